"""TODO docstring."""

from typing import TYPE_CHECKING, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
)

if TYPE_CHECKING:
    pass

from prefdistill.core.options import Section
from prefdistill.models.options import Dtype


class SignalOptions(Section):
    dtype: Dtype | None = None  # of the teacher's weights while it is read; null: bfloat16 where it is fast, else auto
    quantization: Literal["4bit", "8bit"] | None = None  # of the teacher's weights while it is read
    # of which states values are kept of training pairs where nothing else is read of the teacher; the held-out pairs'
    # are all kept, for the terms they are compared with
    positions: Literal["all", "endpoints"] = "all"
    value_dtype: Literal["float32", "float16"] = "float32"  # not of endpoints
    topk_coding: Literal["packed", "float32"] | None = None  # null: packed, but exact for k: vocab
    value_temperature: PositiveFloat = 1.0
    k: PositiveInt | Literal["vocab"] = 50  # tokens kept of each distribution, the likeliest ones,
    p: float | None = Field(default=None, gt=0, le=1)  # or fewer, where fewer hold this share of the probability
    batch_tokens: PositiveInt = 16_384
