"""A checkup for a person: the findings, worst first, then the facts."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from prefdistill.experiment.doctor.findings import SEVERITIES, Finding
from prefdistill.experiment.doctor.machine import size

if TYPE_CHECKING:
    from prefdistill.experiment.doctor.examine import Checkup

WIDTH = 110


def as_text(checkup: Checkup) -> str:
    blocks = [_finding(finding) for finding in checkup.findings]
    counts = {s: sum(f.severity == s for f in checkup.findings) for s in SEVERITIES}
    total = ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s, n in counts.items())
    return "\n\n".join([*blocks, *_facts(checkup.facts), total])


def _finding(finding: Finding) -> str:
    counted = f"{finding.count:,} of {finding.of:,} rows of " if finding.rows else ""
    where = f"{counted}{finding.data}: " if finding.data else ""
    lines = _wrapped(f"{finding.severity:8} ", f"{where}{finding.message}")
    if finding.example:
        lines += _wrapped("         ", finding.example)
    lines += _wrapped("         > ", f"{finding.fix}  [{finding.check}]")
    return "\n".join(lines)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def _facts(facts: dict[str, Any]) -> list[str]:
    blocks = []
    for name in ("train", "test"):
        if data := facts.get(name):
            rows = [f"{name}: {data['rows']:,} rows, {data['pairs']:,} pairs, {data['prompts']:,} prompts"]
            for unit in ("characters", "tokens"):
                for column, found in data.get(unit, {}).items():
                    if found:
                        rows.append(f"  {column:9}{unit:11}" + "  ".join(f"{q} {n:,}" for q, n in found.items()))
            blocks.append("\n".join(rows))
    for what, parts in (("memory", facts.get("memory", {})), ("disk", facts.get("disk", {}))):
        if parts:
            rows = [f"{what}, at least:" if what == "memory" else f"{what}, at most:"]
            for part, count in _together(parts):
                rows += _wrapped(f"  {size(count):>11}  ", part)
            blocks.append("\n".join(rows))
    return blocks


def _together(parts: dict[str, int]) -> list[tuple[str, int]]:
    """Models that take the same, in one line: many methods train one student."""
    lines: dict[tuple[str, int], list[str]] = {}
    for part, count in parts.items():
        kind = next((start for start in ("training ", "weights of ") if part.startswith(start)), part)
        lines.setdefault((kind, count), []).append(part.removeprefix(kind))
    return [(kind + ", ".join(names), count) for (kind, count), names in lines.items()]
