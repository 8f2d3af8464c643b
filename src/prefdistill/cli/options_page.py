"""Write docs/options.md, the table of all options, from the sections that declare them.

python -m prefdistill.cli.options_page > docs/options.md
"""

import types
import typing
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prefdistill.cli.flags import default_text, is_mapping, type_text
from prefdistill.core.options import NOT_IN_KEY
from prefdistill.evaluation.options import EvaluateRequest
from prefdistill.experiment.recipe import Recipe
from prefdistill.sampling.options import SampleRequest
from prefdistill.signals.options import ExtractRequest

HEAD = """# Options

Every option with its type, default and meaning, generated from the sections that declare them
(`python -m prefdistill.cli.options_page`). In a recipe and as an override an option is written with its dotted key:
`training.learning_rate=1e-6`. An option with ° is no part of the cache key: it changes no result, or it is a name whose
content is in the key. [recipes.md](recipes.md) explains recipes; the options of a method are on [its
page](methods.md).
"""
REQUESTS: dict[str, type[BaseModel]] = {
    "`prefdistill signals` and `extract_signals`": ExtractRequest,
    "`prefdistill sample` and `sample_responses`": SampleRequest,
    "`prefdistill evaluate`": EvaluateRequest,
}


def options_page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD, "\n".join(["## A recipe", "", *_table(Recipe)])]
    described: dict[type[BaseModel], str] = {}
    for key, section in _sections(Recipe, ""):
        if section in described:
            continue
        described[section] = key
        base = next((part for part in section.__mro__[1:] if part in described), None)
        same = [f"All options of `{described[base]}`, and:", ""] if base else []
        parts.append("\n".join([f"## `{key}`", "", *_about(section), *same, *_table(section, base)]))
    for title, section in REQUESTS.items():
        parts.append("\n".join([f"## {title}", "", *_table(section)]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _sections(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the sections inside a section, each with its dotted key."""
    for name, field in section.model_fields.items():
        for inner, key in _inner(field.annotation, f"{prefix}{name}"):
            yield key, inner
            yield from _sections(inner, f"{key}.")


def _inner(annotation: object, key: str) -> Iterator[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, key
    key = f"{key}.NAME" if typing.get_origin(annotation) is dict else key
    for part in typing.get_args(annotation):
        yield from _inner(part, key)


def _about(section: type[BaseModel]) -> list[str]:
    text = vars(section).get("__doc__")  # not an inherited one
    return [" ".join(text.split()), ""] if text else []


def _table(section: type[BaseModel], base: type[BaseModel] | None = None) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        if base is None or name not in base.model_fields:
            mark = "°" if NOT_IN_KEY in field.metadata else ""
            help = _escaped(field.description or "")
            rows.append(f"| `{field.alias or name}`{mark} | {_type(field)} | {_default(field)} | {help} |")
    return ["| option | type | default | |", "|---|---|---|---|", *rows]


def _type(field: FieldInfo) -> str:
    if next(_inner(field.annotation, ""), None):
        union = isinstance(field.annotation, types.UnionType)
        return "text or section" if union and str in typing.get_args(field.annotation) else "section"
    if field.annotation in (bool, bool | None):
        return "boolean"
    if is_mapping(field):
        return "mapping"
    return _escaped(type_text(field).lower())


def _default(field: FieldInfo) -> str:
    if next(_inner(field.annotation, ""), None):
        return ""
    if field.is_required():
        return "required"
    text = str(field.default).lower() if isinstance(field.default, bool) else default_text(field)
    return f"`{_escaped(text)}`" if text else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(options_page(), end="")
