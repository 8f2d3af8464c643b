"""Preference distillation for small language models: pairs -> signals -> method -> student -> evaluation -> report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prefdistill.data import load_pairs as load_pairs
    from prefdistill.encode import Truncation as Truncation
    from prefdistill.errors import UserError as UserError
    from prefdistill.evaluation import margin_accuracy as margin_accuracy
    from prefdistill.methods import METHODS as METHODS
    from prefdistill.sample import sample_responses as sample_responses
    from prefdistill.signals import Signals as Signals
    from prefdistill.signals import extract_signals as extract_signals
    from prefdistill.training import PrefDistillTrainer as PrefDistillTrainer

# Looked up on first use, so that `import prefdistill` and `prefdistill --help` do not wait for torch.
_HOME = {
    "METHODS": "methods",
    "PrefDistillTrainer": "training",
    "Signals": "signals",
    "Truncation": "encode",
    "UserError": "errors",
    "extract_signals": "signals",
    "load_pairs": "data",
    "margin_accuracy": "evaluation",
    "sample_responses": "sample",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"prefdistill.{_HOME[name]}"), name)
    raise AttributeError(f"module 'prefdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
