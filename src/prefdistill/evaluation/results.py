"""Read results.json: scores, paired differences, metrics, roles and the headline.

Only the key "methods" is required. Anything missing or malformed is absent, never guessed; no run's name has a meaning.
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

Kind = Literal["baseline", "method", "placebo", "bound", "noise_floor", "teacher", "start"]
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
    in_table: bool = True

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
    """A mean over `n` repeats with its standard error and 95 % interval, each None where there is none.

    Where the error is also over the test prompts that all repeats share, `prompts` is their number.
    """

    mean: float
    se: float | None = None
    n: int | None = None
    over: str = ""
    low: float | None = None
    high: float | None = None
    prompts: int | None = None

    @classmethod
    def parse(cls, value: Any) -> "Estimate | None":
        """Read a number or {"mean", "se", "n", "over", "low", "high", "prompts"}; return None without a mean."""
        if not isinstance(value, dict):
            value = {"mean": value}
        mean, se, n, low, high = (number(value.get(key)) for key in ("mean", "se", "n", "low", "high"))
        if mean is None:
            return None
        if se is not None and se < 0:
            se = None
        if low is None or high is None or not low <= high:
            low = high = None
        count, prompts = (
            int(x) if x is not None and math.isfinite(x) else None for x in (n, number(value.get("prompts")))
        )
        return cls(mean, se, count, clean(value.get("over") or ""), low, high, prompts)

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


def estimates(table: Any) -> dict[str, Estimate]:
    """Return the values of a mapping that are estimates, by name."""
    return {key: e for key, value in mapping(table).items() if (e := Estimate.parse(value)) is not None}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


@dataclass(frozen=True)
class Role:
    """The declared role of a run; `of` is the run that a control is a control of."""

    kind: Kind = "method"
    of: str | None = None

    @property
    def is_control(self) -> bool:
        """Whether the run is a placebo, a bound or a noise floor."""
        return self.kind in CONTROLS


class Results:
    """The content of a results.json, read.

    Args:
        raw: the JSON object.
    """

    def __init__(self, raw: "dict[str, Any] | Results") -> None:
        self.raw: dict[str, Any] = raw.raw if isinstance(raw, Results) else raw
        self.methods = {name: estimates(scores) for name, scores in self.mapping("methods").items()}
        self.differences = {name: estimates(scores) for name, scores in self.mapping("differences").items()}
        self.gaps = {name: estimates(scores) for name, scores in self.mapping("gaps").items()}
        self.declared_metric: str | None = _text(self.mapping("headline").get("metric"))

    def mapping(self, key: str) -> dict[str, Any]:
        """Return an optional section; empty if it is missing or malformed."""
        return mapping(self.raw.get(key))

    def items(self, key: str) -> list[Any]:
        """Return an optional list; empty if it is missing or malformed."""
        value = self.raw.get(key)
        return value if isinstance(value, list) else []

    def text(self, key: str) -> str:
        """Return an optional text on one line; empty if it is missing or malformed."""
        return clean(_text(self.raw.get(key)) or "")

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The role of every row, in the order of the rows. A row without a declared role is a method."""
        roles = {}
        for name in self.methods:
            declared = mapping(self.mapping("roles").get(name))
            kind, of = declared.get("kind"), _text(declared.get("of"))
            known = cast(Kind, kind) if kind in get_args(Kind) else "method"
            roles[name] = Role(known, of if of in self.methods and of != name else None)
        return roles

    @cached_property
    def baseline(self) -> str | None:
        """The run that the others are compared with, if there is one."""
        return next((name for name, role in self.roles.items() if role.kind == "baseline"), None)

    @cached_property
    def all_columns(self) -> list[Column]:
        """Every metric in the order of results.json. Metrics that it does not describe come last."""
        described = self.mapping("metrics")
        measured = (key for scores in self.mapping("methods").values() for key in mapping(scores))
        columns = []
        for key in dict.fromkeys([*described, *measured]):
            about = mapping(described.get(key))
            better, spec = about.get("higher_is_better"), _text(about.get("format"))
            direction = better if isinstance(better, bool) else None
            label, in_table = clean(about.get("label") or key), about.get("in_table") is not False
            columns.append(Column(key, label, direction, spec or ".3f", in_table))
        return columns

    @cached_property
    def columns(self) -> list[Column]:
        """The metrics that tables show, the headline first."""
        shown = [column for column in self.all_columns if column.in_table or column.key == self.declared_metric]
        return sorted(shown, key=lambda column: column.key != self.declared_metric)

    @cached_property
    def headline(self) -> Column | None:
        """The headline metric: the declared one, else the first of the tables; None where nothing was measured."""
        declared = self.declared_metric
        return next((column for column in self.columns if declared is None or column.key == declared), None)

    @cached_property
    def headline_method(self) -> str | None:
        """The method that the verdict is about; None where it is about all alike."""
        name = _text(self.mapping("headline").get("method"))
        return name if self.roles.get(name or "", Role("start")).kind == "method" else None

    def score(self, name: str, column: Column) -> Estimate | None:
        """Return the score of a run."""
        return self.methods.get(name, {}).get(column.key)

    def difference(self, name: str, column: Column | None = None) -> Estimate | None:
        """Return the paired difference of a run to the baseline, by default of the headline metric."""
        column = column or self.headline
        return self.differences.get(name, {}).get(column.key) if column else None

    def gap(self, control: str) -> Estimate | None:
        """Return the paired difference, on the headline metric, of a run to its control.

        Where it was not recorded, that of their differences to the baseline, with an error as if these were
        independent.
        """
        if self.headline is None:
            return None
        recorded = self.gaps.get(control, {}).get(self.headline.key)
        if recorded is not None:
            return recorded
        name, other = self.roles[control].of, self.difference(control)
        own = Estimate(0.0, 0.0) if name in (None, self.baseline) else self.difference(name)
        if own is None or other is None:
            return None
        return Estimate(own.mean - other.mean, math.hypot(own.se or 0.0, other.se or 0.0), other.n, other.over)

    def repeats(self, estimate: Estimate) -> str:
        """Return what an estimate is over: "seeds", "data orders" or "test prompts"."""
        return estimate.over or ("seeds" if len(self.items("seeds")) > 1 else "data orders")

    def repeated(self, estimate: Estimate) -> str:
        """Return what an estimate is over, as "3 seeds and 50 test prompts"; "" where the number is not known."""
        if not estimate.n:
            return ""
        prompts = f" and {estimate.prompts} test prompts" if estimate.prompts else ""
        return f"{estimate.n} {self.repeats(estimate)}{prompts}"

    def over(self, estimate: Estimate) -> str:
        """Return " over 3 seeds and 50 test prompts", or "" where the number is not known."""
        repeated = self.repeated(estimate)
        return repeated and f" over {repeated}"

    def display_name(self, name: str) -> str:
        """Return a run's name as sentences write it."""
        return clean(_text(self.mapping("display_names").get(name)) or name)
