"""From sections to flags: the command of a verb, and the section that a command line asks for."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from prefdistill.core.errors import UserError
from prefdistill.core.options import NO_FLAG, REPEATED, Argument, Flag, Override, Section, validate

Verb = Callable[[Any], dict[str, Any]]
CONTEXT = {"help_option_names": ["-h", "--help"]}
NAMES = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Call:
    """A verb with what the command line says, not validated yet."""

    name: str
    verb: Verb
    values: dict[str, Any]
    as_json: bool
    debug: bool

    def options(self) -> Section:
        """The verb's section.

        Raises:
            UserError: naming every wrong flag.
        """
        section = section_of(self.verb)
        fields = section.model_fields
        texts = {name: value for name, value in self.values.items() if value not in (None, False, [])}
        paths_and_lists = [n for n in texts if _is_list(fields[n]) or Path in _members(fields[n].annotation)]
        if empty := [flag_of(section, name) for name in paths_and_lists if texts[name] == ""]:
            raise UserError(*(f"{flag} is empty; give a value, or leave it out" for flag in empty))
        values = {
            name: not _is_on(fields[name]) and _parsed(fields[name], value, flag_of(section, name))
            for name, value in texts.items()
        }
        options = validate(section, values, "", spelled=lambda key: flag_of(section, key), strict=False)
        return typing.cast(Section, options)


def section_of(verb: Verb) -> type[Section]:
    """The section that a verb takes: the annotation of its parameter."""
    hints = typing.get_type_hints(verb)
    return typing.cast(type[Section], next(hint for name, hint in hints.items() if name != "return"))


def flag_of(section: type[Section], key: str) -> str:
    """How an option is written on the command line; a part of one, such as `key.0`, is written as the whole."""
    name = key.partition(".")[0]
    field = section.model_fields.get(name)
    if field is None:
        return key
    argument, flag = _mark(field, Argument), _mark(field, Flag)
    negation = "no-" if _is_on(field) else ""
    return argument.metavar if argument else flag.name if flag else f"--{negation}{name.replace('_', '-')}"


def command(name: str, verb: Verb) -> Any:
    """The command of a verb: its flags are the fields of its section."""
    section = section_of(verb)

    def parse(as_json: bool, debug: bool, **values: Any) -> Call:
        return Call(name, verb, values, as_json, debug)

    keyword = inspect.Parameter.KEYWORD_ONLY
    flags = [
        *((field_name, _option(section, field_name)) for field_name in ordered(section)),
        ("as_json", (bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else."))),
        ("debug", (bool, typer.Option("--debug", help="Show the traceback of an error."))),
    ]
    defaults = {bool: False, str: inspect.Parameter.empty, list[str]: inspect.Parameter.empty}
    parameters = [
        inspect.Parameter(n, keyword, default=defaults.get(kind), annotation=Annotated[kind, option])
        for n, (kind, option) in flags
    ]
    parse.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parse.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=CONTEXT)
    app.command(name.split()[-1], help=inspect.getdoc(verb))(parse)
    return typer.main.get_command(app)


def ordered(section: type[Section]) -> list[str]:
    """Fields in the order of the help: arguments, what is required, the verb's own, and those it inherits."""
    own = section.__annotations__

    def rank(name: str) -> tuple[bool, bool, bool]:
        field = section.model_fields[name]
        return _mark(field, Argument) is None, not field.is_required(), name not in own

    return sorted((n for n, f in section.model_fields.items() if NO_FLAG not in f.metadata), key=rank)


def _option(section: type[Section], name: str) -> tuple[Any, Any]:
    """The type that typer reads a field as, and its option. Every value is text: the section says what it may be."""
    field = section.model_fields[name]
    several = _is_list(field)
    if argument := _mark(field, Argument):
        kind = list[str] if several else str
        option = typer.Argument(metavar=argument.metavar, help=field.description, show_default=False)
        return (kind if field.is_required() else kind | None), option
    default = default_text(field)
    note = "  [required]" if field.is_required() else f"  [default: {default}]" if default else ""
    help = f"{field.description}{note}"
    if field.annotation is bool:
        help = field.description or ""
        return bool, typer.Option(flag_of(section, name), help=help)
    option = typer.Option(flag_of(section, name), help=help, metavar=type_text(field), show_default=False)
    return (list[str] if is_mapping(field) or (several and REPEATED in field.metadata) else str) | None, option


def type_text(field: FieldInfo) -> str:
    """The type of a field in a help text or a table: INTEGER>0, [all|endpoints], TEXT,..., KEY=VALUE,..."""
    if is_mapping(field):
        return "KEY=VALUE,..."
    members = _members(field.annotation)
    choices = [str(c) for member in members if typing.get_origin(member) is Literal for c in typing.get_args(member)]
    names = [NAMES.get(member, "TEXT") for member in members if typing.get_origin(member) is not Literal]
    bounds = ",".join(dict.fromkeys(_bounds([*field.metadata, *_inner_metadata(field.annotation)])))
    text = "|".join([*(f"{name}{bounds}" for name in dict.fromkeys(names)), *choices])
    if choices and len(choices) + len(names) > 1:
        text = f"[{text}]"
    return text + (",..." if _is_list(field) and REPEATED not in field.metadata else "")


def default_text(field: FieldInfo) -> str:
    """The default of a field in a help text or a table; empty for none."""
    value = field.get_default(call_default_factory=True) if not field.is_required() else None
    if value is None or value is PydanticUndefined or value is False or value in ((), [], {}, ""):
        return ""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _parsed(field: FieldInfo, value: Any, flag: str) -> Any:
    """The text of a flag, split at commas if it is a list in one flag, or a mapping of its `KEY=VALUE`."""
    if is_mapping(field):
        parts = [part for text in value for part in re.split(r",(?=[^,=]+=)", text)]
        if wrong := next((part for part in parts if "=" not in part), None):
            raise UserError(f"{flag} {wrong}: write KEY=VALUE, such as {flag} prompt=question,tools=null")
        return key_values(tuple(parts))
    if isinstance(value, str) and _is_list(field):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _mark(field: FieldInfo, kind: type[Any]) -> Any:
    return next((mark for mark in field.metadata if isinstance(mark, kind)), None)


def _is_on(field: FieldInfo) -> bool:
    """Whether an option is on by default, so that its flag `--no-NAME` turns it off."""
    return field.annotation is bool and field.default is True


def _is_list(field: FieldInfo) -> bool:
    return any(typing.get_origin(member) in (list, tuple) for member in _members(field.annotation, within=False))


def is_mapping(field: FieldInfo) -> bool:
    """Return whether an option is a mapping of names to values."""
    return any(typing.get_origin(member) is dict for member in _members(field.annotation))


def _members(annotation: Any, within: bool = True) -> list[Any]:
    """The types that a value may have, without None; `within`: of the parts of a list too."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _members(arguments[0], within)
    if origin in (Union, types.UnionType):
        return [part for argument in arguments for part in _members(argument, within)]
    if origin in (list, tuple) and within:
        return _members(arguments[0], within)
    return [] if annotation is type(None) else [annotation]


def _inner_metadata(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for part in typing.get_args(annotation):
        yield from _inner_metadata(part)


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for mark in metadata:
        for name, sign in BOUNDS.items():
            if (bound := getattr(mark, name, None)) is not None:
                yield f"{sign}{bound}"


def key_values(overrides: tuple[str, ...], *prefixes: str) -> dict[str, Any]:
    """`KEY=VALUE` arguments as nested mappings, with or without one of the prefixes: training.epochs=2, epochs=2."""
    raw: dict[str, Any] = {}
    for text in overrides:
        change = Override.parse(text)
        head, _, rest = change.key.partition(".")
        (Override(rest, change.value) if rest and head in prefixes else change).apply(raw)
    return raw
