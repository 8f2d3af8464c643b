"""Preference distillation for small language models: pairs -> signals -> method -> student -> evaluation -> report."""

from typing import TYPE_CHECKING

from prefdistill.core.lazy import lazy_imports

__version__ = "0.1.0"

if TYPE_CHECKING:  # looked up on first use, so that `import prefdistill` and `prefdistill --help` do not wait for torch
    from prefdistill.core.errors import UserError
    from prefdistill.data.encode import encode_pairs
    from prefdistill.data.fingerprint import data_fingerprint
    from prefdistill.data.load import load_pairs
    from prefdistill.data.truncation import Truncation
    from prefdistill.evaluation.stats import margin_accuracy
    from prefdistill.methods import METHODS
    from prefdistill.models.load import load_model
    from prefdistill.sampling.files import sample_responses
    from prefdistill.signals.extract import extract_signals
    from prefdistill.signals.live import LiveTeacher
    from prefdistill.signals.store import Signals
    from prefdistill.training.trainer import PrefDistillTrainer

__all__, __getattr__, __dir__ = lazy_imports(__name__)
