"""Tables of results.json: methods by metrics, as plain text for a terminal and as GitHub markdown."""

import re
import unicodedata
from typing import Any

from prefdistill.evaluation.results import (
    Column,
    Estimate,
    Results,
    all_columns,
    baseline_of,
    clean,
    columns_of,
    difference,
    display_name,
    headline_column,
    mapping,
    score,
)
from prefdistill.evaluation.verdict import over

MISSING = "-"
WIDTH = 100  # columns of a terminal


def markdown_cell(text: Any) -> str:
    """Return text that is safe in one cell of a markdown table: no HTML, links, images, cell or line breaks."""
    text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text)


def markdown_table(header: list[str], rows: list[list[str]], *, left: int = 1) -> str:
    """Return a GitHub table; the first `left` columns are text, the others numbers. Cells must be escaped."""
    align = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def method_table(results: Results, *, markdown: bool = False) -> str:
    """Return methods by metrics: mean ± standard error, and the paired difference of the headline to the baseline.

    Plain text for a terminal is at most 100 columns wide: further metrics go into a second block below.
    """
    headline, baseline = headline_column(results), baseline_of(results)
    names = list(mapping(results.get("methods")))
    columns = [(c.label, [_cells(score(results, n, c), c) for n in names]) for c in columns_of(results)]
    differences = [difference(results, name, headline) for name in names]
    if headline is not None and baseline is not None and any(differences):
        cells = [
            ("baseline", "") if n == baseline else _cells(d, headline, sign=True)
            for n, d in zip(names, differences, strict=True)
        ]
        columns.insert(1, (f"difference to {display_name(results, baseline)}", cells))

    if markdown:
        header = ["method", *(markdown_cell(label) for label, _ in columns)]
        rows = [
            [f"**{markdown_cell(n)}**" if n == baseline else markdown_cell(n), *(_join(c[i]) for _, c in columns)]
            for i, n in enumerate(names)
        ]
        return markdown_table(header, rows)
    return "\n\n".join(_blocks([_fit(clean(n), 30) for n in names], columns)) + _footnote(results, differences)


def _cells(estimate: Estimate | None, column: Column, *, sign: bool = False) -> tuple[str, str]:
    if estimate is None:
        return MISSING, ""
    mean, _, se = estimate.text(column, sign=sign).partition(" ± ")
    return mean, se


def _join(cell: tuple[str, str]) -> str:
    return f"{cell[0]} ± {cell[1]}" if cell[1] else cell[0]


def _blocks(names: list[str], columns: list[tuple[str, list[tuple[str, str]]]]) -> list[str]:
    """Return plain-text tables, each at most WIDTH wide, that together hold all columns."""
    first = [*names, "method"]
    name_width = max(map(width, first))
    blocks: list[list[list[str]]] = []
    used = WIDTH + 1
    for label, cells in columns:
        column = _column(label, cells)
        if used + 2 + width(column[-1]) > WIDTH:
            blocks.append([])
            used = name_width
        blocks[-1].append(column)
        used += 2 + width(column[-1])
    texts = []
    for block in blocks or [[]]:
        heads = [column[: len(column) - len(names)] for column in block]
        height = max((len(h) for h in heads), default=1)
        lines = []
        for i in range(height):
            row = [" " * width(h[-1]) if i < height - len(h) else h[i - height + len(h)] for h in heads]
            lines.append("  ".join([_pad("method" if i == height - 1 else "", name_width), *row]).rstrip())
        rule = "  ".join("-" * w for w in [name_width, *(width(h[-1]) for h in heads)])
        body = [
            "  ".join([_pad(n, name_width), *(c[len(h) + i] for c, h in zip(block, heads, strict=True))]).rstrip()
            for i, n in enumerate(names)
        ]
        texts.append("\n".join([*lines, rule, *body]))
    return texts


def _column(label: str, cells: list[tuple[str, str]]) -> list[str]:
    """Return header lines, then cells, all padded to one width; means and standard errors are aligned separately."""
    numbers = [(mean, se) for mean, se in cells if re.match(r"[+-]?[\d.]", mean)]
    means = max((width(mean) for mean, _ in numbers), default=0)
    errors = max((width(se) for _, se in numbers), default=0)
    tail = errors + 3 if errors else 0
    body = []
    for mean, se in cells:
        lead = _pad(mean, means, right=True)
        if (mean, se) not in numbers:  # "baseline", "not finite", "-"
            body.append(mean)
        else:
            body.append(f"{lead} ± {_pad(se, errors, right=True)}" if se else lead + " " * tail)
    body_width = max(map(width, body), default=0)
    head = _wrap(_fit(label, 48), max(body_width, 14))
    full = max(body_width, *map(width, head))
    return [_pad(x, full, right=True) for x in head] + [_pad(x, full, right=True) for x in body]


def _footnote(results: Results, differences: list[Estimate | None]) -> str:
    estimate = next((d for d in differences if d is not None and d.repeated), None)
    if estimate is None:
        return ""
    return f"\n\n± is the standard error of the mean{over(results, estimate)}; differences are paired."


def width(text: str) -> int:
    """Return the columns a text takes in a terminal: wide East Asian characters two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, to: int, *, right: bool = False) -> str:
    space = " " * max(0, to - width(text))
    return space + text if right else text + space


def _fit(text: str, to: int) -> str:
    if width(text) <= to:
        return text
    while width(text) > to - 3:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, to: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and width(lines[-1]) + 1 + width(word) > to:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def compare_runs(runs: list[Results]) -> list[tuple[Column, list[str], list[list[Estimate | None]]]]:
    """Return the metrics that all runs measured, each with the methods (rows) and every run's score (columns)."""
    if not runs:
        return []
    shared = [c for c in columns_of(runs[0]) if all(c.key in {o.key for o in all_columns(r)} for r in runs)]
    names = list(dict.fromkeys(n for r in runs for n in mapping(r.get("methods"))))
    return [(c, names, [[score(r, n, c) for r in runs] for n in names]) for c in shared]
