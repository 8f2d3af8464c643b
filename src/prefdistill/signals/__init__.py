"""What a model computes for each response of a preference data set: extracted once, stored, read by every method."""

from typing import TYPE_CHECKING

from prefdistill.core.lazy import lazy_names

if TYPE_CHECKING:
    from prefdistill.signals.extract import extract_signals
    from prefdistill.signals.kinds import KINDS, Kind
    from prefdistill.signals.live import LiveTeacher
    from prefdistill.signals.needs import ROLES, Need
    from prefdistill.signals.repair import repair_signals
    from prefdistill.signals.store import Signals, SignalSet

__all__ = ["KINDS", "ROLES", "Kind", "LiveTeacher", "Need", "SignalSet", "Signals", "extract_signals", "repair_signals"]

__getattr__ = lazy_names(
    __name__,
    {
        "KINDS": "kinds",
        "Kind": "kinds",
        "ROLES": "needs",
        "LiveTeacher": "live",
        "Need": "needs",
        "SignalSet": "store",
        "Signals": "store",
        "extract_signals": "extract",
        "repair_signals": "repair",
    },
)
