"""Format a checkup as text: the findings, most severe first, then the facts."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from prefdistill.core.text import size
from prefdistill.experiment.doctor.findings import SEVERITIES, Finding

if TYPE_CHECKING:
    from prefdistill.experiment.doctor.examine import Checkup

WIDTH = 110


def as_text(checkup: Checkup) -> str:
    """Return a checkup as text for a terminal."""
    blocks = [_finding(finding) for finding in checkup.findings]
    counts = {s: sum(f.severity == s for f in checkup.findings) for s in SEVERITIES}
    total = ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s, n in counts.items())
    return "\n\n".join([*blocks, *_facts(checkup.facts), total])


def _finding(finding: Finding) -> str:
    counted = f"{finding.count:,} of {finding.of:,} rows of " if finding.rows else ""
    where = f"{counted}{finding.data}: " if finding.data else ""
    lines = _wrap(f"{finding.severity:8} ", f"{where}{finding.message}")
    if finding.example:
        lines += _wrap("         ", finding.example)
    lines += _wrap("         > ", f"{finding.fix}  [{finding.check}]")
    return "\n".join(lines)


def _wrap(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def _facts(facts: dict[str, Any]) -> list[str]:
    blocks = []
    for name in ("train", "test"):
        if data := facts.get(name):
            rows = [f"{name}: {data['rows']:,} rows, {data['pairs']:,} pairs, {data['prompts']:,} prompts"]
            if "read" in data:
                rows += _wrap("  read: ", data["read"]["text"])
            for unit in ("characters", "tokens"):
                rows += _lengths(data.get(unit, {}), unit)
            teacher = data.get("teacher", {})
            if teacher:
                rows += _wrap("  read by the teacher: ", teacher["read"]["text"])
                rows += _lengths(teacher["tokens"], "tokens")
            if aligned := teacher.get("aligned"):
                rows += _wrap("  both: ", _aligned(aligned))
            blocks.append("\n".join(rows))
    for resource, parts in (("memory", facts.get("memory", {})), ("disk", facts.get("disk", {}))):
        if parts:
            rows = [f"{resource}, at least:" if resource == "memory" else f"{resource}, at most:"]
            for part, count in _group_equal(parts):
                rows += _wrap(f"  {size(count):>11}  ", part)
            blocks.append("\n".join(rows))
    return blocks


def _lengths(columns: dict[str, dict[str, int]], unit: str) -> list[str]:
    return [
        f"  {column:9}{unit:11}" + "  ".join(f"{q} {n:,}" for q, n in lengths.items())
        for column, lengths in columns.items()
        if lengths
    ]


def _aligned(facts: dict[str, Any]) -> str:
    """Return how a teacher with its own tokens serves the student, in words."""
    shared = facts["shared_states"]
    share = "" if shared is None else f"the teacher's tokens share {shared:.1%} of the student's states; "
    dropped = "; ".join(f"{reason} ({count:,})" for reason, count in facts["dropped"].items())
    return f"{share}{facts['kept']:,} of {facts['rows']:,} rows are left" + (f", without: {dropped}" if dropped else "")


def _group_equal(parts: dict[str, int]) -> list[tuple[str, int]]:
    """Join models of equal size in one line: many methods train the same student."""
    lines: dict[tuple[str, int], list[str]] = {}
    for part, count in parts.items():
        kind = next((start for start in ("training ", "weights of ") if part.startswith(start)), part)
        lines.setdefault((kind, count), []).append(part.removeprefix(kind))
    return [(kind + ", ".join(names), count) for (kind, count), names in lines.items()]
