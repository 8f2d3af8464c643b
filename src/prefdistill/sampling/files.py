"""Sample responses into a data file.

    dataset = sample_responses("my/student", "pairs.jsonl", out="sampled.jsonl", column="student_response")

The model gets exactly the prompt tokens that `encode_pairs` gives. Rows are counted from 0.
"""

import gzip
import hashlib
import io
import json
import sys
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import FileArtifact
from prefdistill.core.files import read_json, value_digest, write_json
from prefdistill.core.options import takes
from prefdistill.core.parts import Parts
from prefdistill.core.progress import Progress, say
from prefdistill.data.columns import (
    SIDES,
    check_column,
    ended_column,
    ids_column,
    sample_columns,
    tokens_column,
    unread_columns,
)
from prefdistill.data.encoder import Encoder
from prefdistill.data.load import load_prompts, say_unread
from prefdistill.data.messages import without_nulls
from prefdistill.data.prompts import prompts_of
from prefdistill.data.template import changes_with_time, check_text_form
from prefdistill.data.truncation import Truncation
from prefdistill.models.identity import model_identity, model_key, tokenizer_identity
from prefdistill.models.load import load_tokenizer
from prefdistill.sampling import ENGINES
from prefdistill.sampling.engines import Engine
from prefdistill.sampling.options import SampleRequest
from prefdistill.sampling.sampler import Sampler

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


class OtherPrompts(UserError):
    """The prompts of a file are rendered otherwise now than when its responses were sampled."""


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
    """Sample responses to every prompt and write them beside the row's other columns: `n` rows per prompt, consecutive.

    `OUT.meta.json` holds the request, counts and speed. A finished file of the same request is reused; an interrupted
    one is resumed after its last whole part, and becomes the same file to the byte.

    Args:
        model: a causal language model, or the Hub name or directory to load one from.
        dataset: prompts, see `prefdistill.data.load.load_prompts`, or where to load them from.
        tokenizer: the model's tokenizer; default: the one found beside the model.
        out: the .jsonl, .jsonl.gz or .parquet file to write.
        truncation: prompts and responses are truncated as `encode_pairs` does. A prompt that leaves no room is dropped
            and counted. Default: no limit.
        options: fields of `prefdistill.sampling.options.SampleRequest`, see docs/options.md. Responses go to `column`:
            one assistant message to a conversation, text to text. The column `{column}_ended` says whether the model
            wrote its end token, `{column}_tokens` is the token count with the end token, `{column}_ids` are the ids,
            by which `encode_pairs` encodes the response in the tokens sampled, and `{column}_check` says what they
            belong to (`data.sampled`).

    Returns:
        The file, loaded.

    Raises:
        UserError: on an option out of range, data or a model that cannot be read, a column that exists already, or
            other work in `out`.

    Example:
        >>> sample_responses("my/student", "pairs.jsonl", out="own.jsonl", column="student_response")  # doctest: +SKIP
    """
    out = Path(out)
    settings = SampleRequest.checked("sample_responses", **options)
    engine, column = ENGINES.find(settings.engine), settings.column
    _check_place(out)
    engine.check(model, settings)
    data_name = dataset if isinstance(dataset, str) else "a data set in memory"
    read_as = settings.loader_options(dataset)
    dataset = load_prompts(dataset, **read_as)
    if read_as:
        say_unread(data_name, unread_columns(dataset.column_names, (*SIDES, "completion")))
    if taken := [name for name in (column, *sample_columns(column)) if name in dataset.column_names]:
        raise UserError(f"{data_name} has a column '{taken[0]}' already; name another with --column")
    if tokenizer is None:
        source = model if isinstance(model, str) else model.name_or_path
        tokenizer = load_tokenizer(str(source), trust_remote_code=settings.trust_remote_code)

    sampler = Sampler(tokenizer, settings, truncation)
    request = {
        "column": column,
        "model": {"name": model, "key": model_key(model)} if isinstance(model, str) else model_identity(model),
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "trust_remote_code": settings.trust_remote_code,
        "tokenizer": tokenizer_identity(tokenizer),
        "data": {"name": data_name, "rows": len(dataset), "fingerprint": _fingerprint(dataset, out)},
        **settings.drawing,
        **asdict(sampler.truncation),
        "seed": settings.seed,
        "shard_rows": settings.shard_rows,
        "keep_ids": settings.keep_ids,
    }
    artifact = FileArtifact("sample", out, request, "sample")
    with artifact.session() as seal:
        if seal is None:
            prompts = prompts_of(dataset)
            encoded, dropped = sampler.encode_all(prompts)
            if len(dropped) == len(dataset):
                raise UserError(f"No prompt is left: {dropped}. Change the data, the chat template or the lengths.")
            if dropped:
                say(f"sample: {dropped}")
            if isinstance(prompts[0], str) and tokenizer.chat_template:
                check_text_form(tokenizer)
                say("sample: the prompts are plain text, which does not go through the chat template")
            rows = [row for row, ids in enumerate(encoded) if ids]
            size = settings.shard_rows
            shards = [rows[start : start + size] for start in range(0, len(rows), size)]
            parts = Parts(artifact.parts, len(shards))
            with closing(engine.open(model, tokenizer, settings)) as opened:
                _sample_parts(parts, shards, sampler, opened, prompts, encoded, settings.seed)
            responses, seconds = _read_parts(parts)
            counts = _counts(responses, len(rows), seconds)
            full = _with_responses(dataset, rows, column, responses, settings.keep_ids)
            check_prompts(out, full, column, tokenizer)  # of parts that an earlier run has sampled
            about = {"dropped": dropped.counts, **counts, "versions": _versions()}
            artifact.seal(lambda path: write_rows(full, path, out.name), about)
            _report(counts)
    sampled = load_prompts(str(out))
    if seal is not None:
        check_prompts(out, sampled, column, tokenizer)
    return sampled


def _check_place(out: Path) -> None:
    if not out.name.endswith(OUTPUT_SUFFIXES):
        raise UserError(f"{out}: unknown file type. Give --out a name that ends in {', '.join(OUTPUT_SUFFIXES)}.")
    if out.is_dir():
        raise UserError(f"{out} is a directory; --out names the file for the responses")


def _fingerprint(dataset: "Dataset", out: Path) -> str:
    """Return a digest of every column of every row: all of them go into the file."""
    digest, readable = hashlib.sha256(), str if out.name.endswith(".parquet") else None
    for index, row in enumerate(dataset):
        try:
            digest.update(json.dumps(_without_nulls(row), sort_keys=True, default=readable).encode() + b"\n")
        except TypeError as error:
            raise UserError(
                f"row {index} of the data cannot be written as JSON ({error}); give --out a name that ends in .parquet"
            ) from error
    return digest.hexdigest()


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its messages as they were before Arrow gave all of them the same keys."""
    messages = [k for k, v in row.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
    return row | {name: without_nulls(row[name]) for name in messages}


def _sample_parts(
    parts: Parts,
    shards: list[list[int]],
    sampler: Sampler,
    engine: Engine,
    prompts: list[Any],
    encoded: list[list[int]],
    seed: int,
) -> None:
    """Write the missing parts: `{"seconds": ..., "responses": [[text, ids, ended, check], ...]}` each.

    The draws of a part depend on the seed and its number alone, so that an interruption before it changes nothing.
    """
    n = sampler.sampling.n
    missing = parts.missing()
    done = n * sum(len(shard) for number, shard in enumerate(shards) if number not in missing)
    to_draw = [
        sampler.part(
            [encoded[row] for row in shards[number]], shards[number], int(value_digest([seed, number])[:15], 16)
        )
        for number in missing
    ]
    with (
        Progress("sampling", n * sum(map(len, shards)), "response", done) as progress,
        closing(engine.draw_all(to_draw, progress)) as drawn,
    ):
        for index, (tokens, seconds) in drawn:
            part = to_draw[index]
            part_prompts = [prompts[row] for row in part.rows for _ in range(n)]
            responses = [
                [response.text, response.ids, response.ended, sampler.check(prompt, response.ids, response.text)]
                for prompt, response in zip(part_prompts, sampler.responses(part, tokens), strict=True)
            ]
            write_json(parts.path(missing[index]), {"seconds": seconds, "responses": responses})


def _read_parts(parts: Parts) -> tuple[list[list[Any]], float]:
    """Return the responses of all parts, and the seconds they took."""
    read = [read_json(path) for path in parts.paths]
    return [response for part in read for response in part["responses"]], sum(part["seconds"] for part in read)


def _counts(responses: list[list[Any]], prompts: int, seconds: float) -> dict[str, Any]:
    _, ids, ended, _ = zip(*responses, strict=True)
    tokens = sum(map(len, ids))
    return {
        "prompts": prompts,
        "responses": len(responses),
        "tokens": tokens,
        "ended_share": round(sum(ended) / len(responses), 6),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-3), 1),
    }


def _with_responses(
    dataset: "Dataset", rows: list[int], column: str, responses: list[list[Any]], keep_ids: bool
) -> "Dataset":
    """Return the sampled rows, each repeated for its responses, with the columns of these."""
    texts, ids, ended, checks = zip(*responses, strict=True)
    conversational = isinstance(dataset[0]["prompt"], list)
    values = [[{"role": "assistant", "content": text}] if conversational else text for text in texts]
    repeated = [row for row in rows for _ in range(len(responses) // len(rows))]
    full = dataset.select(repeated).flatten_indices(keep_in_memory=True)
    full = full.add_column(column, values).add_column(ended_column(column), list(ended))
    full = full.add_column(tokens_column(column), [*map(len, ids)])
    return full.add_column(ids_column(column), [*ids]).add_column(check_column(column), [*checks]) if keep_ids else full


def check_prompts(out: Path, sampled: "Dataset", column: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that prompts are rendered as they were when their responses were sampled.

    Raises:
        OtherPrompts: naming the first row that differs.
    """
    if check_column(column) not in sampled.column_names:
        return
    encoder = Encoder(tokenizer)
    columns = (sampled[name][:] for name in (column, ids_column(column), check_column(column)))
    for index, (prompt, response, ids, check) in enumerate(zip(prompts_of(sampled), *columns, strict=True)):
        text = response if isinstance(response, str) else response[0]["content"]
        if encoder.check(encoder.text(prompt), ids, text) != check:
            raise OtherPrompts(
                f"the prompt of row {index} of {out} is rendered otherwise now than when its response was sampled"
                + (": the chat template prints the date or the time" if changes_with_time(tokenizer) else "")
                + "; delete the file and sample again, or give another --out"
            )


def _report(counts: dict[str, Any]) -> None:
    say(
        f"sample: {counts['responses']:,} responses, {counts['tokens']:,} tokens, "
        f"{counts['tokens_per_second']:,} tokens/s, {counts['ended_share']:.1%} ended"
    )


def write_rows(dataset: "Dataset", path: Path, name: str) -> None:
    """Write a data set to a path, in the format that a file name ends in."""
    with path.open("wb") as file:
        if name.endswith(".parquet"):
            table = io.BytesIO()  # writing to a full disk, Arrow can abort the process
            dataset.to_parquet(table)
            file.write(table.getbuffer())
            return
        # a gzip header without name and time: the same rows give the same bytes
        lines = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if name.endswith(".gz") else nullcontext(file)
        with lines as stream:
            for row in dataset:
                stream.write(json.dumps(_without_nulls(row), ensure_ascii=False).encode() + b"\n")


def _versions() -> dict[str, str]:
    return {"prefdistill": __version__} | {
        name: sys.modules[name].__version__ for name in ("torch", "transformers", "vllm") if name in sys.modules
    }
