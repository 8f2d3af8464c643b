"""The signal kinds. A kind is one class: what it computes from the logits, how that is stored, read back and priced.

To add one from another package, derive a class from `Kind` and call `KINDS.register(name, class)`, or declare an entry
point of the group `prefdistill.kinds`. It can then be extracted (`--kind NAME`), stored, read (`Signals.row`), priced
(`store_bytes`) and needed by methods (`Need(role, NAME)`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.signals.kind_registry import KINDS as KINDS
from prefdistill.signals.kind_registry import Settings as Settings

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from prefdistill.signals.interfaces import Store, Stores


@dataclass(frozen=True)
class Column:
    """How one column is stored.

    Args:
        item: type of its numbers, as numpy names it; or "binary".
        ragged: whether each row has an array of them.
        encoding: Parquet's, where the default is not the best one.
        per_row: whether all responses of a row share it; its name then has no response in front.
        across: what becomes of it for a student of another tokenizer (`signals.aligned`): "same", a number of the whole
            text; "hold", of states: that of the last state that both tokenisations have; "sum", of tokens: their sum
            since that state; "" if it is of one tokenizer only. Default: "same" unless ragged.
    """

    item: str
    ragged: bool = False
    encoding: str | None = None
    per_row: bool = False
    across: Literal["same", "hold", "sum", "", None] = None

    def __post_init__(self) -> None:
        if self.across is None:
            object.__setattr__(self, "across", "" if self.ragged else "same")

    @property
    def type(self) -> pa.DataType:
        import pyarrow as pa

        item = pa.binary() if self.item == "binary" else pa.from_numpy_dtype(np.dtype(self.item))
        return pa.list_(item) if self.ragged else item

    @property
    def item_bytes(self) -> int:
        return np.dtype(self.item).itemsize


PER_RESPONSE = Column("float32")
PER_TOKEN = Column("float32", ragged=True, encoding="BYTE_STREAM_SPLIT")


class Tile:
    """The logits of some states, with what is known of each.

    Args:
        logits: float32 [n, vocab]; -inf for tokens that the tokenizer cannot emit.
        tokens: the realised token after each state, [n]; any token after s_T.
        last: whether it is the last state before the end token (s_T where there is none), bool [n].
        inputs: what `Kind.state_inputs` returned, by kind, [n, ...].
    """

    def __init__(self, logits: Tensor, tokens: Tensor, last: Tensor, inputs: Mapping[str, Tensor]) -> None:
        self.logits, self.tokens, self.last, self.inputs = logits, tokens, last, inputs

    @cached_property
    def log_normaliser(self) -> Tensor:
        """Log of the sum of the exponentials of the logits, [n]; computed once for all kinds."""
        from prefdistill.models.logprobs import log_normaliser

        return log_normaliser(self.logits)

    @cached_property
    def token_logps(self) -> Tensor:
        """Log-probability of the realised token, [n]."""
        return self.logits.gather(-1, self.tokens[:, None])[:, 0] - self.log_normaliser

    def likeliest(self, k: int, mass: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the k most likely tokens, their log-probabilities, and the log of the mass of the others."""
        from prefdistill.models.logprobs import likeliest

        return likeliest(self.logits, k, mass)


class Kind:
    """Base of all signal kinds; one instance per extraction or store.

    A subclass sets `name` and `description`, and implements `reduce`. Unless it says otherwise, `reduce` returns one
    tensor per column, with a number per state; there is one column, named as the kind, with s_0 .. s_{T-1} of each
    response.
    """

    name: ClassVar[str]
    description: ClassVar[str]  # one line, for help and docs
    uses: Collection[str] = ()  # options of `SignalRequest` that change it
    columns: ClassVar[Mapping[str, Column]] = {}
    has_final_state: bool = False  # whether s_T is read as well
    shares_start: bool = False  # whether the first number is of s_0, which all responses of a row share
    infinite: Collection[str] = ()  # collected columns in which -inf is a valid number
    needs_logits: bool = True  # whether `reduce` reads the logits; else a served teacher can give it too
    in_batch: bool = False  # whether methods that need it get it for every token of a batch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.columns and "name" in vars(cls):
            cls.columns = {cls.name: PER_TOKEN}

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def check(self) -> None:
        """Raise a UserError if the kind cannot be extracted with these settings."""

    @property
    def needs_same_tokens(self) -> bool:
        """Whether its numbers say nothing to a student of another tokenizer."""
        return not all(column.across for column in self.columns.values())

    # -- extraction ----------------------------------------------------------------------------------------------------

    def state_inputs(self, places: Sequence[tuple[int, str]], has_final_state: bool) -> Tensor | None:
        """Return what `reduce` needs to know of each state, [states, ...], of responses given as (row, response)."""
        return None

    def reduce(self, tile: Tile) -> tuple[Tensor, ...]:
        """Reduce the logits of a tile to a few numbers per state: tensors [n, ...]."""
        raise NotImplementedError

    @property
    def collected(self) -> Collection[str]:
        """The names of what `collect` returns."""
        return tuple(self.columns)

    def collect(self, parts: Sequence[np.ndarray], ended: bool) -> dict[str, Any]:
        """Return the numbers of one response, by column, from what `reduce` returned for its states."""
        return dict(zip(self.collected, parts, strict=True))

    def pack(self, columns: dict[str, list[Any]], rows: Sequence[int]) -> tuple[dict[str, Sequence[Any]], list[float]]:
        """Return one response's columns as they are stored, and the divergence that packing put into each state."""
        return dict(columns), []

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, store: Store, response: str, row: int) -> dict[str, Any]:
        """Return what `Signals.row` shows of one response."""
        return {name: store.value(self.column_name(name, response), row) for name in self.columns}

    def batch(self, signals: Stores, role: str, response: str) -> dict[str, np.ndarray]:
        """Return what a method gets of a batch: name -> [states, ...], the rows' states one after another."""
        store = signals.store(role, self.name, response)
        return {f"{role}_{response}_{name}": store.flat(f"{response}_{name}", signals.rows) for name in self.columns}

    def column_name(self, name: str, response: str) -> str:
        return name if self.columns[name].per_row else f"{response}_{name}"

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def numbers_per_state(self) -> int:
        """The most numbers of a state that are in memory while a shard is extracted."""
        return 1

    def stored_bytes(self, tokens: int, responses: int) -> int:
        """Return the most bytes of some responses on disk."""
        states = tokens + responses * self.has_final_state
        return sum(c.item_bytes * (states if c.ragged else responses) for c in self.columns.values())


class Values(Kind):
    name = "values"
    description = "soft value of s_0 .. s_T, from raw logits"
    uses: Collection[str] = ("value_temperature", "value_dtype", "positions")
    shares_start = True

    @property
    def has_final_state(self) -> bool:  # type: ignore[override]
        return not self.settings.endpoints

    @property
    def columns(self) -> Mapping[str, Column]:  # type: ignore[override]
        if self.settings.endpoints:
            return {"start_value": Column("float32", per_row=True), "end_value": PER_RESPONSE}
        column = Column(self.settings.value_dtype, ragged=True, encoding=PER_TOKEN.encoding, across="hold")
        return {self.name: column}

    def reduce(self, tile: Tile) -> tuple[Tensor, ...]:
        from prefdistill.losses import soft_value

        if self.settings.value_temperature == 1:
            return (tile.log_normaliser,)
        return (soft_value(tile.logits, self.settings.value_temperature),)

    def collect(self, parts: Sequence[np.ndarray], ended: bool) -> dict[str, Any]:
        if self.settings.endpoints:
            return dict(zip(self.columns, parts[0], strict=True))
        return super().collect(parts, ended)

    def pack(self, columns: dict[str, list[Any]], rows: Sequence[int]) -> tuple[dict[str, Sequence[Any]], list[float]]:
        packed, errors = super().pack(columns, rows)
        if self.settings.value_dtype == "float16" and not self.settings.endpoints:
            packed[self.name] = _float16(columns[self.name], rows)
        return packed, errors


class RawValues(Values):
    """Values, with how much the last one moves under other gauges (signals/gauge.py)."""

    @property
    def columns(self) -> Mapping[str, Column]:  # type: ignore[override]
        columns = dict(super().columns)
        gauge = Column("float32", ragged=True, across="same")
        return columns if self.settings.endpoints else columns | {"gauge": gauge}

    def reduce(self, tile: Tile) -> tuple[Tensor, ...]:
        if self.settings.endpoints:
            return super().reduce(tile)
        from prefdistill.signals.gauge import DIRECTIONS, gauge_shifts

        shifts = tile.logits.new_zeros(len(tile.logits), DIRECTIONS)
        shifts[tile.last] = gauge_shifts(tile.logits[tile.last])
        return (*super().reduce(tile), shifts)

    def collect(self, parts: Sequence[np.ndarray], ended: bool) -> dict[str, Any]:
        if self.settings.endpoints:
            return super().collect(parts, ended)
        values, shifts = parts
        return {"values": values, "gauge": shifts[len(shifts) - 1 - ended]}

    def stored_bytes(self, tokens: int, responses: int) -> int:
        if self.settings.endpoints:
            return 8 * responses
        from prefdistill.signals.gauge import DIRECTIONS

        value, gauge = self.columns.values()
        return value.item_bytes * (tokens + responses) + gauge.item_bytes * DIRECTIONS * responses


class LogprobValues(Values):
    name = "logprob_values"
    description = "soft value of s_0 .. s_T, from log-probabilities; needs a value_temperature other than 1"
    uses = ("value_temperature", "value_dtype")

    def check(self) -> None:
        if self.settings.value_temperature == 1:
            raise UserError(
                "logprob_values at value_temperature 1 is 0 everywhere, because probabilities sum to 1; give another "
                "value_temperature"
            )

    def reduce(self, tile: Tile) -> tuple[Tensor, ...]:
        from prefdistill.losses import soft_value

        return (soft_value(tile.logits.log_softmax(-1), self.settings.value_temperature),)


class _Sum(Kind):
    """A number per token, summed in float64 and stored as one float32 per response."""

    def collect(self, parts: Sequence[np.ndarray], ended: bool) -> dict[str, Any]:
        return {self.name: np.float32(parts[0].sum(dtype=np.float64))}


class Logps(_Sum):
    name = "logps"
    description = "log-probability of the response"
    columns: ClassVar[Mapping[str, Column]] = {"logps": PER_RESPONSE}
    needs_logits = False

    def reduce(self, tile: Tile) -> tuple[Tensor, ...]:
        return (tile.token_logps,)


class Q(_Sum):
    name = "q"
    description = "sum of the raw logits of the response's tokens"
    columns: ClassVar[Mapping[str, Column]] = {"q": PER_RESPONSE}

    def reduce(self, tile: Tile) -> tuple[Tensor, ...]:
        return (tile.logits.gather(-1, tile.tokens[:, None])[:, 0],)


class TokenLogps(Kind):
    name = "token_logps"
    description = "log-probability of each token of the response"
    columns: ClassVar[Mapping[str, Column]] = {"token_logps": replace(PER_TOKEN, across="sum")}
    needs_logits = False
    in_batch = True

    def reduce(self, tile: Tile) -> tuple[Tensor, ...]:
        return (tile.token_logps,)


def make_kinds(names: Collection[str], settings: Settings | None = None) -> list[Kind]:
    """Return the kinds with these names, in the order of `KINDS`.

    Raises:
        UserError: on a name that is not registered. Names in a store's manifest are never imported.
    """
    for name in sorted(names):
        if name not in KINDS:
            KINDS.find(name if name.isidentifier() else repr(name))
    return [KINDS[name](settings) for name in KINDS if name in names]


def check_finite(kinds: Iterable[Kind], columns: Mapping[str, list[Any]], rows: Sequence[int]) -> None:
    """Raise a UserError that names the row if a number is not finite, except -inf where a column allows it."""
    infinite = tuple(f"_{name}" for kind in kinds for name in kind.infinite)
    bad_rows: set[int] = set()
    for name, values in columns.items():
        refused = np.isnan if name.endswith(infinite) else lambda x: ~np.isfinite(x)
        bad_rows |= {rows[i] for i, x in enumerate(values) if np.any(refused(x))}
    if bad_rows:
        raise UserError(
            f"the model's logits are not finite in {len(bad_rows)} pairs, the first is row {min(bad_rows)} of the "
            "data; its weights may be damaged, or its dtype too narrow: try --dtype float32"
        )


def _float16(values: Sequence[np.ndarray], rows: Sequence[int]) -> list[np.ndarray]:
    with np.errstate(over="ignore"):
        halves = [part.astype(np.float16) for part in values]
    for row, part in zip(rows, halves, strict=True):
        if not np.isfinite(part).all():
            raise UserError(f"a value of row {row} is too large for float16; store values as float32")
    return halves
