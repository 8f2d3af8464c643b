"""TODO docstring."""

import copy
import difflib
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    ValidationError,
)

from prefdistill.core.errors import UserError

if TYPE_CHECKING:
    pass

from prefdistill.core.yaml import parse_value

Options = dict[str, JsonValue]
UNION_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")  # in pydantic's path to a value, but no key


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} must be a mapping of names to values, got {reprlib.repr(value)}")
    return value


@dataclass(frozen=True)
class Override:
    """`key=value` from the command line; the value is read as YAML."""

    key: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Override":
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key or not key.isprintable():
            raise UserError(f"{text!r} is not an override; write key=value, e.g. training.learning_rate=1e-6")
        return cls(key, parse_value(value, key))

    def apply(self, raw: dict[str, Any]) -> None:
        *parents, last = self.key.split(".")
        place = raw
        for part in parents:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = copy.deepcopy(self.value)  # a later override may reach into it


def applied(changes: dict[str, Any]) -> dict[str, Any]:
    """Overrides by dotted key, as the mapping they make."""
    raw: dict[str, Any] = {}
    for key, value in changes.items():
        Override(key, value).apply(raw)
    return raw


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        under = below.get(key)
        both[key] = _laid_over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both


def validate(kind: type[Any], raw: Any, where: str, also: Iterable[str] = ()) -> Any:
    """`kind(**raw)`, with its complaint as one line that says the fix; `also` are keys known at the top besides."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(kind, error, also)}") from error


def _explain(kind: type[BaseModel], error: ValidationError, also: Iterable[str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not UNION_MEMBER.fullmatch(str(part)))
    got = reprlib.repr(first["input"])
    if first["type"] == "extra_forbidden":
        known = [*_keys_at(kind, first["loc"][:-1]), *also]
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known there: {', '.join(known)}"
        text = f"unknown key {key!r}; {hint}"
    elif first["type"] == "missing":
        text = f"{key} is missing"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
    elif first["type"] in ("model_type", "dict_type"):
        text = f"{key} must be a mapping of names to values, got {got}"
    else:
        text = f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {got}"
    return " ".join(text.split())


def _keys_at(kind: Any, location: tuple[Any, ...]) -> list[str]:
    import typing

    for part in location:
        annotation = kind.model_fields[part].annotation if part in getattr(kind, "model_fields", {}) else kind
        options = [annotation, *typing.get_args(annotation)]
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), kind)
    return list(kind.model_fields)
