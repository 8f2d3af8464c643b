"""One pass of a model over a preference data set: what it says about every response, kind by kind."""

import itertools
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from prefdistill import __version__
from prefdistill.data import data_fingerprint, load_pairs
from prefdistill.encode import PairCollator, Truncation, encode_pairs
from prefdistill.errors import UserError
from prefdistill.files import atomic_path, file_digest, read_json, write_json
from prefdistill.logprobs import (
    emittable_ids,
    likeliest,
    next_tokens,
    reduce_logits,
    response_states,
    token_logps,
    topk_logps,
    vocabulary_rows,
)
from prefdistill.losses.value import soft_value
from prefdistill.models import load_model, load_tokenizer, model_identity, ready, tokenizer_identity
from prefdistill.progress import Progress, say
from prefdistill.signals.gauge import gauge_directions, gauge_shifts
from prefdistill.signals.store import KINDS, ROLES, SCHEMA, SIDES, Need, Signals, SignalSet, check_same_request
from prefdistill.stages import processes

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Numbers of one shard that are held at once before it is written: 2^26 pairs of id and log-probability are 0.5 GiB.
SHARD_NUMBERS = 2**26


@dataclass(frozen=True)
class TopKRequest:
    """Which tokens of each state a "topk" signal keeps.

    Args:
        k: how many, the likeliest ones; "vocab" is all of them.
        p: keep fewer where fewer hold this share of the probability.
        ids_from: read at the ids of this store instead, so that the two can be compared token by token.
    """

    k: int | Literal["vocab"] = 50
    p: float | None = None
    ids_from: Signals | None = None

    def __post_init__(self) -> None:
        if self.k != "vocab" and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise UserError(f"k must be 1 or more, or the word vocab, got {self.k!r}")
        if self.p is not None and not 0 < self.p <= 1:
            raise UserError(f"p is a share of the probability and must lie in 0..1, got {self.p}")

    def manifest(self, vocabulary: int) -> dict[str, Any]:
        """What a store says of itself; `vocabulary` is how many tokens there can be."""
        kept = {"ids_from": self.ids_from.digest} if self.ids_from else {"k": self.k, "p": self.p}
        return kept | {"vocabulary": vocabulary}

    def most(self, vocabulary: int) -> int:
        """The most tokens of a state that are kept."""
        k = self.ids_from.manifest["topk"]["k"] if self.ids_from else self.k
        return vocabulary if k == "vocab" else min(k, vocabulary)


def extract_signals(
    model: "PreTrainedModel | str",
    dataset: "Dataset | str",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    kinds: tuple[str, ...] = ("values", "logps"),
    out: str | Path = "signals",
    *,
    role: str = "teacher",
    responses: tuple[str, ...] = SIDES,
    truncation: Truncation | None = None,
    value_temperature: float = 1.0,
    k: int | Literal["vocab"] = 50,
    p: float | None = None,
    ids_from: Signals | None = None,
    dtype: str | None = None,
    bf16: bool = False,
    batch_tokens: int = 16_384,
    shard_rows: int = 1_024,
    trust_remote_code: bool = False,
) -> Signals:
    r"""What a model says about the responses of every row, stored in a directory.

    .. math:: V(s_t) = b \log \sum_a \exp(z(s_t, a) / b), \qquad \log\pi(y|x) = \sum_t \log\pi(a_t|s_t)

    A finished store of the same request is opened as it is; an interrupted one goes on after its last whole shard.
    Under `accelerate launch` or torchrun every process makes its share of the shards; their number changes no byte
    (that of a process's CPU threads may, by rounding).

    Args:
        model: a causal language model, or the Hub name or directory to load one from.
        dataset: preference pairs in TRL's format, or where to load them from.
        tokenizer: the model's tokenizer; default: the one found beside the model.
        kinds: "values" (soft value of s_0 .. s_T, from raw logits), "logprob_values" (the same from log-probabilities),
            "logps" (log-probability of the response), "q" (sum of its tokens' raw logits), "topk" (the most likely
            tokens of s_0 .. s_{T-1} and the mass of all others). All float32, in nats.
        out: directory of the store.
        role: whose word it is: "teacher", "teacher_reference" or "reference" (the student's starting point).
        responses: columns of the data to read: "chosen", "rejected", or what `sample` wrote ("student_response").
        truncation: see `prefdistill.data.Truncation`.
        value_temperature: b of the soft value.
        k, p, ids_from: which tokens a "topk" signal keeps, see `TopKRequest`.
        dtype: of the weights, when the model is loaded here. Default: "float32" for a reference, which must be read as
            the student is trained, "auto" (as stored) for a teacher.
        bf16: run the float32 model under bfloat16 autocast, as a bf16 training run does.
        batch_tokens: padded tokens per forward pass.
        shard_rows: pairs per file, the unit of resuming.
        trust_remote_code: let the model's repository run its own code.

    Raises:
        UserError: on an unknown kind or role, data that cannot be read, a store of another request in `out`, ids of
            a store of other data, or logits that are not finite (with the rows).

    Example:
        >>> extract_signals("my/teacher", "pairs.jsonl", out="signals/teacher")       # doctest: +SKIP
    """
    if unknown := set(kinds) - set(KINDS):
        raise UserError(f"unknown signal kind {sorted(unknown)[0]!r}; known: {', '.join(KINDS)}")
    if not kinds:
        raise UserError(f"no signal kind asked for; known: {', '.join(KINDS)}")
    if not responses or len(set(responses)) < len(responses):
        raise UserError(f"responses must name columns of the data, each once, got {', '.join(responses) or 'none'}")
    if role not in ROLES:
        raise UserError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    if not 0 < value_temperature < float("inf"):
        raise UserError(f"the value temperature must be positive and finite, got {value_temperature}")
    if "logprob_values" in kinds and value_temperature == 1:
        raise UserError("log-probabilities sum to one: their value at temperature 1 is 0 everywhere; give another one")
    topk = TopKRequest(k, p, ids_from)
    if ids_from is not None and "topk" not in kinds:
        raise UserError(f"ids of another store are read for the kind topk only, not for {', '.join(kinds)}")
    if (k, p) != (50, None) and ("topk" not in kinds or ids_from is not None):
        raise UserError("k and p say which tokens a topk signal keeps: leave them out without it, and with ids_from")
    truncation = truncation or Truncation()
    model_name = model if isinstance(model, str) else ""
    data_name = dataset if isinstance(dataset, str) else "a data set in memory"
    if isinstance(dataset, str):
        dataset = load_pairs(dataset, responses=responses)
    if tokenizer is None:
        source = model if isinstance(model, str) else model.name_or_path
        tokenizer = load_tokenizer(str(source), trust_remote_code=trust_remote_code)
    if isinstance(model, str):
        dtype = dtype or ("float32" if role == "reference" else "auto")
        model = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    model = ready(model)

    if ids_from is not None:
        _check_ids(ids_from, role, dataset, tokenizer, truncation, responses)
    encoded, dropped = encode_pairs(dataset, tokenizer, truncation, responses=responses)
    if ids_from is not None and (lacking := set(encoded["row"][:]).difference(ids_from.rows.tolist())):
        raise UserError(
            f"the store whose ids are to be used has no row {min(lacking)} ({len(lacking)} such rows), because another "
            f"response of it was left out there; read --responses {','.join(ids_from.responses)} as that store was"
        )
    head_rows = vocabulary_rows(model)
    vocabulary = _emittable_count(emittable_ids(tokenizer, head_rows), head_rows)
    request = {
        "schema": SCHEMA,
        "role": role,
        "kinds": sorted(kinds),
        "responses": list(responses),
        "value_temperature": value_temperature,
        "topk": topk.manifest(vocabulary) if "topk" in kinds else {},
        "model": {**model_identity(model, model_name), "bf16": bf16},
        "tokenizer": tokenizer_identity(tokenizer),
        "data": {"name": data_name, "rows": len(dataset), "fingerprint": data_fingerprint(dataset, responses)},
        "truncation": {"max_length": truncation.max_length, "max_prompt_length": truncation.max_prompt_length},
        "dropped": {
            "reasons": dropped.counts,
            "rows": sorted(set(range(len(dataset))).difference(encoded["row"][:])),
        },
        "shard_rows": shard_rows,
        "batch_tokens": batch_tokens,
    }
    out = Path(out)
    team = processes()
    with team.main_process_first():  # it clears the way, the others find it cleared
        if _finished(out, request):
            return Signals.open(out)
    if dropped and team.is_main_process:
        say(f"signals: {dropped}")

    shards = _shards(encoded, responses, shard_rows, topk.most(vocabulary) if "topk" in kinds else 0)
    paths = [out / "shards" / f"{number:05d}.parquet" for number in range(len(shards))]
    # by number, so that a run goes on with what any number of processes have left
    ours = [n for n in range(len(shards)) if n % team.num_processes == team.process_index]
    with Progress(f"signals ({role})", len(responses) * sum(len(shards[n]) for n in ours), "response") as progress:
        for n in ours:
            if paths[n].exists():
                progress.update(len(responses) * len(shards[n]))
                continue
            found = score_pairs(
                model,
                shards[n],
                tokenizer,
                kinds,
                responses=responses,
                value_temperature=value_temperature,
                topk=topk,
                bf16=bf16,
                batch_tokens=batch_tokens,
                progress=progress,
            )
            _write_shard(paths[n], shards[n], responses, found)
    team.wait_for_everyone()
    if team.is_main_process:
        made = [
            {"file": path.name, "rows": len(shard), "sha256": file_digest(path)}
            for path, shard in zip(paths, shards, strict=True)
        ]
        write_json(out / "manifest.json", {**request, "shards": made, "versions": _versions()})
    team.wait_for_everyone()
    return Signals.open(out)


def _shards(encoded: "Dataset", responses: tuple[str, ...], most_rows: int, per_state: int) -> "list[Dataset]":
    """Rows cut into shards, the unit of resuming: at most so many rows, and numbers that fit into memory."""
    tokens = [[len(ids) for ids in encoded[f"{name}_ids"]] for name in responses]
    starts, held = [0], 0
    for row, lengths in enumerate(zip(*tokens, strict=True)):
        numbers = sum(lengths) * (1 + per_state)
        if row > starts[-1] and (row - starts[-1] >= most_rows or held + numbers > SHARD_NUMBERS):
            starts.append(row)
            held = 0
        held += numbers
    return [encoded.select(range(a, b)) for a, b in itertools.pairwise([*starts, len(encoded)])]


def _emittable_count(emittable: Tensor | None, head_rows: int) -> int:
    """How many tokens can be, of `emittable_ids`."""
    return head_rows if emittable is None else int(emittable.sum())


def _check_ids(
    ids_from: Signals,
    role: str,
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    truncation: Truncation,
    responses: tuple[str, ...],
) -> None:
    """Whether another store's ids stand at the very states that are to be read."""
    if role == "teacher" or ids_from.role != "teacher":
        raise UserError(f"token ids are a teacher's: a {role} cannot be read at those of a {ids_from.role}")
    available = SignalSet.of([ids_from], dataset)
    if missing := available.missing([Need(ids_from.role, "topk", responses)]):
        raise UserError(f"the store whose ids are to be used has no {missing[0]}; make it with --kind topk")
    ids_from.check_tokenizer(tokenizer)
    if Truncation(**ids_from.manifest["truncation"]) != truncation:
        raise UserError(
            f"the store whose ids are to be used was truncated otherwise: {ids_from.manifest['truncation']}"
        )


def _finished(out: Path, request: dict[str, Any]) -> bool:
    """Whether `out` holds what is asked for; clears the way for it where it does not."""
    if (out / "request.json").is_file():
        before = read_json(out / "request.json")
        check_same_request("signals", out, before, request)
        return (out / "manifest.json").is_file()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no signals; give another --out")
    shutil.rmtree(out, ignore_errors=True)
    write_json(out / "request.json", request)
    return False


def _versions() -> dict[str, str]:
    import transformers

    return {"prefdistill": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _write_shard(path: Path, rows: "Dataset", responses: tuple[str, ...], found: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"row": pa.array(rows["row"][:], pa.int64())}
    for name in responses:
        columns[f"{name}_tokens"] = pa.array([len(ids) for ids in rows[f"{name}_ids"]], pa.int32())
        columns[f"{name}_ended"] = pa.array(rows[f"{name}_ended"][:], pa.bool_())
        columns[f"{name}_offsets"] = pa.array(rows[f"{name}_offsets"][:], pa.list_(pa.int32()))
    for name, column in found.items():
        number = pa.int32() if name.endswith(("_topk_counts", "_topk_ids")) else pa.float32()
        columns[name] = pa.array(column, pa.list_(number) if np.ndim(column[0]) else number)
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


@torch.no_grad()
def score_pairs(
    model: "PreTrainedModel",
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    kinds: Iterable[str] = ("values", "logps"),
    *,
    responses: tuple[str, ...] = SIDES,
    value_temperature: float = 1.0,
    topk: TopKRequest | None = None,
    bf16: bool = False,
    batch_tokens: int = 16_384,
    progress: Progress | None = None,
) -> dict[str, list[Any]]:
    """Signals of encoded pairs (`encode_pairs`), in memory: `{"chosen_values": [array [T+1], ...], ...}`.

    All responses of a row start in the same state s_0, and get the very same number for V(s_0).

    Raises:
        UserError: if a model's logits are not finite, naming the rows.
    """
    reading = _Reading(
        tuple(kind for kind in KINDS if kind in set(kinds)),
        value_temperature,
        topk or TopKRequest(),
        emittable_ids(tokenizer, vocabulary_rows(model)),
        vocabulary_rows(model),
    )
    found: dict[str, list[Any]] = {
        f"{response}_{column}": [None] * len(rows) for response in responses for column in reading.columns
    }
    ids = {column: rows[column][:] for column in ("prompt_ids", *(f"{response}_ids" for response in responses))}
    numbers = rows["row"][:]
    rows_ended = {name: rows[f"{name}_ended"][:] for name in responses}
    for places in _batches(ids, responses, batch_tokens):
        batch = PairCollator(tokenizer.pad_token_id, responses=("response",))(
            [{"prompt_ids": ids["prompt_ids"][i], "response_ids": ids[f"{name}_ids"][i]} for i, name in places]
        )
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, Tensor)}
        ended = [rows_ended[name][i] for i, name in places]
        given = reading.given_ids([(numbers[i], name) for i, name in places])
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            scored = reading.read(model, batch, ended, given)
        for n, (i, name) in enumerate(places):
            for column in reading.columns:
                found[f"{name}_{column}"][i] = scored[column][n]
        if progress is not None:
            progress.update(len(places))
    for column in {"values", "logprob_values"}.intersection(reading.columns):
        for first, *others in zip(*(found[f"{name}_{column}"] for name in responses), strict=True):
            for other in others:
                other[0] = first[0]
    _check_finite(found, numbers)
    return found


def _batches(
    ids: dict[str, list[list[int]]], responses: tuple[str, ...], batch_tokens: int
) -> Iterator[list[tuple[int, str]]]:
    """(place, response) of like length, longest first, at most `batch_tokens` padded tokens together."""
    lengths = {
        (i, name): len(prompt) + len(ids[f"{name}_ids"][i])
        for i, prompt in enumerate(ids["prompt_ids"])
        for name in responses
    }
    batch: list[tuple[int, str]] = []
    width = 0
    for place in sorted(lengths, key=lambda key: (-lengths[key], key)):
        if batch and (len(batch) + 1) * width > batch_tokens:
            yield batch
            batch = []
        width = max(width, lengths[place]) if batch else lengths[place]
        batch.append(place)
    if batch:
        yield batch


class _Reading:
    """What is taken from the logits of each state, and how it becomes columns of the store."""

    def __init__(
        self,
        kinds: tuple[str, ...],
        value_temperature: float,
        topk: TopKRequest,
        emittable: Tensor | None,
        vocabulary: int,
    ) -> None:
        self.kinds, self.value_temperature, self.topk, self.emittable = kinds, value_temperature, topk, emittable
        self.k = topk.most(_emittable_count(emittable, vocabulary))
        self.columns = [column for kind in kinds for column in KINDS[kind]]
        if topk.ids_from is not None and "topk_ids" in self.columns:
            self.columns.remove("topk_ids")
        self.final = not {"values", "logprob_values"}.isdisjoint(kinds)  # whether s_T is read as well
        self.directions = gauge_directions(vocabulary) if "values" in kinds else None

    def given_ids(self, places: list[tuple[int, str]]) -> Tensor | None:
        """The ids to read at, for each state of the responses in `places`; None: the most likely ones."""
        if self.topk.ids_from is None or "topk" not in self.kinds:
            return None
        parts = [self.topk.ids_from.topk(name, np.array([row])).ids for row, name in places]
        width = max(part.shape[1] for part in parts)
        after = int(self.final)  # s_T has none
        return torch.from_numpy(
            np.concatenate([np.pad(x, ((0, after), (0, width - x.shape[1])), constant_values=-1) for x in parts])
        )

    def reduce(self, logits: Tensor, tokens: Tensor, last: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for kind in self.kinds:
            if kind == "values":
                assert self.directions is not None
                shifts = logits.new_zeros(len(logits), self.directions.shape[1])
                shifts[last] = gauge_shifts(logits[last], self.directions)
                found += [soft_value(logits, self.value_temperature), shifts]
            elif kind == "logprob_values":
                found.append(soft_value(logits.log_softmax(-1), self.value_temperature))
            elif kind == "logps":
                found += token_logps(logits, tokens)
            elif kind == "q":
                found.append(logits.gather(-1, tokens[:, None])[:, 0])
            elif kind == "topk" and given is None:
                found += likeliest(logits, self.k, self.topk.p)
            elif kind == "topk":
                assert given is not None
                found += [given, *topk_logps(logits, given)[:2]]
        return tuple(found)

    def read(
        self, model: "PreTrainedModel", batch: dict[str, Tensor], ended: list[bool], given: Tensor | None
    ) -> dict[str, list[Any]]:
        """Columns of the store for each response of a batch."""
        ids, lengths = batch["input_ids"], batch["lengths"]
        states = response_states(batch["prompt_lengths"], lengths, ids.shape[1], final=self.final)
        if self.directions is not None:
            self.directions = self.directions.to(ids.device)
        sizes = lengths + int(self.final)
        last = torch.zeros(int(sizes.sum()), dtype=torch.bool, device=ids.device)
        last[sizes.cumsum(0) - 1 - torch.tensor(ended, device=ids.device).long()] = self.final
        out = iter(
            reduce_logits(
                model,
                {"input_ids": ids, "attention_mask": batch["attention_mask"]},
                states,
                self.reduce,
                next_tokens(ids, states),
                last,
                *([] if given is None else [given.to(ids.device)]),
                emittable=self.emittable,
            )
        )

        def per_response(read: Tensor) -> list[np.ndarray]:
            return [part.numpy().copy() for part in read.cpu().split(sizes.tolist())]

        found: dict[str, list[Any]] = {}
        for kind in self.kinds:
            if kind == "values":
                found["values"] = per_response(next(out))
                found["gauge"] = list(next(out)[last].cpu().numpy())
            elif kind == "logprob_values":
                found[kind] = per_response(next(out))
            elif kind in ("logps", "q"):
                parts = zip(per_response(next(out)), lengths.tolist(), strict=True)
                found[kind] = [np.float32(part[:n].sum(dtype=np.float64)) for part, n in parts]  # as it is stored
            else:
                ids_of, logps, rest = (per_response(next(out)) for _ in range(3))
                found |= self._topk(ids_of, logps, rest, lengths.tolist())
        return found

    @staticmethod
    def _topk(
        ids: list[np.ndarray], logps: list[np.ndarray], rest: list[np.ndarray], lengths: list[int]
    ) -> dict[str, list[np.ndarray]]:
        there = [part[:n] >= 0 for part, n in zip(ids, lengths, strict=True)]
        return {
            "topk_counts": [mask.sum(1, dtype=np.int32) for mask in there],
            "topk_ids": [part[:n][mask] for part, n, mask in zip(ids, lengths, there, strict=True)],
            "topk_logps": [part[:n][mask] for part, n, mask in zip(logps, lengths, there, strict=True)],
            "topk_rest": [part[:n] for part, n in zip(rest, lengths, strict=True)],
        }


def _check_finite(found: dict[str, list[Any]], rows: list[int]) -> None:
    """-inf is a fair answer for the mass of no other token, and for nothing else."""
    bad: set[int] = set()
    for name, column in found.items():
        refused = np.isnan if name.endswith("_topk_rest") else lambda x: ~np.isfinite(x)
        bad |= {rows[i] for i, x in enumerate(column) if np.any(refused(x))}
    if bad:
        raise UserError(
            f"the model's logits are not finite in {len(bad)} pairs, the first is row {min(bad)} of the data; "
            "its weights may be damaged, or its dtype too narrow: try --dtype float32"
        )
