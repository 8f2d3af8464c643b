"""Log-probabilities of given tokens from an OpenAI-compatible server: vLLM's `prompt_logprobs`, or `echo`.

The token ids that are sent are ours. What comes back is compared with them, so a server that reads other tokens (adds
BOS, or has another tokenizer) is refused.
"""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from prefdistill.core.errors import UserError
from prefdistill.models.endpoint import REFUSED, Endpoint, open_client

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from transformers import PreTrainedTokenizerBase

State = dict[int, float]  # log-probabilities by token id
BYTES_PER_TOKEN = 400  # of a reply, at most: an id, its log-probability, rank and text
BROKEN = 400  # the status of a request that a server does not take


@dataclass(frozen=True)
class TeacherEndpoint(Endpoint):
    """The address of a served teacher."""

    flag: ClassVar[str] = "--base-url"
    key_variables: ClassVar[tuple[str, ...]] = ("PREFDISTILL_TEACHER_KEY", "OPENAI_API_KEY")


class Refused(Exception):
    """A server does not answer a request as a form needs it."""


class Form(ABC):
    """A form in which servers give log-probabilities of a prompt."""

    name: ClassVar[str]
    has_ids: ClassVar[bool]  # whether other tokens than those of the text come with their ids

    @abstractmethod
    def fields(self, k: int) -> dict[str, Any]:
        """Return the fields of a request for the k most likely tokens of each state."""

    @abstractmethod
    def read(self, choice: dict[str, Any], ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[State]:
        """Return the log-probabilities at the state before each token; none before the first.

        Raises:
            Refused: if there are none.
            OtherTokens: if the server has read other tokens.
        """


class OtherTokens(UserError):
    """A server has read other tokens than those that it was sent."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the server reads other tokens than it is sent ({what}): name the tokenizer of its model with "
            "--tokenizer, and switch off what adds tokens to a prompt there"
        )


class PromptLogprobs(Form):
    """vLLM: `prompt_logprobs` of each choice has for each token a mapping of ids to `{"logprob": ...}`."""

    name = "prompt_logprobs"
    has_ids = True

    def fields(self, k: int) -> dict[str, Any]:
        return {"prompt_logprobs": max(1, k), "return_token_ids": True}

    def read(self, choice: dict[str, Any], ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[State]:
        entries = choice.get("prompt_logprobs")
        if not isinstance(entries, list):
            raise Refused("its reply has no prompt_logprobs")
        own = choice.get("prompt_token_ids")
        if len(entries) != len(ids) or (own is not None and own != ids):
            raise OtherTokens(f"{len(entries)} tokens for {len(ids)}" if len(entries) != len(ids) else "other ids")
        states: list[State] = [{}]
        for token, entry in zip(ids[1:], entries[1:], strict=True):
            state = {int(other): float(scores["logprob"]) for other, scores in entry.items()}
            if token not in state:
                raise OtherTokens(f"no log-probability of {tokenizer.convert_ids_to_tokens(token)!r}")
            states.append(state)
        return states


class Echo(Form):
    """OpenAI's completions: with `echo`, `logprobs.token_logprobs` begins with those of the prompt."""

    name = "echo"
    has_ids = False

    def fields(self, k: int) -> dict[str, Any]:
        return {"echo": True, "logprobs": 1}

    def read(self, choice: dict[str, Any], ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[State]:
        scored = choice.get("logprobs") or {}
        logps, texts = scored.get("token_logprobs") or [], scored.get("tokens") or []
        if len(logps) < len(ids) or len(texts) != len(logps):
            raise Refused(f"its reply to echo and logprobs has {len(logps)} log-probabilities for {len(ids)} tokens")
        if len(logps) > len(ids) + 1:  # one token is generated
            raise OtherTokens(f"{len(logps) - 1} tokens for {len(ids)}")
        for token, text in zip(ids, texts, strict=False):
            known = {tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)}
            part_of_character = text.startswith("bytes:") or any("\ufffd" in one for one in known)
            if text not in known and not part_of_character:
                raise OtherTokens(f"{text!r} for {tokenizer.convert_ids_to_tokens(token)!r}")
        return [{}, *({token: float(logp)} for token, logp in zip(ids[1:], logps[1:], strict=False))]


@dataclass(frozen=True)
class ServedTeacher:
    """A model at an endpoint that gives log-probabilities of prompts, see `connect`.

    Args:
        endpoint: its address.
        tokenizer: that the ids are of.
        form: in which it gives them.
        k: how many tokens of each state, the most likely ones; 0: only those of the text.
    """

    endpoint: TeacherEndpoint
    tokenizer: "PreTrainedTokenizerBase"
    form: Form
    k: int

    def score(self, texts: Sequence[list[int]], record: Callable[[int, list[State]], None]) -> None:
        """Score texts of token ids, and `record` the states of each with its number as they come.

        Raises:
            UserError: if the server refuses a request, or has read other tokens.
            RuntimeError: if it does not answer after all retries.
        """
        asyncio.run(self._score(texts, record))

    async def _score(self, texts: Sequence[list[int]], record: Callable[[int, list[State]], None]) -> None:
        remaining = iter(enumerate(texts))

        async def work(client: "AsyncOpenAI") -> None:
            for number, ids in remaining:  # shared by all workers
                try:
                    states = self.form.read(await self.ask(client, ids), ids, self.tokenizer)
                except Refused as error:
                    raise UserError(f"{self.endpoint.url} gives no log-probabilities of a prompt: {error}") from error
                record(number, states)

        async with open_client(self.endpoint) as client:
            await asyncio.gather(*(work(client) for _ in range(min(self.endpoint.concurrency, len(texts)))))

    async def ask(self, client: "AsyncOpenAI", ids: list[int]) -> dict[str, Any]:
        """Return the choice of a completion of some ids.

        Raises:
            Refused: if the server does not take the request.
            UserError: if it refuses the key, the address or the model.
            RuntimeError: if it does not answer after all retries.
        """
        import openai

        try:
            raw = await client.completions.with_raw_response.create(
                model=self.endpoint.model,
                prompt=cast(Any, ids),
                max_tokens=1,
                temperature=1,
                extra_body=self.form.fields(self.k),
            )
            return _choice(json.loads(raw.content))
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            failure = self.endpoint.failure(error, "completion")
        status, text = failure.get("status"), self.endpoint.safe_error(failure["error"])
        if status in REFUSED:
            raise UserError(self.endpoint.refusal(status, text))
        if status is not None and BROKEN <= status < 500:
            raise Refused(text)
        raise RuntimeError(
            f"{self.endpoint.url} does not answer ({text}); finished shards are kept, the same command resumes"
        )


def _choice(completion: Any) -> dict[str, Any]:
    """Return the first choice of a completion.

    Raises:
        ValueError: if there is none.
    """
    choices = completion.get("choices") if isinstance(completion, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("the reply holds no choices")
    return choices[0]


def connect(
    endpoint: TeacherEndpoint, tokenizer: "PreTrainedTokenizerBase", example: list[int], k: int
) -> ServedTeacher:
    """Return the teacher of an endpoint, in the first form in which the server answers for an example.

    Raises:
        UserError: if it answers in none.
    """
    reasons = []
    for form in (PromptLogprobs(), Echo()):
        if k and not form.has_ids:
            continue
        teacher = ServedTeacher(endpoint, tokenizer, form, k)
        try:
            asyncio.run(_try(teacher, example))
        except Refused as error:
            reasons.append(f"{form.name}: {error}")
            continue
        return teacher
    many = f"vLLM gives as many tokens as its --max-logprobs (20 by default), and {k} are asked for: give --k; or "
    raise UserError(
        f"{endpoint.url} gives no log-probabilities of {f'the {k} most likely tokens of ' if k else ''}a prompt "
        f"({'; '.join(reasons)}). {many if k else ''}serve the teacher with vLLM, or use the engine transformers"
    )


async def _try(teacher: ServedTeacher, example: list[int]) -> None:
    async with open_client(teacher.endpoint) as client:
        teacher.form.read(await teacher.ask(client, example), example, teacher.tokenizer)
