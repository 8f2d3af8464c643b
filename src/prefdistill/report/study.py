"""Render a study from its results.json: a page, a table in markdown and a plot."""

import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefdistill import __version__
from prefdistill.core.files import write_json, write_text
from prefdistill.evaluation.results import Column, Estimate, Role, all_columns, baseline_of, roles_in
from prefdistill.report.figures import ForestRow, SweepPoint, forest, sweep
from prefdistill.report.format import duration, flat, printable, typeset
from prefdistill.report.svg import INK, Style, styles
from prefdistill.report.table import markdown_cell, markdown_table

Results = dict[str, Any]

# The page's colours, for a picture in a file of its own.
_ALONE = """
svg { color: #1d1d1b; background: #fcfcfa; font-family: system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --page: #fcfcfa; --muted: #62625d; --rule: #e0dfd9; --band: #e6e5df; --blue: #0072b2; --vermillion: #d55e00;
  --green: #009e73; --orange: #e69f00; --purple: #cc79a7; --sky: #56b4e9; --yellow: #d8c72a; }
@media (prefers-color-scheme: dark) {
  svg { color: #e6e5e0; background: #16181b; --page: #16181b; --muted: #a2a29c; --rule: #32363b; --band: #2b2f35;
    --blue: #4aa8e0; --vermillion: #ee7a2b; --green: #22b88d; --orange: #e9ad2e; --purple: #d993b8; --sky: #8accf2;
    --yellow: #f0e442; }
}
"""


def write_study(results: Results, out: Path) -> None:
    """Write results.json, table.md, plot.svg and study.html into `out`."""
    write_json(out / "results.json", results)
    write_text(out / "table.md", printable(render_markdown(results)))
    picture = plot(results)
    if picture:
        write_text(out / "plot.svg", alone(picture))
    else:
        (out / "plot.svg").unlink(missing_ok=True)
    write_text(out / "study.html", printable(render_page(results, picture)))


# -- in words ----------------------------------------------------------------------------------------------------------


def metric_of(results: Results) -> Column:
    """Return the metric that the study compares."""
    columns = {column.key: column for column in _columns(results)}
    return columns.get(results["metric"], Column(results["metric"], results["metric"]))


def _columns(results: Results) -> list[Column]:
    return all_columns({"methods": {}, "metrics": results["metrics"]})


def study_roles(results: Results) -> dict[str, Role]:
    """Return the declared role of every run of the cells."""
    return roles_in({"methods": results["roles"], "roles": results["roles"]})


def baseline(results: Results) -> str:
    """Return the run that the methods are compared with; "" before any cell is finished."""
    return baseline_of({"methods": results["roles"], "roles": results["roles"]}) or ""


def answers(results: Results) -> list[str]:
    """Return a sentence for each method: in how many cells its interval excludes zero, and its best and worst cell."""
    metric = metric_of(results)
    sentences = []
    for name in results["methods"]:
        cells = [(cell["cell"], estimate) for cell in results["cells"] if (estimate := _difference(cell, name, metric))]
        if not cells:
            continue
        above = sum(1 for _, e in cells if (interval := interval_of(e)) and interval[0] > 0)
        below = sum(1 for _, e in cells if (interval := interval_of(e)) and interval[1] < 0)
        ranked = sorted(cells, key=lambda cell: cell[1]["mean"])
        (worst, low), (best, high) = ranked[0], ranked[-1]
        text = (
            f"{name}: above {baseline(results)} in {above} of {len(cells)} cells and below it in {below} "
            f"(95 % interval excludes zero); highest {metric.format(high['mean'], sign=True)} ({best})"
        )
        text += f", lowest {metric.format(low['mean'], sign=True)} ({worst})." if len(cells) > 1 else "."
        sentences.append(text)
    return sentences


def caveat(results: Results) -> str:
    """Return what the errors are over, and how many intervals would exclude zero by chance."""
    seeds, cells = len(results["seeds"]), len(results["cells"])
    over = (
        f"Mean paired difference to {baseline(results)} ± standard error over {seeds} seeds, each a whole pipeline, "
        "and the 95 % interval by Student's t."
        if seeds > 1
        else f"One seed, {results['seeds'][0]}: errors are within a run, and say nothing about other seeds."
    )
    count = cells * len(results["methods"])
    chance = f" Of {count} such intervals about {max(round(count / 20), 1)} would exclude zero by chance alone."
    return over + (chance if count >= 10 else "")


def _difference(cell: dict[str, Any], name: str, metric: Column) -> dict[str, Any] | None:
    return cell["differences"].get(name, {}).get(metric.key)


def interval_of(estimate: dict[str, Any]) -> tuple[float, float] | None:
    """Return the 95 % interval of an estimate, None where there is none."""
    return None if estimate["low"] is None else (estimate["low"], estimate["high"])


def _text(estimate: dict[str, Any] | None, metric: Column, *, sign: bool = False) -> str:
    parsed = Estimate.parse(estimate) if estimate else None
    if estimate is None or parsed is None:
        return "-"
    text = parsed.text(metric, sign=sign)
    interval = interval_of(estimate) if sign else None
    if interval is None:
        return text
    return f"{text} [{metric.format(interval[0], sign=True)}, {metric.format(interval[1], sign=True)}]"


# -- tables ------------------------------------------------------------------------------------------------------------


def headline(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the study's table: a row per cell, the metric of start, teacher and baseline, the differences to it."""
    metric, roles = metric_of(results), study_roles(results)
    beside = [name for kind in ("start", "teacher", "baseline") for name, role in roles.items() if role.kind == kind]
    header = ["cell", "seeds", *beside, *(f"{name} − {baseline(results)}" for name in results["methods"])]
    rows = []
    for cell in results["cells"]:
        levels = [cell["methods"].get(name, {}).get(metric.key) for name in beside]
        differences = [_difference(cell, name, metric) for name in results["methods"]]
        rows.append(
            [
                cell["cell"],
                str(len(cell["seeds"])),
                *(_text(level, metric) for level in levels),
                *(_text(difference, metric, sign=True) for difference in differences),
            ]
        )
    return header, rows


def seed_by_seed(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the same differences for each seed."""
    metric = metric_of(results)
    header = ["cell", "method", *(f"seed {seed}" for seed in results["seeds"])]
    rows = []
    for cell in results["cells"]:
        for name in results["methods"]:
            estimate = _difference(cell, name, metric)
            values = dict(zip(cell["seeds"], estimate["values"], strict=True)) if estimate else {}
            shown = [metric.format(values[s], sign=True) if s in values else "-" for s in results["seeds"]]
            rows.append([cell["cell"], name, *shown])
    return header, rows


def other_metrics(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the differences on the other metrics."""
    described = results["metrics"]
    others = [c for c in _columns(results) if c.key != results["metric"] and described[c.key].get("in_table", True)]
    header = ["cell", "method", *(metric.label for metric in others)]
    rows = [
        [cell["cell"], name, *(_text(_without_interval(_difference(cell, name, m)), m, sign=True) for m in others)]
        for cell in results["cells"]
        for name in results["methods"]
    ]
    return header, rows if others else []


def teacher_terms(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return how well each term of the teacher, alone, orders the held-out pairs."""
    terms = list(dict.fromkeys(term for cell in results["cells"] for term in cell["margin_accuracy"]))
    metric = Column("accuracy", "margin accuracy")
    rows = [
        [cell["cell"], *(_text(_without_interval(cell["margin_accuracy"].get(t)), metric) for t in terms)]
        for cell in results["cells"]
        if cell["margin_accuracy"]
    ]
    if len({tuple(row[1:]) for row in rows}) == 1:  # the same teacher throughout
        rows = [["every cell", *rows[0][1:]]]
    return ["cell", *terms], rows


def _without_interval(estimate: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if estimate is None else {**estimate, "low": None, "high": None}


def tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables of a study with their titles; the first is the answer."""
    metric = metric_of(results)
    shown = [
        (f"{metric.label}: differences to {baseline(results)}", *headline(results)),
        ("Seed by seed", *seed_by_seed(results)),
        (f"Other metrics: differences to {baseline(results)}", *other_metrics(results)),
        ("Held-out pairs that each term of the teacher, alone, orders correctly", *teacher_terms(results)),
    ]
    if len(results["seeds"]) == 1:
        shown.pop(1)
    return [table for table in shown if table[2]]


def render_markdown(results: Results) -> str:
    """Return the study as markdown: question, answer, tables."""
    parts = [f"# {markdown_cell(results['study'])}", markdown_cell(results["question"])]
    lines = [f"- {markdown_cell(line)}" for line in [*answers(results), *_failed(results)]]
    parts += ["\n".join(lines) or "No results yet.", caveat(results)]
    for title, header, rows in tables(results):
        parts.append(f"## {markdown_cell(title)}")
        parts.append(
            markdown_table(
                [markdown_cell(h) for h in header],
                [[markdown_cell(c) for c in r] for r in rows],
                left=2 if header[1] == "method" else 1,
            )
        )
    return "\n\n".join(parts) + "\n"


def _failed(results: Results) -> list[str]:
    return [f"{one['cell']}, seed {one['seed']}: failed. {one['error']}" for one in results["failed"]]


# -- plot --------------------------------------------------------------------------------------------------------------


def plot(results: Results) -> Markup | None:
    """Return differences along x as lines, or by category as a forest plot; None where nothing was measured."""
    metric = metric_of(results)
    if not any(_difference(cell, name, metric) for cell in results["cells"] for name in results["methods"]):
        return None
    alt = " ".join([results["question"], *answers(results), caveat(results)])
    label = f"{metric.label}, difference to {baseline(results)}"
    if results["x"] is None:
        return _forest(results, metric, label, alt)
    groups = list(dict.fromkeys(cell["group"] for cell in results["cells"]))
    lines: dict[str, list[SweepPoint]] = {}
    roles, line_roles = study_roles(results), {}
    for name in results["methods"]:
        for group in groups:
            key, role = _line_name(name, group, groups), roles.get(name, Role())
            line_roles[key] = Role(role.kind, role.of and _line_name(role.of, group, groups))
            lines[key] = sorted(
                (float(cell["x"]), e["mean"], e["low"], e["high"], e["values"])
                for cell in results["cells"]
                if cell["group"] == group and (e := _difference(cell, name, metric)) is not None
            )
    lines = {name: line for name, line in lines.items() if line}
    drawn = styles({name: line_roles[name] for name in lines}, None)
    return sweep(
        lines, drawn, title=label, x_label=results["x_label"],
        log=results["x_scale"] == "log", alt=alt, key="study",
    )  # fmt: skip


def _line_name(name: str, group: str, groups: list[str]) -> str:
    return f"{name}, {group}" if len(groups) > 1 else name


def _forest(results: Results, metric: Column, label: str, alt: str) -> Markup:
    several = len(results["methods"]) > 1
    roles = study_roles(results)
    drawn = styles({name: roles.get(name, Role()) for name in results["methods"]}, None) if several else {}
    rows = []
    for cell in results["cells"]:
        for name in results["methods"]:
            if estimate := _difference(cell, name, metric):
                title = f"{cell['cell']}: {name}" if several else cell["cell"]
                text = _text(_without_interval(estimate), metric, sign=True)
                style = drawn.get(name, Style(INK))
                control = roles.get(name, Role()).is_control
                values = tuple(estimate["values"]) if len(estimate["values"]) > 1 else ()
                interval = (estimate["low"], estimate["high"])
                rows.append(ForestRow(title, estimate["mean"], *interval, text, style, control, values))
    base = baseline(results)
    return forest(
        rows, floor=None, left=f"below {base}", right=f"above {base} ({metric.label})",
        alt=f"{label}. {alt}", key="study", names_to=44,
    )  # fmt: skip


def alone(picture: str) -> str:
    """Return a figure of the page as a file of its own, with the page's colours, light or dark as the system is."""
    picture = str(picture)  # Markup would escape the replacements
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', picture)
    assert size is not None
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size[1]}" '
    picture = picture.replace("<svg ", f'{head}height="{size[2]}" ', 1)
    margin = f'viewBox="-12 -8 {int(size[1]) + 24} {int(size[2]) + 16}"'
    picture = picture.replace(size[0], margin, 1)
    return picture.replace("<title", f"<style>{_ALONE}</style><title", 1) + "\n"


# -- page --------------------------------------------------------------------------------------------------------------


def render_page(results: Results, picture: Markup | None) -> str:
    """Return the study as one self-contained HTML page."""
    from prefdistill.report.page import environment

    about = [("metric", metric_of(results).label), ("recipe", results["recipe"]), ("seeds", str(results["seeds"]))]
    about += [("x axis", results["x"])] if results["x"] else []
    about += [("time of the cells", duration(results["seconds"])), *flat(results["overrides"])]
    template = environment().get_template("study.html.j2")
    return template.render(
        results=results,
        answers=[typeset(line) for line in answers(results)],
        failed=_failed(results),
        caveat=caveat(results),
        picture=picture,
        tables=tables(results),
        about=about,
        environments=[flat(value) for value in results["environments"]],
        data=flat({seed: values[0] if len(values) == 1 else values for seed, values in results["data"].items()}),
        version=__version__,
    )
