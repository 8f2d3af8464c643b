"""The data of the token view: the text of each pair in tokens, and the signals of every token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.columns import SCORES, SIDES
from prefdistill.data.encode import encode_pairs, render_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.methods.tvkd import VALUES
from prefdistill.report.options import Weights
from prefdistill.report.own_tokens import OwnTokens
from prefdistill.report.packed import BLOCK, Pieces, block, finest, quantised, quantised_steps, width_of
from prefdistill.signals.ids import check_ids
from prefdistill.signals.needs import ROLES, Need
from prefdistill.signals.shaping import shaping_returns
from prefdistill.signals.store import SignalSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# log-ratios whose difference is a DPO margin: the teacher's own, and the student's
MARGINS = (("teacher", "teacher_reference"), ("student", "reference"))
LOGP_STEP = -9  # log-probabilities are rounded to 2^-9 nats
SNIPPET = 140  # characters of a prompt in the list of pairs


def has(signals: SignalSet, need: Need) -> bool:
    """Return whether some signals are there."""
    return not signals.missing([need])


def positions(signals: SignalSet, kind: str) -> set[str]:
    """Return which states' values are stored of the two responses: "all" or "endpoints"."""
    return {signals.store("teacher", kind, side).manifest["positions"] for side in SIDES}


# -- the text ----------------------------------------------------------------------------------------------------------


@dataclass
class Texts:
    """The tokens of each pair on the page, and how many were truncated."""

    prompts: list[list[str]]  # text and special tokens by turns: text first
    prompt_tokens: list[int]
    prompt_cut: list[int]
    pieces: dict[str, list[np.ndarray]]
    ids: dict[str, list[np.ndarray]]
    cut: dict[str, list[int]]
    table: Pieces

    @classmethod
    def of(cls, signals: SignalSet, tokenizer: "PreTrainedTokenizerBase", truncation: Truncation) -> "Texts":
        """Encode without truncation, then truncate as the signals were, so that truncated tokens are counted.

        Raises:
            UserError: if the tokens are not those of the signals.
        """
        pairs = signals.data.select(signals.rows)
        encoded, _ = encode_pairs(pairs, tokenizer, Truncation(None))
        if len(encoded) != len(pairs):
            raise UserError("rows that have signals cannot be encoded now: extract the signals again with this version")
        texts = cls([], [], [], {s: [] for s in SIDES}, {s: [] for s in SIDES}, {s: [] for s in SIDES}, Pieces())
        prompt_ids: list[list[int]] = []
        prompts: dict[tuple[int, ...], list[str]] = {}
        with Progress("token view: text", len(pairs), "pair") as progress:
            for row, rendered in zip(encoded, render_pairs(pairs, tokenizer), strict=True):
                assert rendered is not None  # encoded as well
                whole = row["prompt_ids"]
                kept = truncation.cut_prompt(whole, tokenizer.bos_token_id)
                key = tuple(kept)
                if key not in prompts:
                    prompts[key] = _segments(kept, tokenizer)
                prompt_ids.append(kept)
                texts.prompts.append(prompts[key])
                texts.prompt_tokens.append(len(kept))
                texts.prompt_cut.append(len(whole) - len(kept))
                room = truncation.room_after(kept)
                for side, text in zip(SIDES, rendered[1:], strict=True):
                    ids, ends = row[f"{side}_ids"][:room], row[f"{side}_offsets"][:room]
                    texts.ids[side].append(np.array(ids, dtype=np.int64))
                    texts.pieces[side].append(texts.table.number(ids, text[len(rendered[0]) :], ends))
                    texts.cut[side].append(len(row[f"{side}_ids"]) - len(ids))
                progress.update()
        ids = {f"{side}_ids": texts.ids[side] for side in SIDES}
        current = Dataset.from_dict({"row": signals.rows, "prompt_ids": prompt_ids, **ids})
        for store in signals.stores:
            check_ids(store, current, tokenizer)
        return texts


def _segments(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the text of a prompt, split at its special tokens: text, special token, text, ..., text."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    runs: list[list[int]] = [[]]
    separators: list[str] = []
    for token in ids:
        if token in special:
            separators.append(str(tokenizer.convert_ids_to_tokens(token)))
            runs.append([])
        else:
            runs[-1].append(token)
    texts = [str(tokenizer.decode(run, clean_up_tokenization_spaces=False)) for run in runs]
    return [part for both in zip(texts, [*separators, ""], strict=True) for part in both][:-1]


def _snippet(prompt: Any) -> str:
    """Return the last message of the user, on one line."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    line = " ".join(text[: 4 * SNIPPET].split())
    return line if len(line) <= SNIPPET else line[: SNIPPET - 1] + "…"


# -- the numbers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """Numbers of every token: a path of values, or log-probabilities of a role.

    Args:
        kind: a kind of values, or "logps".
        role: of the model.
        source: the kind of signal that it is read from.
    """

    kind: str
    role: str
    source: str

    @property
    def path(self) -> bool:
        return self.kind in VALUES.values()

    def manifest(self) -> dict[str, Any]:
        return {"kind": self.kind, "role": self.role, "path": self.path}


def fields_of(signals: SignalSet) -> list[Field]:
    """Return the fields that the signals have; log-probabilities of every token rather than of the k kept ones."""
    fields = []
    for kind in VALUES.values():
        need = Need("teacher", kind)
        if has(signals, need) and positions(signals, kind) == {"all"}:
            fields.append(Field(kind, "teacher", kind))
    for role in ROLES:
        if source := next((kind for kind in ("token_logps", "topk") if has(signals, Need(role, kind))), None):
            fields.append(Field("logps", role, source))
    return fields


def token_psi(values: np.ndarray, ended: bool, discount: float = 1.0, terminal: str = "last") -> np.ndarray:
    r"""Return what each token of a response adds to Psi, [T]; the sum is `losses.shaping_return`.

    .. math:: \psi_t = \gamma V(s_{t+1}) - V(s_t)

    Args:
        values: V(s_0) .. V(s_T), [T + 1].
        ended: whether the last token is an end token, after which `terminal` defines V(s_T).
    """
    states = np.asarray(values, dtype=np.float64).copy()
    if ended and terminal != "bootstrap":
        states[-1] = 0.0 if terminal == "zero" else states[-2]
    return discount * states[1:] - states[:-1]


def token_logps(signals: SignalSet, field: Field, side: str, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the log-probability of each token of some responses; nan where it is not among the k kept ones."""
    ends = np.cumsum([len(part) for part in ids])[:-1]
    if field.source == "token_logps":
        flat = signals.store(field.role, "token_logps", side).flat(f"{side}_token_logps", signals.rows)
        return np.split(flat.astype(np.float64), ends)
    topk = signals.topk(field.role, side)
    match = topk.ids == np.concatenate(ids)[:, None]
    at = match.argmax(axis=1)[:, None]
    flat = np.where(match.any(axis=1), np.take_along_axis(topk.logps, at, axis=1)[:, 0], np.nan)
    return np.split(flat.astype(np.float64), ends)


def packed(
    signals: SignalSet, texts: Texts, fields: list[Field], weights: Weights, own: OwnTokens | None = None
) -> tuple[dict[str, Any], list[str], list[tuple[int, str]], dict[str, float]]:
    """Return the index of the pairs, their blocks, the table of pieces, and the scale of each mode.

    Args:
        signals: of the rows on the page.
        texts: their tokens.
        fields: the numbers of every token.
        weights: of psi and the margins.
        own: the tokens of a teacher with other tokens.
    """
    n = len(signals.rows)
    everything = [part for tokens in (texts, own) if tokens for side in SIDES for part in tokens.pieces[side]]
    table, places = texts.table.ranked(np.bincount(np.concatenate(everything), minlength=len(texts.table)))
    values = {
        (field.kind, side): [np.asarray(v, dtype=np.float64) for v in signals.ragged("teacher", field.kind, side)]
        for field in fields
        if field.path
        for side in SIDES
    }
    least = {
        kind: finest(_scale([np.diff(path) for (k, _), paths in values.items() if k == kind for path in paths]))
        for kind in {kind for kind, _ in values}
    }
    index = _index(signals, texts, weights)
    index["peak"] = [0.0] * n
    index["steps"] = [[] for _ in range(n)]
    if own:
        index["own"] = {"tokens": [own.lengths(at) for at in range(n)], "steps": []}
    sizes: dict[str, list[np.ndarray]] = {}

    def note(mode: str, numbers: np.ndarray) -> None:
        sizes.setdefault(mode, []).append(numbers[np.isfinite(numbers)])

    blocks = []
    with Progress("token view: numbers", n, "pair") as progress:
        for start in range(0, n, BLOCK):
            part = range(start, min(start + BLOCK, n))
            here = signals.at(signals.rows[part.start : part.stop])
            coded: list[list[np.ndarray]] = [[] for _ in fields]
            logps: dict[tuple[str, str], list[np.ndarray]] = {}
            for field in fields:
                if not field.path:
                    for side in SIDES:
                        ids = texts.ids[side][part.start : part.stop]
                        logps[field.role, side] = token_logps(here, field, side, ids)
            for at in part:
                for number, field in enumerate(fields):
                    if field.path:
                        paths = [values[field.kind, side][at] for side in SIDES]
                        steps, exponent = quantised_steps(paths, least[field.kind])
                        coded[number] += steps
                        for side, path, ended in zip(SIDES, paths, index["ended"][at], strict=True):
                            psi = token_psi(path, ended, weights.discount, weights.terminal)
                            note(f"{field.kind}.psi", psi)
                            note(f"{field.kind}.V", path[1:] - path[0])
                            if number == 0:
                                index["peak"][at] = max(index["peak"][at], short(np.abs(psi).max()))
                            index[f"{field.kind}_start"][side].append(short(path[0]))
                    else:
                        both = [logps[field.role, side][at - start] for side in SIDES]
                        joined, exponent = quantised(np.concatenate(both), LOGP_STEP)
                        coded[number].append(joined)
                        note(f"{field.role}.logp", np.concatenate(both))
                    index["steps"][at].append(exponent)
                progress.update()
            for a, b in MARGINS:
                for side in SIDES:
                    if (a, side) in logps and (b, side) in logps:
                        for x, y in zip(logps[a, side], logps[b, side], strict=True):
                            note(f"{a}.ratio", x - y)
            pieces = np.concatenate([places[texts.pieces[side][at]] for at in part for side in SIDES])
            prompts: list[list[str]] = []
            which = []
            for at in part:
                if texts.prompts[at] not in prompts:
                    prompts.append(texts.prompts[at])
                which.append(prompts.index(texts.prompts[at]))
            head = {"prompts": prompts, "which": which}
            width = width_of(len(table))
            numbers = [(pieces, width), *((np.concatenate(field), 2) for field in coded)]
            if own:
                numbers += _own_numbers(own, part, places, width, least, index["own"]["steps"])
            blocks.append(block(head, numbers))
    scales = {mode: _scale(parts) for mode, parts in sizes.items()}
    return index, blocks, table, scales


def _own_numbers(
    own: OwnTokens, part: range, places: np.ndarray, width: int, least: dict[str, int], steps: list[int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield what a block has of the teacher's own tokens; put the exponents of the steps of its values into `steps`."""

    def joined(tokens: dict[str, list[np.ndarray]]) -> np.ndarray:
        return np.concatenate([tokens[side][at] for at in part for side in SIDES])

    yield joined(own.student_shared), 1
    yield places[joined(own.pieces)], width
    yield joined(own.shared), 1
    if own.kind:
        coded: list[np.ndarray] = []
        for at in part:
            of_pair, exponent = quantised_steps([own.values[side][at] for side in SIDES], least[own.kind])
            coded += of_pair
            steps.append(exponent)
        yield np.concatenate(coded), 2


def _scale(parts: list[np.ndarray]) -> float:
    """Return the number with the strongest colour: 98 % of all are smaller. 1 if there are none."""
    numbers = np.abs(np.concatenate(parts))
    if not len(numbers):
        return 1.0
    return float(np.quantile(numbers, 0.98)) or float(numbers.max(initial=0.0)) or 1.0


def _index(signals: SignalSet, texts: Texts, weights: Weights) -> dict[str, Any]:
    """Return what the page lists of every pair: columns, with [chosen, rejected] where there are two."""
    data = signals.data.select(signals.rows)
    first_store = signals.stores[0]
    flags = {
        side: next(s for s in signals.stores if side in s.responses).scalar(f"{side}_ended", signals.rows)
        for side in SIDES
        if any(side in s.responses for s in signals.stores)
    }
    if len(flags) < len(SIDES):
        raise UserError(
            f"the signals are of {', '.join(first_store.responses)}: the token view needs {' and '.join(SIDES)}"
        )
    index: dict[str, Any] = {
        "row": signals.rows.tolist(),
        "prompt": [_snippet(prompt) for prompt in data["prompt"]],
        "prompt_tokens": texts.prompt_tokens,
        "prompt_cut": texts.prompt_cut,
        "tokens": [[len(texts.ids[side][at]) for side in SIDES] for at in range(len(data))],
        "cut": [[texts.cut[side][at] for side in SIDES] for at in range(len(data))],
        "ended": [[bool(flags[side][at]) for side in SIDES] for at in range(len(data))],
        "psi": {},
        "logps": {},
        "scores": None,
    }
    for kind in VALUES.values():
        if has(signals, Need("teacher", kind)):
            returns = [
                shaping_returns(signals, side, discount=weights.discount, terminal=weights.terminal, kind=kind)
                for side in SIDES
            ]
            index["psi"][kind] = _columns(returns)
            index[f"{kind}_start"] = {side: [] for side in SIDES}
    for role in ROLES:
        if has(signals, Need(role, "logps")):
            index["logps"][role] = _columns([signals.scalar(role, "logps", side) for side in SIDES])
    if set(SCORES) <= set(data.column_names):
        index["scores"] = [
            [None if x is None or not np.isfinite(x) else short(x) for x in both]
            for both in zip(*(data[name] for name in SCORES), strict=True)
        ]
    return index


def _columns(both: list[np.ndarray]) -> list[list[float]]:
    return [[short(x) for x in row] for row in zip(*both, strict=True)]


def short(x: float) -> float:
    """Round to seven digits, all that a float32 has."""
    return float(f"{float(x):.7g}")
