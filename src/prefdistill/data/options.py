"""Options of data: where pairs come from, how many are used, how long they may be."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from prefdistill.core.errors import UserError
from prefdistill.core.options import NOT_IN_KEY, Options, Section


class Lengths(Section):
    """How many tokens of a pair are used."""

    max_length: PositiveInt | None = Field(
        1024, description="Tokens of prompt and response; the response is cut on the right."
    )
    max_prompt_length: PositiveInt | None = Field(None, description="Tokens of the prompt; a longer one keeps its end.")


class Columns(Section):
    """How the columns of data are read."""

    columns: Annotated[dict[str, str | None], NOT_IN_KEY] = Field(
        default_factory=dict,
        description="Names of columns, such as {chosen: response_j}; null leaves a column out.",
    )
    chat_template_kwargs: Annotated[Options, NOT_IN_KEY] = Field(
        default_factory=dict,
        description="Variables of the chat template, such as {enable_thinking: false}; the column of this name wins.",
    )

    def loader_options(self, data: Any) -> dict[str, Any]:
        """Return these options for the loader of data.

        Raises:
            UserError: if any is set for data that are in memory, which no loader reads.
        """
        options = self.part(Columns)
        if not isinstance(data, str) and any(options.values()):
            raise UserError("columns and chat_template_kwargs apply to data given by name; leave them out")
        return options if isinstance(data, str) else {}


class Synthetic(Section):
    """The built-in task with a known reward, in place of data files."""

    demonstrations: PositiveInt = Field(description="Rows of the SFT stages.")
    teacher_pairs: PositiveInt = Field(description="Pairs that the teacher's DPO trains on.")
    pairs: PositiveInt = Field(description="Pairs that the student trains on, the first of the teacher's.")
    test_prompts: PositiveInt = Field(description="Held-out prompts.")
    teacher_label_noise: NonNegativeFloat = Field(
        0.0, le=1, description="Share of the teacher's pairs whose label is flipped."
    )
    teacher_tokenizer: Literal["same", "other"] = Field(
        "same", description="The teacher's tokenizer: the student's, or one that splits every word in two."
    )


class Data(Section):
    """Pairs to train and test on: a Hub name (`org/name#split`), a directory, or a file."""

    train: Annotated[str | None, NOT_IN_KEY] = Field(None, description="Preference pairs to train on.")
    test: Annotated[str | None, NOT_IN_KEY] = Field(None, description="Held-out pairs.")
    sft: Annotated[str | None, NOT_IN_KEY] = Field(
        None, description="Demonstrations for the SFT stages; null: the chosen responses of `train`."
    )
    columns: Annotated[dict[str, str | None], NOT_IN_KEY] = Field(
        default_factory=dict,
        description="Names of columns of `train` and `test`, such as {chosen: response_j}; null leaves a column out.",
    )
    sft_columns: Annotated[dict[str, str | None], NOT_IN_KEY] = Field(
        default_factory=dict, description="Names of columns of `sft`."
    )
    chat_template_kwargs: Annotated[Options, NOT_IN_KEY] = Field(
        default_factory=dict, description=Columns.model_fields["chat_template_kwargs"].description
    )
    max_train: PositiveInt | None = Field(None, description="Use the first rows of `train` only.")
    max_test: PositiveInt | None = Field(None, description="Use the first rows of `test` only.")
    max_length: PositiveInt | None = Lengths.redefault("max_length", 1024)
    max_prompt_length: PositiveInt | None = Lengths.redefault("max_prompt_length", None)
    synthetic: Synthetic | None = Field(None, description="The built-in task, in place of `train`.")

    @property
    def read_as(self) -> dict[str, Any]:
        """The options of `Columns` for `train` and `test`."""
        return self.part(Columns)

    @property
    def sft_read_as(self) -> dict[str, Any]:
        """The options of `Columns` for `sft`."""
        return {"columns": self.sft_columns, "chat_template_kwargs": self.chat_template_kwargs}
