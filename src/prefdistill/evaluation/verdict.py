"""The verdict of a comparison: what every paired difference says, the noise floor, the placebos, and one sentence.

All of it follows from the numbers, roles and headline of results.json; nothing depends on what a run is called.
"""

from dataclasses import dataclass
from typing import Any, Literal

from prefdistill.evaluation.reliability import JUDGED, reward_model_warning
from prefdistill.evaluation.results import NOT_FINITE, Column, Estimate, Results

Outcome = Literal["clear", "leaning", "noise", "single", "broken", "missing"]

MANY = 5  # other methods, from which on the sentence says that many were compared
VARIANCE = {
    "seeds": "seed-to-seed variance",
    "data orders": "order-to-order variance",
    "test prompts": "the variance between test prompts",
}
VARIANCE_WITH_PROMPTS = {
    "seeds": "the variance between seeds and test prompts",
    "data orders": "the variance between data orders and test prompts",
}


@dataclass(frozen=True)
class Comparison:
    """What one paired difference says. `good`: +1 better than the baseline, -1 worse, 0 where neither is better."""

    outcome: Outcome
    estimate: Estimate | None
    good: int = 0
    below_floor: bool = False

    @property
    def decided(self) -> bool:
        """Whether the difference is larger than noise."""
        return self.outcome in ("clear", "leaning")

    @property
    def word(self) -> str:
        """Two words for a table."""
        if self.decided:
            assert self.estimate is not None
            word = {1: "ahead", -1: "behind", 0: "higher" if self.estimate.mean > 0 else "lower"}[self.good]
            return word if self.outcome == "clear" else f"leans {word}"
        return {"noise": "within noise", "single": "no repeats", "broken": NOT_FINITE, "missing": "-"}[self.outcome]


def noise_floors(results: Results) -> dict[str, float]:
    """Return, by noise-floor run, how far it is from the run that it repeats.

    The difference of two runs of the same method should be zero. Its size, or twice its standard error where that is
    larger, is what a difference between two methods has to exceed before it means anything.
    """
    repeats = [name for name, role in results.roles.items() if role.kind == "noise_floor"]
    gaps = {name: gap for name in repeats if (gap := results.gap(name)) is not None and gap.finite}
    return {name: max(abs(gap.mean), 2 * (gap.se or 0.0)) for name, gap in gaps.items()}


def noise_floor(results: Results) -> float | None:
    """Return the largest of the noise floors."""
    return max(noise_floors(results).values(), default=None)


def _direction(results: Results) -> int:
    """Return +1 where a higher value of the headline metric is better, -1 where a lower one is, 0 where neither."""
    better = results.headline.higher_is_better if results.headline else None
    return 0 if better is None else 1 if better else -1


def compare(results: Results, name: str) -> Comparison:
    """Compare a run with the baseline by their paired difference on the headline metric.

    clear    larger than two standard errors and than the noise floor, and the 95 % interval excludes zero
    leaning  larger than two standard errors and than the noise floor, but with so few repeats that the 95 % interval
             (Student's t) still includes zero
    noise    anything smaller
    single   no standard error: one run says nothing about noise
    """
    estimate = results.difference(name)
    if estimate is None:
        return Comparison("missing", None)
    if not estimate.finite:
        return Comparison("broken", estimate)
    good = _direction(results) * (1 if estimate.mean > 0 else -1 if estimate.mean < 0 else 0)
    interval = estimate.interval()
    if interval is None or estimate.se is None:
        return Comparison("single", estimate, good)
    floor = noise_floor(results)
    if abs(estimate.mean) <= 2 * estimate.se:
        return Comparison("noise", estimate, good)
    if floor is not None and abs(estimate.mean) <= floor:
        return Comparison("noise", estimate, good, below_floor=True)
    return Comparison("leaning" if interval[0] <= 0 <= interval[1] else "clear", estimate, good)


def placebos(results: Results, name: str) -> dict[str, tuple[Estimate, bool]]:
    """Return the differences of a method's declared placebos, and whether each did as well: within two standard errors
    of their gap. None where either was not compared or no direction is better."""
    direction, compared = _direction(results), {}
    for control, role in results.roles.items():
        if role.kind == "placebo" and role.of == name and direction:
            estimate, gap = results.difference(control), results.gap(control)
            if estimate is not None and estimate.finite and gap is not None and gap.finite:
                compared[control] = estimate, direction * gap.mean <= 2 * (gap.se or 0.0)
    return compared


def verdict_of(raw: dict[str, Any] | Results) -> dict[str, Any]:
    """Return `verdict` of results.json: the sentence and the comparisons behind it.

    Returns:
        `{"text", "metric", "baseline", "noise_floor", "runs": {NAME: {"outcome", "good", "below_floor", "placebos":
        {NAME: as_well}}}}`, a run for every paired difference.
    """
    results = Results(raw)
    compared = {name: c for name in results.roles if (c := compare(results, name)).estimate is not None}
    return {
        "text": verdict(results),
        "metric": results.headline.key if results.headline else None,
        "baseline": results.baseline,
        "noise_floor": noise_floor(results),
        "runs": {
            name: {
                "outcome": c.outcome,
                "good": c.good,
                "below_floor": c.below_floor,
                "placebos": {placebo: as_well for placebo, (_, as_well) in placebos(results, name).items()},
            }
            for name, c in compared.items()
        },
    }


# -- in words ----------------------------------------------------------------------------------------------------------


def verdict(raw: dict[str, Any] | Results) -> str:
    """Return in words whether the headline method beat the baseline, and how every other method came out.

    "beat" needs a paired difference of the headline metric of more than two standard errors that also exceeds the
    noise floor (see `compare`). A loss is said in the same words as a win, and a tie is called one. Without a headline
    method all are treated alike. Controls are no methods: placebos are mentioned beside the method they control.
    """
    results = Results(raw)
    names = [name for name, role in results.roles.items() if role.kind == "method"]
    if results.headline is None:
        declared = results.declared_metric
        what = f"The headline metric, {declared}, was not measured" if declared else "Nothing was measured"
        return f"{what}, so there is nothing to compare."
    if results.baseline is None:
        return "No baseline was run, so nothing can be said about which method is better."
    if not names:
        return "Only baselines and controls were run, so there is nothing to compare."
    first = results.headline_method or (names[0] if len(names) == 1 else None)
    column, baseline = results.headline, results.baseline
    if first is None:
        return _list(results, names, baseline, column) + _judge(results, column)
    others = [name for name in names if name != first]
    return _sentence(results, first, baseline, column) + _others(results, others, baseline) + _judge(results, column)


def _sentence(results: Results, name: str, baseline: str, column: Column) -> str:
    comparison = compare(results, name)
    estimate, a, b = comparison.estimate, results.display_name(name), results.display_name(baseline)
    if estimate is None:
        own, base = results.score(name, column), results.score(baseline, column)
        if own is None or base is None:
            return f"No difference between {a} and {b} was measured on {column.label}, so neither can be called better."
        return (
            f"{a} scored {own.text(column)} and {b} {base.text(column)} on {column.label}, "
            "but no paired difference was recorded, so neither can be called better."
        )
    if comparison.outcome == "broken":
        return f"The difference between {a} and {b} on {column.label} is not a finite number: a run failed or diverged."
    size, on = column.format(abs(estimate.mean)), f"on {column.label}"
    if comparison.outcome == "single":
        how = {1: f"{size} better than", -1: f"{size} worse than", 0: f"{column.format(estimate.mean, sign=True)} from"}
        came = f"came out {how[comparison.good]} {b}" if estimate.mean else f"came out level with {b}"
        if estimate.n and estimate.n > 1:
            return f"{a} {came} {on}{results.over(estimate)}; without a standard error it may be noise."
        return f"{a} {came} {on} in a single run; without repeats this may be noise."

    spread = f"(mean ± s.e.{results.over(estimate)})"
    if comparison.outcome == "noise":
        limit = _variance(results, estimate)
        if comparison.below_floor:
            floors = noise_floors(results)
            widest = max(floors, key=lambda floor: floors[floor])
            limit = f"the noise floor ({column.format(floors[widest])}, from {results.display_name(widest)})"
        text = f"{a} differs from {b} {on} by no more than {limit}: {estimate.text(column, sign=True)} {spread}"
    else:
        clear = comparison.outcome == "clear"
        verb = {
            1: f"beat {b}" if clear else f"came out ahead of {b}",
            -1: f"lost to {b}" if clear else f"came out behind {b}",
            0: f"came out {'above' if estimate.mean > 0 else 'below'} {b}",
        }[comparison.good]
        text = f"{a} {verb} by {size} ± {column.format(estimate.se or 0.0)} {on} {spread}"
        if not clear:
            low, high = (column.format(x, sign=True) for x in estimate.interval() or (0.0, 0.0))
            text += f", but with so few repeats the 95 % interval ({low} to {high}) still includes zero"
    return text + _caveat(results, estimate) + _placebos(results, name, column, comparison) + "."


def _judge(results: Results, column: Column) -> str:
    """Return what is wrong with the reward model that the headline metric rests on, as a sentence; "" if nothing is."""
    warning = reward_model_warning(results) if column.key.startswith(JUDGED) else None
    return f" Do not rely on this: {warning}." if warning else ""


def _others(results: Results, names: list[str], baseline: str) -> str:
    """Return a second sentence with the difference of every other method, "" where there is none."""
    if not names:
        return ""
    parts = ", ".join(_part(results, name) for name in names)
    many = f"; {len(names)} methods, not corrected for multiple comparisons" if len(names) >= MANY else ""
    which = "The other method" if len(names) == 1 else "The other methods"
    return f" {which} against {results.display_name(baseline)}: {parts}{many}."


def _list(results: Results, names: list[str], baseline: str, column: Column) -> str:
    """Return one sentence with the difference of every method."""
    comparisons = [compare(results, name) for name in names]
    measured = [c.estimate for c in comparisons if c.estimate is not None and (c.decided or c.outcome == "noise")]
    b = results.display_name(baseline)
    text = f"Against {b} on {column.label}: "
    if (
        measured
        and column.higher_is_better is not None
        and not any(c.outcome == "clear" and c.good > 0 for c in comparisons)
    ):
        over_same = {results.repeats(estimate) for estimate in measured}
        variance = _variance(results, measured[0]) if len(over_same) == 1 else "noise"
        text = f"No method beats {b} on {column.label} by more than {variance}: "
    text += ", ".join(_part(results, name) for name in names)
    if not measured:
        return f"{text}; without repeats this may be noise."
    same = len(set(map(results.repeated, measured))) == 1
    weakest = min(measured, key=lambda e: ("order" not in results.repeats(e), e.n or 0))
    return f"{text} (mean ± s.e.{results.over(weakest) if same else ''}){_caveat(results, weakest)}."


def _part(results: Results, name: str) -> str:
    """Return one method of a list: "DCKD ahead (+0.140 ± 0.020)"."""
    comparison, a = compare(results, name), results.display_name(name)
    if comparison.estimate is None:
        return f"{a} not compared"
    if comparison.outcome == "broken":
        return f"{a} {NOT_FINITE}"
    assert results.headline is not None
    amount = comparison.estimate.text(results.headline, sign=True)
    if comparison.outcome == "single":
        return f"{a} {amount} in a single run"
    as_well = [results.display_name(p) for p, (_, did) in placebos(results, name).items() if did]
    placebo = f"; its placebo {' and '.join(as_well)} did as well" if as_well and comparison.good > 0 else ""
    return f"{a} {comparison.word} ({amount}{placebo if comparison.decided else ''})"


def _placebos(results: Results, name: str, column: Column, own: Comparison) -> str:
    """Return how the placebos of the method did: if one did as well, the teacher's signal is not the reason."""
    won, lost = own.decided and own.good > 0, own.decided and own.good < 0
    text = ""
    for placebo, (estimate, as_well) in placebos(results, name).items():
        text += f"; its placebo {results.display_name(placebo)} ({estimate.text(column, sign=True)}) did "
        if lost:
            text += "no worse" if as_well else "worse still"
        else:
            text += "as well" if as_well else "less well"
        if won and as_well:
            text += ", so the gain cannot be credited to the teacher's signal"
    return text


def _variance(results: Results, estimate: Estimate) -> str:
    known = VARIANCE_WITH_PROMPTS if estimate.prompts else VARIANCE
    return known.get(results.repeats(estimate), "noise")


def _caveat(results: Results, estimate: Estimate) -> str:
    """Return what the standard error does not cover."""
    if "test" in results.repeats(estimate):
        return "; this covers the choice of test prompts only: another training run or seed may differ"
    if "order" in results.repeats(estimate):
        noise = (
            "training-order noise and the choice of test prompts" if estimate.prompts else "training-order noise only"
        )
        return f"; this covers {noise}, another seed may differ"
    if estimate.n is not None and estimate.n < 3:
        return f"; {estimate.n} seeds are too few to cover much more than training-order noise"
    return ""
