"""A plan at scale for a reader."""

from typing import Any

from prefdistill.core.text import printable, size, table
from prefdistill.experiment.scale import STRATEGIES


def as_text(scaled: dict[str, Any]) -> str:
    """Return what `at_scale` returns as tables."""
    machine = f"{scaled['devices']} x {scaled['gpu']} ({scaled['memory'] / 1e9:,.0f} GB)"
    head = f"at scale: {machine}, {scaled['strategy']}, {scaled['utilisation']:.0%} of its operations per second"
    columns = ("step", "FLOP", "hours", "GB per device", *(f"fits {one}" for one in STRATEGIES))
    lines = [columns]
    for step in scaled["steps"]:
        fits = [_fits(step["fits"][one]) if one in step["fits"] else "-" for one in STRATEGIES]
        lines.append((step["name"], f"{step['flops']:.3g}", _hours(step["hours"]), _giga(step["per_device"]), *fits))
    lines.append(("all", f"{scaled['flops']:.3g}", _hours(scaled["hours"]), "", *("" for _ in STRATEGIES)))
    blocks = [head, table(lines)]
    largest = {step["kind"]: step for step in sorted(scaled["steps"], key=lambda step: step["per_device"])}
    for step in largest.values():
        parts = list(step["memory"]["one"])
        count = max(scaled["devices"], 2)
        rows = [
            (one if one == "one" else f"{one} x {count}", *(_giga(of[part]) for part in parts), _giga(sum(of.values())))
            for one, of in step["memory"].items()
        ]
        blocks.append(f"{step['name']}, GB per device\n{table([('', *parts, 'together'), *rows])}")
    stored = [(step["name"], kind, size(count)) for step in scaled["steps"] for kind, count in step["signals"].items()]
    if stored:
        blocks.append(table([("signals", "kind", "on disk"), *stored]))
    return "\n\n".join(
        "\n".join(map(printable, block.splitlines())) for block in (*blocks, "\n".join(scaled["advice"])) if block
    )


def _fits(devices: int | None) -> str:
    return "no" if devices is None else str(devices)


def _giga(count: float) -> str:
    return f"{count / 1e9:,.1f}" if count >= 5e7 else f"{count / 1e9:.2g}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"
