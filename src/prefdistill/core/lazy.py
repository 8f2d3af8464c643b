"""Names of a package that are imported on first use, so that importing the package stays fast; optional packages."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it.

    Example:
        >>> is_installed("torch"), is_installed("no_such_package")
        (True, False)
    """
    return sys.modules.get(package) is not None or find_spec(package) is not None


def lazy_imports(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__all__`, `__getattr__` and `__dir__` of a package whose imports stand under `if TYPE_CHECKING:`.

    Args:
        package: the package's `__name__`. Its public names are those of that block; each is imported on first use.
    """
    module = sys.modules[package]
    source = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in source.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(module, name, value)
        return value

    return list(homes), load, lambda: sorted({*vars(module), *homes})
