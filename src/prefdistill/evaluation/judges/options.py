"""Options of judging: how a model answers MT-Bench, and how an endpoint is called."""

from pydantic import Field, NonNegativeInt, PositiveInt

from prefdistill.core.options import Section, Seeded
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


class Calling(Section):
    """How a judge's endpoint is called."""

    timeout: float = Field(120.0, ge=0.1, description="Read timeout in seconds, then retry.")
    retries: NonNegativeInt = Field(5, description="Retries after 429, 5xx, a timeout or a lost connection.")
    concurrency: PositiveInt = Field(4, description="Requests at a time.")
