"""`prefdistill inspect` and `prefdistill report`: pages to look at."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from prefdistill.cli.output import show
from prefdistill.cli.verbs.common import PAIRS
from prefdistill.core.options import REPEATED, Argument, Section
from prefdistill.data.options import Columns
from prefdistill.models.options import Trust
from prefdistill.report.options import Weights


class InspectFlags(Weights, Trust, Columns):
    data: str = Field(description=PAIRS)
    signals: Annotated[tuple[Path, ...], REPEATED] = Field(description="Signal store of these pairs; repeat for each.")
    out: Path = Field(description="File to write (HTML).")
    tokenizer: str | None = Field(
        None,
        description="The student's: Hub name or directory; default: the one that the student's signals name, or else "
        "the first.",
    )
    max_pairs: PositiveInt = Field(5_000, description="The page holds the first of the pairs.")


def inspect(options: InspectFlags) -> dict[str, Any]:
    """Write the token view: one page with V, psi and probabilities over the text of chosen and rejected.

    Example: prefdistill inspect --data pairs.jsonl --signals signals/teacher --out tokens.html
    """
    from prefdistill.report.tokens import write_token_view
    from prefdistill.signals import Signals

    results = write_token_view(
        options.data,
        [Signals.open(path) for path in options.signals],
        options.out,
        options.tokenizer,
        max_pairs=options.max_pairs,
        weights=options,
        columns=options,
        trust_remote_code=options.trust_remote_code,
    )
    show(f"{results['pairs']} of {results['rows']} pairs, {results['bytes']:,} bytes in {options.out}")
    return results


class ReportFlags(Section):
    runs: Annotated[tuple[Path, ...], Argument("RUNS")] = Field(description="Run directories.")
    out: Path = Field(description="File to write.")
    format: Literal["html", "md"] | None = Field(None, description="Default: by the name of the file.")


def report(options: ReportFlags) -> dict[str, Any]:
    """Write one self-contained page from one or more run directories.

    Example: prefdistill report runs/quickstart runs/tvkd --out report.html
    """
    from prefdistill.core.errors import UserError
    from prefdistill.report import write_report

    out, runs = options.out, list(options.runs)
    formats = {"": "html", ".html": "html", ".htm": "html", ".md": "md"}
    if options.format is None and out.suffix.lower() not in formats:
        raise UserError(f"{out}: unknown file type. Give --out a name that ends in .html or .md, or say --format.")
    write_report(runs, out, format=options.format or formats[out.suffix.lower()])
    show(str(out))
    return {"out": str(out), "runs": [str(path) for path in runs]}
