"""One calm page from a run directory: what was compared, what came out, and what that does not say.

    from prefdistill.report import method_table, verdict, write_report

Importing this package is cheap; matplotlib and jinja2 are loaded when a page is rendered.
"""

from prefdistill.report.markdown import render_markdown
from prefdistill.report.page import render_html, write_report
from prefdistill.report.run import load_run
from prefdistill.report.table import method_table, verdict

__all__ = ["load_run", "method_table", "render_html", "render_markdown", "verdict", "write_report"]
