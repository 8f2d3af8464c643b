"""Options: sections that declare each option once, their validation, and `key=value` overrides.

A section is a torch-free pydantic model. It is the section of a recipe, the source of a command's flags
(`prefdistill.cli.flags`), the validation, the part of a cache key (`Section.cache_key`) and a row of docs/options.md.
"""

import copy
import difflib
import inspect
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from prefdistill.core.errors import UserError

Options = dict[str, JsonValue]
F = TypeVar("F", bound=Callable[..., Any])
# Marks of a field, as in Annotated[int, NOT_IN_KEY]:
NOT_IN_KEY = "not in the cache key"  # it changes no result, or it is a name whose content is in the key
NO_FLAG = "not on the command line"
REPEATED = "one value per flag"  # `--signals A --signals B`; other lists are comma-separated
# In pydantic's path to a value, but no key: the member of a union.
UNION_MEMBER = re.compile(
    r"constrained-\w+|literal\[.*\]|list\[.*\]|dict\[.*\]|str|int|float|bool|FromModel|Options|Processes"
)


@dataclass(frozen=True)
class Flag:
    """Mark of a field whose flag is not `--its-name`."""

    name: str


@dataclass(frozen=True)
class Argument:
    """Mark of a field that is a positional argument, with its name in the help."""

    metavar: str


class Section(BaseModel):
    """Options that belong together. Unknown keys and wrong types are errors. A list of one may be written without its
    brackets: `report_to: wandb`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _list_of_one(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str | int | float) or info.field_name not in cls.model_fields:
            return value
        sequence = _only_sequence(cls.model_fields[info.field_name].annotation)
        return value if sequence is None else sequence([value])

    @classmethod
    def checked(cls, where: str, **options: Any) -> Self:
        """The section with these options.

        Raises:
            UserError: naming every unknown option and every wrong value; `where` says who was called.
        """
        return typing.cast(Self, validate(cls, options, where))

    @classmethod
    def redefault(cls, name: str, default: Any) -> Any:
        """A field of this section for a subclass that has another default; its help and its bounds stay.

        Example:
            >>> from pydantic import Field, PositiveInt
            >>> class Batch(Section):
            ...     size: PositiveInt = Field(64, description="Rows per batch.")
            >>> class Small(Batch):
            ...     size: PositiveInt = Batch.redefault("size", 8)
            >>> Small().size
            8
        """
        field: FieldInfo = cls.model_fields[name]
        changed = copy.copy(field)
        changed.default = default
        return changed

    def cache_key(self) -> dict[str, Any]:
        """Every option that results depend on: all but those marked `NOT_IN_KEY`."""
        fields = type(self).model_fields.items()
        return {name: _keyed(getattr(self, name)) for name, field in fields if NOT_IN_KEY not in field.metadata}

    def part(self, section: "type[Section]") -> dict[str, Any]:
        """The options of a section that this one extends."""
        return {name: getattr(self, name) for name in section.model_fields}


def _only_sequence(annotation: Any) -> Any:
    """Return `list` or `tuple` if a type takes one of them, or null, and nothing else; None otherwise."""
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    origins = {typing.get_origin(member) or member for member in members} - {type(None)}
    return origins.pop() if origins in ({list}, {tuple}) else None


class Seeded(Section):
    """What has a seed."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, data order and sampling.")


class OnWorkers(Section):
    """What may run on a Ray cluster."""

    workers: Annotated[PositiveInt | None, NOT_IN_KEY] = Field(
        None, description="Most workers of the engine ray; default: as many as the cluster has room for."
    )


def _keyed(value: Any) -> Any:
    if isinstance(value, Section):
        return value.cache_key()
    if isinstance(value, dict):
        return {name: _keyed(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_keyed(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def takes(section: type[Section]) -> Callable[[F], F]:
    """A decorator: shows the options of a section in the signature of a function that takes them as `**options`."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [(name, field) for name, field in section.model_fields.items() if name not in signature.parameters]
        keyword = inspect.Parameter.KEYWORD_ONLY
        options = [inspect.Parameter(n, keyword, default=f.get_default(), annotation=f.annotation) for n, f in fields]
        function.__signature__ = signature.replace(parameters=[*fixed, *options])  # type: ignore[attr-defined]
        return function

    return decorate


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """The value as a mapping of names to values; null is an empty one.

    Raises:
        ValueError: if it is something else.
    """
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
        from prefdistill.core.yaml import parse_value

        return cls(key, parse_value(value, key))

    def apply(self, raw: dict[str, Any]) -> None:
        *parents, last = self.key.split(".")
        section = raw
        for part in parents:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[last] = copy.deepcopy(self.value)  # a later override may change part of it


def applied(changes: dict[str, Any]) -> dict[str, Any]:
    """Overrides by dotted key, as nested mappings."""
    raw: dict[str, Any] = {}
    for key, value in changes.items():
        Override(key, value).apply(raw)
    return raw


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested mappings in one; where both have a value, `above` wins."""
    both = dict(below)
    for key, value in above.items():
        under = below.get(key)
        both[key] = merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both


def leaves(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key.

    Example:
        >>> leaves({"data": {"max_length": 256}, "seed": 0})
        {'data.max_length': 256, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def validate(
    kind: type[Any],
    raw: Any,
    where: str,
    also: Iterable[str] = (),
    spelled: Callable[[str], str] = str,
    strict: bool | None = None,
) -> Any:
    """`kind(**raw)`.

    Args:
        kind: a section.
        raw: its options.
        where: names the source of `raw` in the message, such as a file.
        also: further keys that are known at the top, for "did you mean".
        spelled: turns the dotted key of an option into what the user wrote, such as a flag.
        strict: False reads numbers from text, as on a command line; default: as the section says.

    Raises:
        UserError: one line with every unknown key and every wrong value.
    """
    try:
        return kind.model_validate(raw, strict=strict)
    except ValidationError as error:
        raise UserError(*problems(kind, error, also, spelled), where=where) from error


def problems(
    kind: type[BaseModel], error: ValidationError, also: Iterable[str] = (), spelled: Callable[[str], str] = str
) -> list[str]:
    """Everything that is wrong with the options of a section, one message per key."""
    by_key: dict[str, list[Any]] = {}
    for part in error.errors():
        key = ".".join(str(name) for name in part["loc"] if not UNION_MEMBER.fullmatch(str(name)))
        by_key.setdefault(key, []).append(part)
    for key in list(by_key):  # a mapping where a name could stand too: what is wrong inside it is what counts
        if any(other.startswith(f"{key}.") for other in by_key):
            del by_key[key]
    return [" ".join(_problem(kind, parts, spelled(key), also).split()) for key, parts in by_key.items()]


def _problem(kind: type[BaseModel], errors: list[Any], key: str, also: Iterable[str]) -> str:
    """The message of one key; several errors are those of the members of a union."""
    error = errors[0]
    got = reprlib.repr(error["input"])
    if error["type"] == "extra_forbidden":
        known = [*_keys_at(kind, error["loc"][:-1]), *also]
        return f"unknown key {key!r}; {suggestion(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in ("model_type", "dict_type"):
        return f"{key} must be a mapping of names to values, got {got}"
    texts = [re.sub("^Input should be |, unable to parse.*", "", part["msg"]) for part in errors]
    texts = [re.sub(r"dictionary or instance of \w+", "mapping", text) for text in texts]
    if all(part["msg"].startswith("Input should be ") for part in errors):
        return f"{key} must be {' or '.join(dict.fromkeys(texts))}, got {got}"
    return f"{key}: {texts[0][0].lower()}{texts[0][1:]}, got {got}"


def suggestion(name: str, known: Iterable[str], all_of_them: str = "known there") -> str:
    """The known name that is closest, as a question, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{all_of_them}: {', '.join(names) or 'none'}"


def _keys_at(kind: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        annotation = kind.model_fields[part].annotation if part in getattr(kind, "model_fields", {}) else kind
        kind = _section_in(annotation) or kind
    return [field.alias or name for name, field in kind.model_fields.items()]


def _section_in(annotation: Any) -> Any:
    """Return the first section in a type, such as a union or a mapping of names to sections; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, typing.get_args(annotation))), None)
