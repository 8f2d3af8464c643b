"""What a model computes for each response of a preference data set: extracted once, stored, read by every method."""

from typing import TYPE_CHECKING

from prefdistill.core.lazy import lazy_imports

if TYPE_CHECKING:
    from prefdistill.signals.extract import extract_signals
    from prefdistill.signals.kinds import KINDS, Kind
    from prefdistill.signals.live import LiveTeacher
    from prefdistill.signals.needs import ROLES, Need
    from prefdistill.signals.repair import repair_signals
    from prefdistill.signals.store import Signals, SignalSet

__all__, __getattr__, __dir__ = lazy_imports(__name__)
