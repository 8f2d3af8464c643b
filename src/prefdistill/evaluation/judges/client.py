"""Send a judge's questions to an OpenAI-compatible endpoint, concurrently. A failure is a row like any other."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from prefdistill.core.errors import UserError
from prefdistill.core.files import value_digest
from prefdistill.models.endpoint import REFUSED, Endpoint, open_client

if TYPE_CHECKING:
    from openai import AsyncOpenAI

GIVE_UP_AFTER = 8  # failed requests, if none was answered before
FIELDS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 2048}


@dataclass(frozen=True)
class Question:
    """One request: messages for the judge, and labels to write beside its reply."""

    messages: list[dict[str, str]]
    about: dict[str, Any]

    def key(self, endpoint: Endpoint) -> str:
        """Return the cache key: a digest of the messages, the judge's model and the request fields."""
        return value_digest({"messages": self.messages, "model": endpoint.model, "fields": endpoint.body})


@dataclass(frozen=True)
class Reply:
    """A judge's reply; if there is none, `reply` is None and `error` says why."""

    reply: str | None = None
    error: str | None = None
    status: int | None = None
    first_token: list[tuple[str, float]] | None = None
    finish: str | None = None
    served_as: str | None = None
    fingerprint: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    retries: int = 0
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return self.reply or ""


def ask_all(endpoint: Endpoint, questions: Iterable[Question], record: Callable[[Question, Reply], None]) -> None:
    """Ask every question and `record` each reply as it comes; an interruption loses only the requests in flight.

    Raises:
        UserError: if the endpoint refuses the key, the address or the model before anything was answered.
        RuntimeError: if nothing is answered at all.
    """
    asyncio.run(_ask_all(endpoint, list(questions), record))


async def _ask_all(endpoint: Endpoint, questions: list[Question], record: Callable[[Question, Reply], None]) -> None:
    remaining, answered, failed = iter(questions), 0, 0

    async def work(client: "AsyncOpenAI") -> None:
        nonlocal answered, failed
        for question in remaining:  # shared by all workers
            reply = _safe_to_write(await _ask(client, endpoint, question), endpoint)
            record(question, reply)
            answered, failed = answered + (reply.error is None), failed + (reply.error is not None)
            if answered == 0 and reply.status in REFUSED:
                raise UserError(endpoint.refusal(reply.status, reply.error))
            if answered == 0 and failed >= min(len(questions), max(GIVE_UP_AFTER, 2 * endpoint.concurrency)):
                raise RuntimeError(
                    f"none of {failed} requests to {endpoint.url} was answered, the last one: {reply.error}"
                )

    async with open_client(endpoint) as client:
        await asyncio.gather(*(work(client) for _ in range(min(endpoint.concurrency, len(questions)))))


async def _ask(client: "AsyncOpenAI", endpoint: Endpoint, question: Question) -> Reply:
    import openai

    begun = time.monotonic()
    try:
        raw = await client.chat.completions.with_raw_response.create(
            model=endpoint.model,
            messages=cast(Any, question.messages),
            extra_body=endpoint.body,
        )
        fields = asdict(_parse(raw.parse())) | {"retries": raw.retries_taken}
    except (openai.OpenAIError, ValueError, RecursionError) as error:
        fields = endpoint.failure(error, "chat completion")
    return Reply(**fields | {"seconds": round(time.monotonic() - begun, 3)})


def _parse(completion: Any) -> Reply:
    """Read a completion, which the package builds from any JSON without validation, or leaves as text."""
    try:
        choice = completion.choices[0]
        text = choice.message.content
        if text is None:
            text = getattr(choice.message, "refusal", None) or ""
        if not isinstance(text, str):
            raise TypeError
        scored = getattr(getattr(choice, "logprobs", None), "content", None)
        first = [(entry.token, float(entry.logprob)) for entry in scored[0].top_logprobs] if scored else None
    except (AttributeError, TypeError, IndexError, ValueError):
        return Reply(error="no chat completion: the reply holds no choices with a message")
    usage = getattr(completion, "usage", None)
    return Reply(
        reply=text,
        first_token=first,
        finish=_field(str, choice, "finish_reason"),
        served_as=_field(str, completion, "model"),
        fingerprint=_field(str, completion, "system_fingerprint"),
        tokens_in=_field(int, usage, "prompt_tokens"),
        tokens_out=_field(int, usage, "completion_tokens"),
    )


def _field(kind: type, part: Any, name: str) -> Any:
    """Return an optional field; None if a server omits it or sends another type."""
    value = getattr(part, name, None)
    return value if isinstance(value, kind) else None


def _safe_to_write(reply: Reply, endpoint: Endpoint) -> Reply:
    texts: dict[str, Any] = {
        name: endpoint.safe(value) for name, value in asdict(reply).items() if isinstance(value, str)
    }
    if reply.error is not None:
        texts["error"] = endpoint.safe_error(reply.error)
    return replace(reply, **texts)
