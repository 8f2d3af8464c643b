"""`prefdistill sample`."""

from pathlib import Path
from typing import Any

from pydantic import Field

from prefdistill.cli.output import show
from prefdistill.cli.verbs.common import MODEL
from prefdistill.data.options import Lengths
from prefdistill.models.options import ReadWith
from prefdistill.sampling.options import SampleRequest

REPORTED = ("responses", "tokens", "ended_share", "tokens_per_second")


class SampleFlags(SampleRequest, ReadWith, Lengths):
    model: str = Field(description=MODEL)
    data: str = Field(description="Rows with a prompt, preference pairs, or messages; Hub name, directory or file.")
    out: Path = Field(description="File for the rows: .jsonl, .jsonl.gz or .parquet.")


def sample(options: SampleFlags) -> dict[str, Any]:
    """Sample responses to every prompt, as a data file like any other. Resumes if interrupted.

    Example: prefdistill sample --model my/student --data pairs.jsonl --out own.jsonl --column student_response
    """
    from prefdistill.core.file_artifact import sidecar
    from prefdistill.core.files import read_json
    from prefdistill.data.truncation import Truncation
    from prefdistill.models.vocabulary import tokenizer_for
    from prefdistill.sampling.files import sample_responses

    out, model = options.out, options.place(options.model)
    reused = out.exists()  # a finished file is reused, or refused
    sample_responses(
        model,
        options.data,
        tokenizer_for(model, options.tokenizer, options.form, trust_remote_code=options.trust_remote_code),
        out=out,
        truncation=Truncation(**options.part(Lengths)),
        **options.part(SampleRequest),
    )
    record = read_json(sidecar(out))
    results = {key: record[key] for key in REPORTED}
    ended, speed = f"{results['ended_share']:.0%} ended", f"{results['tokens_per_second']:g} tokens/s"
    show(f"{results['responses']} responses ({ended}), {results['tokens']} tokens ({speed}) in {out}")
    return {"out": str(out), **results, "reused": reused}
