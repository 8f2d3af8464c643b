"""Options of models: names, dtype, quantization, random models of a given shape."""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from prefdistill.core.options import NOT_IN_KEY, Options, Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["4bit", "8bit"]
SIZE = r"\d+(\.\d+)?\s*([KMGT]i?B)?"


class Trust(Section):
    """Whether code that comes with a model runs."""

    trust_remote_code: bool = Field(False, description="Let the model's repository run its own code.")


class Loading(Trust):
    """How a model is loaded."""

    dtype: Dtype = Field("auto", description="dtype of the weights; auto is as stored.")


class Form(Section):
    """The form in which a model reads a conversation, for this model alone."""

    chat_template: Annotated[str | None, NOT_IN_KEY] = Field(
        None,
        description="Chat template in place of the model's own: a Jinja file, or plain or llama3, for a base model "
        "without one.",
    )
    system_prompt: Annotated[str | None, NOT_IN_KEY] = Field(
        None, description="System prompt in place of the one that a row has or lacks; empty: none."
    )
    template_kwargs: Annotated[Options, NOT_IN_KEY] = Field(
        default_factory=dict,
        description="Variables of its chat template, such as {enable_thinking: false}, in place of those of the data.",
    )
    response_prefix: Annotated[str | None, NOT_IN_KEY] = Field(
        None,
        description="Text between its generation prompt and a response, such as an end of the thinking block that its "
        'generation prompt opens: "\\n</think>\\n\\n".',
    )


class ReadWith(Form):
    """The file of a model, the tokenizer that it is read with, and the form in which it reads a conversation."""

    gguf_file: str | None = Field(
        None,
        description="GGUF file in the directory or Hub repository of the model, which is dequantized while loading; a "
        "model's name may also end in it: models/model-Q8_0.gguf.",
    )
    tokenizer: str | None = Field(
        None,
        description="Read the model with this tokenizer and chat template: the student's, for a teacher that has "
        "another template over the same vocabulary. Hub name or directory; default: the model's own.",
    )

    def place(self, model: str) -> str:
        """The name of a model with its GGUF file."""
        return model_place(model, self.gguf_file)

    @property
    def form(self) -> Form:
        """The part of these options that is the form."""
        return Form(**self.part(Form))


class Placement(Section):
    """Where the weights of a model lie that is only read, and larger than one device."""

    device_map: Annotated[Literal["auto", "balanced", "balanced_low_0", "sequential"] | None, NOT_IN_KEY] = Field(
        None,
        description="Spread the layers over the devices of this machine, then main memory, then disk, as transformers "
        "does under this name; default: the whole model on one device.",
    )
    max_memory: Annotated[dict[int | str, int | str], NOT_IN_KEY] = Field(
        default_factory=dict,
        description="With device_map: the most that weights take of each device, such as {0: 70GiB, cpu: 400GiB}; a "
        "device that is left out takes none. Default: what is free.",
    )

    @model_validator(mode="after")
    def _sizes(self) -> "Placement":
        if self.max_memory and self.device_map is None:
            raise ValueError("max_memory says how device_map spreads a model; set that too, such as device_map=auto")
        for device, most in self.max_memory.items():
            if not re.fullmatch(SIZE, str(most)) or not re.fullmatch(r"\d+|cpu|disk|mps", str(device)):
                raise ValueError(
                    f"max_memory {device}={most}: write the number of a device, or cpu, and a size such as 70GiB"
                )
        return self

    @property
    def placement(self) -> dict[str, Any]:
        """These options as `load_model` takes them."""
        return {
            "device_map": self.device_map,
            "max_memory": {
                int(device) if str(device).isdigit() else device: int(most) if str(most).isdigit() else most
                for device, most in self.max_memory.items()
            },
        }


class QuantizedLoading(Loading):
    """How a model is loaded that is only read."""

    quantization: Quantization | None = Field(
        None, description="Quantize the weights while loading (bitsandbytes); a quantized checkpoint needs no option."
    )


class Calling(Section):
    """How an endpoint is called."""

    timeout: float = Field(120.0, ge=0.1, description="Read timeout in seconds, then retry.")
    retries: NonNegativeInt = Field(5, description="Retries after 429, 5xx, a timeout or a lost connection.")
    concurrency: PositiveInt = Field(4, description="Requests at a time.")


class Scratch(Section):
    """Models made from random weights, and a tokenizer trained on the data."""

    vocab_size: PositiveInt = Field(4096, description="Size of the tokenizer's vocabulary.")
    teacher: Options = Field(description="`LlamaConfig` arguments of the teacher.")
    student: Options = Field(description="`LlamaConfig` arguments of the student.")


class FromModel(Section):
    """A model made from a named one: `{from: NAME, layers: 24}`."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: Annotated[str, NOT_IN_KEY] = Field(alias="from", description="Hub name or directory of the whole model.")
    layers: PositiveInt | list[int] | None = Field(
        None,
        description="Decoder layers that it keeps: how many, the first half of them and the last; or their numbers "
        "from 0; null: all.",
    )


class Models(Trust):
    """Hub names or directories; a model that is not named is made from `scratch`."""

    teacher: Annotated[str | None, NOT_IN_KEY] = Field(None, description="Hub name or directory of the teacher.")
    teacher_gguf_file: Annotated[str | None, NOT_IN_KEY] = Field(
        None, description="GGUF file in the directory or repository of the teacher; it is dequantized while loading."
    )
    teacher_reference: Annotated[str | None, NOT_IN_KEY] = Field(
        None, description="What the teacher's DPO started from, for methods that compare the two."
    )
    student: Annotated[str | FromModel | None, NOT_IN_KEY] = Field(
        None, description="Hub name or directory of the student, or `{from: NAME, layers: 24}`: fewer layers of it."
    )
    chat_template: Annotated[str | None, NOT_IN_KEY] = Field(
        None,
        description="Chat template of teacher and student, in place of their own, such as base models without one: a "
        "Jinja file, plain, or llama3.",
    )
    teacher_tokenizer: Annotated[str | None, NOT_IN_KEY] = Field(
        None,
        description="Hub name or directory of the tokenizer and chat template of the teacher and its reference; a "
        "teacher from scratch is made for it. Default: the student's, or the teacher's own if its tokens differ.",
    )
    teacher_chat_template: Annotated[str | None, NOT_IN_KEY] = Field(
        None,
        description="Chat template of the teacher and its reference: a Jinja file, or plain or llama3, for a base "
        "model without one.",
    )
    teacher_system_prompt: Annotated[str | None, NOT_IN_KEY] = Field(
        None, description="System prompt of the teacher and its reference, in place of that of a row; empty: none."
    )
    teacher_template_kwargs: Annotated[Options, NOT_IN_KEY] = Field(
        default_factory=dict,
        description="Variables of the chat template of the teacher and its reference, such as {enable_thinking: "
        "false}, in place of those of the data.",
    )
    teacher_response_prefix: Annotated[str | None, NOT_IN_KEY] = Field(
        None,
        description="Text between the generation prompt and a response of the teacher and its reference, such as "
        '"\\n</think>\\n\\n" where the generation prompt opens a thinking block.',
    )
    scratch: Scratch | None = Field(None, description="Shapes of random models; null: models are named.")
    dtype: Dtype = Field(
        "float32",
        description="dtype of the weights in training; with training.bf16 they stay float32.",
    )

    def cache_key(self) -> dict[str, Any]:
        layers = self.student_layers
        return super().cache_key() | ({} if layers is None else {"student_layers": layers})

    def name_of(self, role: str) -> str | None:
        """Return the model that is named for a role, or that the model of this role is made from."""
        named: str | FromModel | None = getattr(self, role)
        return named.source if isinstance(named, FromModel) else named

    @property
    def student_layers(self) -> int | list[int] | None:
        """The decoder layers that the student keeps of the model that it is made from; None: all."""
        return self.student.layers if isinstance(self.student, FromModel) else None

    @property
    def teacher_form(self) -> Form | None:
        """The form in which the teacher and its reference read a conversation; None: as their tokenizer says."""
        form = Form(**{name: getattr(self, f"teacher_{name}") for name in Form.model_fields})
        return None if form == Form() else form

    @model_validator(mode="after")
    def _form_has_tokenizer(self) -> "Models":
        if self.teacher_form and not (self.teacher or self.teacher_tokenizer):
            keys = ", ".join(f"model.teacher_{name}" for name in Form.model_fields)
            raise ValueError(f"{keys} change how a named teacher reads; name model.teacher or model.teacher_tokenizer")
        if self.chat_template and not (self.teacher or self.student or self.teacher_tokenizer):
            raise ValueError("model.chat_template is for named models; models from scratch have their own")
        return self

    @model_validator(mode="before")
    @classmethod
    def _place_of_teacher(cls, raw: Any) -> Any:
        """Make the GGUF file part of the teacher's name."""
        if not isinstance(raw, dict) or raw.get("teacher_gguf_file") is None:
            return raw
        teacher, file = raw.get("teacher"), raw["teacher_gguf_file"]
        if not isinstance(teacher, str):
            raise ValueError("model.teacher_gguf_file is a file of model.teacher; name that too")
        return {**raw, "teacher": model_place(teacher, file), "teacher_gguf_file": None}


def model_place(model: str, gguf_file: str | None) -> str:
    """Return the name of a model with its GGUF file."""
    return f"{model.rstrip('/')}/{gguf_file}" if gguf_file else model
