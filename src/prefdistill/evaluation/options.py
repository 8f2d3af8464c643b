"""TODO docstring."""

from typing import TYPE_CHECKING

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

if TYPE_CHECKING:
    pass

from prefdistill.core.options import Options, Section
from prefdistill.training.options import Training


class RewardModelOptions(Section):
    """The judge of the responses to the held-out prompts: one that is named, or one trained on prompts of its own."""

    name: str | None = None  # Hub name or directory; null: trained from random weights,
    share: float = Field(0.25, gt=0, lt=1)  # on this share of the training prompts, which nobody else sees
    model: Options | None = None  # its `LlamaConfig` arguments; it reads max_position_embeddings tokens of a text
    training: Training

    @model_validator(mode="after")
    def _somehow(self) -> "RewardModelOptions":
        if self.name is None and self.model is None:
            raise ValueError("reward_model.name must be named, or reward_model.model say how to make one")
        if self.training.lora:
            raise ValueError("reward_model.training.lora: there is nothing to adapt in random weights; leave it out")
        return self


class Evaluation(Section):
    """What is measured on the held-out data besides pair accuracies."""

    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64
    prompts: NonNegativeInt = 0  # of the test pairs, each answered once at temperature 1; 0: no responses are measured
    samples: NonNegativeInt = 0  # generations kept for the report
    length_ranges: list[PositiveInt] | None = None  # edges in words of the reference response; null: its quartiles
