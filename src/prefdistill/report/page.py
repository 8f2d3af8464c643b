"""Render the report as one self-contained HTML page or as GitHub markdown (`page.*.j2`), and write it to a file."""

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full, write_text
from prefdistill.core.paths import check_file
from prefdistill.report.format import fence, in_cell, markdown_cell, printable, typeset
from prefdistill.report.glossary import glossary_of
from prefdistill.report.load import load_runs
from prefdistill.report.sections import comparison_of, view_of

PAGE = "<!DOCTYPE html>\n"  # the first line of every page
STARTS = {"html": PAGE, "md": "# "}  # of the formats


def render_html(runs: list[Path]) -> str:
    """Return the report on one or several run directories as one HTML page that loads no other file."""
    return _render(runs, "page.html.j2")


def render_markdown(runs: list[Path]) -> str:
    """Return the report as GitHub markdown: the tables and texts of the page, without its figures."""
    return _render(runs, "page.md.j2")


def _render(runs: list[Path], template: str) -> str:
    loaded = load_runs(runs)
    several = len(loaded) > 1
    page = (
        environment()
        .get_template(template)
        .render(
            title=f"{len(loaded)} runs compared" if several else loaded[0]["name"],
            views=[view_of(run, f"run{i + 1}", len(loaded)) for i, run in enumerate(loaded)],
            comparison=comparison_of(loaded) if several else [],
            glossary=glossary_of(loaded),
            version=__version__,
        )
    )
    return printable(page)


def write_report(runs: list[Path], out: str | Path, format: str = "html") -> Path:
    """Render `runs` and write the page to `out` atomically. Returns `out`."""
    if format not in STARTS:
        raise UserError(f'unknown report format "{format}": use one of {", ".join(STARTS)}')
    check_file(Path(out), STARTS[format], "report")
    return save_page(_render([Path(run) for run in runs], f"page.{format}.j2"), Path(out), "the report")


def save_page(text: str, out: Path, what: str) -> Path:
    """Write a page atomically. Returns `out`.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        write_text(out, text)
    except OSError as error:
        if disk_full(error):  # not a mistake of the user
            raise
        raise UserError(f"{what} cannot be written to {out}: {error.strerror or error}") from None
    return out


@functools.cache
def environment() -> Any:
    """Return the jinja2 environment of the templates beside this file; all but those of markdown escape HTML."""
    templates = Environment(
        loader=PackageLoader("prefdistill.report", "."),
        autoescape=lambda name: not (name or "").endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"typeset": typeset, "md": markdown_cell, "cell": in_cell, "fence": fence}
    return templates
