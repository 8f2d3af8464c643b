"""The names of the signal kinds and the settings they have in common; the kinds themselves are loaded on first use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefdistill.core.registry import Registry

if TYPE_CHECKING:
    from prefdistill.signals.interfaces import Store


@dataclass(frozen=True)
class Settings:
    """How signals are extracted and stored, for the kinds.

    Args:
        positions: the states that are read: "all", or "endpoints".
        value_dtype: of stored values of all states.
        value_temperature: b of the soft value.
        topk: of top-k signals, as a manifest has it: k, p, vocabulary, coding, id_bits, ids_from.
        ids_from: the store whose token ids top-k signals are computed at.
    """

    positions: str = "all"
    value_dtype: str = "float32"
    value_temperature: float = 1.0
    topk: Mapping[str, Any] = field(default_factory=dict)
    ids_from: Store | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Settings:
        """Return the settings of a store's manifest or request; a manifest of old may have no `value_dtype`."""
        names = ("positions", "value_dtype", "value_temperature", "topk")
        return cls(**{name: manifest[name] for name in names if name in manifest})

    @property
    def endpoints(self) -> bool:
        return self.positions == "endpoints"


KINDS = Registry(
    "signal kind",
    "kinds",
    {
        "values": "prefdistill.signals.kinds:RawValues",
        "logprob_values": "prefdistill.signals.kinds:LogprobValues",
        "logps": "prefdistill.signals.kinds:Logps",
        "token_logps": "prefdistill.signals.kinds:TokenLogps",
        "q": "prefdistill.signals.kinds:Q",
        "topk": "prefdistill.signals.topk:TopKKind",
    },
)
