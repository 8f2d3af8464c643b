"""Options of evaluation: of a run, of its reward model, and of `prefdistill evaluate`."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Tag,
    model_validator,
)

from prefdistill.core.options import NOT_IN_KEY, Options, Section, Seeded
from prefdistill.data.options import Columns
from prefdistill.models.options import Dtype, FromModel, Loading, ReadWith
from prefdistill.sampling.options import Engine, Sampling
from prefdistill.training.options import Training

SAMPLED = ("prompts", "temperature", "max_new_tokens", "batch_size", "engine")  # options of sampled responses


def _kind_of_model(model: Any) -> str:
    source = isinstance(model, FromModel) or (isinstance(model, dict) and "from" in model)
    return "FromModel" if source else "Options"


ModelToTrain = Annotated[
    Annotated[FromModel, Tag("FromModel")] | Annotated[Options, Tag("Options")], Discriminator(_kind_of_model)
]


class RewardModelOptions(Section):
    """The reward model that scores the responses to held-out prompts: a named one, or one trained for the run."""

    name: Annotated[str | None, NOT_IN_KEY] = Field(
        None, description="Hub name or directory of a one-label classifier; null: train one, from `model`."
    )
    share: float = Field(0.25, gt=0, lt=1, description="Share of the training prompts that only it sees.")
    model: ModelToTrain | None = Field(
        None,
        description="What it is trained from: `{from: NAME}`, a pretrained model, with its own tokenizer and template; "
        "or `LlamaConfig` arguments of random weights. It reads max_position_embeddings tokens of a text.",
    )
    training: Training = Field(description="How it is trained.")

    @model_validator(mode="after")
    def _consistent(self) -> "RewardModelOptions":
        if self.name is None and self.model is None:
            raise ValueError(
                "reward_model needs a `name`, or a `model` to train it from: {from: NAME}, or the shape of a random one"
            )
        if self.training.lora:
            raise ValueError("reward_model.training.lora: its head is new, so all weights are trained; leave it out")
        return self

    @property
    def start(self) -> FromModel | None:
        """The pretrained model that it is trained from; None for a finished one, or random weights."""
        return self.model if self.name is None and isinstance(self.model, FromModel) else None

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments of random weights."""
        return {} if self.model is None or isinstance(self.model, FromModel) else self.model

    @property
    def source(self) -> str | None:
        """The named model: the finished reward model, or the one that it is trained from."""
        return self.start.source if self.start else self.name


def _rising(edges: tuple[int, ...]) -> tuple[int, ...]:
    if any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"length_ranges must rise, e.g. 5,10,50; got {','.join(map(str, edges))}")
    return edges


class Evaluation(Section):
    """What a run measures on held-out data besides pair accuracies."""

    max_new_tokens: PositiveInt = Sampling.redefault("max_new_tokens", 256)
    batch_size: PositiveInt = Sampling.redefault("batch_size", 64)
    prompts: NonNegativeInt = Field(
        0, description="Test prompts that each model responds to once at temperature 1; 0: responses are not measured."
    )
    samples: NonNegativeInt = Field(0, description="Responses shown in the report.")
    length_ranges: list[PositiveInt] | None = Field(
        None, description="Edges of length ranges in words of the reference response; default: quartiles."
    )


class EvaluateRequest(Loading, ReadWith, Seeded, Columns):
    """What `evaluate` measures of one model."""

    model: str | None = Field(
        None, description="Hub name or directory of the student; not needed to score given responses."
    )
    data: str | None = Field(
        None, description="Held-out pairs, or rows with prompt and completion; Hub name, directory or file."
    )
    reference: Path | None = Field(None, description="Pairs: logps signals of the student's start on this data.")
    teacher: Path | None = Field(None, description="Pairs: values,logps signals of the teacher on this data.")
    generate: bool = Field(False, description="Respond to each prompt once; the responses are kept beside --out.")
    generations: Path | None = Field(None, description="Score the responses in this file instead of sampling.")
    reward_model: str | None = Field(
        None, description="Score responses: Hub name or directory of a one-label classifier."
    )
    against: Path | None = Field(
        None, description="Win rate against the responses in this file; default: the chosen ones of --data."
    )
    column: str = Field("response", description="Column of the responses in --generations and --against.")
    length_ranges: Annotated[tuple[PositiveInt, ...], AfterValidator(_rising)] = Field(
        (), strict=False, description=f"Comma-separated. {Evaluation.model_fields['length_ranges'].description}"
    )
    prompts: PositiveInt | None = Field(None, description="Respond to the first prompts only.")
    temperature: NonNegativeFloat = Sampling.redefault("temperature", 1.0)
    max_new_tokens: PositiveInt = Sampling.redefault("max_new_tokens", 512)
    batch_size: PositiveInt = Sampling.redefault("batch_size", 64)
    engine: Engine = Sampling.redefault("engine", "transformers")
    lm_eval: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Comma-separated tasks of lm-evaluation-harness, or open-llm-leaderboard.",
    )
    lm_eval_include: Path | None = Field(None, description="Directory with further task files.")
    lm_eval_batch_size: PositiveInt = Field(8, description="Requests of a benchmark per batch.")
    limit: PositiveInt | None = Field(None, description="The first items of each benchmark only.")
    dtype: Dtype = Loading.redefault("dtype", "float32")

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluateRequest":
        if not (self.reference or self.lm_eval or self.has_responses):
            raise ValueError(
                "nothing to evaluate: give --reference (pairs), --generate, --generations or --reward-model "
                "(responses), or --lm-eval (benchmarks)"
            )
        if self.model is None and (self.reference or self.lm_eval or not self.generations):
            raise ValueError("--model is required: only --generations can be evaluated without a model")
        if self.data is None and (self.reference or (self.has_responses and not self.generations)):
            raise ValueError("--data is required: the pairs that --reference was extracted from, or prompts")
        if self.generate and self.generations:
            raise ValueError("--generate samples responses and --generations reads them from a file; use only one")
        sampled = self.has_responses and not self.generations
        for present, needs, options in (
            (self.reference, "--reference", ("teacher",)),
            (self.reward_model, "--reward-model, which scores both", ("against",)),
            (self.generations or self.against, "--generations or --against", ("column",)),
            (self.has_responses, "responses: --generate, --generations or --reward-model", ("length_ranges",)),
            (sampled, "responses to sample: --generate or --reward-model", SAMPLED),
            (self.data, "--data", tuple(Columns.model_fields)),
            (
                self.reference or sampled or self.lm_eval,
                "a model that reads texts: --reference, --generate or --lm-eval",
                tuple(ReadWith.model_fields),
            ),
            (self.lm_eval, "--lm-eval", ("lm_eval_include", "lm_eval_batch_size", "limit")),
        ):
            fields = type(self).model_fields
            changed = [n for n in options if getattr(self, n) != fields[n].get_default(call_default_factory=True)]
            if changed and not present:
                raise ValueError(f"--{changed[0].replace('_', '-')} needs {needs}")
        return self

    @property
    def has_responses(self) -> bool:
        """Whether responses are measured."""
        return self.generate or self.generations is not None or self.reward_model is not None
