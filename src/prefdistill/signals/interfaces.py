"""The interface of stored signals that signal kinds rely on: the store and the set of stores implement it."""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


class Store(Protocol):
    """One model's signals for one data set, see `prefdistill.signals.store.Signals`."""

    manifest: dict[str, Any]

    @property
    def settings(self) -> Any:
        """The `Settings` that the signals were extracted with."""

    @property
    def digest(self) -> str:
        """Identifies the numbers in the store."""

    def value(self, column: str, row: int) -> Any:
        """Return a column's value for one row: a number, or an array."""

    def flat(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Return a column's numbers for some rows, one row after another."""

    def table(self, rows: np.ndarray, columns: tuple[str, ...]) -> "pa.Table":
        """Return some columns of some rows."""

    def topk(self, response: str, rows: np.ndarray, ids_from: Any = None) -> Any:
        """Return the token distributions of one response of some rows."""


class Stores(Protocol):
    """The signals of some rows from several stores, see `prefdistill.signals.store.SignalSet`."""

    @property
    def rows(self) -> np.ndarray:
        """The rows of the data."""

    def store(self, role: str, kind: str, response: str) -> Store:
        """Return the store that holds a kind of signal of one response."""

    def topk(self, role: str, response: str) -> Any:
        """Return the token distributions of one response."""
