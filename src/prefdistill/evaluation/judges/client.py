"""Send questions to an OpenAI-compatible endpoint, concurrently, through the `openai` package.

The package retries (429, 5xx, timeouts, broken connections) with exponential back-off, jitter and Retry-After. Added
here: a limit of the bytes and the seconds of a reply, and a failure is a row like any other.
"""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from prefdistill.core.errors import UserError
from prefdistill.core.files import value_digest
from prefdistill.evaluation.judges.options import Calling

if TYPE_CHECKING:
    from openai import AsyncOpenAI

KEY_VARIABLES = ("PREFDISTILL_JUDGE_KEY", "OPENAI_API_KEY")
SECRET = re.compile(r"api.?key|authorization|password|secret|(^|_)(access_|auth_)?token$", re.IGNORECASE)
RESERVED_FIELDS = ("messages", "model", "stream", "n")
REFUSED = (401, 403, 404)  # the same for every request: retrying is useless
GIVE_UP_AFTER = 8  # failed requests, if none was answered before
ERROR_CHARACTERS = 300
DEFAULTS = Calling()
FIELDS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 2048}


@dataclass(frozen=True)
class Endpoint:
    """A judge's address and request options. The key is in the environment only.

    Args:
        url: base URL, such as http://localhost:8000/v1; credentials in it are refused.
        model: the judge's name at the endpoint.
        fields: request fields besides the messages. They override those of an evaluator, or `FIELDS` without one.
        timeout: read timeout in seconds, then retry; a reply that takes twice as long in all is given up.
        retries: further attempts after a transient failure.
        concurrency: concurrent requests.
        max_bytes: of one reply.
    """

    url: str
    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    timeout: float = DEFAULTS.timeout
    retries: int = DEFAULTS.retries
    concurrency: int = DEFAULTS.concurrency
    max_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            whole = False
        if not whole:
            raise UserError("--url is not an http:// or https:// URL; give the base, e.g. http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:  # not shown: it may hold a secret
            raise UserError(
                f"--url holds more than an address (user, query or fragment); keys go into {' or '.join(KEY_VARIABLES)}"
            )
        if secret := [name for name in self.fields if SECRET.search(name)]:
            raise UserError(f"{secret[0]} would be written into the results; keys go into {' or '.join(KEY_VARIABLES)}")
        if taken := [name for name in RESERVED_FIELDS if name in self.fields]:
            raise UserError(f"{taken[0]} cannot be set: it differs between requests")

    @property
    def body(self) -> dict[str, Any]:
        """The fields that are sent; null removes a default."""
        return {name: value for name, value in self.fields.items() if value is not None}


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


def judge_key() -> tuple[str | None, str]:
    """Return the name of the environment variable that holds a key, and the key; local servers need none."""
    for name in KEY_VARIABLES:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise UserError(f"{name} holds characters that are not valid in a key; set it again")
            return name, key
    return None, "none"


def ask_all(endpoint: Endpoint, questions: Iterable[Question], record: Callable[[Question, Reply], None]) -> None:
    """Ask every question and `record` each reply as it comes; an interruption loses only the requests in flight.

    Raises:
        UserError: if the endpoint refuses the key, the address or the model before anything was answered.
        RuntimeError: if nothing is answered at all.
    """
    asyncio.run(_ask_all(endpoint, list(questions), record))


async def _ask_all(endpoint: Endpoint, questions: list[Question], record: Callable[[Question, Reply], None]) -> None:
    variable, key = judge_key()
    remaining, answered, failed = iter(questions), 0, 0

    async def work(client: "AsyncOpenAI") -> None:
        nonlocal answered, failed
        for question in remaining:  # shared by all workers
            reply = _safe_to_write(await _ask(client, endpoint, question), key if variable else None)
            record(question, reply)
            answered, failed = answered + (reply.error is None), failed + (reply.error is not None)
            if answered == 0 and reply.status in REFUSED:
                raise UserError(_refusal(endpoint, reply, variable))
            if answered == 0 and failed >= min(len(questions), max(GIVE_UP_AFTER, 2 * endpoint.concurrency)):
                raise RuntimeError(
                    f"none of {failed} requests to {endpoint.url} was answered, the last one: {reply.error}"
                )

    async with _client(endpoint, key) as client:
        await asyncio.gather(*(work(client) for _ in range(min(endpoint.concurrency, len(questions)))))


def _refusal(endpoint: Endpoint, reply: Reply, variable: str | None) -> str:
    if reply.status == 404:
        fix = f"is {endpoint.model!r} a model there, and does the address end as it should (often in /v1)?"
    else:
        fix = f"the key came from {variable}" if variable else f"set {' or '.join(KEY_VARIABLES)} in the environment"
    return f"{endpoint.url} refuses: {reply.error}; {fix}"


def _client(endpoint: Endpoint, key: str) -> "AsyncOpenAI":
    try:
        import openai
    except ImportError as error:
        raise UserError("judges need the openai package: pip install 'prefdistill[judges]'") from error

    class LimitExceeded(openai.OpenAIError):
        """The package raises its own errors without a retry."""

    class Limited(openai.DefaultAsyncHttpxClient):
        """Limits the bytes and the seconds of a reply; the package limits neither."""

        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            try:
                async with asyncio.timeout(2 * endpoint.timeout):
                    response = await super().send(request, stream=True, **options)
                    try:
                        body = await _read(response.aiter_bytes(), endpoint.max_bytes)
                    finally:
                        await response.aclose()
            except TimeoutError:
                raise LimitExceeded(f"the reply is incomplete after {2 * endpoint.timeout:g} s") from None
            if body is None:
                raise LimitExceeded(f"the reply is longer than {endpoint.max_bytes:,} bytes")
            headers = [
                (k, v) for k, v in response.headers.multi_items() if k not in ("content-encoding", "content-length")
            ]
            return type(response)(response.status_code, headers=headers, content=body, request=response.request)

    return openai.AsyncOpenAI(
        api_key=key,
        base_url=endpoint.url,
        timeout=endpoint.timeout,
        max_retries=endpoint.retries,
        http_client=Limited(timeout=endpoint.timeout),
    )


async def _read(chunks: AsyncIterator[bytes], most: int) -> bytes | None:
    """Return the bytes; None if there are more than `most`."""
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > most:
            return None
    return bytes(body)


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
    except openai.APIStatusError as error:
        fields = {
            "error": f"status {error.status_code}: {error.response.text}",
            "status": error.status_code,
            "retries": int(error.request.headers.get("x-stainless-retry-count", 0)),
        }
    except openai.APIConnectionError as error:
        timed_out = isinstance(error, openai.APITimeoutError)
        reason = (
            f"no reply within {endpoint.timeout:g} s" if timed_out else f"no connection ({error.__cause__ or error})"
        )
        fields = {"error": reason, "retries": endpoint.retries}
    except (openai.OpenAIError, ValueError, RecursionError) as error:  # too long; not JSON; nested too deeply
        fields = {"error": f"no chat completion: {error}"}
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


def _safe_to_write(reply: Reply, key: str | None) -> Reply:
    """Remove the key, which servers quote in their errors, and lone surrogates, which cannot be encoded."""

    def clean(text: str) -> str:
        encodable = text.encode(errors="replace").decode()
        return encodable.replace(key, "***") if key else encodable

    texts: dict[str, Any] = {name: clean(value) for name, value in asdict(reply).items() if isinstance(value, str)}
    if reply.error is not None:  # truncated last: half a key would not be recognised
        texts["error"] = " ".join(texts["error"].split())[:ERROR_CHARACTERS]
    return replace(reply, **texts)
