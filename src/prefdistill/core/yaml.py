"""TODO docstring."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from prefdistill.core.errors import UserError
from prefdistill.core.text import surrogate

if TYPE_CHECKING:
    pass


class _Loader(yaml.SafeLoader):
    """YAML 1.1, and numbers such as 1e-6, which it takes for words. A key that stands twice is an error: it would hide
    what is said first. So is half a character, which no result could be written with."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:  # before merged keys are among them, which may stand there too
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if surrogate(value) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{value!r} holds half a character", node.start_mark)
        return value


def _number(loader: _Loader, node: Any) -> Any:
    """Of YAML 1.1, where 010 is eight and 1:30 ninety: neither is what its writer meant."""
    if re.match(r"[-+]?0[\d_]", node.value) or ":" in node.value:
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.value} is no plain number; quote it if it is none at all", node.start_mark
        )
    kind = node.tag.rpartition(":")[2]
    return getattr(loader, f"construct_yaml_{kind}")(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` would take for numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_value(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML's constructors raise what they like, e.g. KeyError for `!!bool x`
        reason = getattr(error, "problem", None)
        raise UserError(f"{where}: {text!r} is not a YAML value{f': {reason}' if reason else ''}") from error


def read_yaml(path: Path, what: str, where: str, keys: str) -> dict[str, Any]:
    """The mapping in a YAML file that is to be a `what`.

    Raises:
        UserError: if there is no file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"no {what} at {path}; {where}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except Exception as error:  # as in parse_value
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a {what}: it must be a mapping with keys such as {keys}")
    return raw
