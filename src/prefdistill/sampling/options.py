"""Options of sampling: how responses are drawn from a model."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from prefdistill.core.options import NO_FLAG, OnWorkers, Options, Section, Seeded
from prefdistill.data.options import Columns
from prefdistill.models.options import Placement, QuantizedLoading
from prefdistill.sampling import ENGINES


def _check_engine(name: str) -> str:
    if name not in ENGINES and "." not in name:
        raise ValueError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    return name


Engine = Annotated[str, AfterValidator(_check_engine)]


class Sampling(Section):
    """How responses of the teacher or the student are sampled, for methods that learn from them."""

    temperature: NonNegativeFloat = Field(1.0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: draw from the top-p tokens; 1 keeps all.")
    n: PositiveInt = Field(1, description="Responses per prompt.")
    max_new_tokens: PositiveInt = Field(256, description="Maximum tokens of a response.")
    batch_size: PositiveInt = Field(64, description="Responses generated together; vLLM makes its own batches.")
    engine: Engine = Field(
        "transformers",
        description="transformers, in this process; ray, transformers on the workers of a Ray cluster; or vllm, where "
        "it is installed.",
    )
    vllm: Options = Field(
        default_factory=dict,
        description="Arguments of vLLM's LLM for the engine vllm, such as {tensor_parallel_size: 8, max_model_len: "
        "4096, gpu_memory_utilization: 0.8}.",
    )

    @property
    def drawing(self) -> dict[str, Any]:
        """The options that responses depend on, for requests. Engines with the same responses have one name."""
        engine = ENGINES.find(self.engine)
        options = self.part(Sampling) | {"engine": engine.same_draws_as or self.engine}
        if engine.makes_batches:
            del options["batch_size"]
        if not self.vllm:
            del options["vllm"]
        return options

    @model_validator(mode="after")
    def _draws(self) -> "Sampling":
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"temperature=0 gives the same response {self.n} times; use n=1 or a temperature above 0")
        if self.vllm and self.engine != "vllm":
            raise ValueError("vllm has arguments of the engine vllm; leave it out, or set engine=vllm")
        return self


class SampleRequest(Sampling, QuantizedLoading, Placement, OnWorkers, Seeded, Columns):
    """Options of `sample_responses`, without the model, the data and the file."""

    column: str = Field(
        "completion", description="Column for the responses, e.g. student_response or teacher_response."
    )
    max_new_tokens: PositiveInt = Sampling.redefault("max_new_tokens", 512)
    shard_rows: Annotated[PositiveInt, NO_FLAG] = Field(256, description="Prompts per part, the unit of resuming.")
    keep_ids: Annotated[bool, NO_FLAG] = Field(
        True, description="Write the sampled token ids beside the text, for methods that learn from the responses."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "SampleRequest":
        if not self.column.isidentifier():
            raise ValueError(f"column={self.column!r}: use letters, digits and _, such as student_response")
        if self.quantization is not None and self.engine == "vllm":
            raise ValueError("quantization applies to the engine transformers; vLLM loads quantized checkpoints")
        if self.device_map is not None and self.engine != "transformers":
            raise ValueError(f"device_map applies to the engine transformers; {self.engine} places a model itself")
        if self.workers is not None and self.engine != "ray":
            raise ValueError("workers applies to the engine ray; leave it out")
        return self
