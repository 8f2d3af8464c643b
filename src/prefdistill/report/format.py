"""Format values for the report: numbers, times, table cells and text of unknown origin."""

import json
import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

from prefdistill.evaluation.results import NOT_FINITE, Column, Estimate, clean, mapping, number

MAX_POINTS = 500  # of one scatter


def flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested values as dotted names and text."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{clean(key)}"
        if isinstance(item, dict) and item and prefix.count(".") < 4:
            rows += flat(item, f"{name}.")
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else string(item)
            rows.append((name, cut(text, 1_000)))
    return rows[:300]


def string(value: Any) -> str:
    """Return text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cut(text: str, limit: int) -> str:
    """Return at most `limit` characters, with a note where text was cut."""
    return text if len(text) <= limit else f"{text[:limit]} … (cut here: {len(text):,} characters in all)"


def duration(seconds: float) -> str:
    """Return a time in words: 94 -> "1 min 34 s"."""
    if not math.isfinite(seconds):
        return NOT_FINITE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def printable(text: str) -> str:
    """Return text with control characters as Unicode control pictures and lone surrogates as "?"."""
    pictures = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n\r"}
    return text.encode("utf-8", errors="replace").decode().translate(pictures)


def typeset(text: str) -> str:
    """Return text with a true minus before numbers, and no line break inside "0.1 ± 0.2" or "95 %"."""
    text = re.sub(r"(?<![\w.)])-(?=[\d.])", "−", text)
    return re.sub(r"(?<=\d) (?=[±%])|(?<=±) (?=\d)", "\u00a0", text)


def plural(n: int, one: str, many: str) -> str:
    """Return the singular for 1, else the plural."""
    return one if n == 1 else many


def natural(text: str) -> list[Any]:
    """Return a sort key that puts "seed-10" after "seed-2"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def cell_of(estimate: Estimate | None, column: Column, *, sign: bool = False, missing: str = "–") -> dict[str, Any]:
    """Return a cell of a table: the mean, its standard error, and whether it is not finite."""
    if estimate is None:
        return {"mean": missing, "se": "", "bad": False}
    mean, _, se = estimate.text(column, sign=sign).partition(" ± ")
    return {"mean": mean, "se": se, "bad": not estimate.finite}


def interval_of(estimate: Estimate | None, column: Column) -> str:
    """Return the 95 % interval of a difference as text, "" without repeats."""
    interval = estimate.interval() if estimate else None
    return f"{column.format(interval[0], sign=True)} to {column.format(interval[1], sign=True)}" if interval else ""


def correlation(points: list[tuple[float, float]]) -> float | None:
    """Return the correlation of pairs of numbers; None for one pair, or where nothing varies."""
    try:
        return statistics.correlation([x for x, _ in points], [y for _, y in points])
    except statistics.StatisticsError:
        return None


def points_of(value: Any) -> list[tuple[float, float]]:
    """Return the finite pairs of numbers in a list, at most as many as a scatter plot shows."""
    points = []
    for item in value if isinstance(value, list) else []:
        if isinstance(item, list) and len(item) == 2:
            x, y = number(item[0]), number(item[1])
            if x is not None and y is not None and math.isfinite(x) and math.isfinite(y):
                points.append((x, y))
    return points[:MAX_POINTS]


# -- markdown ----------------------------------------------------------------------------------------------------------


def markdown_cell(text: Any) -> str:
    """Return text that is safe in one cell of a markdown table: no HTML, links, images, cell or line breaks."""
    text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text)


def markdown_table(header: list[str], rows: list[list[str]], *, left: int = 1) -> str:
    """Return a GitHub table; the first `left` columns are text, the others numbers. Cells must be escaped."""
    align = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def in_cell(cell: dict[str, Any]) -> str:
    """Return a cell of a table as text: mean ± standard error."""
    return f"{cell['mean']} ± {cell['se']}" if cell["se"] else str(cell["mean"])


def fence(text: str, language: str = "") -> str:
    """Return a markdown code block whose fence is longer than any in `text`."""
    ticks = "`" * max(3, 1 + max((len(t) for t in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def form_text(form: Mapping[str, Any]) -> str:
    """Return the form in which a model read the conversations, in words; see `models.form`."""
    template, system, variables = (form.get(name) for name in ("chat_template", "system_prompt", "template_kwargs"))
    prefix = form.get("response_prefix")
    return "; ".join(
        part
        for part in (
            template and ("as plain text" if template == "plain" else f"chat template {clean(template)}"),
            system is not None and (f"system prompt {clean(system)!r}" if system else "no system prompt"),
            variables and ", ".join(f"{clean(name)} = {clean(value)}" for name, value in mapping(variables).items()),
            prefix is not None and f"responses begin after {clean(prefix)!r}",
        )
        if part
    )
