"""The figures of the report and of a study, as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefdistill.report.load import Points, average
from prefdistill.report.svg import (
    BAND,
    BLUE,
    INK,
    MUTED,
    PAGE,
    Style,
    axes_of,
    bare,
    envelope,
    limits,
    shorten,
    svg,
    text_width,
    thin,
    xy,
)

Cloud = tuple[str, Points, Style, str]  # name, points, style, text alternative
SweepPoint = tuple[float, float, float | None, float | None, list[float]]  # x, mean, its 95 % interval, every repeat


@dataclass(frozen=True)
class ForestRow:
    """One run's paired difference to the baseline.

    Args:
        low, high: its 95 % interval, None without repeats.
        control: drawn hollow.
        values: the repeats to show with it.
    """

    name: str
    mean: float
    low: float | None
    high: float | None
    text: str
    style: Style
    control: bool = False
    values: tuple[float, ...] = ()


def forest(
    rows: Sequence[ForestRow], *, floor: float | None, left: str, right: str, alt: str, key: str, names_to: int = 24,
) -> Markup:  # fmt: skip
    """Draw dots with 95 % intervals against the baseline at zero; the band is the noise floor.

    Names are cut at `names_to` characters.
    """

    def draw(figure: Figure) -> None:
        left_edge, right_edge = text_width([r.name for r in rows], 12, names_to), text_width([r.text for r in rows], 11)
        axes = axes_of(figure, left=left_edge, right=right_edge, top=2, bottom=42)
        limit = _limit(rows, floor)
        if floor is not None:
            axes.axvspan(max(-floor, -limit), min(floor, limit), color=BAND, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1.2)
        for y, row in enumerate(rows):
            _forest_row(axes, y, row, limit)
            axes.annotate(
                row.text.replace("-", "−"), (1.02, y), xycoords=("axes fraction", "data"), va="center",
                color=MUTED if row.control else INK,
            )  # fmt: skip
        axes.set_xlim(-limit * 1.04, limit * 1.04)
        _name_rows(axes, [(shorten(r.name, names_to), MUTED if r.control else INK) for r in rows])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        for x, text, side in ((0, f"← {left}", "left"), (1, f"{right} →", "right")):
            axes.annotate(
                text, (x, 0), (0, -22), xycoords="axes fraction", textcoords="offset points", ha=side, va="top",
                color=MUTED, fontsize=11,
            )  # fmt: skip

    height = 46 + 27 * len(rows)
    width = 560 + max(round(text_width([r.name for r in rows], 12, names_to) - text_width(["x" * 24], 12)), 0)
    return svg(draw, width, height, title="Paired differences to the baseline", alt=alt, key=key)


def _forest_row(axes: Any, y: int, row: ForestRow, limit: float) -> None:
    colour = row.style.colour
    face = PAGE if row.control else colour
    if not math.isfinite(row.mean):
        return
    if row.low is not None and row.high is not None and row.low < limit and row.high > -limit:
        axes.plot([max(row.low, -limit), min(row.high, limit)], [y, y], color=colour, linewidth=2)
        for end, marker in ((row.low, "<"), (row.high, ">")):
            if abs(end) > limit:
                axes.plot(math.copysign(limit, end), y, marker=marker, color=colour, markersize=6)
    if abs(row.mean) > limit:  # beyond the axis: an arrow at its end
        axes.plot(math.copysign(limit, row.mean), y, marker=">" if row.mean > 0 else "<", color=colour, markersize=8)
        return
    for value in row.values:
        if abs(value) <= limit:
            axes.plot(value, y + 0.24, marker="o", color=colour, markersize=3, markeredgewidth=0, alpha=0.6)
    shape = "o" if row.low is not None else "D"
    axes.plot(row.mean, y, marker=shape, color=colour, markerfacecolor=face, markersize=8, markeredgewidth=1.8)


def _name_rows(axes: Any, rows: list[tuple[str, str]]) -> None:
    """Write the name of each row at its left, in its colour, the first row on top."""
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    for label, (_, colour) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(colour)
        label.set_fontsize(12)
    bare(axes, "y")


def _limit(rows: Sequence[ForestRow], floor: float | None) -> float:
    """Return half the axis: wide enough for most rows, not for one that is ten times further away than the rest."""
    means = sorted(abs(r.mean) for r in rows if math.isfinite(r.mean))
    if not means:
        return 1.0
    middle = max(means[(len(means) - 1) // 2], floor or 0.0)
    near = [m for m in means if m <= 5 * middle] or means[:1]
    ends = [
        min(max(abs(r.low), abs(r.high)), 4 * max(near))
        for r in rows
        if r.low is not None and r.high is not None and abs(r.mean) <= max(near)
    ]
    return 1.08 * max([*near, *ends, floor or 0.0]) or 1.0


def curves(
    runs: dict[str, list[Points]], chosen: dict[str, Style], *, title: str, alt: str, key: str,
    y_limits: tuple[float, float] | None = None, points: int = 80,
) -> Markup:  # fmt: skip
    """Draw one metric by optimizer step: the mean over data orders and seeds, and each of them thinly behind it.

    More than four runs of a method are drawn as the band between the lowest and the highest, with `points` per line.
    """

    def draw(figure: Figure) -> None:
        axes = axes_of(figure, left=40, right=8, top=26, bottom=38)
        for name, lines in runs.items():
            style = chosen.get(name, Style())
            mean = lines[0] if len(lines) == 1 else average(lines)
            alone = sum(math.isfinite(y) for _, y in mean) < 2  # the runs share no steps: no mean to draw
            if alone or 1 < len(lines) <= 4:
                for line in lines[:12]:
                    width, alpha = (1.1, 0.8) if alone else (0.8, 0.28)
                    axes.plot(*xy(thin(line, points // 2)), color=style.colour, linewidth=width, alpha=alpha)
            elif len(lines) > 4:
                x, low, high = envelope(lines, points * 3 // 4)
                axes.fill_between(x, low, high, color=style.colour, alpha=0.09, linewidth=0)
            axes.plot(*xy(thin(mean, points)), color=style.colour, linestyle=style.line, linewidth=1.8)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        axes.set_title(shorten(title, 44))
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        bare(axes, "x")

    return svg(draw, 330, 220, title=f"{title} by optimizer step", alt=alt, key=key)


def sweep(
    lines: dict[str, list[SweepPoint]], chosen: dict[str, Style], *, title: str, x_label: str, log: bool, alt: str,
    key: str,
) -> Markup:  # fmt: skip
    """Draw differences to the baseline at zero along one setting: means with 95 % intervals, every repeat a dot."""

    def draw(figure: Figure) -> None:
        axes = axes_of(figure, left=52, right=10, top=30 + 20 * -(-len(lines) // 2), bottom=42)
        ticks = sorted({point[0] for line in lines.values() for point in line})
        axes.set_xscale("log" if log else "linear")
        axes.axhline(0, color=INK, linewidth=1.2)
        step = 0.012 * (len(ticks) > 1)
        for place, (name, line) in enumerate(lines.items()):
            style = chosen.get(name, Style())
            shift = step * (place - (len(lines) - 1) / 2)  # beside each other, where they share an x
            span = math.log(ticks[-1] / ticks[0]) if log else ticks[-1] - ticks[0]
            xs = [x * math.exp(shift * span) if log else x + shift * span for x, *_ in line]
            axes.plot(xs, [m for _, m, *_ in line], color=style.colour, linestyle=style.line, linewidth=1.8, marker="o",
                      markersize=5, label=name)  # fmt: skip
            for x, (_, _, low, high, values) in zip(xs, line, strict=True):
                if low is not None and high is not None:
                    axes.plot([x, x], [low, high], color=style.colour, linewidth=1.6, alpha=0.55)
                if len(values) > 1:
                    axes.plot([x] * len(values), values, linestyle="none", marker="o", markersize=3, color=style.colour,
                              markeredgewidth=0, alpha=0.6)  # fmt: skip
        axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(x_label)
        bare(axes, "x")
        axes.set_title(title, pad=12 + 20 * -(-len(lines) // 2))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=11, handlelength=2.6,
                    labelspacing=0.35, borderaxespad=0.2, borderpad=0)  # fmt: skip

    return svg(draw, 560, 330 + 20 * (len(lines) // 2), title=title, alt=alt, key=key)


def bars(rows: Sequence[tuple[str, float, float | None, str, bool]], *, title: str, alt: str, key: str) -> Markup:
    """Draw fractions between 0 and 1 as bars with a line at 0.5. Rows: name, mean, s.e., text, whether to accent it."""

    def draw(figure: Figure) -> None:
        left, right = text_width([r[0] for r in rows], 12, 34), text_width([r[3] for r in rows], 11)
        axes = axes_of(figure, left=left, right=right, top=2, bottom=22)
        for y, (_, mean, se, text, accent) in enumerate(rows):
            colour = BLUE if accent else MUTED
            if math.isfinite(mean):
                axes.barh(y, mean, height=0.58, color=colour, alpha=0.9 if accent else 0.45, linewidth=0)
                if se is not None and math.isfinite(se):
                    axes.plot([mean - se, mean + se], [y, y], color=INK, linewidth=1.4)
            axes.annotate(
                text, (1.02, y), xycoords=("axes fraction", "data"), va="center", color=INK if accent else MUTED
            )
        axes.axvline(0.5, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        _name_rows(axes, [(shorten(name, 34), INK if accent else MUTED) for name, *_, accent in rows])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5 (chance)", "", "1"])

    return svg(draw, 560, 26 + 26 * len(rows), title=title, alt=alt, key=key)


def clouds(
    named_clouds: Sequence[tuple[str, Points, Style, str]],
    *,
    labels: tuple[str, str],
    key: str,
    budget: int,
    zero: bool,
) -> list[Markup]:
    """Draw a scatter plot of each cloud, on the same axes.

    All share `budget` points; `labels`: of the two axes; `zero`: the axes include it.
    """
    shown = max(40, budget // max(1, len(named_clouds)))
    everything = [point for _, points, _, _ in named_clouds for point in points]
    x_limits, y_limits = (limits((point[axis] for point in everything), zero=zero) for axis in (0, 1))

    def draw(figure: Figure, name: str, points: Points, style: Style) -> None:
        axes = axes_of(figure, left=54, right=8, top=26, bottom=38)
        for line, (low, high) in ((axes.axvline, x_limits), (axes.axhline, y_limits)):
            if low < 0 < high:
                line(0, color=MUTED, linewidth=0.9)
        some = points[:: math.ceil(len(points) / shown)]
        axes.plot(*xy(some), "o", markersize=3.4, markeredgewidth=0, color=style.colour, alpha=0.5)
        axes.set(xlim=x_limits, ylim=y_limits, title=shorten(name, 44), xlabel=labels[0], ylabel=labels[1])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))

    return [
        svg(
            partial(draw, name=name, points=points, style=style), 330, 290,
            title=f"{name}: {labels[1]} against {labels[0]}", alt=alt, key=f"{key}{i}",
        )
        for i, (name, points, style, alt) in enumerate(named_clouds)
    ]  # fmt: skip


def ranges(
    names: Sequence[str], series: dict[str, tuple[list[tuple[float, float, float] | None], Style]], *, label: str,
    alt: str, key: str,
) -> Markup:  # fmt: skip
    """Draw means with 95 % intervals of several methods over a few ranges, side by side. Series: (mean, low, high)."""

    def draw(figure: Figure) -> None:
        axes = axes_of(figure, left=48, right=8, top=8, bottom=42)
        step = 0.7 / max(1, len(series))
        for i, (ends, style) in enumerate(series.values()):
            at = [(x + (i - (len(series) - 1) / 2) * step, end) for x, end in enumerate(ends) if end is not None]
            for x, (_, low, high) in at:
                axes.plot([x, x], [low, high], color=style.colour, linewidth=1.4)
            xs, means = [x for x, _ in at], [end[0] for _, end in at]
            axes.plot(
                xs, means, color=style.colour, linestyle=style.line, linewidth=1, marker="o", markersize=5,
                markeredgewidth=0,
            )  # fmt: skip
        axes.set_xticks(range(len(names)), [shorten(name) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel("words of the reference response")
        axes.set_ylabel(shorten(label, 40))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        bare(axes, "x")

    return svg(draw, 560, 260, title=f"{label} by length of the reference response", alt=alt, key=key)
