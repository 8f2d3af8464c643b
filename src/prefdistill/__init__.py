"""Preference distillation for small language models: pairs -> signals -> method -> student -> evaluation -> report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prefdistill.core.errors import UserError as UserError
    from prefdistill.data.encode import encode_pairs as encode_pairs
    from prefdistill.data.fingerprint import data_fingerprint as data_fingerprint
    from prefdistill.data.load import load_pairs as load_pairs
    from prefdistill.data.truncation import Truncation as Truncation
    from prefdistill.evaluation.stats import margin_accuracy as margin_accuracy
    from prefdistill.methods import METHODS as METHODS
    from prefdistill.models.load import load_model as load_model
    from prefdistill.sampling.files import sample_responses as sample_responses
    from prefdistill.signals.extract import extract_signals as extract_signals
    from prefdistill.signals.live import LiveTeacher as LiveTeacher
    from prefdistill.signals.store import Signals as Signals
    from prefdistill.training.trainer import PrefDistillTrainer as PrefDistillTrainer

# Looked up on first use, so that `import prefdistill` and `prefdistill --help` do not wait for torch.
_HOME = {
    "LiveTeacher": "signals.live",
    "METHODS": "methods",
    "PrefDistillTrainer": "training.trainer",
    "Signals": "signals.store",
    "Truncation": "data.truncation",
    "UserError": "core.errors",
    "data_fingerprint": "data.fingerprint",
    "encode_pairs": "data.encode",
    "extract_signals": "signals.extract",
    "load_model": "models.load",
    "load_pairs": "data.load",
    "margin_accuracy": "evaluation.stats",
    "sample_responses": "sampling.files",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"prefdistill.{_HOME[name]}"), name)
    raise AttributeError(f"module 'prefdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
