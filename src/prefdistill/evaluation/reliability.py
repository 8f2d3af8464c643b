"""What the reward model of a comparison is worth, in words: its accuracy beside chance and beside length."""

from typing import Any

from prefdistill.evaluation.results import Column, Estimate, Results, clean, estimates

JUDGED = "reward_model_"  # how the metrics that rest on a reward model begin
SHARE = Column("accuracy", "share of pairs", True)


def reward_model_sentence(raw: dict[str, Any] | Results) -> str | None:
    """Return the reward model's accuracy in words; None without a reward model."""
    model = Results(raw).mapping("reward_model")
    numbers = estimates(model)
    accuracy, pairs = numbers.get("accuracy"), numbers.get("pairs")
    if accuracy is None:
        return None
    name = clean(model.get("name") or "of unknown origin")
    of = f"{pairs.mean:,.0f} held-out pairs" if pairs is not None and pairs.finite else "the held-out pairs"
    length = ""
    if longer := numbers.get("longer_is_better"):
        length = f"; the better one is the longer one in {longer.text(SHARE)}"
    if balanced := numbers.get("length_controlled"):
        length += f". Where length says nothing, its accuracy is {balanced.text(SHARE)}{_interval(balanced)}"
    return (
        f"The reward model, {name}, scores the better response higher in {accuracy.text(SHARE)}"
        f"{_interval(accuracy)} of {of}{length}. Its scores and win rates are no more reliable than that."
    )


def reward_model_warning(raw: dict[str, Any] | Results) -> str | None:
    """Return a warning if the reward model is not clearly better than chance, or than length alone."""
    numbers = estimates(Results(raw).mapping("reward_model"))
    accuracy, longer, balanced = (numbers.get(key) for key in ("accuracy", "longer_is_better", "length_controlled"))
    if accuracy is None or not accuracy.finite:
        return None
    text = f"the reward model orders {accuracy.text(SHARE)} of the held-out pairs correctly"
    if _low(accuracy) <= 0.5:
        return f"{text}, not clearly more than chance: its win rates mean nothing"
    beyond = balanced is not None and balanced.finite and _low(balanced) > 0.5
    if longer is not None and longer.finite and _low(accuracy) <= longer.mean:
        text = f"{text}, not clearly more than length alone ({longer.mean:.3f}): its win rates may only measure length"
        return f"{text}; read the length-controlled ones" if beyond else text
    if balanced is not None and balanced.finite and not beyond:
        return (
            f"{text}, but {balanced.text(SHARE)} where length says nothing, not clearly more than chance: its win "
            "rates may only measure length"
        )
    return None


def _low(estimate: Estimate) -> float:
    return (estimate.interval() or (estimate.mean, estimate.mean))[0]


def _interval(estimate: Estimate) -> str:
    ends = [SHARE.format(end) for end in estimate.interval() or ()]
    return f" (95 % interval {' to '.join(ends)})" if ends else ""
