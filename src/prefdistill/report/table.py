"""Numbers in words and tables: what `results.json` says, for a terminal, as markdown and as one honest sentence.

Everything here reads the dictionary of `results.json`; only its key "methods" is required. Nothing is ever guessed:
what was not measured is "-", what is not a finite number is "not finite", and a single run gets no "±".
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

Results = dict[str, Any]
Role = Literal["baseline", "reference", "control", "method"]
Kind = Literal["clear", "leaning", "noise", "single", "broken", "missing"]

NOT_FINITE = "not finite"
MISSING = "-"
WIDTH = 100

# 97.5 % quantiles of Student's t for 1..30 degrees of freedom; with three repeats an interval is 4.3 s.e. wide, not 2.
_Z = 1.959964
_T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
_T975 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]

_PRETTY = {
    "tvkd": "TVKD", "dpo": "DPO", "sft": "SFT", "dckd": "DCKD", "adpa": "ADPA", "adpa+": "ADPA+", "dpkd": "DPKD",
    "vanillakd": "VanillaKD", "seqkd": "SeqKD", "simpo": "SimPO", "wpo": "WPO", "dadpo": "daDPO", "adpa-plus": "ADPA+",
    "distillm2": "DistiLLM-2",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Reading results.json
# ---------------------------------------------------------------------------------------------------------------------


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a dictionary, else an empty one: optional sections may be missing or malformed."""
    return value if isinstance(value, dict) else {}


def clean(text: Any) -> str:
    """One printable line: control characters (terminal escapes too) and line breaks become spaces."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(text))
    return " ".join(text.split())


def number(value: Any) -> float | None:
    """A float (perhaps not finite), or None where there is no number. Quoted "NaN" and "Infinity" count as numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class Metric:
    """One column: its key in results.json, its name in words, its direction and how its numbers are written."""

    key: str
    label: str
    higher_is_better: bool | None = None
    spec: str = ".3f"

    def format(self, value: float, *, sign: bool = False) -> str:
        if not math.isfinite(value):
            return NOT_FINITE
        try:
            text = format(value, self.spec)
        except ValueError:
            text = format(value, ".4g")
        if not re.search("[1-9]", text):  # rounds to zero: "-0.000" and "+0.000" would suggest a direction
            return text.lstrip("-+")
        return "+" + text if sign and value > 0 and not text.startswith("+") else text


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` repeats with its standard error, each None where it was not measured.

    `low`, `high`: a 95 % interval that was measured with it, by a bootstrap.
    """

    mean: float
    se: float | None = None
    n: int | None = None
    over: str = ""
    low: float | None = None
    high: float | None = None

    @classmethod
    def parse(cls, value: Any) -> "Estimate | None":
        """From a number or {"mean", "se", "n", "over"}; None where nothing was measured."""
        if not isinstance(value, dict):
            mean = number(value)
            return None if mean is None else cls(mean)
        mean, se, n = number(value.get("mean")), number(value.get("se")), number(value.get("n"))
        if mean is None:
            return None
        if se is not None and se < 0:
            se = None
        low, high = number(value.get("low")), number(value.get("high"))
        if low is None or high is None or not low <= high:
            low = high = None
        count = int(n) if n is not None and math.isfinite(n) else None
        return cls(mean, se, count, clean(value.get("over") or ""), low, high)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.mean) and (self.se is None or math.isfinite(self.se))

    @property
    def repeated(self) -> bool:
        return self.se is not None and self.n != 1

    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean: the one measured with it, else by Student's t; None without repeats.

        An unknown `n` is taken as large.
        """
        if not self.finite or self.se is None or not self.repeated:
            return None
        if self.low is not None and self.high is not None:
            return self.low, self.high
        half = t975(self.n - 1 if self.n else None) * self.se
        return self.mean - half, self.mean + half

    def text(self, metric: Metric, *, sign: bool = False) -> str:
        mean = metric.format(self.mean, sign=sign)
        return f"{mean} ± {metric.format(self.se)}" if self.se is not None and mean != NOT_FINITE else mean


def t975(df: int | None) -> float:
    """The 97.5 % quantile of Student's t with `df` degrees of freedom (None: the normal distribution's)."""
    if df is None:
        return _Z
    return _T975[max(df, 1) - 1] if df <= len(_T975) else _Z + 2.3723 / df + 2.8225 / df**2  # Cornish-Fisher


def metrics_of(results: Results) -> list[Metric]:
    """The metrics in display order, the headline first. Metrics that results.json does not describe come last."""
    described = mapping(results.get("metrics"))
    keys = dict.fromkeys(described)
    for scores in mapping(results.get("methods")).values():
        keys.update(dict.fromkeys(mapping(scores)))
    metrics = []
    for key in keys:
        about = mapping(described.get(key))
        better = about.get("higher_is_better")
        spec = about.get("format")
        metrics.append(
            Metric(
                key,
                clean(about.get("label") or key),
                better if isinstance(better, bool) else None,
                spec if isinstance(spec, str) else ".3f",
            )
        )
    return metrics


def baseline_of(results: Results) -> str | None:
    """The method that the others are compared with, if it was run."""
    name = results.get("baseline", "dpo")
    return name if isinstance(name, str) and name in mapping(results.get("methods")) else None


def difference(results: Results, name: str, metric: Metric | None) -> Estimate | None:
    """The paired difference of `name` to the baseline."""
    if metric is None:
        return None
    return Estimate.parse(mapping(mapping(results.get("differences")).get(name)).get(metric.key))


def repeats(results: Results, estimate: Estimate) -> str:
    """What a difference was repeated over: "seeds", "data orders" or "test prompts"."""
    if estimate.over:
        return estimate.over
    seeds = results.get("seeds")
    return "seeds" if isinstance(seeds, list) and len(seeds) > 1 else "data orders"


def role(results: Results, name: str) -> Role:
    """Whether a row is the baseline, a reference point (teacher, start), a control or a method under test."""
    from prefdistill.experiment.recipe import RESERVED_NAMES

    controls = results.get("controls")
    if name == results.get("baseline", "dpo"):
        return "baseline"
    if isinstance(controls, list) and name in controls:
        return "control"
    if name in RESERVED_NAMES:
        return "reference"
    if re.search(r"(^|-)(shuffled|placebo|oracle|random|other-order)(-|$)", name):
        return "control"
    return "method"


def noise_floor(results: Results, metric: Metric | None) -> float | None:
    """How far apart two runs of the *same* method come out: the baseline against itself with another data order.

    That difference should be zero. Its size, or twice its standard error where that is larger, is what a difference
    between two methods has to exceed before it means anything.
    """
    names = [n for n in mapping(results.get("differences")) if n.endswith("other-order")]
    floors = []
    for name in names:
        estimate = difference(results, name, metric)
        if estimate is not None and estimate.finite:
            floors.append(max(abs(estimate.mean), 2 * (estimate.se or 0.0)))
    return max(floors, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Judging a difference
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What one paired difference says. `good`: +1 better than the baseline, -1 worse, 0 where neither is better."""

    kind: Kind
    estimate: Estimate | None
    good: int = 0
    below_floor: bool = False

    @property
    def word(self) -> str:
        """Two words for a table."""
        if self.kind in ("clear", "leaning"):
            assert self.estimate is not None
            up = self.estimate.mean > 0
            word = {1: "ahead", -1: "behind", 0: "higher" if up else "lower"}[self.good]
            return word if self.kind == "clear" else f"leans {word}"
        return {"noise": "within noise", "single": "no repeats", "broken": NOT_FINITE, "missing": MISSING}[self.kind]


def judge(results: Results, name: str, metric: Metric | None) -> Judgement:
    """Judge the paired difference of `name` to the baseline.

    clear    larger than two standard errors and than the noise floor, and the 95 % interval excludes zero
    leaning  larger than two standard errors and than the noise floor, but with so few repeats that the 95 % interval
             (Student's t) still includes zero
    noise    anything smaller
    single   no standard error: one run says nothing about noise
    """
    estimate = difference(results, name, metric)
    if estimate is None or metric is None:
        return Judgement("missing", None)
    if not estimate.finite:
        return Judgement("broken", estimate)
    direction = 0 if metric.higher_is_better is None else 1 if metric.higher_is_better else -1
    good = direction * (1 if estimate.mean > 0 else -1 if estimate.mean < 0 else 0)
    interval = estimate.interval()
    if interval is None or estimate.se is None:
        return Judgement("single", estimate, good)
    floor = noise_floor(results, metric)
    if abs(estimate.mean) <= 2 * estimate.se:
        return Judgement("noise", estimate, good)
    if floor is not None and abs(estimate.mean) <= floor:
        return Judgement("noise", estimate, good, below_floor=True)
    return Judgement("leaning" if interval[0] <= 0 <= interval[1] else "clear", estimate, good)


def pretty(name: str) -> str:
    """A method's name as it is written in a sentence."""
    name = clean(name)
    return _PRETTY.get(name, name)


def verdict(results: Results) -> str:
    """One sentence: did TVKD (or, where it was not run, each method that is not a control) beat the baseline?

    "beat" needs a paired difference of the headline metric of more than two standard errors that also exceeds the
    noise floor (see `judge`). A loss is said in the same words as a win, and a tie is called one. Where another method
    (not a control) came out ahead of the baseline, a second short sentence says so, and of how many.
    """
    names = [n for n in mapping(results.get("methods")) if role(results, n) == "method"]
    headline = next(iter(metrics_of(results)), None)
    baseline = baseline_of(results)
    if headline is None:
        return "Nothing was measured, so there is nothing to compare."
    if baseline is None:
        missing = pretty(str(results.get("baseline", "dpo")))
        return f"The baseline, {missing}, was not run, so nothing can be said about which method is better."
    if not names:
        return "Only baselines and controls were run, so there is nothing to compare."
    if "tvkd" in names:
        others = [n for n in names if n != "tvkd"]
        return _sentence(results, "tvkd", baseline, headline) + _ahead(results, others, baseline, headline)
    if any(n.startswith("tvkd") for n in names):
        names = [n for n in names if n.startswith("tvkd")]
    if len(names) == 1:
        return _sentence(results, names[0], baseline, headline)
    return _list(results, names, baseline, headline)


def _sentence(results: Results, name: str, baseline: str, metric: Metric) -> str:
    judgement = judge(results, name, metric)
    estimate, a, b = judgement.estimate, pretty(name), pretty(baseline)
    if estimate is None:
        scores = mapping(results.get("methods"))
        ours, theirs = (Estimate.parse(mapping(scores[n]).get(metric.key)) for n in (name, baseline))
        if ours is None or theirs is None:
            return f"No difference between {a} and {b} was measured on {metric.label}, so neither can be called better."
        return (
            f"{a} scored {ours.text(metric)} and {b} {theirs.text(metric)} on {metric.label}, "
            "but no paired difference was recorded, so neither can be called better."
        )
    if judgement.kind == "broken":
        return f"The difference between {a} and {b} on {metric.label} is not a finite number: a run failed or diverged."
    size, on = metric.format(abs(estimate.mean)), f"on {metric.label}"
    if judgement.kind == "single":
        how = {1: f"{size} better than", -1: f"{size} worse than", 0: f"{metric.format(estimate.mean, sign=True)} from"}
        came = f"came out {how[judgement.good]} {b}" if estimate.mean else f"came out level with {b}"
        if estimate.n and estimate.n > 1:
            return f"{a} {came} {on}{_over(results, estimate)}; without a standard error it may be noise."
        return f"{a} {came} {on} in a single run; without repeats nothing says whether that is more than noise."

    amount = f"{size} ± {metric.format(estimate.se or 0.0)}"
    spread = f"(mean ± s.e.{_over(results, estimate)})"
    if judgement.kind == "noise":
        amount = estimate.text(metric, sign=True)
        text = f"No difference between {a} and {b} could be told apart from noise {on}: {amount} {spread}"
        if judgement.below_floor:
            floor = metric.format(noise_floor(results, metric) or 0.0)
            text += f", no more than {b} moves by itself with another data order ({floor})"
    else:
        clear = judgement.kind == "clear"
        side = "above" if estimate.mean > 0 else "below"
        text = a + " " + {
            1: f"beat {b} by" if clear else f"came out ahead of {b} by",
            -1: f"lost to {b} by" if clear else f"came out behind {b} by",
            0: f"came out {side} {b} by",
        }[judgement.good]  # fmt: skip
        text += f" {amount} {on} {spread}"
        if not clear:
            low, high = (metric.format(x, sign=True) for x in estimate.interval() or (0.0, 0.0))
            text += f", but with so few repeats the 95 % interval ({low} to {high}) still includes zero"
    return text + _caveat(results, estimate) + _placebo(results, name, metric, judgement) + "."


MANY = 5  # comparisons, from which on their number belongs beside those that came out ahead


def _ahead(results: Results, names: list[str], baseline: str, metric: Metric) -> str:
    """A short second sentence on those of `names` that came out ahead of the baseline, "" where none did."""
    parts = []
    for name in names:
        judgement = judge(results, name, metric)
        estimate = judgement.estimate
        if estimate is None or judgement.kind not in ("clear", "leaning") or judgement.good <= 0:
            continue
        amount = f"{metric.format(abs(estimate.mean))} ± {metric.format(estimate.se or 0.0)}"
        part = f"{pretty(name)} came out ahead of {pretty(baseline)} by {amount}"
        parts.append(part if judgement.kind == "clear" else f"{part}, but its 95 % interval includes zero")
    among = f" ({len(names)} other methods were compared)" if len(names) >= MANY else ""
    return f" {'; '.join(parts)}{among}." if parts else ""


def _list(results: Results, names: list[str], baseline: str, metric: Metric) -> str:
    judged = [(pretty(n), judge(results, n, metric)) for n in names]
    measured = [j.estimate for _, j in judged if j.estimate is not None and j.kind in ("clear", "leaning", "noise")]
    parts = []
    for name, j in judged:
        if j.estimate is None:
            parts.append(f"{name} not compared")
        elif j.kind == "broken":
            parts.append(f"{name} not finite")
        elif j.kind == "single":
            parts.append(f"{name} {j.estimate.text(metric, sign=True)} in a single run")
        else:
            parts.append(f"{name} {j.word} ({j.estimate.text(metric, sign=True)})")
    text = f"Against {pretty(baseline)} on {metric.label}: " + ", ".join(parts)
    if not measured:
        return text + "; without repeats nothing says whether that is more than noise."
    same = len({(e.n, repeats(results, e)) for e in measured}) == 1
    weakest = min(measured, key=lambda e: ("order" not in repeats(results, e), e.n or 0))
    return f"{text} (mean ± s.e.{_over(results, weakest) if same else ''}){_caveat(results, weakest)}."


def _over(results: Results, estimate: Estimate) -> str:
    return f" over {estimate.n} {repeats(results, estimate)}" if estimate.n else ""


def _caveat(results: Results, estimate: Estimate) -> str:
    """What the standard error does not cover."""
    if "test" in repeats(results, estimate):
        return "; this covers the choice of test prompts only: another training or seed may differ"
    if "order" in repeats(results, estimate):
        return "; this covers training-order noise only, another seed may differ"
    if estimate.n is not None and estimate.n < 3:
        return f"; {estimate.n} seeds are too few to cover much more than training-order noise"
    return ""


def _placebo(results: Results, name: str, metric: Metric, ours: Judgement) -> str:
    """How the same method did with another row's values: if it did as well, the teacher's values are not the reason."""
    estimate = next((e for n in (f"{name}-shuffled", "tvkd-shuffled") if (e := difference(results, n, metric))), None)
    if estimate is None or not estimate.finite or ours.estimate is None or metric.higher_is_better is None:
        return ""
    direction = 1 if metric.higher_is_better else -1
    gap = direction * (ours.estimate.mean - estimate.mean)
    gap_se = math.hypot(ours.estimate.se or 0.0, estimate.se or 0.0)
    as_well = gap <= 2 * gap_se
    won = ours.kind in ("clear", "leaning") and ours.good > 0
    lost = ours.kind in ("clear", "leaning") and ours.good < 0
    text = f"the placebo with shuffled values ({estimate.text(metric, sign=True)})"
    if won and as_well:
        return f"; {text} did as well, so the gain cannot be credited to the teacher's values"
    if lost:
        return f"; {text} did {'no worse' if as_well else 'worse still'}"
    return f"; {text} did {'as well' if as_well else 'less well'}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def markdown_cell(text: Any) -> str:
    """Text that is safe in one cell of a markdown table: no HTML, no links or images, no cell or line breaks."""
    text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text)


def markdown_table(header: list[str], rows: list[list[str]], *, left: int = 1) -> str:
    """A GitHub table; the first `left` columns are text, the others numbers. Cells must be escaped already."""
    align = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def method_table(results: Results, *, markdown: bool = False) -> str:
    """Methods by metrics: mean ± standard error, and the paired difference of the headline metric to the baseline.

    Plain text for a terminal is at most 100 columns wide: further metrics go into a second block below.
    """
    metrics, baseline = metrics_of(results), baseline_of(results)
    names = list(mapping(results.get("methods")))
    columns = [(m.label, [_cells(_score(results, n, m), m) for n in names]) for m in metrics]
    differences = [difference(results, n, metrics[0]) if metrics else None for n in names]
    if baseline is not None and any(differences):
        metric = metrics[0]
        cells = [
            ("baseline", "") if n == baseline else _cells(d, metric, sign=True)
            for n, d in zip(names, differences, strict=True)
        ]
        columns.insert(1, (f"difference to {pretty(baseline)}", cells))

    if markdown:
        header = ["method", *(markdown_cell(label) for label, _ in columns)]
        rows = [
            [f"**{markdown_cell(n)}**" if n == baseline else markdown_cell(n), *(_join(c[i]) for _, c in columns)]
            for i, n in enumerate(names)
        ]
        return markdown_table(header, rows)
    return "\n\n".join(_blocks([_fit(clean(n), 30) for n in names], columns)) + _footnote(results, differences)


def _score(results: Results, name: str, metric: Metric) -> Estimate | None:
    return Estimate.parse(mapping(mapping(results.get("methods")).get(name)).get(metric.key))


def _cells(estimate: Estimate | None, metric: Metric, *, sign: bool = False) -> tuple[str, str]:
    if estimate is None:
        return MISSING, ""
    mean, _, se = estimate.text(metric, sign=sign).partition(" ± ")
    return mean, se


def _join(cell: tuple[str, str]) -> str:
    return f"{cell[0]} ± {cell[1]}" if cell[1] else cell[0]


def _blocks(names: list[str], columns: list[tuple[str, list[tuple[str, str]]]]) -> list[str]:
    """Plain-text tables, each at most WIDTH wide, that together hold all columns."""
    first = [*names, "method"]
    name_width = max(map(width, first))
    blocks: list[list[list[str]]] = []
    used = WIDTH + 1
    for label, cells in columns:
        column = _column(label, cells)
        if used + 2 + width(column[-1]) > WIDTH:
            blocks.append([])
            used = name_width
        blocks[-1].append(column)
        used += 2 + width(column[-1])
    texts = []
    for block in blocks or [[]]:
        heads = [column[: len(column) - len(names)] for column in block]
        height = max((len(h) for h in heads), default=1)
        lines = []
        for i in range(height):
            row = [" " * width(h[-1]) if i < height - len(h) else h[i - height + len(h)] for h in heads]
            lines.append("  ".join([_pad("method" if i == height - 1 else "", name_width), *row]).rstrip())
        rule = "  ".join("-" * w for w in [name_width, *(width(h[-1]) for h in heads)])
        body = [
            "  ".join([_pad(n, name_width), *(c[len(h) + i] for c, h in zip(block, heads, strict=True))]).rstrip()
            for i, n in enumerate(names)
        ]
        texts.append("\n".join([*lines, rule, *body]))
    return texts


def _column(label: str, cells: list[tuple[str, str]]) -> list[str]:
    """Header lines, then the cells, all padded to one width; means and standard errors are aligned by themselves."""
    numbers = [(mean, se) for mean, se in cells if re.match(r"[+-]?[\d.]", mean)]
    means = max((width(mean) for mean, _ in numbers), default=0)
    errors = max((width(se) for _, se in numbers), default=0)
    tail = errors + 3 if errors else 0
    body = []
    for mean, se in cells:
        lead = _pad(mean, means, right=True)
        if (mean, se) not in numbers:  # "baseline", "not finite", "-"
            body.append(mean)
        else:
            body.append(f"{lead} ± {_pad(se, errors, right=True)}" if se else lead + " " * tail)
    body_width = max(map(width, body), default=0)
    head = _wrap(_fit(label, 48), max(body_width, 14))
    full = max(body_width, *map(width, head))
    return [_pad(x, full, right=True) for x in head] + [_pad(x, full, right=True) for x in body]


def _footnote(results: Results, differences: list[Estimate | None]) -> str:
    estimate = next((d for d in differences if d is not None and d.repeated), None)
    if estimate is None:
        return ""
    return f"\n\n± is the standard error of the mean{_over(results, estimate)}; differences are paired."


def width(text: str) -> int:
    """Columns in a terminal: wide East Asian characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, to: int, *, right: bool = False) -> str:
    space = " " * max(0, to - width(text))
    return space + text if right else text + space


def _fit(text: str, to: int) -> str:
    if width(text) <= to:
        return text
    while width(text) > to - 3:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, to: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and width(lines[-1]) + 1 + width(word) > to:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def comparison(runs: list[Results]) -> list[tuple[Metric, list[str], list[list[Estimate | None]]]]:
    """Metrics that all runs measured, each with the methods (rows) and every run's score (columns)."""
    if not runs:
        return []
    shared = [m for m in metrics_of(runs[0]) if all(m.key in {o.key for o in metrics_of(r)} for r in runs)]
    names = list(dict.fromkeys(n for r in runs for n in mapping(r.get("methods"))))
    return [(m, names, [[_score(r, n, m) for r in runs] for n in names]) for m in shared]
