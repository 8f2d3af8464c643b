"""Tables of results.json: methods by metrics, as plain text for a terminal and as GitHub markdown."""

import re
import unicodedata
from typing import Any

from prefdistill.evaluation.results import Results, clean
from prefdistill.report.format import cell_of, in_cell, markdown_cell, markdown_table

MISSING = "-"
WIDTH = 100  # columns of a terminal


def method_table(raw: dict[str, Any] | Results, *, markdown: bool = False) -> str:
    """Return methods by metrics: mean ± standard error, and the paired difference of the headline to the baseline.

    Plain text for a terminal is at most 100 columns wide: further metrics go into a second block below.
    """
    results = Results(raw)
    names, headline, baseline = list(results.methods), results.headline, results.baseline
    columns = [(c.label, [cell_of(results.score(n, c), c, missing=MISSING) for n in names]) for c in results.columns]
    differences = [results.difference(name) for name in names]
    if headline is not None and baseline is not None and any(differences):
        cells = [cell_of(d, headline, sign=True, missing=MISSING) for d in differences]
        cells[names.index(baseline)] = {"mean": "baseline", "se": ""}
        columns.insert(1, (f"difference to {results.display_name(baseline)}", cells))
    if markdown:
        header = ["method", *(markdown_cell(label) for label, _ in columns)]
        rows = [
            [f"**{markdown_cell(n)}**" if n == baseline else markdown_cell(n), *(in_cell(c[i]) for _, c in columns)]
            for i, n in enumerate(names)
        ]
        return markdown_table(header, rows)
    text = "\n\n".join(_blocks([_fit(clean(n), 30) for n in names], columns))
    repeated = next((d for d in differences if d is not None and d.repeated), None)
    if repeated is None:
        return text
    return f"{text}\n\n± is the standard error of the mean{results.over(repeated)}; differences are paired."


def _blocks(names: list[str], columns: list[tuple[str, list[dict[str, Any]]]]) -> list[str]:
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


def _column(label: str, cells: list[dict[str, Any]]) -> list[str]:
    """Return header lines, then cells, all padded to one width; means and standard errors are aligned separately."""
    numbers = [cell for cell in cells if re.match(r"[+-]?[\d.]", cell["mean"])]
    means = max((width(cell["mean"]) for cell in numbers), default=0)
    errors = max((width(cell["se"]) for cell in numbers), default=0)
    body = []
    for cell in cells:
        error = f" ± {_pad(cell['se'], errors, right=True)}" if cell["se"] else " " * (errors and errors + 3)
        number = _pad(cell["mean"], means, right=True) + error
        body.append(number if cell in numbers else cell["mean"])  # "baseline", "not finite", "-"
    body_width = max(map(width, body), default=0)
    head = _wrap(_fit(label, 48), max(body_width, 14))
    full = max(body_width, *map(width, head))
    return [_pad(x, full, right=True) for x in head] + [_pad(x, full, right=True) for x in body]


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
