"""Options of judging: how a model answers MT-Bench, and what is judged."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from prefdistill.core.options import Flag, Options, Section, Seeded
from prefdistill.models.options import Loading
from prefdistill.sampling.options import Sampling


class Questions(Section):
    """Which questions are used."""

    max_questions: PositiveInt | None = Field(None, description="Use only so many, evenly from the whole file.")


class Answering(Questions, Loading, Seeded):
    """How a model answers MT-Bench's questions."""

    name: str | None = Field(None, description="model_id of the responses; default: the model's name.")
    max_new_tokens: PositiveInt = Sampling.redefault("max_new_tokens", 1024)
    max_length: PositiveInt | None = Field(
        None, description="Tokens of conversation and response together; a longer conversation loses its start."
    )
    batch_size: PositiveInt = Sampling.redefault("batch_size", 16)
    chat_template_kwargs: Options = Field(
        default_factory=dict, description="Variables of the chat template, such as {enable_thinking: false}."
    )


class Judging(Questions):
    """What every judged task has."""

    price_in: NonNegativeFloat | None = Field(None, description="Price of a million tokens of the judge's input.")
    price_out: NonNegativeFloat | None = Field(None, description="Price of a million tokens of the judge's output.")


class MTBench(Judging):
    """What is judged of MT-Bench; all files are FastChat's."""

    answers: Path = Field(description="The responses to judge, in FastChat's format.")
    questions: Path = Field(description="MT-Bench's question.jsonl.")
    prompts: Path = Field(description="FastChat's judge_prompts.jsonl.")
    references: Path = Field(description="Reference responses: math, reasoning and coding.")
    against: Path | None = Field(None, description="Other responses, to compare with.")
    kinds: Annotated[tuple[Literal["single", "pair"], ...] | None, Flag("--kind")] = Field(
        None,
        strict=False,
        description="Comma-separated: grades from 1 to 10, and comparisons; default: all that can be judged.",
    )


class AlpacaEval(Judging):
    """What is judged in the manner of AlpacaEval."""

    answers: Path = Field(description="Responses to judge: instruction and output, or a file of `sample`.")
    against: Path = Field(description="Responses to compare with, to the same instructions.")
    prompt: str = Field(
        "weighted_alpaca_eval_gpt4_turbo",
        description="An evaluator of the alpaca_eval package, or a text file with {instruction}, {output_1}, "
        "{output_2}. The default needs log-probabilities of the endpoint; alpaca_eval_clf_gpt4_turbo does not.",
    )
    labels: tuple[str, ...] | None = Field(
        None,
        strict=False,
        description="Comma-separated: what the judge writes, by a prompt file, for the first output, the second and, "
        "if it can, a tie; default: m,M.",
    )
