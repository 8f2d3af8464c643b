"""Render the report as one self-contained HTML page (`page.html.j2`, which escapes), and write it to a file."""

import functools
from pathlib import Path
from typing import Any

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full, write_text
from prefdistill.core.paths import check_file
from prefdistill.report.format import printable, typeset
from prefdistill.report.markdown import render_markdown
from prefdistill.report.reading import reading_of
from prefdistill.report.run import load_runs
from prefdistill.report.sections import comparison_of, title_of, view_of

PAGE = "<!DOCTYPE html>\n"  # the first line of every page


def render_html(runs: list[Path]) -> str:
    """Return the report on one or several run directories as one HTML page that loads no other file."""
    loaded = load_runs(runs)
    views = [view_of(run, f"run{i + 1}", len(loaded)) for i, run in enumerate(loaded)]
    template = environment().get_template("page.html.j2")
    html = template.render(
        title=title_of(loaded),
        views=views,
        comparison=comparison_of(loaded) if len(loaded) > 1 else [],
        reading=reading_of(loaded),
        version=__version__,
    )
    return printable(html)


def write_report(runs: list[Path], out: str | Path, format: str = "html") -> Path:
    """Render `runs` and write the page to `out` atomically. Returns `out`."""
    renderers = {"html": (render_html, PAGE), "md": (render_markdown, "# ")}
    if format not in renderers:
        raise UserError(f'unknown report format "{format}": use one of {", ".join(renderers)}')
    render, start = renderers[format]
    check_file(Path(out), start, "report")
    return save_page(render([Path(run) for run in runs]), Path(out), "the report")


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
    """Return the jinja2 environment of the templates beside this file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("prefdistill.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["typeset"] = typeset
    return templates
