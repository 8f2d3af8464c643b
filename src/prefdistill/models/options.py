"""TODO docstring."""

from typing import TYPE_CHECKING, Literal

from pydantic import (
    PositiveInt,
)

if TYPE_CHECKING:
    pass

from prefdistill.core.options import Options, Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Scratch(Section):
    """Models made from random weights: `LlamaConfig` arguments of each, and a tokenizer trained on the data."""

    vocab_size: PositiveInt = 4096
    teacher: Options
    student: Options


class Models(Section):
    """Hub names or directories; a model that is not named is made from `scratch`."""

    teacher: str | None = None
    teacher_reference: str | None = None  # what the named teacher's DPO started from, for methods that compare the two
    student: str | None = None
    scratch: Scratch | None = None
    dtype: Dtype = "float32"  # of the weights in training; with bf16=true they stay float32 and the products are bf16
    trust_remote_code: bool = False
