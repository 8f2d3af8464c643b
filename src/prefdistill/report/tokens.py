"""The token view: one page that shows, token by token, what the stored signals say about the responses of each pair."""

import base64
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill import __version__
from prefdistill.data import SCORES, load_pairs
from prefdistill.encode import Truncation, encode_pairs, end_token_ids, render_pairs
from prefdistill.errors import UserError
from prefdistill.methods import shaping_returns
from prefdistill.methods.tvkd import VALUES
from prefdistill.models import load_tokenizer
from prefdistill.progress import Progress
from prefdistill.report.packed import (
    BLOCK,
    Pieces,
    block,
    deflated_json,
    finest,
    quantised,
    quantised_steps,
    width_of,
)
from prefdistill.report.page import environment, save_page
from prefdistill.signals.store import ROLES, SIDES, Need, Signals, SignalSet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MOST_PAIRS = 5_000
# log-ratios whose difference is a DPO margin: the teacher's own, and the student's
MARGINS = (("teacher", "teacher_reference"), ("student", "reference"))
WHOSE = {
    "teacher": "TEACHER",
    "teacher_reference": "TEACHER_SFT_MODEL",
    "reference": "STUDENT",
    "student": "TRAINED_STUDENT",
}
LOGP_STEP = -9  # log-probabilities are rounded to 2^-9 nats
SNIPPET = 140  # characters of a prompt in the list of pairs


@dataclass(frozen=True)
class Weights:
    """What the page multiplies margins by, and how it adds up psi; the defaults are those of the method "tvkd"."""

    alpha: float = 0.7
    beta: float = 0.1
    discount: float = 1.0
    terminal: str = "last"


def write_token_view(
    data: "str | Dataset",
    signals: Sequence[Signals],
    out: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    max_pairs: int = MOST_PAIRS,
    weights: Weights | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    r"""Write the token view of some pairs to one HTML file that loads nothing from elsewhere.

    .. math:: \psi_t = \gamma V(s_{t+1}) - V(s_t), \qquad \Psi(y) = \sum_t \psi_t

    Args:
        data: the preference pairs that the signals were made from, or where to load them from.
        signals: stores for these pairs. What they hold is what the page offers; it names the rest.
        out: the file.
        tokenizer: the one the signals were made with; default: the one that their manifest names.
        max_pairs: the page holds the first of them.
        weights: alpha and beta of the margins, discount and terminal of psi.

    Returns:
        `{"out", "pairs", "rows", "bytes", "shows"}`: pairs on the page, rows of the data, what tokens can be coloured by.

    Raises:
        UserError: if a store was made from other data or tokens, no pair has signals, or the file cannot be written.

    Example:
        >>> write_token_view("pairs.jsonl", [Signals.open("signals/teacher")], "tokens.html")     # doctest: +SKIP
    """
    weights = weights or Weights()
    if not signals:
        raise UserError("no signals to look at: give a store with --signals DIR (`prefdistill signals` makes one)")
    name = data if isinstance(data, str) else signals[0].manifest["data"]["name"]
    pairs = load_pairs(data) if isinstance(data, str) else data
    available = SignalSet.of(signals, pairs)
    if tokenizer is None:
        tokenizer = _tokenizer_of(signals[0], trust_remote_code)
    for store in signals:
        store.check_tokenizer(tokenizer)
    if not len(available.rows):
        raise UserError("no pair has signals in all of the stores: nothing to show")
    shown = available.at(available.rows[:max_pairs])
    texts = _Texts.of(shown, tokenizer, Truncation(**signals[0].manifest["truncation"]))
    fields = _fields(shown)
    index, blocks, pieces, scales = _packed(shown, texts, fields, weights)
    modes = _modes(fields, scales)
    page = {
        "rows": len(pairs),
        "left": len(available.rows) - len(shown.rows),
        "sides": SIDES,
        "block": BLOCK,
        "width": width_of(len(pieces)),
        "fields": [field.manifest() for field in fields],
        "modes": modes,
        "weights": vars(weights),
        "kept": {role: _kept(shown, role) for role in ROLES if _has(shown, Need(role, "topk"))},
    }
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= end_token_ids(tokenizer)
    table = {
        "ids": [token for token, _ in pieces],
        "texts": [text for _, text in pieces],
        "special": [i for i, (token, _) in enumerate(pieces) if token in special],
        "names": {i: tokenizer.convert_ids_to_tokens(token) for i, (token, text) in enumerate(pieces) if not text},
    }
    html = _render(page, index, table, blocks, _about(name, shown, pairs, page["left"]), _missing(shown, name))
    save_page(html, Path(out), "the token view")
    return {
        "out": str(out),
        "pairs": len(shown.rows),
        "rows": len(pairs),
        "bytes": Path(out).stat().st_size,
        "shows": [mode["key"] for mode in modes],
    }


def _tokenizer_of(store: Signals, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    made = store.manifest["tokenizer"]["name"]
    if not made:
        raise UserError("the signals do not say which tokenizer they were made with; name it with --tokenizer")
    try:
        return load_tokenizer(made, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(f"{error}\n(the signals name this tokenizer; --tokenizer says where it is now)") from None


def _has(signals: SignalSet, need: Need) -> bool:
    return not signals.missing([need])


# -- the text ----------------------------------------------------------------------------------------------------------


@dataclass
class _Texts:
    """The tokens of each pair, in the rows that are shown, and what truncation took away."""

    prompts: list[list[str]]  # text and special tokens by turns: text first
    prompt_tokens: list[int]
    prompt_cut: list[int]
    pieces: dict[str, list[np.ndarray]]
    ids: dict[str, list[np.ndarray]]
    cut: dict[str, list[int]]
    table: Pieces

    @classmethod
    def of(cls, signals: SignalSet, tokenizer: "PreTrainedTokenizerBase", truncation: Truncation) -> "_Texts":
        """Encode without truncation, then cut as the signals were, so that what was lost can be counted.

        Raises:
            UserError: if what comes out is not what the signals were made of.
        """
        pairs = signals.data.select(signals.rows)
        encoded, _ = encode_pairs(pairs, tokenizer, Truncation(None))
        if len(encoded) != len(pairs):
            raise UserError("rows that have signals cannot be encoded now: make the signals again with this version")
        texts = cls([], [], [], {s: [] for s in SIDES}, {s: [] for s in SIDES}, {s: [] for s in SIDES}, Pieces())
        made = signals.stores[0]
        lengths = {side: made.scalar(f"{side}_tokens", signals.rows) for side in SIDES if side in made.responses}
        prompts: dict[tuple[int, ...], list[str]] = {}
        with Progress("token view: text", len(pairs), "pair") as progress:
            for at, (row, rendered) in enumerate(zip(encoded, render_pairs(pairs, tokenizer), strict=True)):
                assert rendered is not None  # encoded as well
                whole = row["prompt_ids"]
                kept = truncation.cut_prompt(whole, tokenizer.bos_token_id)
                key = tuple(kept)
                if key not in prompts:
                    prompts[key] = _segments(kept, tokenizer)
                texts.prompts.append(prompts[key])
                texts.prompt_tokens.append(len(kept))
                texts.prompt_cut.append(len(whole) - len(kept))
                room = truncation.room_after(kept)
                for side, text in zip(SIDES, rendered[1:], strict=True):
                    ids, ends = row[f"{side}_ids"][:room], row[f"{side}_offsets"][:room]
                    if side in lengths and len(ids) != lengths[side][at]:
                        raise UserError(
                            f"row {signals.rows[at]}: {side} has {len(ids)} tokens now and {lengths[side][at]} in the "
                            "signals; make the signals again with this version"
                        )
                    texts.ids[side].append(np.array(ids, dtype=np.int64))
                    texts.pieces[side].append(texts.table.number(ids, text[len(rendered[0]) :], ends))
                    texts.cut[side].append(len(row[f"{side}_ids"]) - len(ids))
                progress.update()
        return texts


def _segments(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Text of a prompt, cut at its special tokens: text, special token, text, ..., text."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    runs: list[list[int]] = [[]]
    found: list[str] = []
    for token in ids:
        if token in special:
            found.append(str(tokenizer.convert_ids_to_tokens(token)))
            runs.append([])
        else:
            runs[-1].append(token)
    texts = [str(tokenizer.decode(run, clean_up_tokenization_spaces=False)) for run in runs]
    return [part for both in zip(texts, [*found, ""], strict=True) for part in both][:-1]


def _snippet(prompt: Any) -> str:
    """The last thing the user said, on one line."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    line = " ".join(text[: 4 * SNIPPET].split())
    return line if len(line) <= SNIPPET else line[: SNIPPET - 1] + "…"


# -- the numbers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    """Numbers of every token: a path of values, or log-probabilities of a role."""

    kind: str
    role: str

    @property
    def path(self) -> bool:
        return self.kind in VALUES.values()

    def manifest(self) -> dict[str, Any]:
        return {"kind": self.kind, "role": self.role, "path": self.path}


def _fields(signals: SignalSet) -> list[_Field]:
    found = []
    for kind in VALUES.values():
        need = Need("teacher", kind)
        if _has(signals, need) and all(_positions(signals, kind, side) == "all" for side in SIDES):
            found.append(_Field(kind, "teacher"))
    return found + [_Field("logps", role) for role in ROLES if _has(signals, Need(role, "topk"))]


def _positions(signals: SignalSet, kind: str, side: str) -> str:
    return signals.store("teacher", kind, side).manifest["positions"]


def token_psi(values: np.ndarray, ended: bool, discount: float = 1.0, terminal: str = "last") -> np.ndarray:
    r"""What each token of a response adds to Psi, [T]; they add up to `losses.shaping_return`.

    .. math:: \psi_t = \gamma V(s_{t+1}) - V(s_t)

    Args:
        values: V(s_0) .. V(s_T), [T + 1].
        ended: whether the last token is an end token, after which `terminal` says what stands for V(s_T).
    """
    states = np.asarray(values, dtype=np.float64).copy()
    if ended and terminal != "bootstrap":
        states[-1] = 0.0 if terminal == "zero" else states[-2]
    return discount * states[1:] - states[:-1]


def _token_logps(signals: SignalSet, role: str, side: str, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Log-probability of each token of some responses where it is among those kept, nan where it is not."""
    topk = signals.topk(role, side)
    match = topk.ids == np.concatenate(ids)[:, None]
    at = match.argmax(axis=1)[:, None]
    flat = np.where(match.any(axis=1), np.take_along_axis(topk.logps, at, axis=1)[:, 0], np.nan)
    return np.split(flat.astype(np.float64), np.cumsum([len(part) for part in ids])[:-1])


def _packed(
    signals: SignalSet, texts: _Texts, fields: list[_Field], weights: Weights
) -> tuple[dict[str, Any], list[str], list[tuple[int, str]], dict[str, float]]:
    """The index of the pairs, their blocks, the table of pieces, and how large the numbers of each mode are."""
    n = len(signals.rows)
    everything = [part for side in SIDES for part in texts.pieces[side]]
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
                        logps[field.role, side] = _token_logps(here, field.role, side, ids)
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
                                index["peak"][at] = max(index["peak"][at], _short(np.abs(psi).max()))
                            index[f"{field.kind}_start"][side].append(_short(path[0]))
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
            blocks.append(block(head, pieces, width_of(len(table)), [np.concatenate(field) for field in coded]))
    scales = {mode: _scale(parts) for mode, parts in sizes.items()}
    return index, blocks, table, scales


def _scale(parts: list[np.ndarray]) -> float:
    """How large numbers are whose colour is the strongest: 98 % of all are smaller."""
    numbers = np.abs(np.concatenate(parts))
    return float(np.quantile(numbers, 0.98)) or float(numbers.max(initial=0.0)) or 1.0


def _index(signals: SignalSet, texts: _Texts, weights: Weights) -> dict[str, Any]:
    """What the page knows of every pair before it is shown: columns of numbers, [chosen, rejected] where there are two."""
    data = signals.data.select(signals.rows)
    made = signals.stores[0]
    flags = {
        side: next(s for s in signals.stores if side in s.responses).scalar(f"{side}_ended", signals.rows)
        for side in SIDES
        if any(side in s.responses for s in signals.stores)
    }
    if len(flags) < len(SIDES):
        raise UserError(f"the signals are of {', '.join(made.responses)}: the token view needs {' and '.join(SIDES)}")
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
        if _has(signals, Need("teacher", kind)):
            returns = [
                shaping_returns(signals, side, discount=weights.discount, terminal=weights.terminal, kind=kind)
                for side in SIDES
            ]
            index["psi"][kind] = _columns(returns)
            index[f"{kind}_start"] = {side: [] for side in SIDES}
    for role in ROLES:
        if _has(signals, Need(role, "logps")):
            index["logps"][role] = _columns([signals.scalar(role, "logps", side) for side in SIDES])
    if set(SCORES) <= set(data.column_names):
        index["scores"] = [
            [None if x is None or not np.isfinite(x) else _short(x) for x in both]
            for both in zip(*(data[name] for name in SCORES), strict=True)
        ]
    return index


def _columns(both: list[np.ndarray]) -> list[list[float]]:
    return [[_short(x) for x in row] for row in zip(*both, strict=True)]


def _short(x: float) -> float:
    """Seven digits: all that a float32 has."""
    return float(f"{float(x):.7g}")


# -- words -------------------------------------------------------------------------------------------------------------


def _modes(fields: list[_Field], scales: dict[str, float]) -> list[dict[str, Any]]:
    """What tokens can be coloured by. `signed`: whether zero is in the middle of the scale or at its end."""
    modes: list[dict[str, Any]] = []
    for number, field in enumerate(fields):
        if field.path:
            of = "" if field.kind == "values" else " of log-probabilities"
            modes += [
                {"key": f"{field.kind}.psi", "show": "psi", "field": number, "label": f"ψ{of}", "signed": True},
                {"key": f"{field.kind}.V", "show": "V", "field": number, "label": f"V{of}", "signed": True},
            ]
        else:
            label = f"log-prob, {field.role.replace('_', ' ')}"
            modes.append(
                {"key": f"{field.role}.logp", "show": "logp", "field": number, "label": label, "signed": False}
            )
    place = {field.role: number for number, field in enumerate(fields) if not field.path}
    for a, b in MARGINS:
        if a in place and b in place:
            label = f"log-ratio, {a} to {b.replace('_', ' ')}"
            both = {"field": place[a], "base": place[b]}
            modes.append({"key": f"{a}.ratio", "show": "ratio", **both, "label": label, "signed": True})
    return [mode | {"scale": _short(scales[mode["key"]])} for mode in modes]


def _kept(signals: SignalSet, role: str) -> str:
    """How many tokens of each distribution a store has, in words."""
    made = signals.store(role, "topk", SIDES[0]).manifest["topk"]
    if "k" not in made:
        return "the ones kept of the teacher's"
    return "all" if made["k"] == "vocab" else f"the {made['k']} likeliest"


def _about(name: str, signals: SignalSet, pairs: "Dataset", left: int) -> dict[str, Any]:
    """What the head of the page says."""
    made = signals.stores[0].manifest
    lengths = made["truncation"]
    facts = []
    for role in ROLES:
        stores = [store for store in signals.stores if store.role == role]
        if stores:
            model = stores[0].manifest["model"].get("name") or "a model in memory"
            kinds = ", ".join(dict.fromkeys(kind for store in stores for kind in store.kinds))
            facts.append((role.replace("_", " "), f"{model} ({kinds})"))
    facts.append(("tokenizer", made["tokenizer"]["name"] or "not named"))
    facts.append(("max_length", str(lengths["max_length"] or "none")))
    if lengths["max_prompt_length"]:
        facts.append(("max_prompt_length", str(lengths["max_prompt_length"])))
    gone = len(pairs) - len(signals.rows) - left
    notes = []
    if gone:
        reasons = dict.fromkeys(reason for store in signals.stores for reason in store.manifest["dropped"]["reasons"])
        notes.append(f"{gone:,} of {len(pairs):,} rows have no signals ({'; '.join(reasons)}).")
    if left:
        notes.append(f"The first {len(signals.rows):,} pairs; {left:,} more are left out (--max-pairs).")
    return {"name": name, "facts": facts, "notes": notes}


def _missing(signals: SignalSet, data: str) -> list[dict[str, str]]:
    """What the page could show if it were stored, and the command that stores it."""
    made = signals.stores[0].manifest
    models = {store.role: store.manifest["model"].get("name") for store in signals.stores}

    def command(role: str, kind: str) -> str:
        parts = ["prefdistill", "signals", "--model", models.get(role) or WHOSE[role], "--data", data]
        parts += [] if role == "teacher" else ["--role", role]
        parts += ["--kind", kind]
        if kind == "topk" and role != "teacher":
            parts += ["--ids-from", "DIR_OF_THE_TEACHERS"]
        for option, value in made["truncation"].items():
            if value is not None and (option, value) != ("max_length", Truncation().max_length):
                parts += [f"--{option.replace('_', '-')}", str(value)]
        return shlex.join([*parts, "--out", f"signals/{role.replace('_', '-')}-{kind}"])

    missing = []
    has_values = _has(signals, Need("teacher", "values"))
    if not has_values or any(_positions(signals, "values", side) != "all" for side in SIDES):
        what = "V and ψ of every token" + (" (these signals hold the endpoints only)" if has_values else "")
        missing.append({"what": what, "command": command("teacher", "values")})
    if not _has(signals, Need("teacher", "topk")):
        what = "the teacher's log-prob of each token (where it is among the k likeliest)"
        missing.append({"what": what, "command": command("teacher", "topk")})
    for role, what in (
        ("teacher", "the teacher's log-probability of each response"),
        ("teacher_reference", "the teacher's own DPO margin"),
        ("reference", "the student's DPO margin: the student's start"),
        ("student", "the student's DPO margin: the trained student"),
    ):
        if not _has(signals, Need(role, "logps")):
            missing.append({"what": what, "command": command(role, "logps")})
    return missing


# -- the page ----------------------------------------------------------------------------------------------------------


def _render(
    page: dict[str, Any],
    index: dict[str, Any],
    table: dict[str, Any],
    blocks: list[str],
    about: dict[str, Any],
    missing: list[dict[str, str]],
) -> str:
    from markupsafe import Markup

    templates = environment()
    script, style = (templates.get_template(name).render() for name in ("tokens.js", "tokens.css"))
    return templates.get_template("tokens.html.j2").render(
        page=page,
        about=about,
        missing=missing,
        count=len(index["row"]),
        version=__version__,
        script=Markup(script),
        style=Markup(style),
        script_hash=_csp_hash(script),
        style_hash=_csp_hash(style),
        index=Markup(deflated_json(index)),
        pieces=Markup(deflated_json(table)),
        blocks=[Markup(text) for text in blocks],
    )


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
