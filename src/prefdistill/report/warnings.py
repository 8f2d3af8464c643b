"""Warnings about a run: not finite numbers, collapsed trainings, uninformative signals, unreadable files."""

import math
import statistics

from prefdistill.evaluation.reliability import reward_model_warning
from prefdistill.evaluation.results import NOT_FINITE, Estimate, Results, clean, mapping
from prefdistill.report.format import cut
from prefdistill.report.load import Points, Run, average


def warnings_of(run: Run) -> list[str]:
    """Return the warnings of the pipeline, of not finite numbers, of suspicious results and of unreadable files."""
    results: Results = run["results"]
    warnings = list(map(str, results.items("warnings")))
    for what, table in (("", results.methods), ("difference of ", results.differences)):
        for name, scores in table.items():
            if bad := [clean(metric) for metric, estimate in scores.items() if not estimate.finite]:
                warnings.append(f"{clean(name)}: {what}{', '.join(bad)} {NOT_FINITE}")
    warnings += _collapses(run) + _worse_than_chance(results)
    warnings += [w for w in (_chance(results), reward_model_warning(results)) if w]
    warnings += run["problems"]
    shown = [cut(w, 600) for w in warnings[:40]]
    if len(warnings) > len(shown):
        shown.append(f"... and {len(warnings) - len(shown)} more")
    return shown


# Log-prob of the rejected responses at the end of training over that at its start, from which on the report warns:
# at 2 every token has become as unlikely as two such tokens were.
COLLAPSE = 2.0


def _collapses(run: Run) -> list[str]:
    """Return a warning for each training that pushed the rejected responses far down, perhaps the chosen ones too."""
    warnings = []
    for name, metrics in [*run["curves"].items(), *run["early"].items()]:
        falls = {side: _fall(metrics.get(f"logps/{side}", [])) for side in ("rejected", "chosen")}
        if falls["rejected"] is None or falls["rejected"][2] < COLLAPSE:
            continue
        first, last, _ = falls["rejected"]
        text = f"{clean(name)}: the log-prob of the rejected responses fell from {first:.3g} to {last:.3g}"
        if falls["chosen"] is not None and falls["chosen"][2] > 1.1:
            text += f", and that of the chosen with it, from {falls['chosen'][0]:.3g} to {falls['chosen'][1]:.3g}"
        warnings.append(f"{text}; use a higher beta, a lower learning rate or fewer steps")
    return warnings


def _fall(lines: list[Points]) -> tuple[float, float, float] | None:
    """Return a log-prob in the first and the last tenth of the steps, and the ratio of the two."""
    line = [(x, y) for x, y in average(lines) if math.isfinite(y)]
    if len(line) < 2:
        return None
    part = max(1, len(line) // 10)
    first, last = (statistics.fmean(y for _, y in points) for points in (line[:part], line[-part:]))
    return (first, last, last / first) if first < 0 else None


def _worse_than_chance(results: Results) -> list[str]:
    """Return a warning for each student that orders the held-out pairs worse than chance."""
    warnings = []
    for name, scores in results.methods.items():
        accuracy = scores.get("reward_accuracy")
        interval = accuracy.interval() if accuracy else None
        if accuracy is None or interval is None or interval[1] >= 0.5:
            continue
        warnings.append(
            f"{clean(name)}: its implicit reward orders {accuracy.mean:.3f} of the held-out pairs correctly, less than "
            f"chance (95 % interval {interval[0]:.3f} to {interval[1]:.3f}): it has not learned a preference that "
            "holds on other prompts. Where the student's start was fine-tuned on the chosen responses of the same "
            "pairs, a method can learn which responses the start has seen; name other demonstrations with data.sft, "
            "lower the learning rate, or take pairs of more prompts"
        )
    return warnings


def _chance(results: Results) -> str | None:
    """Return a warning if the shaping return orders the held-out pairs no better than chance."""
    terms = results.mapping("margin_accuracy").values()
    estimate = Estimate.parse(next((term for term in map(mapping, terms) if term.get("shaping") is True), None))
    interval = estimate.interval() if estimate else None
    if estimate is None or interval is None or not interval[0] <= 0.5 <= interval[1]:
        return None
    return (
        f"the teacher's shaping return orders {estimate.mean:.3f} of the held-out pairs correctly, not distinguishable "
        f"from chance (95 % interval {interval[0]:.3f} to {interval[1]:.3f}): it carries no preference to learn"
    )
