"""TODO docstring."""

from typing import TYPE_CHECKING, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    model_validator,
)

if TYPE_CHECKING:
    pass

from prefdistill.core.options import Section


class Sampling(Section):
    """How responses are sampled for methods that learn from the teacher's or the student's own."""

    temperature: NonNegativeFloat = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: PositiveInt = 1  # per prompt
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64
    engine: Literal["transformers", "vllm"] = "transformers"

    @model_validator(mode="after")
    def _draws(self) -> "Sampling":
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"sampling.temperature=0 gives the same response {self.n} times; n must be 1 for it")
        return self
