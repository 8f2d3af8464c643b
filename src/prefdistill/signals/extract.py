"""One pass of a model over a preference data set: soft values and log-probabilities of every response."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    next_tokens,
    reduce_logits,
    response_states,
    sum_by_row,
    token_logps,
    vocabulary_rows,
)
from prefdistill.losses.value import soft_value
from prefdistill.models import load_model, load_tokenizer, model_identity, ready, tokenizer_identity
from prefdistill.progress import Progress, say
from prefdistill.signals.store import ROLES, SCHEMA, SIDES, Signals, same

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("values", "logps")


def extract_signals(
    model: "PreTrainedModel | str",
    dataset: "Dataset | str",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    kinds: tuple[str, ...] = ("values", "logps"),
    out: str | Path = "signals",
    *,
    role: str = "teacher",
    truncation: Truncation | None = None,
    value_temperature: float = 1.0,
    dtype: str | None = None,
    bf16: bool = False,
    batch_tokens: int = 16_384,
    shard_rows: int = 1_024,
    trust_remote_code: bool = False,
) -> Signals:
    r"""What a model says about both responses of every pair, stored in a directory.

    .. math:: V(s_t) = b \log \sum_a \exp(z(s_t, a) / b), \qquad \log\pi(y|x) = \sum_t \log\pi(a_t|s_t)

    A finished store of the same request is opened as it is; an interrupted one goes on after its last whole shard.

    Args:
        model: a causal language model, or the Hub name or directory to load one from.
        dataset: preference pairs in TRL's format, or where to load them from.
        tokenizer: the model's tokenizer; default: the one found beside the model.
        kinds: "values" (soft value of s_0 .. s_T, float32, nats) and "logps" (log-probability of the response, nats).
        out: directory of the store.
        role: whose word it is: "teacher", "teacher_reference" or "reference" (the student's starting point).
        truncation: see `prefdistill.data.Truncation`.
        value_temperature: b of the soft value.
        dtype: of the weights, when the model is loaded here. Default: "float32" for a reference, which must be read as
            the student is trained, "auto" (as stored) for a teacher.
        bf16: run the float32 model under bfloat16 autocast, as a bf16 training run does.
        batch_tokens: padded tokens per forward pass.
        shard_rows: pairs per file, the unit of resuming.
        trust_remote_code: let the model's repository run its own code.

    Raises:
        UserError: on an unknown kind or role, data that cannot be read, a store of another request in `out`, or
            logits that are not finite (with the rows).

    Example:
        >>> extract_signals("my/teacher", "pairs.jsonl", out="signals/teacher")       # doctest: +SKIP
    """
    if unknown := set(kinds) - set(KINDS):
        raise UserError(f"unknown signal kind {sorted(unknown)[0]!r}; known: {', '.join(KINDS)}")
    if not kinds:
        raise UserError(f"no signal kind asked for; known: {', '.join(KINDS)}")
    if role not in ROLES:
        raise UserError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    if not 0 < value_temperature < float("inf"):
        raise UserError(f"the value temperature must be positive and finite, got {value_temperature}")
    truncation = truncation or Truncation()
    model_name = model if isinstance(model, str) else ""
    data_name = dataset if isinstance(dataset, str) else "a data set in memory"
    if isinstance(dataset, str):
        dataset = load_pairs(dataset)
    if tokenizer is None:
        source = model if isinstance(model, str) else model.name_or_path
        tokenizer = load_tokenizer(str(source), trust_remote_code=trust_remote_code)
    if isinstance(model, str):
        dtype = dtype or ("float32" if role == "reference" else "auto")
        model = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    model = ready(model)

    encoded, dropped = encode_pairs(dataset, tokenizer, truncation)
    request = {
        "schema": SCHEMA,
        "role": role,
        "kinds": sorted(kinds),
        "value_temperature": value_temperature,
        "model": {**model_identity(model, model_name), "bf16": bf16},
        "tokenizer": tokenizer_identity(tokenizer),
        "data": {"name": data_name, "rows": len(dataset), "fingerprint": data_fingerprint(dataset)},
        "truncation": {"max_length": truncation.max_length, "max_prompt_length": truncation.max_prompt_length},
        "dropped": {
            "reasons": dropped.counts,
            "rows": sorted(set(range(len(dataset))).difference(encoded["row"][:])),
        },
        "shard_rows": shard_rows,
        "batch_tokens": batch_tokens,
    }
    out = Path(out)
    if _finished(out, request):
        return Signals.open(out)
    if dropped:
        say(f"signals: {dropped}")

    shards = []
    with Progress(f"signals ({role})", 2 * len(encoded), "response") as progress:
        for start in range(0, len(encoded), shard_rows):
            path = out / "shards" / f"{start // shard_rows:05d}.parquet"
            rows = encoded.select(range(start, min(start + shard_rows, len(encoded))))
            if path.exists():
                progress.update(2 * len(rows))
            else:
                found = score_pairs(
                    model,
                    rows,
                    tokenizer,
                    kinds,
                    value_temperature=value_temperature,
                    bf16=bf16,
                    batch_tokens=batch_tokens,
                    progress=progress,
                )
                _write_shard(path, rows, kinds, found)
            shards.append({"file": path.name, "rows": len(rows), "sha256": file_digest(path)})
    write_json(out / "manifest.json", {**request, "shards": shards, "versions": _versions()})
    return Signals.open(out)


def _finished(out: Path, request: dict[str, Any]) -> bool:
    """Whether `out` holds what is asked for; clears the way for it where it does not."""
    if (out / "request.json").is_file():
        before = read_json(out / "request.json")
        if changed := ", ".join(sorted(k for k in request if not same(before.get(k), request[k]))):
            raise UserError(
                f"{out} holds signals of another request (other {changed}); give another --out or delete it first"
            )
        return (out / "manifest.json").is_file()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no signals; give another --out")
    shutil.rmtree(out, ignore_errors=True)
    write_json(out / "request.json", request)
    return False


def _versions() -> dict[str, str]:
    import transformers

    return {"prefdistill": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _write_shard(path: Path, rows: "Dataset", kinds: tuple[str, ...], found: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"row": pa.array(rows["row"][:], pa.int64())}
    for side in SIDES:
        columns[f"{side}_tokens"] = pa.array([len(ids) for ids in rows[f"{side}_ids"]], pa.int32())
        columns[f"{side}_ended"] = pa.array(rows[f"{side}_ended"][:], pa.bool_())
        columns[f"{side}_offsets"] = pa.array(rows[f"{side}_offsets"][:], pa.list_(pa.int32()))
        if "values" in kinds:
            columns[f"{side}_values"] = pa.array(found[f"{side}_values"], pa.list_(pa.float32()))
        if "logps" in kinds:
            columns[f"{side}_logps"] = pa.array(found[f"{side}_logps"], pa.float32())
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


@torch.no_grad()
def score_pairs(
    model: "PreTrainedModel",
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    kinds: tuple[str, ...] = KINDS,
    *,
    value_temperature: float = 1.0,
    bf16: bool = False,
    batch_tokens: int = 16_384,
    progress: Progress | None = None,
) -> dict[str, list[Any]]:
    """Signals of encoded pairs (`encode_pairs`), in memory: `{"chosen_values": [array [T+1], ...], ...}`.

    Both responses of a pair start in the same state s_0, and get the very same number for V(s_0).

    Raises:
        UserError: if a model's logits are not finite, naming the rows.
    """
    emittable = emittable_ids(tokenizer, vocabulary_rows(model))
    found: dict[str, list[Any]] = {f"{side}_{kind}": [None] * len(rows) for side in SIDES for kind in kinds}
    ids = {column: rows[column][:] for column in ("prompt_ids", "chosen_ids", "rejected_ids")}
    for places in _batches(ids, batch_tokens):
        batch = PairCollator(tokenizer.pad_token_id, responses=("response",))(
            [{"prompt_ids": ids["prompt_ids"][i], "response_ids": ids[f"{side}_ids"][i]} for i, side in places]
        )
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, Tensor)}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            scored = _score_batch(model, batch, value_temperature, emittable)
        for n, (i, side) in enumerate(places):
            for kind in kinds:
                found[f"{side}_{kind}"][i] = scored[kind][n]
        if progress is not None:
            progress.update(len(places))
    if "values" in kinds:
        for chosen, rejected in zip(found["chosen_values"], found["rejected_values"], strict=True):
            rejected[0] = chosen[0]
    _check_finite(found, rows["row"][:])
    return found


def _batches(ids: dict[str, list[list[int]]], batch_tokens: int) -> Iterator[list[tuple[int, str]]]:
    """(place, side) of responses of like length, longest first, at most `batch_tokens` padded tokens together."""
    lengths = {
        (i, side): len(prompt) + len(ids[f"{side}_ids"][i])
        for i, prompt in enumerate(ids["prompt_ids"])
        for side in SIDES
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


def _score_batch(
    model: "PreTrainedModel", batch: dict[str, Tensor], value_temperature: float, emittable: Tensor | None
) -> dict[str, list[Any]]:
    ids, lengths = batch["input_ids"], batch["lengths"]
    states = response_states(batch["prompt_lengths"], lengths, ids.shape[1], final=True)
    choosing = response_states(batch["prompt_lengths"], lengths, ids.shape[1], final=False)
    values, logps = reduce_logits(
        model,
        {"input_ids": ids, "attention_mask": batch["attention_mask"]},
        states,
        lambda logits, tokens: (soft_value(logits, value_temperature), *token_logps(logits, tokens)),
        next_tokens(ids, states),
        emittable=emittable,
    )
    per_response = values.float().cpu().split((lengths + 1).tolist())
    return {
        "values": [value.numpy().copy() for value in per_response],
        "logps": sum_by_row(logps[choosing[states]], choosing).tolist(),
    }


def _check_finite(found: dict[str, list[Any]], rows: list[int]) -> None:
    bad = sorted({rows[i] for column in found.values() for i, x in enumerate(column) if not np.all(np.isfinite(x))})
    if bad:
        raise UserError(
            f"the model's logits are not finite in {len(bad)} pairs, the first is row {bad[0]} of the data; "
            "its weights may be damaged, or its dtype too narrow: try --dtype float32"
        )
