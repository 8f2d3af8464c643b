"""What one model gives on held-out data: the numbers per item behind every metric, and the prompts they belong to."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.evaluation.pairs import implicit_rewards, pair_wins, prompts_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefdistill.signals import Signals


@dataclass
class Measured:
    """What one evaluated model gave: means by metric, and the values per test item behind them."""

    metrics: dict[str, float] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    # by metric, the number of each item's prompt; absent where every item is a prompt of its own
    groups: dict[str, list[int]] = field(default_factory=dict)

    def add(self, metric: str, values: Any, groups: list[int] | None = None) -> None:
        self.items[metric] = np.asarray(values, dtype=np.float64).tolist()
        self.metrics[metric] = float(np.mean(self.items[metric]))
        if groups is not None:
            self.groups[metric] = groups


def measure_pairs(
    measured: Measured,
    student: "PreTrainedModel",
    pairs: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    reference: "Signals",
) -> None:
    """Add how a student orders the held-out pairs by its implicit reward."""
    reward = implicit_rewards(student, pairs, tokenizer, reference)
    groups = numbered(prompts_of(pairs, reward["row"]))
    measured.add("reward_accuracy", pair_wins(reward["chosen"], reward["rejected"]), groups)
    measured.add("reward_margin", reward["chosen"] - reward["rejected"], groups)
    measured.add("chosen_logp", reward["chosen_logp"], groups)


def numbered(prompts: list[str]) -> list[int]:
    """The number of each prompt, in the order in which they first come.

    Example:
        >>> numbered(["b", "a", "b"])
        [0, 1, 0]
    """
    seen: dict[str, int] = {}
    return [seen.setdefault(prompt, len(seen)) for prompt in prompts]
