"""The report of a run directory: one self-contained page with the comparison, its error bars and its controls.

    from prefdistill.report import method_table, verdict, write_report

This package only lays out; the statistics and the verdict are in `prefdistill.evaluation`. Importing it is cheap:
matplotlib and jinja2 are loaded when a page is rendered.
"""

from typing import TYPE_CHECKING

from prefdistill.core.lazy import lazy_imports

if TYPE_CHECKING:
    from prefdistill.evaluation.verdict import verdict
    from prefdistill.report.load import load_run
    from prefdistill.report.page import render_html, render_markdown, write_report
    from prefdistill.report.table import method_table

__all__, __getattr__, __dir__ = lazy_imports(__name__)
