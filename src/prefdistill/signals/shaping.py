"""Shaping returns of stored teacher values, with everything a store may hold of them: all states, or endpoints."""

import numpy as np
import torch

from prefdistill.core.errors import UserError
from prefdistill.losses import shaping_return
from prefdistill.signals.store import SignalSet


def shaping_returns(
    signals: SignalSet, side: str, *, discount: float, terminal: str, kind: str = "values"
) -> np.ndarray:
    """Return `losses.shaping_return` of the teacher's values of one side, [rows].

    Raises:
        UserError: if the store holds endpoints only and more is needed.
    """
    if signals.store("teacher", kind, side).manifest["positions"] == "endpoints":
        return _return_of_endpoints(signals, side, discount, terminal)
    values = signals.ragged("teacher", kind, side)
    lengths = torch.from_numpy(signals.scalar("teacher", kind, side, "tokens").astype(np.int64))
    ended = torch.from_numpy(signals.scalar("teacher", kind, side, "ended").astype(bool))
    returns = np.empty(len(values), dtype=np.float32)
    for start in range(0, len(values), 1024):
        part = slice(start, start + 1024)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(v).float() for v in values[part]], batch_first=True)
        returns[part] = shaping_return(padded, lengths[part], discount, terminal, ended[part]).numpy()
    return returns


def _return_of_endpoints(signals: SignalSet, side: str, discount: float, terminal: str) -> np.ndarray:
    """With discount 1 the sum telescopes to V(s_T) - V(s_0); the end value is the V(s_T) of terminal "last"."""
    if discount != 1 or terminal == "bootstrap":
        raise UserError(
            f"discount={discount:g} and terminal={terminal} need the values of more states than the endpoints in these "
            "signals: extract them again with `--positions all`"
        )
    store = signals.store("teacher", "values", side)
    start, end, ended = (store.scalar(n, signals.rows) for n in ("start_value", f"{side}_end_value", f"{side}_ended"))
    return np.where(ended & (terminal == "zero"), 0, end) - start


def value_range(signals: SignalSet, side: str, kind: str = "values") -> tuple[float, float]:
    """Return the least and the greatest value of one side's stored states."""
    store = signals.store("teacher", kind, side)
    if store.manifest["positions"] == "endpoints":
        rows = [store.scalar(name, signals.rows) for name in ("start_value", f"{side}_end_value")]
    else:
        rows = signals.ragged("teacher", kind, side)
    return min(float(row.min()) for row in rows), max(float(row.max()) for row in rows)
