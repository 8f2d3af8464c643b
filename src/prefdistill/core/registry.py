"""Registries: named things of one kind, built in or added by other packages."""

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from prefdistill.core.errors import UserError


class Registry(Mapping[str, Any]):
    """A read-only mapping from names to things, loaded on first use, with one place to add a thing.

    A name is looked up without regard to case among what was registered, then among the entry points of the group
    `prefdistill.GROUP` that installed packages declare. A dotted name such as `my_package.my_module.MyMethod` is
    imported as it is.

    Args:
        what: the kind of thing, for messages: "method".
        group: the entry point group without its prefix: "methods".
        builtin: things by name, or "module:attribute" for those to import on first use.

    Example:
        >>> colours = Registry("colour", "colours", {"pi": "math:pi"})
        >>> colours["PI"]
        3.141592653589793
        >>> colours.register("e", 2.718)
        >>> sorted(colours)
        ['e', 'pi']
    """

    def __init__(self, what: str, group: str, builtin: Mapping[str, Any] | None = None) -> None:
        self.what, self.group = what, f"prefdistill.{group}"
        self._things: dict[str, Any] = dict(builtin or {})
        self._entry_points_read = False

    def register(self, name: str, thing: Any) -> None:
        """Add a thing, or a "module:attribute" to import it from.

        Raises:
            UserError: if the name is taken.
        """
        if name.lower() in self._known():
            raise UserError(f"there is a {self.what} {name!r} already; register yours under another name")
        self._things[name.lower()] = thing

    def _known(self) -> dict[str, Any]:
        if not self._entry_points_read:
            self._entry_points_read = True
            for point in entry_points(group=self.group):
                self._things.setdefault(point.name.lower(), point.value)
        return self._things

    def __getitem__(self, name: str) -> Any:
        known, key = self._known(), name.lower()
        if key not in known and ("." in name or ":" in name):
            module, _, attribute = name.replace(":", ".").rpartition(".")
            return self._load(f"{module}:{attribute}", name)
        if key not in known:
            raise KeyError(name)
        if isinstance(known[key], str):
            known[key] = self._load(known[key], name)
        return known[key]

    def _load(self, place: str, name: str) -> Any:
        module, _, attribute = place.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"the {self.what} {name!r} cannot be imported from {place}: {error}") from error

    def find(self, name: str) -> Any:
        """The thing with this name.

        Raises:
            UserError: if there is none, naming the closest or all known.
        """
        try:
            return self[name]
        except KeyError:
            close = difflib.get_close_matches(name.lower(), self, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(self)}"
            raise UserError(f"unknown {self.what} {name!r}; {hint}") from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._known()

    def canonical(self, name: str) -> str:
        """Return the name as it was registered, whatever its case; a dotted name stays as it is."""
        return name.lower() if name.lower() in self._known() else name

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())
