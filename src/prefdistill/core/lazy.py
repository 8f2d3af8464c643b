"""Names of a package that are imported on first use, so that importing the package stays fast."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module-level `__getattr__` that imports each name from its submodule on first use.

    Args:
        package: the package's `__name__`.
        homes: submodule by name: `{"Signals": "store"}` for `package.store.Signals`.

    Example:
        >>> lazy_names("os", {"join": "path"})("join").__name__
        'join'
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        thing = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, thing)
        return thing

    return load
