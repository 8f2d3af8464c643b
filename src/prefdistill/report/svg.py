"""From matplotlib to the page: figures as inline SVG that takes its colours from the page.

matplotlib draws with placeholder colours; `svg` replaces them with CSS variables (`currentColor`, `var(--blue)`). One
picture serves the light and the dark page. Text stays text: selectable, searchable and in the page's font. There is
no pyplot: nothing here changes global state or needs a display.
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

from prefdistill.evaluation.results import Kind, Results, Role
from prefdistill.report.load import Points
from prefdistill.report.table import width as columns

# Placeholder colours, and the page's colours that replace them.
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
    """How one run is drawn everywhere on the page: colour and dashes, so that colour is never the only difference."""

    colour: str = MUTED
    dash: tuple[int, ...] = ()

    @property
    def css(self) -> str:
        return _CSS[self.colour]

    @property
    def line(self) -> Any:
        """The line style in matplotlib's terms."""
        return (0, self.dash) if self.dash else "solid"

    @property
    def dasharray(self) -> str:
        return " ".join(map(str, self.dash))


BY_KIND: dict[Kind, Style] = {
    "baseline": Style(INK),
    "bound": Style(GREEN, (6, 2, 1, 2)),
    "noise_floor": Style(MUTED, (1, 2)),
    "teacher": Style(MUTED),
    "start": Style(MUTED, (2, 2)),
}
PLACEBO_DASH = (4, 2, 2, 2)  # in the colour of the method that it controls


def styles(roles: dict[str, Role], headline: str | None) -> dict[str, Style]:
    """Return the style of each run from its role: the headline method (else the first) is blue."""
    colours = (BLUE, VERMILLION, ORANGE, PURPLE, GREEN, SKY, YELLOW)
    free = [Style(colour, dash) for dash in ((), (5, 2), (1, 2)) for colour in colours]
    chosen: dict[str, Style] = {}
    if headline in roles:
        chosen[headline] = free.pop(0)
    for name, role in roles.items():
        if role.kind == "method" and name not in chosen:
            chosen[name] = free.pop(0) if free else Style()
    for name, role in roles.items():
        if role.kind == "placebo":
            chosen[name] = Style(chosen[role.of].colour if role.of in chosen else SKY, PLACEBO_DASH)
        elif role.kind != "method":
            chosen[name] = BY_KIND[role.kind]
    return {name: chosen[name] for name in roles}


def styles_of(results: Results) -> dict[str, Style]:
    """Return the style of each run of the results."""
    return styles(results.roles, results.headline_method)


# -- lines -------------------------------------------------------------------------------------------------------------


def thin(line: Points, to: int) -> Points:
    """Return at most `to` points, each the mean of its neighbours; a value that is not finite stays a gap."""
    if len(line) <= to:
        return line
    size = len(line) / to
    buckets = [line[int(i * size) : int((i + 1) * size)] for i in range(to)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets if b]


def limits(values: Iterable[float], *, zero: bool = True) -> tuple[float, float]:
    """Return axis limits with a margin around all finite values, and around zero if `zero`."""
    finite = [v for v in values if math.isfinite(v)]
    if zero or not finite:
        finite.append(0.0)
    low, high = min(finite), max(finite)
    air = 0.06 * (high - low) or 1.0
    return low - air, high + air


def shorten(text: str, to: int = 24) -> str:
    """Return at most `to` characters, the last one an ellipsis where text was cut."""
    return text if len(text) <= to else text[: to - 1].rstrip() + "…"


def envelope(lines: Sequence[Points], to: int) -> tuple[list[float], list[float], list[float]]:
    """Return x, lowest and highest value of several lines at the steps that all have, thinned to `to` points."""
    tables = [dict(line) for line in lines]
    ends = []
    for x in sorted(set(tables[0]).intersection(*tables[1:])):
        finite = [t[x] for t in tables if math.isfinite(t[x])] or [math.nan]
        ends.append((x, min(finite), max(finite)))
    low, high = thin([(x, y) for x, y, _ in ends], to), thin([(x, y) for x, _, y in ends], to)
    return xy(low)[0], xy(low)[1], xy(high)[1]


def xy(line: Points) -> tuple[list[float], list[float]]:
    """Return the two coordinates apart, with NaN where y is not finite."""
    return [x for x, _ in line], [y if math.isfinite(y) else math.nan for _, y in line]


# -- from matplotlib to the page ---------------------------------------------------------------------------------------


def axes_of(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> Any:
    """Return axes with these margins in pixels: panels line up, and no layout has to measure text."""
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure.add_axes(box)


def bare(axes: Any, axis: str) -> None:
    """Leave out the grid lines of one axis, and the line at the left."""
    axes.grid(False, axis=axis)
    axes.spines["left"].set_visible(False)


def text_width(texts: Sequence[str], size: float, to: int = 24) -> float:
    """Return about how wide the widest of these texts is, in pixels, with the space beside it."""
    return 14 + 0.56 * size * max((columns(shorten(t, to)) for t in texts), default=0)


def svg(draw: Callable[[Figure], None], width: int, height: int, *, title: str, alt: str, key: str) -> Markup:
    """Draw on a new figure of `width` x `height` CSS pixels and return it as an SVG element with a text alternative.

    `key` is the prefix of every id, since several figures share one page.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the browser draws the glyphs that matplotlib's own font lacks
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
    """Return one tag with the page's colours and font, unique ids, and no invisible digits."""
    tag = re.sub(r'\bid="', f'id="{key}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', tag).replace("url(#", f"url(#{key}-")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda c: _CSS.get(c[0], c[0]), tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r"-?\d+\.\d{3,}(?:e-?\d+)?", _round, tag)
    return re.sub(r"\s*\n\s*", " ", tag)


def _round(match: re.Match[str]) -> str:
    """Return a number rounded to a tenth of a pixel; the small numbers of markers to a hundredth."""
    value = float(match[0])
    return f"{value:.{1 if abs(value) >= 10 else 2}f}".rstrip("0").rstrip(".")


def _shrink(body: str, key: str) -> str:
    """Return the body at half the size: no unused ids, no empty groups, one style per cloud of points."""
    used = dict.fromkeys(re.findall(r'(?:href="|url\()#([^")]*)', body))
    short = {name: f"{key}-{i}" for i, name in enumerate(used)}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{short[m[1]]}"' if m[1] in short else "", body)
    body = re.sub(r'(href="|url\()#([^")]*)', lambda m: f"{m[1]}#{short[m[2]]}", body)
    body = re.sub(r"<(g|defs)/>\n?|<(g|defs)>\s*</(?:g|defs)>\n?", "", body)

    def fold(group: re.Match[str]) -> str:
        point_styles = set(re.findall(r' style="[^"]*"', group[2]))
        if len(point_styles) != 1 or group[2].count(" style=") != group[2].count("<use"):
            return group[0]
        return f"<g {group[1]}{(style := point_styles.pop())}>\n{group[2].replace(style, '')}</g>"

    return re.sub(r'<g (clip-path="[^"]*")>\n((?:<use [^>]*/>\n)+)</g>', fold, body)
