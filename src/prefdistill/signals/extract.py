"""Signals of a data set, from a model into a store: what is asked for, shard by shard, on any number of processes."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_sealed, sweep, write_sealed
from prefdistill.core.lock import LOCK, locked
from prefdistill.core.options import takes
from prefdistill.core.paths import check_place
from prefdistill.core.processes import processes
from prefdistill.core.progress import Progress, say
from prefdistill.data.batches import layout_for
from prefdistill.data.encode import encode_pairs
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.load import check_pairs, load_pairs
from prefdistill.data.truncation import Dropped, Truncation, nothing_left
from prefdistill.models.device import default_dtype
from prefdistill.models.identity import model_identity, tokenizer_identity
from prefdistill.models.load import load_model, load_tokenizer, ready
from prefdistill.models.logprobs import emittable_ids, vocabulary_rows
from prefdistill.signals.needs import Need
from prefdistill.signals.options import SignalRequest
from prefdistill.signals.packing import kl_error, pack_sorted, pack_unsorted, unpack_sorted, unpack_unsorted
from prefdistill.signals.reading import VALUES, TopKRequest, emittable_count, score_pairs
from prefdistill.signals.shards import Shard, is_whole, read_checksum, write_shard
from prefdistill.signals.store import (
    KINDS,
    PACKED,
    PACKED_AT_IDS,
    SCHEMA,
    DamagedSignals,
    Signals,
    SignalSet,
    check_same_request,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Numbers of one shard that are held at once before it is written: 2^24 pairs of id and log-probability are 128 MiB.
SHARD_NUMBERS = 2**24
IN_MEMORY = "a data set in memory"
TOKENS = 4096  # of a response at most, where truncation says nothing

DEFAULTS = SignalRequest()


@takes(SignalRequest)
def extract_signals(
    model: "PreTrainedModel | str",
    dataset: "Dataset | str",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    kinds: tuple[str, ...] = DEFAULTS.kinds,
    out: str | Path = "signals",
    *,
    truncation: Truncation | None = None,
    ids_from: Signals | None = None,
    **options: Any,
) -> Signals:
    r"""What a model says about the responses of every row, stored in a directory.

    .. math:: V(s_t) = b \log \sum_a \exp(z(s_t, a) / b), \qquad \log\pi(y|x) = \sum_t \log\pi(a_t|s_t)

    A finished store of the same request is opened as it is; an interrupted one goes on after its last whole shard, and
    so does one whose damaged shards `prefdistill.signals.repair` has set aside.
    Under `accelerate launch` or torchrun every process makes its share of the shards; their number changes no byte
    (that of a process's CPU threads may, by rounding). A process holds the tokens and signals of one shard at a time.

    Args:
        model: a causal language model, or the Hub name or directory to load one from.
        dataset: preference pairs in TRL's format, or where to load them from.
        tokenizer: the model's tokenizer; default: the one found beside the model.
        kinds: "values" (soft value of s_0 .. s_T, from raw logits), "logprob_values" (the same from log-probabilities),
            "logps" (log-probability of the response), "q" (sum of its tokens' raw logits), "topk" (the most likely
            tokens of s_0 .. s_{T-1} and the mass of all others). In nats, float32 but where said.
        out: directory of the store.
        truncation: see `prefdistill.data.truncation.Truncation`.
        ids_from: compute "topk" at the token ids of this teacher's store, so that the two can be compared.
        options: fields of `prefdistill.signals.options.SignalRequest`, see docs/options.md.

    Raises:
        UserError: on an unknown kind or role, data that cannot be read, a store of another request in `out`, another
            run that works there, ids of a store of other data, or logits that are not finite (with the rows).

    Example:
        >>> extract_signals("my/teacher", "pairs.jsonl", out="signals/teacher")       # doctest: +SKIP
    """
    settings = SignalRequest.of("extract_signals", kinds=kinds, **options)
    kinds, role, responses = settings.kinds, settings.role, settings.responses
    if unknown := set(kinds) - set(KINDS):
        raise UserError(f"unknown signal kind {sorted(unknown)[0]!r}; known: {', '.join(KINDS)}")
    if ids_from is not None and "topk" not in kinds:
        raise UserError(f"ids_from applies to the kind topk, not to {', '.join(kinds)}; leave it out")
    if ids_from is not None and (settings.k, settings.p) != (DEFAULTS.k, DEFAULTS.p):
        raise UserError("with ids_from, the other store says which tokens are kept; leave k and p out")
    topk = TopKRequest(settings.k, settings.p, ids_from, settings.topk_coding)
    if settings.quantization is not None and not isinstance(model, str):
        raise UserError("quantization applies to a model that is loaded by name; leave it out for one in memory")
    truncation = truncation or Truncation()
    model_name = model if isinstance(model, str) else ""
    data_name = dataset if isinstance(dataset, str) else IN_MEMORY
    out = Path(out)
    check_place(out)
    if out.is_file():
        raise UserError(f"{out} is not a directory; give another --out")
    with locked(out, together=True):  # before anything is loaded; it also gives each process its device
        if isinstance(dataset, str):
            dataset = load_pairs(dataset, responses=responses)
        else:
            check_pairs(dataset, "The data set", responses)
        if tokenizer is None:
            source = model if isinstance(model, str) else model.name_or_path
            tokenizer = load_tokenizer(str(source), trust_remote_code=settings.trust_remote_code)
        if isinstance(model, str):
            dtype = settings.dtype or default_dtype(role)
            model = load_model(
                model, dtype=dtype, quantization=settings.quantization, trust_remote_code=settings.trust_remote_code
            )
        model = ready(model)
        if ids_from is not None:
            _check_ids(ids_from, role, dataset, tokenizer, truncation, responses)
        head_rows = vocabulary_rows(model)
        vocabulary = emittable_count(emittable_ids(tokenizer, head_rows), head_rows)
        per_state = 1 + (topk.most(vocabulary) if "topk" in kinds else 0)
        most = (truncation.max_length or TOKENS) * len(responses) * per_state
        encode = partial(encode_pairs, dataset, tokenizer, truncation, responses=responses)
        encode(rows=range(1))  # or says what is wrong with them
        layout = layout_for(model, truncation.max_length)
        request = {
            "schema": SCHEMA,
            "role": role,
            "kinds": sorted(kinds),
            "responses": list(responses),
            "positions": settings.positions,
            "value_dtype": settings.value_dtype,
            "value_temperature": settings.value_temperature,
            "topk": topk.manifest(vocabulary, head_rows) if "topk" in kinds else {},
            "model": {
                **model_identity(model, model_name),
                "bf16": settings.bf16,
                **({"read_in": settings.quantization} if settings.quantization else {}),
            },
            "tokenizer": tokenizer_identity(tokenizer),
            "data": {"name": data_name, "rows": len(dataset), "fingerprint": data_fingerprint(dataset, responses)},
            "truncation": {"max_length": truncation.max_length, "max_prompt_length": truncation.max_prompt_length},
            "shard_rows": min(settings.shard_rows, max(1, SHARD_NUMBERS // most)),
            "batch_tokens": settings.batch_tokens,
            "layout": layout.kind,
        }
        read = partial(
            score_pairs,
            model,
            tokenizer=tokenizer,
            kinds=kinds,
            responses=responses,
            positions=settings.positions,
            value_temperature=settings.value_temperature,
            topk=topk,
            bf16=settings.bf16,
            batch_tokens=settings.batch_tokens,
            layout=layout,
        )
        with processes().main_process_first():  # it clears the way, the others find it cleared
            if _finished(out, request):
                return Signals.open(out)
            request |= _before(out)  # the same but for names: what is gone on with keeps those it has
        with _all_or_nothing(out):
            _make_shards(out, request, encode, read)
        return Signals.open(out)


def _make_shards(
    out: Path,
    request: dict[str, Any],
    encode: Callable[..., "tuple[Dataset, Dropped]"],
    read: Callable[..., dict[str, list[Any]]],
) -> None:
    """This process's shards of a store, but those that are there already, and the manifest over all."""
    count, size, responses = request["data"]["rows"], request["shard_rows"], tuple(request["responses"])
    parts = [range(a, min(a + size, count)) for a in range(0, count, size)]
    paths = [out / "shards" / f"{number:05d}.parquet" for number in range(len(parts))]
    team = processes()
    # by number, so that a run goes on with what any number of processes have left
    ours = range(team.process_index, len(parts), team.num_processes)
    total = len(responses) * sum(len(parts[n]) for n in ours)
    with Progress(f"signals ({request['role']})", total, "response") as progress:
        for n in ours:
            if is_whole(paths[n]):
                progress.update(len(responses) * len(parts[n]))
                continue
            rows, dropped = encode(rows=parts[n])
            found = read(rows, progress=progress)
            progress.update(len(responses) * len(dropped))
            columns, errors = _columns(rows, responses, found, request)
            notes = {
                "kept": len(rows),
                "rows": sorted(set(parts[n]).difference(rows["row"][:])),
                "dropped": dropped.counts,
                "first_rows": dropped.first_rows,
                "kl_error": {"sum": sum(errors), "max": max(errors, default=0.0), "states": len(errors)},
            }
            noted = read_checksum(paths[n])
            write_shard(paths[n], columns, notes)
            if noted not in (None, read_checksum(paths[n])):
                say(f"warning: {paths[n]} has come out otherwise than before: made with other versions or hardware")
    team.wait_for_everyone()
    _finish(out, paths, request)


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
    # rows that were left out there because of another response
    lacking: list[int] = []
    if gone := ids_from.manifest["dropped"]["rows"] if set(responses) != set(ids_from.responses) else []:
        kept, _ = encode_pairs(dataset.select(gone), tokenizer, truncation, responses=responses, rows=range(len(gone)))
        lacking = [gone[i] for i in kept["row"][:]]
    if lacking:
        raise UserError(
            f"the store whose ids are to be used has no row {min(lacking)} ({len(lacking)} such rows), because another "
            f"response of it was left out there; read --responses {','.join(ids_from.responses)} as that store was"
        )


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[None]:
    """What is refused before its first shard leaves no directory behind."""
    try:
        yield
    except UserError:
        if not any((out / "shards").glob("*.parquet")):
            shutil.rmtree(out, ignore_errors=True)
        raise


def _finished(out: Path, request: dict[str, Any]) -> bool:
    """Whether `out` holds what is settings for; clears the way for it where it does not."""
    if (out / "request.json").is_file():
        check_same_request("signals", out, _before(out), request)
        if processes().is_main_process:
            sweep(out, below=True)
        return (out / "manifest.json").is_file()
    if (out / "manifest.json").is_file():
        raise DamagedSignals(f"{out}/request.json is missing", out)
    if any(path.name != LOCK for path in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no signals; give another --out")
    write_sealed(out / "request.json", request)
    return False


def _before(out: Path) -> dict[str, Any]:
    """The request that a store was begun with."""
    if (before := read_sealed(out / "request.json")) is None:
        raise DamagedSignals(f"{out}/request.json is damaged (its checksum differs)", out)
    return before


def _columns(
    rows: "Dataset", responses: tuple[str, ...], found: dict[str, list[Any]], request: dict[str, Any]
) -> tuple[dict[str, Any], list[float]]:
    """Signals of a shard as columns of its file, and the divergence that packing has put into each distribution."""
    columns: dict[str, Any] = {"row": rows["row"][:]}
    errors: list[float] = []
    for name in responses:
        columns[f"{name}_tokens"] = [len(ids) for ids in rows[f"{name}_ids"]]
        columns[f"{name}_ended"] = rows[f"{name}_ended"][:]
        if request["positions"] == "endpoints":
            start, end = zip(*found[f"{name}_values"], strict=True) if len(rows) else ((), ())
            columns |= {"start_value": start, f"{name}_end_value": end}
            continue
        columns[f"{name}_offsets"] = rows[f"{name}_offsets"][:]
        parts = {column.removeprefix(f"{name}_"): x for column, x in found.items() if column.startswith(f"{name}_")}
        if request["topk"].get("coding") == "packed":
            parts, more = _packed(parts, request["topk"])
            errors += more
        for kind in set(VALUES).intersection(parts if request["value_dtype"] == "float16" else ()):
            parts[kind] = _rounded(parts[kind], rows["row"][:])
        columns |= {f"{name}_{column}": values for column, values in parts.items()}
    return columns, errors


def _finish(out: Path, paths: list[Path], request: dict[str, Any]) -> None:
    """Write the manifest over the shards; if no pair is left in any of them, take them away and say why."""
    notes = [Shard(path).notes for path in paths]
    reasons: Counter[str] = Counter()
    first_rows: dict[str, int] = {}
    for note in notes:
        reasons.update(note["dropped"])
        first_rows |= {reason: row for reason, row in note["first_rows"].items() if reason not in first_rows}
    dropped = Dropped(dict(reasons.most_common()), first_rows)
    team = processes()
    if len(dropped) == request["data"]["rows"]:
        team.wait_for_everyone()
        if team.is_main_process:
            shutil.rmtree(out)
        raise UserError(nothing_left(dropped))
    if team.is_main_process:
        if dropped:
            say(f"signals: {dropped}")
        errors = [note["kl_error"] for note in notes]
        states = sum(error["states"] for error in errors)
        if states:
            mean = sum(error["sum"] for error in errors) / states
            request["topk"]["kl_error"] = {"mean": mean, "max": max(error["max"] for error in errors), "states": states}
        shards = [
            {"file": path.name, "rows": note["kept"], "sha256": read_checksum(path)}
            for path, note in zip(paths, notes, strict=True)
        ]
        gone = {"reasons": dropped.counts, "rows": [row for note in notes for row in note["rows"]]}
        write_sealed(out / "manifest.json", {**request, "dropped": gone, "shards": shards, "versions": _versions()})
    team.wait_for_everyone()


def _versions() -> dict[str, str]:
    import transformers

    return {"prefdistill": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _packed(parts: dict[str, Any], made: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """One response's columns with its distributions packed, and the divergence of each state."""
    own = "topk_ids" in parts
    ids = parts["topk_ids"] if own else [None] * len(parts["topk_counts"])
    codes: dict[str, list[Any]] = {name: [] for name in (PACKED if own else PACKED_AT_IDS) if name != "counts"}
    errors: list[float] = []
    for at, logps, rest, counts in zip(ids, *(parts[f"topk_{n}"] for n in ("logps", "rest", "counts")), strict=True):
        code = pack_sorted(at, logps, rest, counts, made["id_bits"]) if own else pack_unsorted(logps, rest, counts)
        again = {name: [part] if isinstance(part, bytes) else part for name, part in code.items()}
        again |= {"counts": counts, "states": [len(counts)]}
        decoded = unpack_sorted(**again, bits=made["id_bits"])[1:] if own else unpack_unsorted(**again)
        errors += kl_error(logps, rest, *decoded, counts).tolist()
        for name, column in codes.items():
            column.append(code[name])
    kept = {name: part for name, part in parts.items() if name not in ("topk_ids", "topk_logps", "topk_rest")}
    if own:
        codes["ids"] = pa.array(codes["ids"], pa.binary())
    return kept | {f"topk_{name}": column for name, column in codes.items()}, errors


def _rounded(values: list[np.ndarray], rows: list[int]) -> pa.Array:
    with np.errstate(over="ignore"):
        halves = [part.astype(np.float16) for part in values]
    for row, part in zip(rows, halves, strict=True):
        if not np.isfinite(part).all():
            raise UserError(f"a value of row {row} is too large for float16; store values as float32")
    return pa.array(halves, pa.list_(pa.float16()))
