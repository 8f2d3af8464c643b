"""Render a study from its results.json: a page, a table in markdown and a plot."""

import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefdistill import __version__
from prefdistill.core.files import write_json, write_text
from prefdistill.evaluation.results import Column, Estimate, Results, Role
from prefdistill.report.figures import ForestRow, SweepPoint, forest, sweep
from prefdistill.report.format import duration, flat, markdown_cell, markdown_table, printable, typeset
from prefdistill.report.page import environment
from prefdistill.report.svg import INK, Style, styles

Table = tuple[list[str], list[list[str]]]  # header, rows
Cell = dict[str, Any]  # of results.json


def write_study(results: dict[str, Any], out: Path) -> None:
    """Write results.json, table.md, plot.svg and study.html into `out`."""
    view = StudyView(results)
    write_json(out / "results.json", results)
    write_text(out / "table.md", printable(view.markdown()))
    picture = view.plot()
    if picture:
        write_text(out / "plot.svg", alone(picture))
    else:
        (out / "plot.svg").unlink(missing_ok=True)
    write_text(out / "study.html", printable(view.page(picture)))


def answers(results: dict[str, Any]) -> list[str]:
    """Return a sentence for each method: in how many cells its interval excludes zero, and its best and worst cell."""
    return StudyView(results).answers()


def render_markdown(results: dict[str, Any]) -> str:
    """Return the study as markdown: question, answer, tables."""
    return StudyView(results).markdown()


class StudyView:
    """The results of a study in words, tables and a plot."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results, self.cells, self.methods = results, results["cells"], results["methods"]
        rows = Results({**results, "methods": {name: {} for name in results["roles"]}})
        self.columns = rows.all_columns
        key = results["metric"]
        self.metric = next((column for column in self.columns if column.key == key), Column(key, key))
        self.roles, self.baseline = rows.roles, rows.baseline or ""  # none before any cell is finished
        self.failed = [f"{one['cell']}, seed {one['seed']}: failed. {one['error']}" for one in results["failed"]]

    def difference(self, cell: Cell, name: str, metric: Column | None = None) -> dict[str, Any] | None:
        return cell["differences"].get(name, {}).get((metric or self.metric).key)

    # -- in words ------------------------------------------------------------------------------------------------------

    def answers(self) -> list[str]:
        sentences = []
        for name in self.methods:
            cells = [(cell["cell"], estimate) for cell in self.cells if (estimate := self.difference(cell, name))]
            if not cells:
                continue
            above = sum(e["low"] is not None and e["low"] > 0 for _, e in cells)
            below = sum(e["high"] is not None and e["high"] < 0 for _, e in cells)
            ranked = sorted(cells, key=lambda cell: cell[1]["mean"])
            (worst, low), (best, high) = ranked[0], ranked[-1]
            text = (
                f"{name}: above {self.baseline} in {above} of {len(cells)} cells and below it in {below} "
                f"(95 % interval excludes zero); highest {self.metric.format(high['mean'], sign=True)} ({best})"
            )
            text += f", lowest {self.metric.format(low['mean'], sign=True)} ({worst})." if len(cells) > 1 else "."
            sentences.append(text)
        return sentences

    def caveat(self) -> str:
        """Return what the errors are over, and how many intervals would exclude zero by chance."""
        seeds, count = self.results["seeds"], len(self.cells) * len(self.methods)
        estimates = [e for cell in self.cells for name in self.methods if (e := self.difference(cell, name))]
        prompts = max((e.get("prompts") or 0 for e in estimates), default=0)
        over = (
            f"Mean paired difference to {self.baseline} ± standard error over {len(seeds)} seeds"
            + (f" and {prompts} test prompts, which all seeds share" if prompts else ", each a whole pipeline")
            + ", and the 95 % interval by Student's t."
            if len(seeds) > 1
            else f"One seed, {seeds[0]}: errors are within a run, and say nothing about other seeds."
        )
        chance = f" Of {count} such intervals about {max(round(count / 20), 1)} would exclude zero by chance alone."
        return over + (chance if count >= 10 else "")

    # -- tables --------------------------------------------------------------------------------------------------------

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Return the tables of the study with their titles; the first is the answer."""
        shown = [
            (f"{self.metric.label}: differences to {self.baseline}", self.headline()),
            ("Seed by seed", self.seed_by_seed() if len(self.results["seeds"]) > 1 else ([], [])),
            (f"Other metrics: differences to {self.baseline}", self.other_metrics()),
            ("Held-out pairs that each term of the teacher, alone, orders correctly", self.teacher_terms()),
            ("The same where length says nothing", self.teacher_terms("length_controlled_margins")),
        ]
        return [(title, header, rows) for title, (header, rows) in shown if rows]

    def headline(self) -> Table:
        """Return a row per cell: the metric of start, teacher and baseline, and the differences to it."""
        beside = [n for kind in ("start", "teacher", "baseline") for n, role in self.roles.items() if role.kind == kind]
        rows = [
            [
                cell["cell"],
                str(len(cell["seeds"])),
                *(_text(cell["methods"].get(name, {}).get(self.metric.key), self.metric) for name in beside),
                *(_text(self.difference(cell, name), self.metric, sign=True, span=True) for name in self.methods),
            ]
            for cell in self.cells
        ]
        return ["cell", "seeds", *beside, *(f"{name} − {self.baseline}" for name in self.methods)], rows

    def seed_by_seed(self) -> Table:
        seeds, rows = self.results["seeds"], []
        for cell in self.cells:
            for name in self.methods:
                estimate = self.difference(cell, name)
                values = dict(zip(cell["seeds"], estimate["values"], strict=True)) if estimate else {}
                shown = [self.metric.format(values[s], sign=True) if s in values else "-" for s in seeds]
                rows.append([cell["cell"], name, *shown])
        return ["cell", "method", *(f"seed {seed}" for seed in seeds)], rows

    def other_metrics(self) -> Table:
        others = [column for column in self.columns if column.key != self.metric.key and column.in_table]
        rows = [
            [cell["cell"], name, *(_text(self.difference(cell, name, metric), metric, sign=True) for metric in others)]
            for cell in self.cells
            for name in self.methods
        ]
        return ["cell", "method", *(metric.label for metric in others)], rows if others else []

    def teacher_terms(self, part: str = "margin_accuracy") -> Table:
        """Return how well each term of the teacher, alone, orders the held-out pairs."""
        terms = list(dict.fromkeys(term for cell in self.cells for term in cell.get(part, {})))
        metric = Column("accuracy", "margin accuracy")
        rows = [
            [cell["cell"], *(_text(cell[part].get(term), metric) for term in terms)]
            for cell in self.cells
            if cell.get(part)
        ]
        if len({tuple(row[1:]) for row in rows}) == 1:  # the same teacher throughout
            rows = [["every cell", *rows[0][1:]]]
        return ["cell", *terms], rows

    # -- files ---------------------------------------------------------------------------------------------------------

    def markdown(self) -> str:
        parts = [f"# {markdown_cell(self.results['study'])}", markdown_cell(self.results["question"])]
        lines = [f"- {markdown_cell(line)}" for line in [*self.answers(), *self.failed]]
        parts += ["\n".join(lines) or "No results yet.", self.caveat()]
        for title, header, rows in self.tables():
            escaped = [[markdown_cell(cell) for cell in row] for row in (header, *rows)]
            table = markdown_table(escaped[0], escaped[1:], left=2 if header[1] == "method" else 1)
            parts += [f"## {markdown_cell(title)}", table]
        return "\n\n".join(parts) + "\n"

    def page(self, picture: Markup | None) -> str:
        """Return the study as one self-contained HTML page."""
        results = self.results
        about = [("metric", self.metric.label), ("recipe", results["recipe"]), ("seeds", str(results["seeds"]))]
        about += [("x axis", results["x"])] if results["x"] else []
        about += [("time of the cells", duration(results["seconds"])), *flat(results["overrides"])]
        page: str = (
            environment()
            .get_template("study.html.j2")
            .render(
                results=results,
                answers=[typeset(line) for line in self.answers()],
                failed=self.failed,
                caveat=self.caveat(),
                picture=picture,
                tables=self.tables(),
                about=about,
                environments=[flat(value) for value in results["environments"]],
                data=flat(
                    {seed: values[0] if len(values) == 1 else values for seed, values in results["data"].items()}
                ),
                version=__version__,
            )
        )
        return page

    def plot(self) -> Markup | None:
        """Return differences along x as lines, or by category as a forest plot; None where nothing was measured."""
        if not any(self.difference(cell, name) for cell in self.cells for name in self.methods):
            return None
        alt = " ".join([self.results["question"], *self.answers(), self.caveat()])
        label = f"{self.metric.label}, difference to {self.baseline}"
        return self._forest(f"{label}. {alt}") if self.results["x"] is None else self._sweep(label, alt)

    def _sweep(self, label: str, alt: str) -> Markup:
        results = self.results
        groups = list(dict.fromkeys(cell["group"] for cell in self.cells))
        lines: dict[str, list[SweepPoint]] = {}
        roles: dict[str, Role] = {}
        for name in self.methods:
            for group in groups:
                suffix, role = f", {group}" if len(groups) > 1 else "", self.roles.get(name, Role())
                points = sorted(
                    (float(cell["x"]), e["mean"], e["low"], e["high"], e["values"])
                    for cell in self.cells
                    if cell["group"] == group and (e := self.difference(cell, name)) is not None
                )
                if points:
                    lines[name + suffix] = points
                    roles[name + suffix] = Role(role.kind, role.of and role.of + suffix)
        return sweep(
            lines, styles(roles, None), title=label, x_label=results["x_label"], log=results["x_scale"] == "log",
            alt=alt, key="study",
        )  # fmt: skip

    def _forest(self, alt: str) -> Markup:
        several = len(self.methods) > 1
        roles = {name: self.roles.get(name, Role()) for name in self.methods}
        drawn = styles(roles, None) if several else {}
        rows = []
        for cell in self.cells:
            for name in self.methods:
                if e := self.difference(cell, name):
                    title = f"{cell['cell']}: {name}" if several else cell["cell"]
                    text, style = _text(e, self.metric, sign=True), drawn.get(name, Style(INK))
                    values = tuple(e["values"]) if len(e["values"]) > 1 else ()
                    control = roles[name].is_control
                    rows.append(ForestRow(title, e["mean"], e["low"], e["high"], text, style, control, values))
        right = f"above {self.baseline} ({self.metric.label})"
        return forest(rows, floor=None, left=f"below {self.baseline}", right=right, alt=alt, key="study", names_to=44)


def _text(estimate: dict[str, Any] | None, metric: Column, *, sign: bool = False, span: bool = False) -> str:
    """Return "mean ± standard error", with the 95 % interval if `span`."""
    parsed = Estimate.parse(estimate)
    if estimate is None or parsed is None:
        return "-"
    text = parsed.text(metric, sign=sign)
    if not span or estimate["low"] is None:
        return text
    return f"{text} [{metric.format(estimate['low'], sign=True)}, {metric.format(estimate['high'], sign=True)}]"


def alone(picture: str) -> str:
    """Return a figure of the page as a file of its own, with the page's colours, light or dark as the system is."""
    picture = str(picture)  # Markup would escape the replacements
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', picture)
    assert size is not None
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size[1]}" '
    picture = picture.replace("<svg ", f'{head}height="{size[2]}" ', 1)
    margin = f'viewBox="-12 -8 {int(size[1]) + 24} {int(size[2]) + 16}"'
    picture = picture.replace(size[0], margin, 1)
    look = environment().get_template("look.css").render()
    own = "svg { color: var(--ink); background: var(--page); font-family: var(--sans); }"
    return picture.replace("<title", f"<style>\n{look}\n{own}\n</style><title", 1) + "\n"
