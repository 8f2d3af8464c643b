"""Read results.json: scores, paired differences, metrics, roles and the headline.

Only the key "methods" is required. Anything missing or malformed is absent, never guessed; no run's name has a meaning.
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal, get_args

Results = dict[str, Any]
Kind = Literal["baseline", "method", "placebo", "bound", "noise_floor", "teacher", "start"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CONTROLS: tuple[Kind, ...] = ("placebo", "bound", "noise_floor")

NOT_FINITE = "not finite"


def mapping(value: Any) -> dict[str, Any]:
    """Return `value` if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def clean(text: Any) -> str:
    """Return one printable line: control characters (terminal escapes too) and line breaks become spaces."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(text))
    return " ".join(text.split())


def number(value: Any) -> float | None:
    """Return a float (perhaps not finite), or None for anything else. Quoted "NaN" and "Infinity" count as numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class Column:
    """A metric as results.json describes it: its key, label, direction and number format."""

    key: str
    label: str
    higher_is_better: bool | None = None
    spec: str = ".3f"

    def format(self, value: float, *, sign: bool = False) -> str:
        """Return a number as text, with an explicit plus if `sign`."""
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
    """A mean over `n` repeats with its standard error and 95 % interval, each None where there is none."""

    mean: float
    se: float | None = None
    n: int | None = None
    over: str = ""
    low: float | None = None
    high: float | None = None

    @classmethod
    def parse(cls, value: Any) -> "Estimate | None":
        """Read a number or {"mean", "se", "n", "over", "low", "high"}; return None where there is no mean."""
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
        """Whether mean and standard error are finite."""
        return math.isfinite(self.mean) and (self.se is None or math.isfinite(self.se))

    @property
    def repeated(self) -> bool:
        """Whether there is a standard error over more than one repeat."""
        return self.se is not None and self.n != 1

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval: the recorded one, else by Student's t; None without repeats.

        An unknown `n` counts as large.
        """
        if not self.finite or self.se is None or not self.repeated:
            return None
        if self.low is not None and self.high is not None:
            return self.low, self.high
        from prefdistill.evaluation.stats import t_interval

        return t_interval(self.mean, self.se, self.n or None)

    def text(self, column: Column, *, sign: bool = False) -> str:
        """Return "mean ± standard error"."""
        mean = column.format(self.mean, sign=sign)
        return f"{mean} ± {column.format(self.se)}" if self.se is not None and mean != NOT_FINITE else mean


@dataclass(frozen=True)
class Role:
    """The declared role of a run; `of` is the run that a control is a control of."""

    kind: Kind = "method"
    of: str | None = None

    @property
    def is_control(self) -> bool:
        """Whether the run is a placebo, a bound or a noise floor."""
        return self.kind in CONTROLS


def roles_in(results: Results) -> dict[str, Role]:
    """Return the role of every row, in the order of the rows. A row without a declared role is a method."""
    methods, declared = mapping(results.get("methods")), mapping(results.get("roles"))
    roles = {}
    for name in methods:
        role = mapping(declared.get(name))
        kind, of = role.get("kind"), role.get("of")
        known: Kind = kind if isinstance(kind, str) and kind in KINDS else "method"
        roles[name] = Role(known, of if isinstance(of, str) and of in methods and of != name else None)
    return roles


def declares_roles(results: Results) -> bool:
    """Return whether results.json declares roles; those of older versions do not."""
    return bool(mapping(results.get("roles")))


def baseline_of(results: Results) -> str | None:
    """Return the run that the others are compared with, if there is one."""
    return next((name for name, role in roles_in(results).items() if role.kind == "baseline"), None)


def all_columns(results: Results) -> list[Column]:
    """Return every metric in the order of results.json. Metrics that it does not describe come last."""
    described = mapping(results.get("metrics"))
    keys = dict.fromkeys(described)
    for scores in mapping(results.get("methods")).values():
        keys.update(dict.fromkeys(mapping(scores)))
    columns = []
    for key in keys:
        about = mapping(described.get(key))
        better, spec = about.get("higher_is_better"), about.get("format")
        columns.append(
            Column(
                key,
                clean(about.get("label") or key),
                better if isinstance(better, bool) else None,
                spec if isinstance(spec, str) else ".3f",
            )
        )
    return columns


def columns_of(results: Results) -> list[Column]:
    """Return the metrics that tables show, the headline first."""
    described, headline = mapping(results.get("metrics")), _headline_key(results)
    hidden = {key for key, about in described.items() if mapping(about).get("in_table") is False} - {headline}
    shown = [column for column in all_columns(results) if column.key not in hidden]
    return sorted(shown, key=lambda column: column.key != headline)


def headline_column(results: Results) -> Column | None:
    """Return the headline metric: the declared one, else the first of the tables; None where nothing was measured."""
    columns, key = columns_of(results), _headline_key(results)
    return next((column for column in columns if key is None or column.key == key), None)


def _headline_key(results: Results) -> str | None:
    key = mapping(results.get("headline")).get("metric")
    return key if isinstance(key, str) else None


def headline_method(results: Results) -> str | None:
    """Return the method that the verdict is about; None where it is about all alike."""
    name = mapping(results.get("headline")).get("method")
    role = roles_in(results).get(name) if isinstance(name, str) else None
    return name if role is not None and role.kind == "method" else None


def score(results: Results, name: str, column: Column) -> Estimate | None:
    """Return the score of a run."""
    return Estimate.parse(mapping(mapping(results.get("methods")).get(name)).get(column.key))


def difference(results: Results, name: str, column: Column | None) -> Estimate | None:
    """Return the paired difference of a run to the baseline."""
    if column is None:
        return None
    return Estimate.parse(mapping(mapping(results.get("differences")).get(name)).get(column.key))


def repeats(results: Results, estimate: Estimate) -> str:
    """Return what an estimate is over: "seeds", "data orders" or "test prompts"."""
    if estimate.over:
        return estimate.over
    seeds = results.get("seeds")
    return "seeds" if isinstance(seeds, list) and len(seeds) > 1 else "data orders"


def display_name(results: Results, name: str) -> str:
    """Return a run's name as sentences write it."""
    shown = mapping(results.get("display_names")).get(name)
    return clean(shown if isinstance(shown, str) and shown else name)
