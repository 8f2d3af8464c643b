"""YAML 1.2 files and values, read safely and written."""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor

from prefdistill.core.errors import UserError
from prefdistill.core.text import surrogate


class _Constructor(SafeConstructor):
    """Refuses a number such as 010, and half a surrogate pair, which no result could be written with."""

    def construct_yaml_int(self, node: Any) -> int:
        if re.match(r"[-+]?0\d", node.value):
            raise ConstructorError(problem=f"{node.value} is not a plain number; quote it, or drop the leading zero")
        return int(super().construct_yaml_int(node))

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if surrogate(str(value)) is not None:
            raise ConstructorError(problem=f"{value!r} holds half a surrogate pair")
        return value


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)


def safe_yaml() -> YAML:
    """A reader and writer that constructs plain values only."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _problem(error: Exception) -> str:
    """What is wrong, in one line. ruamel's constructors raise anything, such as KeyError for `!!bool x`."""
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return " ".join(str(getattr(error, "problem", None) or error).split()) + place


def parse_value(text: str, where: str) -> Any:
    """The value that a text is in YAML."""
    try:
        return safe_yaml().load(text)
    except Exception as error:
        raise UserError(f"{where}: {text!r} is not a YAML value: {_problem(error)}") from error


def read_yaml(path: Path, what: str, where: str, keys: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        what: what it should be, for messages: "recipe".
        where: where to find one.
        keys: some of its keys.

    Raises:
        UserError: if there is no file, or it is something else.
    """
    if not path.is_file():
        raise UserError(f"no {what} at {path}; {where}")
    try:
        raw = safe_yaml().load(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise UserError(f"{path} is not valid YAML: {_problem(error)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a {what}: it must be a mapping with keys such as {keys}")
    return raw


def as_yaml(value: Any) -> str:
    """A value as YAML that `parse_value` reads back."""
    text = io.StringIO()
    safe_yaml().dump(value, text)
    return text.getvalue()
