"""What a reader of the report must be told before its numbers: of the run, and of what cannot be read of it."""

import math
import re
import statistics

from prefdistill.report.generations import judge_warning
from prefdistill.report.run import Points, Run, average
from prefdistill.report.table import NOT_FINITE, Estimate, Results, clean, mapping
from prefdistill.report.text import cut, natural


def warnings_of(run: Run) -> list[str]:
    """What the pipeline warned of, what is not finite, what looks wrong, and what could not be read."""
    results = run["results"]
    warnings = [str(w) for w in results.get("warnings", [])]
    for part in ("methods", "differences"):
        for name, scores in mapping(results.get(part)).items():
            bad = [k for k, v in mapping(scores).items() if (e := Estimate.parse(v)) is not None and not e.finite]
            if bad:
                what = "" if part == "methods" else "difference of "
                warnings.append(f"{clean(name)}: {what}{', '.join(map(clean, bad))} {NOT_FINITE}")
    warnings += _collapses(run)
    warnings += [w for w in (_chance(results), judge_warning(results)) if w]
    warnings += run["problems"]
    shown = [cut(w, 600) for w in warnings[:40]]
    if len(warnings) > len(shown):
        shown.append(f"... and {len(warnings) - len(shown)} more")
    return shown


# Log-prob of the rejected responses at the end of a training in units of that at its start, from which on it is said:
# at 2 every token has become as unlikely as two such tokens were.
COLLAPSE = 2.0


def _collapses(run: Run) -> list[str]:
    """Trainings that pushed the rejected responses far down, and whether the chosen ones went with them."""
    warnings: dict[str, str] = {}
    for stage, metrics in sorted(run["curves"].items(), key=lambda item: natural(item[0])):
        name = method_of(stage, list(run["results"]["methods"])) or stage
        falls = {side: _fall(metrics.get(f"logps/{side}", [])) for side in ("rejected", "chosen")}
        if falls["rejected"] is None or falls["rejected"][2] < COLLAPSE or name in warnings:
            continue
        first, last, _ = falls["rejected"]
        text = f"{clean(name)}: the log-prob of the rejected responses fell from {first:.3g} to {last:.3g}"
        if falls["chosen"] is not None and falls["chosen"][2] > 1.1:
            text += f", and that of the chosen with it, from {falls['chosen'][0]:.3g} to {falls['chosen'][1]:.3g}"
        warnings[name] = f"{text}; a higher beta, a lower learning rate or fewer steps hold them"
    return list(warnings.values())


def _fall(lines: list[Points]) -> tuple[float, float, float] | None:
    """A log-prob at the first and the last tenth of the steps, and the ratio of the two."""
    line = [(x, y) for x, y in average(lines) if math.isfinite(y)]
    if len(line) < 2:
        return None
    part = max(1, len(line) // 10)
    first, last = (statistics.fmean(y for _, y in points) for points in (line[:part], line[-part:]))
    return (first, last, last / first) if first < 0 else None


def _chance(results: Results) -> str | None:
    """The shaping return is only worth adding where it tells the better response from the worse."""
    estimate = Estimate.parse(mapping(results.get("margin_accuracy")).get("shaping return"))
    interval = estimate.interval() if estimate else None
    if estimate is None or interval is None or not interval[0] <= 0.5 <= interval[1]:
        return None
    return (
        f"the teacher's shaping return orders {estimate.mean:.3f} of the held-out pairs right, which is not told from "
        f"chance (95 % interval {interval[0]:.3f} to {interval[1]:.3f}): it can hardly teach a preference"
    )


def method_of(stage: str, names: list[str]) -> str | None:
    """ "distill-tvkd-0" -> "tvkd": the method that a stage trained, None for the other stages."""
    if not stage.startswith("distill-"):
        return None
    rest = stage.removeprefix("distill-")
    known = [n for n in names if rest == n or rest.startswith(f"{n}-")]
    exact = re.sub(r"-(order-?)?\d+$", "", rest)
    return exact if exact in names or not known else max(known, key=len)
