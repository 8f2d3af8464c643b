"""An OpenAI-compatible endpoint, through the `openai` package.

The package retries (429, 5xx, timeouts, broken connections) with exponential back-off, jitter and Retry-After. Added
here: a limit of the bytes and the seconds of a reply, and failures as text that holds no key.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from prefdistill.core.errors import UserError
from prefdistill.models.options import Calling

if TYPE_CHECKING:
    from openai import AsyncOpenAI

SECRET = re.compile(r"api.?key|authorization|password|secret|(^|_)(access_|auth_)?token$", re.IGNORECASE)
RESERVED_FIELDS = ("messages", "model", "stream", "n")
REFUSED = (401, 403, 404)  # the same for every request: retrying is useless
ERROR_CHARACTERS = 300
DEFAULTS = Calling()


@dataclass(frozen=True)
class Endpoint:
    """A model's address and request options. The key is in the environment only.

    Args:
        url: base URL, such as http://localhost:8000/v1; credentials in it are refused.
        model: the model's name at the endpoint.
        fields: request fields besides those that differ between requests; they override defaults.
        timeout: read timeout in seconds, then retry; a reply that takes twice as long in all is given up.
        retries: further attempts after a transient failure.
        concurrency: concurrent requests.
        max_bytes: of one reply.
    """

    flag: ClassVar[str] = "--url"
    key_variables: ClassVar[tuple[str, ...]] = ("PREFDISTILL_JUDGE_KEY", "OPENAI_API_KEY")

    url: str
    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    timeout: float = DEFAULTS.timeout
    retries: int = DEFAULTS.retries
    concurrency: int = DEFAULTS.concurrency
    max_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        keys = " or ".join(self.key_variables)
        try:
            parts = urlsplit(self.url)
            whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            whole = False
        if not whole:
            raise UserError(
                f"{self.flag} is not an http:// or https:// URL; give the base, e.g. http://localhost:8000/v1"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:  # not shown: it may hold a secret
            raise UserError(f"{self.flag} holds more than an address (user, query or fragment); keys go into {keys}")
        if secret := [name for name in self.fields if SECRET.search(name)]:
            raise UserError(f"{secret[0]} would be written into the results; keys go into {keys}")
        if taken := [name for name in RESERVED_FIELDS if name in self.fields]:
            raise UserError(f"{taken[0]} cannot be set: it differs between requests")

    @property
    def body(self) -> dict[str, Any]:
        """The fields that are sent; null removes a default."""
        return {name: value for name, value in self.fields.items() if value is not None}

    def key(self) -> tuple[str | None, str]:
        """Return the name of the environment variable that holds a key, and the key; local servers need none."""
        for name in self.key_variables:
            if key := os.environ.get(name, "").strip():
                if not (key.isascii() and key.isprintable()):
                    raise UserError(f"{name} holds characters that are not valid in a key; set it again")
                return name, key
        return None, "none"

    def refusal(self, status: int | None, error: str | None) -> str:
        """Return what to say of a reply with a status of `REFUSED`."""
        variable, _ = self.key()
        if status == 404:
            fix = f"is {self.model!r} a model there, and does the address end as it should (often in /v1)?"
        else:
            keys = " or ".join(self.key_variables)
            fix = f"the key came from {variable}" if variable else f"set {keys} in the environment"
        return f"{self.url} refuses: {error}; {fix}"

    def failure(self, error: Exception, reply: str) -> dict[str, Any]:
        """Return an error of the package as `error`, `status` and `retries`, where there are any; `reply` is what is
        expected."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return {
                "error": f"status {error.status_code}: {error.response.text}",
                "status": error.status_code,
                "retries": int(error.request.headers.get("x-stainless-retry-count", 0)),
            }
        if isinstance(error, openai.APIConnectionError):
            timed_out = isinstance(error, openai.APITimeoutError)
            reason = (
                f"no reply within {self.timeout:g} s" if timed_out else f"no connection ({error.__cause__ or error})"
            )
            return {"error": reason, "retries": self.retries}
        return {"error": f"no {reply}: {error}"}  # too long; not JSON; nested too deeply

    def safe(self, text: str) -> str:
        """Remove the key, which servers quote in their errors, and lone surrogates, which cannot be encoded."""
        variable, key = self.key()
        encodable = text.encode(errors="replace").decode()
        return encodable.replace(key, "***") if variable else encodable

    def safe_error(self, text: str) -> str:
        """Return an error in one short line; it is truncated last: half a key would not be recognised."""
        return " ".join(self.safe(text).split())[:ERROR_CHARACTERS]


def open_client(endpoint: Endpoint) -> "AsyncOpenAI":
    """Return a client of an endpoint: an asynchronous context manager."""
    try:
        import openai
    except ImportError as error:
        raise UserError("an endpoint needs the openai package: pip install 'prefdistill[judges]'") from error

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
        api_key=endpoint.key()[1],
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
