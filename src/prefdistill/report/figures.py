"""The figures of the report, as inline SVG that takes its colours from the page.

matplotlib draws with marker colours; `svg` exchanges them for CSS variables (`currentColor`, `var(--blue)` ...), so one
picture serves the light and the dark page. Text stays text: it is selectable, searchable and set in the page's font.
No pyplot: nothing here touches global state or needs a display.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefdistill.report.run import Points, average
from prefdistill.report.table import width as columns

SweepPoint = tuple[float, float, float | None, float | None, list[float]]  # x, mean, its 95 % interval, every repeat

# What matplotlib is told -> what the page is given.
INK, MUTED, RULE, BAND, PAGE = "#010101", "#020202", "#030303", "#040404", "#050505"
BLUE, VERMILLION, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"  # Okabe & Ito: safe for colour-blind eyes
PURPLE, SKY, YELLOW = "#cc79a7", "#56b4e9", "#f0e442"
_CSS = {
    INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)", BAND: "var(--band)", PAGE: "var(--page)",
    BLUE: "var(--blue)", VERMILLION: "var(--vermillion)", GREEN: "var(--green)", ORANGE: "var(--orange)",
    PURPLE: "var(--purple)", SKY: "var(--sky)", YELLOW: "var(--yellow)",
}  # fmt: skip

_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prefdistill",  # the same results give the same page, byte for byte
    "text.parse_math": False,  # a "$" in a method's name is a dollar
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.titlesize": 12,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "butt",
    "path.simplify_threshold": 0.2,
}


@dataclass(frozen=True)
class Style:
    """How one method is drawn everywhere on the page: colour and dashes, so that colour is never the only sign."""

    colour: str = MUTED
    dash: tuple[int, ...] = ()

    @property
    def css(self) -> str:
        return _CSS[self.colour]

    @property
    def dasharray(self) -> str:
        return " ".join(map(str, self.dash))


@dataclass(frozen=True)
class ForestRow:
    """One method's paired difference to the baseline. `low`, `high`: its 95 % interval, None without repeats; `values`:
    the repeats to show with it."""

    name: str
    mean: float
    low: float | None
    high: float | None
    text: str
    style: Style = Style()
    control: bool = False
    values: tuple[float, ...] = ()


def styles(names: Iterable[str], baseline: str | None) -> dict[str, Style]:
    """A style for each method; the baseline is ink, TVKD blue, its placebo a dashed light blue."""
    fixed = {
        "tvkd": Style(BLUE),
        "tvkd-shuffled": Style(SKY, (5, 2)),
        "oracle-margin": Style(GREEN, (6, 2, 1, 2)),
        "teacher": Style(MUTED),
        "start": Style(MUTED, (2, 2)),
        "sft-chosen": Style(PURPLE, (2, 2)),
    }
    free = [Style(c, d) for d in ((), (5, 2), (1, 2)) for c in (VERMILLION, ORANGE, PURPLE, GREEN, SKY, YELLOW)]
    chosen: dict[str, Style] = {}
    for name in names:
        if name == baseline:
            chosen[name] = Style(INK)
        elif name.endswith("other-order"):
            chosen[name] = Style(MUTED, (1, 2))
        elif name in fixed:
            chosen[name] = fixed[name]
        else:
            chosen[name] = free.pop(0) if free else Style(MUTED)
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------------------------


def forest(
    rows: Sequence[ForestRow], *, floor: float | None, left: str, right: str, alt: str, key: str, names_to: int = 24,
) -> Markup:  # fmt: skip
    """Dots with 95 % intervals against the baseline at zero; the band is the noise floor. Names end at `names_to`."""

    def draw(figure: Figure) -> None:
        left_edge, right_edge = _extent([r.name for r in rows], 12, names_to), _extent([r.text for r in rows], 11)
        axes = _axes(figure, left=left_edge, right=right_edge, top=2, bottom=42)
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
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [shorten(r.name, names_to) for r in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_color(MUTED if row.control else INK)
            label.set_fontsize(12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        for x, text, side in ((0, f"← {left}", "left"), (1, f"{right} →", "right")):
            axes.annotate(
                text, (x, 0), (0, -22), xycoords="axes fraction", textcoords="offset points", ha=side, va="top",
                color=MUTED, fontsize=11,
            )  # fmt: skip

    height = 46 + 27 * len(rows)
    width = 560 + max(round(_extent([r.name for r in rows], 12, names_to) - _extent(["x" * 24], 12)), 0)
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
    if abs(row.mean) > limit:  # beyond the axis: an arrow at its end, the number stands beside it
        axes.plot(math.copysign(limit, row.mean), y, marker=">" if row.mean > 0 else "<", color=colour, markersize=8)
        return
    for value in row.values:
        if abs(value) <= limit:
            axes.plot(value, y + 0.24, marker="o", color=colour, markersize=3, markeredgewidth=0, alpha=0.6)
    shape = "o" if row.low is not None else "D"
    axes.plot(row.mean, y, marker=shape, color=colour, markerfacecolor=face, markersize=8, markeredgewidth=1.8)


def _limit(rows: Sequence[ForestRow], floor: float | None) -> float:
    """Half the axis: wide enough for most rows, not for the one that is ten times further away than the rest."""
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
    """One metric by optimiser step: the mean over data orders and seeds, and each of them lightly behind it.

    More than four runs of a method are drawn as the band between the lowest and the highest. `points` per line.
    """

    def draw(figure: Figure) -> None:
        axes = _axes(figure, left=40, right=8, top=26, bottom=38)
        for name, lines in runs.items():
            style = chosen.get(name, Style())
            dashes: Any = (0, style.dash) if style.dash else "solid"
            mean = lines[0] if len(lines) == 1 else average(lines)
            alone = sum(math.isfinite(y) for _, y in mean) < 2  # the runs share no steps: no mean to draw
            if alone or 1 < len(lines) <= 4:
                for line in lines[:12]:
                    width, alpha = (1.1, 0.8) if alone else (0.8, 0.28)
                    axes.plot(*_xy(thin(line, points // 2)), color=style.colour, linewidth=width, alpha=alpha)
            elif len(lines) > 4:
                x, low, high = _envelope(lines, points * 3 // 4)
                axes.fill_between(x, low, high, color=style.colour, alpha=0.09, linewidth=0)
            axes.plot(*_xy(thin(mean, points)), color=style.colour, linestyle=dashes, linewidth=1.8)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        axes.set_title(shorten(title, 44))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(False, axis="x")
        axes.spines["left"].set_visible(False)

    return svg(draw, 330, 220, title=f"{title} by step", alt=alt, key=key)


def sweep(
    lines: dict[str, list[SweepPoint]], chosen: dict[str, Style], *, title: str, x_label: str, log: bool, alt: str,
    key: str,
) -> Markup:  # fmt: skip
    """Differences to the baseline at zero along one setting: means with 95 % intervals, and every repeat as a dot."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, left=52, right=10, top=30 + 20 * -(-len(lines) // 2), bottom=42)
        ticks = sorted({point[0] for line in lines.values() for point in line})
        axes.set_xscale("log" if log else "linear")
        axes.axhline(0, color=INK, linewidth=1.2)
        step = 0.012 * (len(ticks) > 1)
        for place, (name, line) in enumerate(lines.items()):
            style = chosen.get(name, Style())
            shift = step * (place - (len(lines) - 1) / 2)  # beside each other, where they share a place
            span = math.log(ticks[-1] / ticks[0]) if log else ticks[-1] - ticks[0]
            xs = [x * math.exp(shift * span) if log else x + shift * span for x, *_ in line]
            dashes: Any = (0, style.dash) if style.dash else "solid"
            axes.plot(xs, [m for _, m, *_ in line], color=style.colour, linestyle=dashes, linewidth=1.8, marker="o",
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
        axes.grid(False, axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_title(title, pad=12 + 20 * -(-len(lines) // 2))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=11, handlelength=2.6,
                    labelspacing=0.35, borderaxespad=0.2, borderpad=0)  # fmt: skip

    return svg(draw, 560, 330 + 20 * (len(lines) // 2), title=title, alt=alt, key=key)


def bars(rows: Sequence[tuple[str, float, float | None, str, bool]], *, title: str, alt: str, key: str) -> Markup:
    """Fractions between 0 and 1 as bars with a line at 0.5. Rows: name, mean, s.e., its text, whether it stands out."""

    def draw(figure: Figure) -> None:
        left, right = _extent([r[0] for r in rows], 12, 34), _extent([r[3] for r in rows], 11)
        axes = _axes(figure, left=left, right=right, top=2, bottom=22)
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
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [shorten(r[0], 34) for r in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_color(INK if row[4] else MUTED)
            label.set_fontsize(12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5 (chance)", "", "1"])
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)

    return svg(draw, 560, 26 + 26 * len(rows), title=title, alt=alt, key=key)


def scatter(
    points: Points, style: Style, *, title: str, labels: tuple[str, str], alt: str, key: str,
    x_limits: tuple[float, float], y_limits: tuple[float, float],
) -> Markup:  # fmt: skip
    """A cloud of points; `labels` of the two axes."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, left=54, right=8, top=26, bottom=38)
        for line, (low, high) in ((axes.axvline, x_limits), (axes.axhline, y_limits)):
            if low < 0 < high:
                line(0, color=MUTED, linewidth=0.9)
        if points:
            axes.plot(
                *_xy(points),
                linestyle="none",
                marker="o",
                markersize=3.4,
                markeredgewidth=0,
                color=style.colour,
                alpha=0.5,
            )
        axes.set_xlim(*x_limits)
        axes.set_ylim(*y_limits)
        axes.set_title(shorten(title, 44))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))

    return svg(draw, 330, 290, title=f"{title}: {labels[1]} against {labels[0]}", alt=alt, key=key)


def clouds(
    found: Sequence[tuple[str, Points, Style, str]], *, labels: tuple[str, str], key: str, budget: int, zero: bool
) -> list[Markup]:
    """A scatter of each of some clouds (name, points, style, text alternative), on the same axes.

    `budget` points are shared by all; `zero` says whether the axes reach to it.
    """
    shown = max(40, budget // max(1, len(found)))
    everything = [point for _, points, _, _ in found for point in points]
    x_limits, y_limits = (limits((point[axis] for point in everything), zero=zero) for axis in (0, 1))
    return [
        scatter(
            points[:: math.ceil(len(points) / shown)],
            style,
            title=name,
            labels=labels,
            key=f"{key}{i}",
            x_limits=x_limits,
            y_limits=y_limits,
            alt=alt,
        )
        for i, (name, points, style, alt) in enumerate(found)
    ]


def ranges(
    names: Sequence[str], series: dict[str, tuple[list[tuple[float, float, float] | None], Style]], *, label: str,
    alt: str, key: str,
) -> Markup:  # fmt: skip
    """Means with 95 % intervals of several methods over a few ranges, side by side. Series: (mean, low, high) each."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure, left=48, right=8, top=8, bottom=42)
        step = 0.7 / max(1, len(series))
        for i, (ends, style) in enumerate(series.values()):
            at = [(x + (i - (len(series) - 1) / 2) * step, end) for x, end in enumerate(ends) if end is not None]
            for x, (_, low, high) in at:
                axes.plot([x, x], [low, high], color=style.colour, linewidth=1.4)
            xs, means = [x for x, _ in at], [end[0] for _, end in at]
            dashes: Any = (0, style.dash) if style.dash else "solid"
            axes.plot(
                xs, means, color=style.colour, linestyle=dashes, linewidth=1, marker="o", markersize=5,
                markeredgewidth=0,
            )  # fmt: skip
        axes.set_xticks(range(len(names)), [shorten(name) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel("words of the reference response")
        axes.set_ylabel(shorten(label, 40))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(False, axis="x")
        axes.spines["left"].set_visible(False)

    return svg(draw, 560, 260, title=f"{label} by length of the reference response", alt=alt, key=key)


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------


def thin(line: Points, to: int) -> Points:
    """At most `to` points, each the mean of its neighbours; a gap (a value that is not finite) stays a gap."""
    if len(line) <= to:
        return line
    size = len(line) / to
    buckets = [line[int(i * size) : int((i + 1) * size)] for i in range(to)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets if b]


def limits(values: Iterable[float], *, zero: bool = True) -> tuple[float, float]:
    """Axis limits with a little air around all finite values, and around zero unless told otherwise."""
    finite = [v for v in values if math.isfinite(v)]
    if zero or not finite:
        finite.append(0.0)
    low, high = min(finite), max(finite)
    air = 0.06 * (high - low) or 1.0
    return low - air, high + air


def shorten(text: str, to: int = 24) -> str:
    return text if len(text) <= to else text[: to - 1].rstrip() + "…"


def _envelope(lines: Sequence[Points], to: int) -> tuple[list[float], list[float], list[float]]:
    tables = [dict(line) for line in lines]
    ends = []
    for x in sorted(set(tables[0]).intersection(*tables[1:])):
        finite = [t[x] for t in tables if math.isfinite(t[x])] or [math.nan]
        ends.append((x, min(finite), max(finite)))
    low, high = thin([(x, y) for x, y, _ in ends], to), thin([(x, y) for x, _, y in ends], to)
    return _xy(low)[0], _xy(low)[1], _xy(high)[1]


def _xy(line: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in line], [y if math.isfinite(y) else math.nan for _, y in line]


# ---------------------------------------------------------------------------------------------------------------------
# From matplotlib to the page
# ---------------------------------------------------------------------------------------------------------------------


def _axes(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> Any:
    """Axes with these margins in pixels: panels line up, and it is twice as fast as a layout that measures its text."""
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure.add_axes(box)


def _extent(texts: Sequence[str], size: float, to: int = 24) -> float:
    """About how wide the widest of these texts is, in pixels, with the space beside it."""
    return 14 + 0.56 * size * max((columns(shorten(t, to)) for t in texts), default=0)


def svg(draw: Callable[[Figure], None], width: int, height: int, *, title: str, alt: str, key: str) -> Markup:
    """Draw on a fresh figure of `width` x `height` CSS pixels and return it as an SVG element with a text alternative.

    `key` is put before every id, since several figures share one page.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that matplotlib's own font lacks is drawn by the browser's
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, _RC))
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0], key), body)  # user text holds no "<": matplotlib escapes it
    body = _shrink(re.sub(r">\s*\n\s*<", ">\n<", body), key)
    head = (
        f'<svg class="plot" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-labelledby="{key}-title {key}-alt"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-alt">{escape(alt)}</desc>'
    )
    return Markup(head + body + "</svg>")


def _tag(tag: str, key: str) -> str:
    """One tag for the page: its colours and font, ids that no other figure has, and no digits that nobody sees."""
    tag = re.sub(r'\bid="', f'id="{key}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', tag).replace("url(#", f"url(#{key}-")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda c: _CSS.get(c[0], c[0]), tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r"-?\d+\.\d{3,}(?:e-?\d+)?", _round, tag)
    return re.sub(r"\s*\n\s*", " ", tag)


def _round(found: re.Match[str]) -> str:
    """A tenth of a pixel; a hundredth for the small numbers of which markers are made."""
    value = float(found[0])
    return f"{value:.{1 if abs(value) >= 10 else 2}f}".rstrip("0").rstrip(".")


def _shrink(body: str, key: str) -> str:
    """Half the size: no ids that nothing refers to, no empty groups, the style of a cloud of points said once."""
    used = dict.fromkeys(re.findall(r'(?:href="|url\()#([^")]*)', body))
    short = {name: f"{key}-{i}" for i, name in enumerate(used)}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{short[m[1]]}"' if m[1] in short else "", body)
    body = re.sub(r'(href="|url\()#([^")]*)', lambda m: f"{m[1]}#{short[m[2]]}", body)
    body = re.sub(r"<(g|defs)/>\n?|<(g|defs)>\s*</(?:g|defs)>\n?", "", body)

    def fold(group: re.Match[str]) -> str:
        found = set(re.findall(r' style="[^"]*"', group[2]))
        if len(found) != 1 or group[2].count(" style=") != group[2].count("<use"):
            return group[0]
        return f"<g {group[1]}{(style := found.pop())}>\n{group[2].replace(style, '')}</g>"

    return re.sub(r'<g (clip-path="[^"]*")>\n((?:<use [^>]*/>\n)+)</g>', fold, body)
