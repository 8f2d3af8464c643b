"""The page, the table and the plot of a study, from its results.json."""

import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefdistill import __version__
from prefdistill.core.files import write_json, write_text
from prefdistill.report.figures import INK, ForestRow, Style, SweepPoint, forest, styles, sweep
from prefdistill.report.table import Estimate, Metric, markdown_cell, markdown_table, metrics_of
from prefdistill.report.text import duration, flat, printable, typeset

Results = dict[str, Any]

# The page's colours, for a picture that stands alone.
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
    """results.json, table.md, plot.svg and study.html, into `out`."""
    write_json(out / "results.json", results)
    write_text(out / "table.md", printable(render_markdown(results)))
    picture = plot(results)
    if picture:
        write_text(out / "plot.svg", alone(picture))
    else:
        (out / "plot.svg").unlink(missing_ok=True)
    write_text(out / "study.html", printable(render_page(results, picture)))


# -- in words ----------------------------------------------------------------------------------------------------------


def metric_of(results: Results) -> Metric:
    found = {metric.key: metric for metric in metrics_of({"methods": {}, "metrics": results["metrics"]})}
    return found.get(results["metric"], Metric(results["metric"], results["metric"]))


def answers(results: Results) -> list[str]:
    """What can be said of each method: in how many cells its interval is clear of zero, and its best and worst one."""
    metric = metric_of(results)
    sentences = []
    for name in results["methods"]:
        found = [(cell["cell"], estimate) for cell in results["cells"] if (estimate := _difference(cell, name, metric))]
        if not found:
            continue
        above = sum(1 for _, e in found if (interval := interval_of(e)) and interval[0] > 0)
        below = sum(1 for _, e in found if (interval := interval_of(e)) and interval[1] < 0)
        ranked = sorted(found, key=lambda one: one[1]["mean"])
        (worst, low), (best, high) = ranked[0], ranked[-1]
        text = (
            f"{name}: above {results['baseline']} in {above} of {len(found)} cells and below it in {below} "
            f"(95 % interval clear of zero); highest {metric.format(high['mean'], sign=True)} ({best})"
        )
        text += f", lowest {metric.format(low['mean'], sign=True)} ({worst})." if len(found) > 1 else "."
        sentences.append(text)
    return sentences


def caveat(results: Results) -> str:
    """What the numbers are, and what they are not."""
    seeds, cells = len(results["seeds"]), len(results["cells"])
    over = (
        f"Mean paired difference to {results['baseline']} ± standard error over {seeds} seeds, each a whole pipeline, "
        "and the 95 % interval by Student's t."
        if seeds > 1
        else f"One seed, {results['seeds'][0]}: errors are those within a run, and say nothing about other seeds."
    )
    count = cells * len(results["methods"])
    chance = f" Of {count} such intervals about {max(round(count / 20), 1)} would miss zero by chance alone."
    return over + (chance if count >= 10 else "")


def _difference(cell: dict[str, Any], name: str, metric: Metric) -> dict[str, Any] | None:
    return cell["differences"].get(name, {}).get(metric.key)


def interval_of(estimate: dict[str, Any]) -> tuple[float, float] | None:
    return None if estimate["low"] is None else (estimate["low"], estimate["high"])


def _text(estimate: dict[str, Any] | None, metric: Metric, *, sign: bool = False) -> str:
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
    """The study's table: a row per cell, the metric of the baseline, and the differences to it."""
    metric, baseline = metric_of(results), results["baseline"]
    beside = [name for name in ("start", "teacher") if any(name in cell["methods"] for cell in results["cells"])]
    header = ["cell", "seeds", *(f"{name}" for name in (*beside, baseline))]
    header += [f"{name} − {baseline}" for name in results["methods"]]
    rows = []
    for cell in results["cells"]:
        levels = [cell["methods"].get(name, {}).get(metric.key) for name in (*beside, baseline)]
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
    """The same differences, one by one."""
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
    """Differences in everything else that was measured."""
    measured = metrics_of({"methods": {}, "metrics": results["metrics"]})
    others = [metric for metric in measured if metric.key != results["metric"]]
    header = ["cell", "method", *(metric.label for metric in others)]
    rows = [
        [cell["cell"], name, *(_text(_without_interval(_difference(cell, name, m)), m, sign=True) for m in others)]
        for cell in results["cells"]
        for name in results["methods"]
    ]
    return header, rows if others else []


def teacher_terms(results: Results) -> tuple[list[str], list[list[str]]]:
    """How well each term of the teacher, alone, orders the held-out pairs."""
    terms = list(dict.fromkeys(term for cell in results["cells"] for term in cell["margin_accuracy"]))
    metric = Metric("accuracy", "margin accuracy")
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
    """The tables of a study with their titles; the first is the answer."""
    metric = metric_of(results)
    found = [
        (f"{metric.label}: differences to {results['baseline']}", *headline(results)),
        ("Seed by seed", *seed_by_seed(results)),
        (f"Everything else that was measured: differences to {results['baseline']}", *other_metrics(results)),
        ("Held-out pairs that each term of the teacher orders right, by itself", *teacher_terms(results)),
    ]
    if len(results["seeds"]) == 1:
        found.pop(1)
    return [table for table in found if table[2]]


def render_markdown(results: Results) -> str:
    """The study as markdown: question, answer, tables."""
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
    """Differences along x as lines, or by category as a forest; None where nothing was measured."""
    metric = metric_of(results)
    if not any(_difference(cell, name, metric) for cell in results["cells"] for name in results["methods"]):
        return None
    alt = " ".join([results["question"], *answers(results), caveat(results)])
    label = f"{metric.label}, difference to {results['baseline']}"
    if results["x"] is None:
        return _forest(results, metric, label, alt)
    groups = list(dict.fromkeys(cell["group"] for cell in results["cells"]))
    lines: dict[str, list[SweepPoint]] = {}
    for name in results["methods"]:
        for group in groups:
            key = f"{name}, {group}" if len(groups) > 1 else name
            lines[key] = sorted(
                (float(cell["x"]), e["mean"], e["low"], e["high"], e["values"])
                for cell in results["cells"]
                if cell["group"] == group and (e := _difference(cell, name, metric)) is not None
            )
    lines = {name: line for name, line in lines.items() if line}
    return sweep(
        lines, styles(lines, results["baseline"]), title=label, x_label=results["x_label"],
        log=results["x_scale"] == "log", alt=alt, key="study",
    )  # fmt: skip


def _forest(results: Results, metric: Metric, label: str, alt: str) -> Markup:
    several = len(results["methods"]) > 1
    drawn = styles(results["methods"], results["baseline"]) if several else {}
    rows = []
    for cell in results["cells"]:
        for name in results["methods"]:
            if estimate := _difference(cell, name, metric):
                title = f"{cell['cell']}: {name}" if several else cell["cell"]
                text = _text(_without_interval(estimate), metric, sign=True)
                style = drawn.get(name, Style(INK))
                control = name in results["controls"]
                values = tuple(estimate["values"]) if len(estimate["values"]) > 1 else ()
                interval = (estimate["low"], estimate["high"])
                rows.append(ForestRow(title, estimate["mean"], *interval, text, style, control, values))
    baseline = results["baseline"]
    return forest(
        rows, floor=None, left=f"below {baseline}", right=f"above {baseline} ({metric.label})",
        alt=f"{label}. {alt}", key="study", names_to=44,
    )  # fmt: skip


def alone(picture: str) -> str:
    """A figure of a page as a file of its own, with the page's colours, light or dark as the reader's system is."""
    picture = str(picture)  # Markup would escape what replaces its parts
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', picture)
    assert size is not None
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size[1]}" '
    picture = picture.replace("<svg ", f'{head}height="{size[2]}" ', 1)
    margin = f'viewBox="-12 -8 {int(size[1]) + 24} {int(size[2]) + 16}"'
    picture = picture.replace(size[0], margin, 1)
    return picture.replace("<title", f"<style>{_ALONE}</style><title", 1) + "\n"


# -- page --------------------------------------------------------------------------------------------------------------


def render_page(results: Results, picture: Markup | None) -> str:
    """One self-contained HTML page."""
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
