"""Numeric columns of preference data whose names a method takes as options: weights and margins of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from prefdistill.core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def numeric_column(dataset: Dataset, name: str) -> np.ndarray:
    """Return the numbers of a column, float64 [rows]; NaN where a row has none. Text of a number counts, as in CSV.

    Raises:
        UserError: if it holds anything else.
    """
    try:
        numbers = np.array(dataset[name][:], dtype=np.float64)
        if numbers.ndim != 1:
            raise ValueError(f"{numbers.ndim} dimensions")
    except (TypeError, ValueError) as error:
        raise UserError(f"column {name!r} must hold numbers; convert it, or name another column") from error
    return numbers


def columns_digest(dataset: Dataset, names: Iterable[str]) -> str:
    """Return the SHA-256 of numeric columns: what a training reads of them beside `data_fingerprint`.

    Raises:
        UserError: if the data have no such column, or it does not hold numbers.
    """
    digest = hashlib.sha256()
    for name in names:
        if name not in dataset.column_names:
            raise UserError(f"the data has no column {name!r}; give every pair a number there")
        digest.update(name.encode() + b"\0" + numeric_column(dataset, name).tobytes())
    return digest.hexdigest()
