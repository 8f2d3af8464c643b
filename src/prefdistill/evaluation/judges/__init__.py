"""Answers judged by a language model behind an OpenAI-compatible endpoint: MT-Bench and AlpacaEval."""

from typing import TYPE_CHECKING

from prefdistill.core.lazy import lazy_names

if TYPE_CHECKING:
    from prefdistill.evaluation.judges.alpaca import judge_alpaca_eval
    from prefdistill.evaluation.judges.client import Endpoint
    from prefdistill.evaluation.judges.mt_bench import judge_mt_bench

__all__ = ["Endpoint", "judge_alpaca_eval", "judge_mt_bench"]

__getattr__ = lazy_names(__name__, {"Endpoint": "client", "judge_alpaca_eval": "alpaca", "judge_mt_bench": "mt_bench"})
