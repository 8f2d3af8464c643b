"""The report of a run directory: one self-contained page with the comparison, its error bars and its controls.

    from prefdistill.report import method_table, verdict, write_report

This package only lays out; the statistics and the verdict are in `prefdistill.evaluation`. Importing it is cheap:
matplotlib and jinja2 are loaded when a page is rendered.
"""

from prefdistill.evaluation.verdict import verdict
from prefdistill.report.markdown import render_markdown
from prefdistill.report.page import render_html, write_report
from prefdistill.report.run import load_run
from prefdistill.report.table import method_table

__all__ = ["load_run", "method_table", "render_html", "render_markdown", "verdict", "write_report"]
