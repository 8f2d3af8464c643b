"""Baselines that TRL has: SimPO and WPO, trained by TRL's own trainers on the pairs, without signals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat

from prefdistill.data.columns import SIDES
from prefdistill.methods.base import Method

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class TRLMethod(Method):
    """A method whose trainer is TRL's, on the tokens that every other method is trained on."""

    def classes(self) -> tuple[type[Any], type[Any]]:
        """TRL's configuration and trainer."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """The hyper-parameters in TRL's names."""
        raise NotImplementedError

    def models(self, load: Callable[[], "PreTrainedModel"], *, adapter: bool) -> dict[str, Any]:
        """The models the trainer holds, by the name of its argument."""
        return {"model": load()}

    def rows(self, encoded: "Dataset") -> "Dataset":
        """Rows of `encode_pairs` in the columns that the trainer makes batches of."""
        return encoded.select_columns(["prompt_ids", *(f"{side}_ids" for side in SIDES)])


@dataclass(frozen=True, kw_only=True)
class SimPO(TRLMethod):
    """SimPO (arXiv 2405.14734): log-probabilities per token as the reward, a target margin, no reference.

    Args:
        beta: scale of the reward.
        gamma: the margin that the chosen response shall have, in units of the scaled reward.
    """

    beta: PositiveFloat = 2.0
    gamma: float = 1.0

    def classes(self) -> tuple[type[Any], type[Any]]:
        import os

        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # our range of versions is pinned to what was tested
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOConfig, CPOTrainer

    def arguments(self) -> dict[str, Any]:
        loss = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": self.beta, "simpo_gamma": self.gamma}
        return {**loss, "remove_unused_columns": False}

    def rows(self, encoded: "Dataset") -> "Dataset":
        from prefdistill.data.sources import NO_CACHE

        def row(pair: dict[str, list[int]]) -> dict[str, list[int]]:
            found = {}
            for side in SIDES:
                prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
                found[f"{side}_input_ids"] = prompt + response
                found[f"{side}_attention_mask"] = [1] * len(prompt + response)
                found[f"{side}_labels"] = [-100] * len(prompt) + response
            return found

        return encoded.map(row, remove_columns=encoded.column_names, **NO_CACHE)


@dataclass(frozen=True, kw_only=True)
class WPO(TRLMethod):
    """WPO (arXiv 2406.11827): DPO whose pairs count by how likely the student finds them.

    Args:
        beta: strength of the pull towards the reference, per nat.
    """

    beta: PositiveFloat = 0.1

    def classes(self) -> tuple[type[Any], type[Any]]:
        from trl import DPOConfig, DPOTrainer

        return DPOConfig, DPOTrainer

    def arguments(self) -> dict[str, Any]:
        return {"beta": self.beta, "use_weighting": True}

    def models(self, load: Callable[[], "PreTrainedModel"], *, adapter: bool) -> dict[str, Any]:
        return {"model": load(), "ref_model": None if adapter else load()}
