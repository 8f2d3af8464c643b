"""Sections on the teacher's signals: how well they order held-out pairs, and the shaping margin."""

from functools import partial
from typing import Any

from prefdistill.evaluation.results import Column, Estimate, Results, clean, estimates, mapping, number
from prefdistill.report import figures
from prefdistill.report.format import cell_of, correlation, points_of
from prefdistill.report.load import Points
from prefdistill.report.svg import BLUE, Style

View = dict[str, Any]

_MAX_SCATTERS = 6


def margin_accuracy_of(results: Results, key: str) -> View | None:
    """Return the share of held-out pairs that each term of the teacher orders correctly, as bars, and beside it the
    share where length says nothing."""
    column, terms = Column("accuracy", "margin accuracy", True), results.mapping("margin_accuracy")
    controlled = results.mapping("length_controlled_margins")
    bars = [
        (clean(term), e.mean, e.se, e.text(column), mapping(terms[term]).get("shaping") is True)
        for term, e in estimates(terms).items()
    ]
    if not bars:
        return None
    alt = "Fraction of held-out pairs that each term orders correctly; one half is chance. "
    alt += "; ".join(f"{term} {text}" for term, _, _, text, _ in bars) + "."
    rows = [
        {"name": clean(term), "cells": [cell_of(one, column) for one in (e, Estimate.parse(controlled.get(term)))]}
        for term, e in estimates(terms).items()
    ]
    return {
        "columns": ["fraction of held-out pairs ordered correctly", "where length says nothing"],
        "rows": rows,
        "svg": partial(figures.bars, bars, title="Margin accuracy", alt=alt, key=f"{key}-accuracy"),
    }


def gauge_sentence(results: Results) -> str | None:
    """Return in words how far the order of pairs by the teacher's value depends on its gauge."""
    flips = Estimate.parse(results.mapping("gauge_flips"))
    if flips is None:
        return None
    share = Column("flips", "share of pairs", False)
    return (
        "Adding u·h(s) to all logits of a state changes no probability, but it changes the value. For random u of the "
        f"length of a row of the head, {flips.text(share)} of the pairs flip their order by the shaping return (0: the "
        "value depends on the policy alone; 0.5: it carries no information about the policy)."
    )


def shaping_of(results: Results, styles: dict[str, Style], key: str, budget: int) -> View | None:
    """Return the spread of the shaping margin and of the DPO margin, and a scatter plot of one against the other."""
    column = Column("margin", "margin", None)
    rows, clouds = [], []
    for name, value in results.mapping("shaping").items():
        about = mapping(value)
        std, dpo_std = number(about.get("std")), number(about.get("dpo_margin_std"))
        ratio = std / dpo_std if std is not None and dpo_std else None
        points = points_of(about.get("points"))
        rows.append(
            {
                "name": clean(name),
                "cells": [cell_of(Estimate.parse(v), column) for v in (about.get("mean"), std, dpo_std, ratio)],
                "agreement": _agreement(points),
            }
        )
        if points:
            alt = f"{len(points)} pairs: shaping margin of {clean(name)} against DPO margin. {_agreement(points)}."
            clouds.append((clean(name), points, styles.get(name, Style(BLUE)), alt))
    if not rows:
        return None
    shown, labels = clouds[:_MAX_SCATTERS], ("DPO margin", "shaping margin")
    return {
        "columns": ["mean shaping margin", "its spread (std)", "spread of the DPO margin", "ratio of spreads"],
        "rows": rows,
        "plots": partial(figures.clouds, shown, labels=labels, key=f"{key}-scatter", budget=budget, zero=True),
    }


def _agreement(points: Points) -> str:
    """Return in words how far two margins agree: their correlation, and the share of pairs with the same sign."""
    if len(points) < 3:
        return ""
    agree = sum(1.0 if x * y > 0 else 0.5 if x * y == 0 else 0.0 for x, y in points) / len(points)
    r = correlation(points)
    return f"{'' if r is None else f'correlation {r:+.2f}, '}same sign in {agree:.0%} of pairs"
