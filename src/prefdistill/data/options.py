"""TODO docstring."""

from typing import TYPE_CHECKING

from pydantic import (
    Field,
    PositiveInt,
)

if TYPE_CHECKING:
    pass

from prefdistill.core.options import Section


class Synthetic(Section):
    """The built-in task with a known reward, in place of data files."""

    demonstrations: PositiveInt
    teacher_pairs: PositiveInt  # the teacher's DPO sees these prompts,
    pairs: PositiveInt  # the student the first of them: a teacher is worth asking because it has seen more
    test_prompts: PositiveInt
    teacher_label_noise: float = Field(0.0, ge=0, le=1)  # share of the pairs that the teacher's DPO sees turned round


class Data(Section):
    """Pairs to train and test on: a Hub name (`org/name#split`), a directory, or a file."""

    train: str | None = None
    test: str | None = None
    sft: str | None = None  # demonstrations for the SFT stages; default: the chosen responses of `train`
    max_train: PositiveInt | None = None  # use the first rows only
    max_test: PositiveInt | None = None
    max_length: PositiveInt | None = 1024
    max_prompt_length: PositiveInt | None = None  # not in the SFT and DPO stages: TRL knows max_length only
    synthetic: Synthetic | None = None
