"""Responses from a model, in memory or as a data file like any other.

    responses = sample(model, tokenizer, prompts, n=4, temperature=0.8)
    dataset = sample_responses("my/student", "pairs.jsonl", out="sampled.jsonl", column="student_response")

A prompt is given to the model in the very tokens that `encode_pairs` makes of it. Rows are counted from 0.
"""

import gzip
import hashlib
import io
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.files import atomic_path, file_digest, read_json, sweep, value_digest, write_json
from prefdistill.core.lock import LOCK, locked
from prefdistill.core.options import takes
from prefdistill.core.progress import Progress, say
from prefdistill.data.columns import ended_column, tokens_column
from prefdistill.data.encode import (
    Truncation,
)
from prefdistill.data.load import FILE_TYPES, load_prompts, without_nulls
from prefdistill.models.identity import model_identity, model_key, tokenizer_identity
from prefdistill.models.load import load_model, load_tokenizer, ready
from prefdistill.signals.store import check_same_request

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefdistill.sampling.engines import _Engine, _transformers, _vllm
from prefdistill.sampling.options import SampleRequest
from prefdistill.sampling.sampler import _Sampler

OTHER_TOKENS = 0.05  # share of the responses from which on their other tokens are worth a warning
REQUEST = "request.json"
DRAWING = ("n", "temperature", "top_p", "max_new_tokens", "batch_size")  # options of the draws


# ---- As a data file ----------------------------------------


@takes(SampleRequest)
def sample_responses(
    model: "PreTrainedModel | str",
    dataset: "Dataset | str",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    out: str | Path = "sampled.jsonl",
    *,
    truncation: Truncation | None = None,
    **options: Any,
) -> "Dataset":
    """Responses to every prompt, written beside everything else that its row holds: `n` rows per prompt, consecutive.

    `OUT.meta.json` says what the file was made from and how fast. A finished file of the same request is read as it is;
    an interrupted one goes on after its last whole part, and becomes the same file, to the byte, as if it had not been.

    Args:
        model: a causal language model, or the Hub name or directory to load one from.
        dataset: prompts, see `prefdistill.data.load.load_prompts`, or where to load them from.
        tokenizer: the model's tokenizer; default: the one found beside the model.
        out: the .jsonl, .jsonl.gz or .parquet file to write.
        truncation: prompts are cut as `encode_pairs` does, and responses end where it would cut them. A prompt that
            leaves no room is dropped and counted. Default: no limit.
        options: fields of `prefdistill.sampling.options.SampleRequest`, see docs/options.md. Responses go to `column`:
            one assistant message to a conversation, text to text. The column `{column}_ended` says whether the model
            wrote its end token, `{column}_tokens` how many tokens it took, that one included.

    Returns:
        The file, loaded.

    Raises:
        UserError: on a setting out of its range, data or a model that cannot be read, a column that is there already,
            or something else in the place of `out`.

    Example:
        >>> sample_responses("my/student", "pairs.jsonl", out="own.jsonl", column="student_response")  # doctest: +SKIP
    """
    out = Path(out)
    settings = SampleRequest.of("sample_responses", **options)
    column = settings.column
    _check_place(out)
    if settings.quantization is not None and not isinstance(model, str):
        raise UserError("quantization applies to a model that is loaded by name; leave it out for one in memory")
    if settings.engine == "vllm" and not isinstance(model, str):
        raise UserError("vLLM loads a model itself: give its Hub name or directory, or use the engine transformers")
    data_name = dataset if isinstance(dataset, str) else "a data set in memory"
    dataset = load_prompts(dataset)
    if taken := [
        name for name in (column, ended_column(column), tokens_column(column)) if name in dataset.column_names
    ]:
        raise UserError(f"{data_name} has a column '{taken[0]}' already; name another with --column")
    if tokenizer is None:
        source = model if isinstance(model, str) else model.name_or_path
        tokenizer = load_tokenizer(str(source), trust_remote_code=settings.trust_remote_code)

    sampler = _Sampler(tokenizer, settings, truncation)
    request = {
        "column": column,
        "engine": settings.engine,
        "model": {"name": model, "key": model_key(model)} if isinstance(model, str) else model_identity(model),
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "trust_remote_code": settings.trust_remote_code,
        "tokenizer": tokenizer_identity(tokenizer),
        "data": {"name": data_name, "rows": len(dataset), "fingerprint": _fingerprint(dataset, out)},
        **{name: getattr(settings, name) for name in DRAWING},
        **asdict(sampler.truncation),
        "seed": settings.seed,
        "shard_rows": settings.shard_rows,
    }
    parts = out.with_name(f"{out.name}.parts")
    with locked(parts):
        for file in (out, sidecar(out)):
            sweep(out.parent, file.name)
        if _finished(out, parts, request):
            say(f"sample: {out} reused")
        else:
            prompts = dataset["prompt"][:]
            encoded, dropped = sampler.encode_all(prompts)
            if len(dropped) == len(dataset):
                raise UserError(f"No prompt is left: {dropped}. Change the data, the chat template or the lengths.")
            if dropped:
                say(f"sample: {dropped}")
            if isinstance(prompts[0], str) and tokenizer.chat_template:
                say("sample: the prompts are plain text, which does not go through the chat template")
            if settings.engine == "vllm":
                generate = _vllm(str(model), tokenizer, settings)
            else:
                if isinstance(model, str):
                    model = load_model(
                        model,
                        dtype=settings.dtype,
                        quantization=settings.quantization,
                        trust_remote_code=settings.trust_remote_code,
                    )
                generate = _transformers(ready(model), tokenizer, settings)
            write_json(parts / REQUEST, request)
            rows = [row for row, ids in enumerate(encoded) if ids]
            shards = [rows[start : start + settings.shard_rows] for start in range(0, len(rows), settings.shard_rows)]
            try:
                found = _sample_parts(parts, shards, sampler, generate, prompts, encoded, settings.seed)
            except UserError:
                if {path.name for path in parts.iterdir()} <= {LOCK, REQUEST}:  # nothing to go on with
                    (parts / REQUEST).unlink()
                raise
            _write(
                out, dataset, rows, column, found, {"request": request, "dropped": dropped.counts}, settings.learnt_from
            )
        for path in parts.iterdir():
            if path.name != LOCK:
                path.unlink()
    return load_prompts(str(out))


def sidecar(out: Path) -> Path:
    """Where `sample_responses` says what a file was made from, and how."""
    return out.with_name(f"{out.name}.meta.json")


def made_of(out: Path) -> dict[str, Any]:
    """What the sidecar of a file says; nothing where there is none, or the file is not as it was written."""
    made = read_json(sidecar(out)) if out.is_file() and sidecar(out).is_file() else None
    return made if isinstance(made, dict) and made.get("sha256") == file_digest(out) else {}


def _check_place(out: Path) -> None:
    if not out.name.endswith(FILE_TYPES):
        raise UserError(f"{out}: unknown file type. Give --out a name that ends in {', '.join(FILE_TYPES)}.")
    if out.is_dir():
        raise UserError(f"{out} is a directory; --out names the file for the responses")


def _fingerprint(dataset: "Dataset", out: Path) -> str:
    """Of everything in every row, for all of it goes into the file."""
    digest, readable = hashlib.sha256(), str if out.name.endswith(".parquet") else None
    for index, row in enumerate(dataset):
        try:
            digest.update(json.dumps(_without_nulls(row), sort_keys=True, default=readable).encode() + b"\n")
        except TypeError as error:
            raise UserError(
                f"row {index} of the data holds what JSON cannot ({error}); give --out a name that ends in .parquet"
            ) from error
    return digest.hexdigest()


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its messages as they were before Arrow gave all of them the same keys."""
    messages = [k for k, v in row.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
    return row | {name: without_nulls(row[name]) for name in messages}


def _finished(out: Path, parts: Path, request: dict[str, Any]) -> bool:
    """Whether `out` is what is settings for; refuses anything else in its place."""
    if out.exists():
        made = made_of(out)
        if not made:
            raise UserError(f"{out} is there and is not as `prefdistill sample` wrote it; give another --out")
        check_same_request("responses", out, made["request"], request)
        return True
    if (parts / REQUEST).is_file():
        check_same_request("responses", parts, read_json(parts / REQUEST), request)
        say(f"sample: going on with {out}, which was interrupted")
    elif any(path.name != LOCK for path in parts.iterdir()):
        raise UserError(f"{parts} is not empty and holds no responses; give another --out")
    return False


def _sample_parts(
    parts: Path,
    shards: list[list[int]],
    sampler: _Sampler,
    generate: _Engine,
    prompts: list[Any],
    encoded: list[list[int]],
    seed: int,
) -> list[dict[str, Any]]:
    """For each list of rows `{"seconds": ..., "responses": [[text, tokens, ended, the same tokens again], ...]}`.

    The draws of a part depend on the seed and its number alone, so that an interruption before it changes nothing.
    """
    n = sampler.settings.n
    paths = [parts / f"{number:05d}.json" for number in range(len(shards))]
    done = sum(n * len(rows) for path, rows in zip(paths, shards, strict=True) if path.exists())
    with Progress("sampling", n * sum(map(len, shards)), "response", done) as progress:
        for number, (path, rows) in enumerate(zip(paths, shards, strict=True)):
            if path.exists():
                continue
            begun = time.monotonic()
            own_seed = int(value_digest([seed, number])[:15], 16)
            found = sampler.respond(generate, [encoded[row] for row in rows], rows, own_seed, progress)
            seconds = round(time.monotonic() - begun, 3)
            settings = [prompts[row] for row in rows for _ in range(n)]
            responses = [
                [*astuple(response), sampler.same_tokens_again(prompt, response.text, body)]
                for prompt, (response, body) in zip(settings, found, strict=True)
            ]
            write_json(path, {"seconds": seconds, "responses": responses})
    return [read_json(path) for path in paths]


def _write(
    out: Path,
    dataset: "Dataset",
    rows: list[int],
    column: str,
    parts: list[dict[str, Any]],
    made_from: dict[str, Any],
    learnt_from: bool,
) -> None:
    """The rows with their responses, and beside them what is to be said of them."""
    responses = [response for part in parts for response in part["responses"]]
    texts, tokens, ended, same_tokens = zip(*responses, strict=True)
    conversational = isinstance(dataset[0]["prompt"], list)
    answers = [[{"role": "assistant", "content": text}] if conversational else text for text in texts]
    repeated = [row for row in rows for _ in range(len(responses) // len(rows))]
    full = dataset.select(repeated).flatten_indices(keep_in_memory=True)
    full = full.add_column(column, answers).add_column(ended_column(column), list(ended))
    full = full.add_column(tokens_column(column), list(tokens))
    seconds = sum(part["seconds"] for part in parts)
    counts = {
        "prompts": len(rows),
        "responses": len(responses),
        "tokens": sum(tokens),
        "ended_share": round(sum(ended) / len(responses), 6),
        "other_tokens_share": round(1 - sum(same_tokens) / len(responses), 6),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(tokens) / max(seconds, 1e-3), 1),
    }
    with atomic_path(out) as temporary:
        _write_rows(full, temporary, out.name)
        meta = {**made_from, **counts, "sha256": file_digest(temporary), "versions": _versions()}
        write_json(sidecar(out), meta)
    say(
        f"sample: {counts['responses']:,} responses, {counts['tokens']:,} tokens, "
        f"{counts['tokens_per_second']:,} tokens/s, {counts['ended_share']:.1%} ended"
    )
    if learnt_from and counts["other_tokens_share"] > OTHER_TOKENS:
        say(
            f"warning: the text of {counts['other_tokens_share']:.0%} of the responses is tokenised otherwise than it "
            "was sampled: methods that learn where the model went will look at states it did not visit"
        )


def _write_rows(dataset: "Dataset", path: Path, name: str) -> None:
    with path.open("wb") as file:
        if name.endswith(".parquet"):
            table = io.BytesIO()  # Arrow aborts the process where it cannot write a column of many words to a full disk
            dataset.to_parquet(table)
            file.write(table.getbuffer())
            return
        # a gzip header without name and time: the same rows are the same bytes
        lines = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if name.endswith(".gz") else nullcontext(file)
        with lines as stream:
            for row in dataset:
                stream.write(json.dumps(_without_nulls(row), ensure_ascii=False).encode() + b"\n")


def _versions() -> dict[str, str]:
    return {"prefdistill": __version__} | {
        name: sys.modules[name].__version__ for name in ("torch", "transformers", "vllm") if name in sys.modules
    }
