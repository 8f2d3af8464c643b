"""Render the report as GitHub markdown; text from a model or data is escaped by `markdown_cell` or fenced."""

import re
from pathlib import Path
from typing import Any

from prefdistill.evaluation.results import Column, Estimate, Results, clean, mapping
from prefdistill.evaluation.verdict import verdict
from prefdistill.report.format import cell_of, cut, flat, printable
from prefdistill.report.reading import reading_of
from prefdistill.report.responses import reward_model_of, samples_of, tables_by_length
from prefdistill.report.run import Run, load_runs
from prefdistill.report.sections import TEXT_BUDGET, comparison_of, facts_of, notes_of, stages_of, title_of
from prefdistill.report.table import markdown_cell, markdown_table, method_table
from prefdistill.report.teacher import gauge_sentence
from prefdistill.report.warnings import warnings_of


def render_markdown(runs: list[Path]) -> str:
    """Return the report as GitHub markdown: the tables and texts of the page, without its figures."""
    loaded = load_runs(runs)
    parts = [f"# {markdown_cell(title_of(loaded))}"]
    if len(loaded) > 1:
        parts += _comparison_parts(loaded)
    for run in loaded:
        parts += _run_parts(run, heading="## " if len(loaded) > 1 else "", budget=TEXT_BUDGET // len(loaded))
    parts += ["## How to read this", "\n".join(f"- **{term}**: {text}" for term, text in reading_of(loaded))]
    return printable("\n\n".join(part for part in parts if part) + "\n")


def _run_parts(run: Run, *, heading: str, budget: int) -> list[str]:
    results: Results = run["results"]
    level = "#" * (3 if heading else 2)
    parts = [f"{heading}{markdown_cell(run['name'])}"] if heading else []
    parts.append(f"**{markdown_cell(verdict(results))}**")
    about = [clean(results.get("task", "")), "; ".join(facts_of(results))]
    parts += [markdown_cell(line) for line in about if line]
    warnings = warnings_of(run)
    if warnings:
        parts.append("> [!WARNING]\n" + "\n".join(f"> - {markdown_cell(w)}" for w in warnings))
    parts += [f"{level} Methods", method_table(results, markdown=True)]
    labels = mapping(results.get("labels"))
    named = [f"- {markdown_cell(n)}: {markdown_cell(labels[n])}" for n in results["methods"] if labels.get(n)]
    parts.append("\n".join(named))

    by_length = tables_by_length(results)
    if (reward_model := reward_model_of(results)) or by_length:
        parts += [f"{level} Responses", markdown_cell(reward_model or "")]
    for table in by_length:
        header = [f"{markdown_cell(table['metric'])}, by words of the reference", *map(markdown_cell, table["ranges"])]
        rows = [[markdown_cell(row["name"]), *map(_text, row["cells"])] for row in table["rows"]]
        parts.append(markdown_table(header, rows))
    accuracy = Column("accuracy", "margin accuracy", True)
    terms = [
        [markdown_cell(t), e.text(accuracy)]
        for t, v in mapping(results.get("margin_accuracy")).items()
        if (e := Estimate.parse(v))
    ]
    if terms:
        parts += [
            f"{level} Margin accuracy",
            markdown_table(["term", "fraction of held-out pairs ordered correctly"], terms),
        ]
    if gauge := gauge_sentence(results):
        parts.append(gauge)
    shaping = []
    for name, value in mapping(results.get("shaping")).items():
        about_ = mapping(value)
        numbers = [cell_of(Estimate.parse(about_.get(k)), accuracy)["mean"] for k in ("mean", "std", "dpo_margin_std")]
        shaping.append([markdown_cell(name), *numbers])
    if shaping:
        header = ["method", "mean shaping margin", "its spread", "spread of the DPO margin"]
        parts += [f"{level} Shaping margin", markdown_table(header, shaping)]

    samples = samples_of(results, budget)
    if samples:
        parts.append(f"{level} Samples")
        for sample in samples:
            parts.append("Prompt:\n\n" + _fence(sample["prompt"]))
            for card in sample["cards"]:
                score = f" (score {card['score']})" if card["score"] else ""
                parts.append(f"{markdown_cell(card['name'])}{score}:\n\n" + _fence(card["text"]))
    stages = stages_of(results)
    if stages:
        keys = ("time", "memory", "disk", "reused")
        rows = [[markdown_cell(r["name"]), str(r["runs"]), *(r[key] for key in keys)] for r in stages["rows"]]
        parts += [
            f"{level} Time, memory, disk",
            markdown_table(["stage", "runs", "time", "peak memory", "disk", ""], rows),
        ]
    notes = [f"- {markdown_cell(note)}" for note in notes_of(run)]
    if notes:
        parts += [f"{level} Notes", "\n".join(notes)]
    parts += _provenance_parts(run, level)
    return parts


def _provenance_parts(run: Run, level: str) -> list[str]:
    parts = []
    if run["recipe"]:
        recipe = _fence(cut(run["recipe"], 40_000), "yaml")
        parts.append(f"<details><summary>Recipe</summary>\n\n{recipe}\n\n</details>")
    rows = [[markdown_cell(k), markdown_cell(v)] for k, v in flat(run["environment"] or {})]
    if rows:
        parts.append(markdown_table(["environment", ""], rows, left=2))
    return [f"{level} Provenance", *parts] if parts else []


def _comparison_parts(runs: list[Run]) -> list[str]:
    parts = ["## Comparison"]
    for table in comparison_of(runs):
        rows = []
        for row in table["rows"]:
            cells = []
            for cell in row["cells"]:
                value, d = cell["value"], cell["difference"]
                cells.append(f"{_text(value)} ({_text(d)})" if d else _text(value))
            rows.append([markdown_cell(row["name"]), *cells])
        header = [markdown_cell(table["metric"]), *map(markdown_cell, table["runs"])]
        parts.append(markdown_table(header, rows))
    if len(parts) == 1:
        parts.append("The runs share no metric.")
    else:
        parts.append("In brackets: the paired difference to each run's own baseline.")
    return parts


def _text(cell: dict[str, Any]) -> str:
    return f"{cell['mean']} ± {cell['se']}" if cell["se"] else str(cell["mean"])


def _fence(text: str, language: str = "") -> str:
    """Return a code block whose fence is longer than any in `text`."""
    ticks = "`" * max(3, 1 + max((len(t) for t in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"
