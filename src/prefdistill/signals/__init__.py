"""What a model says about each response of a preference data set: made once, stored, read by every method."""

from prefdistill.signals.extract import extract_signals
from prefdistill.signals.repair import repair_signals
from prefdistill.signals.store import KINDS, ROLES, Need, Signals, SignalSet

__all__ = ["KINDS", "ROLES", "Need", "SignalSet", "Signals", "extract_signals", "repair_signals"]
