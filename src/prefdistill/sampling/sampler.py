"""Sample responses in memory: prompts to tokens, tokens to responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.encoder import Encoder, prompt_tokens
from prefdistill.data.template import end_token_ids
from prefdistill.data.truncation import Dropped, Truncation
from prefdistill.sampling.engines import Part, TransformersEngine
from prefdistill.sampling.options import Sampling


@dataclass(frozen=True)
class Response:
    """A model's response: the text without special tokens, the ids with the end token, whether it ended."""

    text: str
    ids: tuple[int, ...]
    ended: bool

    @property
    def tokens(self) -> int:
        """The number of ids."""
        return len(self.ids)


def sample(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    *,
    n: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    truncation: Truncation | None = None,
    batch_size: int = 64,
    seed: int = 0,
    what: str = "sampling",
) -> list[Response]:
    """Sample responses, in the order of the prompts, the `n` of a prompt consecutive.

    Args:
        model: a causal language model, on its device, in eval mode.
        tokenizer: its tokenizer.
        prompts: messages (through the chat template) or plain text, each.
        n: responses per prompt, drawn independently.
        temperature: sampling temperature; 0 is greedy.
        top_p: nucleus sampling: draw from the most likely tokens with this total probability; 1 keeps all.
        max_new_tokens: a response that has not ended by then is returned with `ended=False`.
        truncation: prompts and responses are truncated as `encode_pairs` does.
        batch_size: responses generated together, to prompts of similar length.
        seed: of the draws; the same seed, prompts and batch size give the same responses on the same machine.
        what: name on the progress bar.

    Raises:
        UserError: on an option out of range, or a prompt that cannot be answered.

    Example:
        >>> sample(model, tokenizer, ["Once upon a time"], n=2, top_p=0.9)             # doctest: +SKIP
    """
    sampling = Sampling.checked(
        "sample",
        n=n,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    sampler = Sampler(tokenizer, sampling, truncation)
    encoded, dropped = sampler.encode_all(prompts)
    for reason, first in dropped.first_rows.items():
        raise UserError(f"prompt {first}: {reason}. Leave such prompts out, or change the template or the lengths.")
    part = sampler.part(encoded, range(len(prompts)), seed)
    with Progress(what, n * len(prompts), "response") as progress:
        drawn = TransformersEngine(model, tokenizer, sampling).draw(part, progress)
    return sampler.responses(part, drawn.tokens)


class Sampler:
    """Encodes prompts exactly as `encode_pairs` does, and decodes new tokens to responses."""

    def __init__(self, tokenizer: Any, sampling: Sampling, truncation: Truncation | None) -> None:
        self.tokenizer, self.sampling, self.truncation = tokenizer, sampling, truncation or Truncation(None)
        self.ends = end_token_ids(tokenizer)
        if not self.ends:
            raise UserError("the tokenizer has no end token, so no response would ever end; set tokenizer.eos_token")
        self.encoder = Encoder(tokenizer)

    def encode_all(self, prompts: list[Any]) -> tuple[list[list[int]], Dropped]:
        """Return the truncated tokens of each prompt; none for one that cannot be answered."""
        encoded = [prompt_tokens(self.encoder, prompt, self.truncation) for prompt in prompts]
        return [ids for ids, _ in encoded], Dropped.from_reasons([reason for _, reason in encoded])

    def part(self, encoded: list[list[int]], rows: Sequence[int], seed: int) -> Part:
        """Return prompts with their limits; `rows` number them in messages."""
        most = self.sampling.max_new_tokens
        rooms = [self.truncation.room_after(ids) for ids in encoded]
        return Part(encoded, [most if room is None else min(most, room) for room in rooms], rows, seed)

    def responses(self, part: Part, tokens: list[list[int]]) -> list[Response]:
        """Return a response to each prompt of a part, or several, from the tokens that an engine has drawn."""
        return [self._response(new[: part.limits[place // self.sampling.n]]) for place, new in enumerate(tokens)]

    def _response(self, new: list[int]) -> Response:
        stop = next((place for place, token in enumerate(new) if token in self.ends), None)
        text = self.tokenizer.decode(new[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Response(text, tuple(new if stop is None else new[: stop + 1]), stop is not None)

    def check(self, prompt: Any, ids: Sequence[int], text: str) -> int:
        """Return the check that goes beside sampled ids, see `data.sampled`."""
        return self.encoder.check(self.encoder.text(prompt), ids, text)
