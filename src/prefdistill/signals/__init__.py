"""What a model says about each response of a preference data set: made once, stored, read by every method."""

from prefdistill.signals.extract import KINDS, extract_signals
from prefdistill.signals.store import ROLES, Signals, SignalSet

__all__ = ["KINDS", "ROLES", "SignalSet", "Signals", "extract_signals"]
