"""Turn prompts and responses into text and into token ids, the same way for pairs, sampling and reward models."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.data.messages import normal_messages
from prefdistill.data.prompts import inputs_of
from prefdistill.data.template import NO_TEMPLATE, Ending, render_messages, template_ending
from prefdistill.data.truncation import PROMPT_EMPTY, PROMPT_TOO_LONG, TEMPLATE_FAILED, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SPACES = "\u0120" + string.whitespace  # as byte-level vocabularies write a space, and as added tokens do


class Encoder:
    """Text and token ids of a prompt, alone or with a response, for one tokenizer.

    A prompt is text, or messages for the chat template, or a `Conversation`: messages with what else the template
    reads. A response is text or messages; text after messages is the content of an assistant message.

    Example:
        >>> Encoder(tokenizer).ids("Once upon a time")                                 # doctest: +SKIP
        >>> Encoder(tokenizer).ids([{"role": "user", "content": "Hi"}], "Hello!")      # doctest: +SKIP
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def ending(self) -> Ending:
        """What the chat template writes after a response."""
        return template_ending(self.tokenizer)

    @cached_property
    def appends_eos(self) -> bool:
        """Whether the tokenizer itself puts EOS after plain text, where a response may still follow."""
        return self.tokenizer("a")["input_ids"][-1:] == [self.tokenizer.eos_token_id]

    # ---- Text

    def text(self, prompt: Any, response: Any = None) -> str:
        """Return a prompt to respond to, or a prompt with its response, as the template writes it.

        Raises:
            UserError: on messages without a chat template.
            jinja2.TemplateError: if the template refuses the messages.
        """
        if isinstance(prompt, str):
            return prompt + (response or "")
        if not self.tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        messages, inputs = normal_messages(list(prompt)), inputs_of(prompt)
        if response is None:
            return render_messages(self.tokenizer, messages, generation_prompt=True, inputs=inputs)
        reply = [{"role": "assistant", "content": response}] if isinstance(response, str) else normal_messages(response)
        return render_messages(self.tokenizer, messages + reply, inputs=inputs)

    def texts(self, prompt: Any, *responses: Any) -> tuple[str, ...] | None:
        """Return the texts of a prompt, and of it with each response; None if the chat template refuses."""
        from jinja2 import TemplateError

        try:
            return self.text(prompt), *(self.text(prompt, response) for response in responses)
        except TemplateError:
            return None

    def ended_texts(self, prompt: Any, *responses: Any, cut: list[bool]) -> tuple[str, ...] | None:
        """Return `texts` with each response up to its end token: EOS after plain text, or the template's end token.

        A response that was `cut` while sampling gets no end token, because the model did not write one.
        """
        if isinstance(prompt, str):
            ended = (text if was_cut else self.with_eos(text) for text, was_cut in zip(responses, cut, strict=True))
            return self.texts(prompt, *ended)
        texts = self.texts(prompt, *responses)
        if texts is None:
            return None
        _, before, after = self.ending
        # Matched at the end of the text, so that an end token inside the content does not end the response.
        full = (text.removesuffix(after) if text.endswith(before + after) else text for text in texts[1:])
        return texts[0], *(
            text.removesuffix(before) if was_cut else text for text, was_cut in zip(full, cut, strict=True)
        )

    @property
    def eos(self) -> str:
        """The text of the EOS token."""
        return str(self.tokenizer.eos_token)

    def with_eos(self, text: str) -> str:
        """Return a text that ends with EOS."""
        return text if text.endswith(self.eos) else text + self.eos

    def ends_of_text(self, *, plain: bool) -> tuple[str, ...]:
        """Return what may stand after the text of a response: the end token as the template writes it, or bare."""
        token = None if plain else self.ending.token
        bare = () if token is None else (str(self.tokenizer.convert_ids_to_tokens(token)),)
        return (*(() if plain else (self.ending.before,)), *bare, self.eos)

    # ---- Tokens

    def ids(self, prompt: Any, response: Any = None) -> list[int]:
        """Return the token ids of `text`; errors as there."""
        plain = isinstance(prompt, str)
        ids = self.tokenizer(self.text(prompt, response), add_special_tokens=plain, verbose=False)["input_ids"]
        return ids[: self._end(plain)]

    def ids_and_ends(self, texts: list[str], *, plain: bool) -> Iterator[tuple[list[int], list[int]]]:
        """Yield for each text its token ids, and the character of the text at which each of them ends.

        Args:
            texts: of plain data, or from a chat template.
            plain: whether the tokenizer adds its special tokens; a chat template writes its own.
        """
        if not texts:
            return
        tokens = self.tokenizer(texts, add_special_tokens=plain, return_offsets_mapping=True, verbose=False)
        stop = self._end(plain)
        trimmed = self._trimmed
        for ids, spans in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            if trimmed:  # a token of spaces alone is reported at its end
                pairs = zip(ids, spans, strict=True)
                spans = [(start, end + (start < end) * trimmed.get(token, 0)) for token, (start, end) in pairs]
            yield ids[:stop], _whole_ends(spans[:stop])

    @cached_property
    def _trimmed(self) -> dict[int, int]:
        """The number of spaces at the end of tokens, where the tokenizer reports offsets without them."""
        processor = self.tokenizer.backend_tokenizer.post_processor
        if processor is None or b'"trim_offsets":true' not in bytes(processor.__getstate__()):
            return {}
        spaces = {
            number: len(token) - len(token.rstrip(SPACES)) for token, number in self.tokenizer.get_vocab().items()
        }
        return {number: count for number, count in spaces.items() if count}

    # ---- Sampled tokens

    def decode(self, ids: list[int], *, special: bool = True) -> str:
        """Return the text of sampled ids, with or without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def ends(self, ids: list[int]) -> list[int]:
        """Return the character of `decode` at which each id ends; ids that share a character all end after it."""
        from tokenizers.decoders import DecodeStream

        stream, backend = DecodeStream(skip_special_tokens=False), self.tokenizer.backend_tokenizer
        pieces = [stream.step(backend, token) for token in ids]  # None until a character is whole
        end = len(self.decode(ids))
        places = [*accumulate(len(piece or "") for piece in pieces)]
        ends = [end := end if piece is None else place for piece, place in zip(pieces[::-1], places[::-1], strict=True)]
        return ends[::-1]

    def check(self, prompt_text: str, ids: Sequence[int], text: str) -> int:
        """Return the CRC-32 of a prompt's text, the tokens that ids stand for, and their response's text."""
        known = max(ids, default=0) < len(self._token_checks)
        tokens = self._token_checks[[*ids]].tobytes() if known else b"unknown"
        check = crc32(tokens, crc32(prompt_text.encode(errors="surrogatepass")))
        return crc32(text.encode(errors="surrogatepass"), check)

    @cached_property
    def _token_checks(self) -> np.ndarray:
        """The CRC-32 of each token, by its id."""
        vocabulary = self.tokenizer.get_vocab()
        checks = np.zeros(max(vocabulary.values()) + 1, dtype="<u4")
        checks[[*vocabulary.values()]] = [crc32(token.encode(errors="surrogatepass")) for token in vocabulary]
        return checks

    def _end(self, plain: bool) -> int | None:
        return -1 if plain and self.appends_eos else None


def _whole_ends(spans: list[tuple[int, int]]) -> list[int]:
    """Return where tokens end; one that ends inside a character, which the next goes on with, ends where that does."""
    ends = [end for _, end in spans]
    for place in range(len(spans) - 2, -1, -1):
        start, end = spans[place + 1]
        if start < spans[place][1] and start < end:
            ends[place] = max(ends[place], ends[place + 1])
    return ends


def prompt_tokens(encoder: Encoder, prompt: Any, truncation: Truncation) -> tuple[list[int], str]:
    """Return the truncated tokens of a prompt to respond to, and an empty text; or none, and why it gets no response.

    Raises:
        UserError: on messages without a chat template.
    """
    from jinja2 import TemplateError

    try:
        ids = encoder.ids(prompt)
    except TemplateError:
        return [], TEMPLATE_FAILED
    if not ids:
        return [], PROMPT_EMPTY
    ids = truncation.cut_prompt(ids, encoder.tokenizer.bos_token_id)
    return ([], PROMPT_TOO_LONG) if truncation.room_after(ids) == 0 else (ids, "")


def accepts_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> bool:
    """Return whether a prompt is text, or messages that the chat template renders."""
    if isinstance(prompt, str):
        return True
    return bool(tokenizer.chat_template) and not prompt_tokens(Encoder(tokenizer), prompt, Truncation(None))[1]


def reward_model_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, response: Any) -> list[int]:
    """Return the token ids that a reward model scores, the same that TRL's RewardTrainer trains on.

    These are of plain text with EOS after it, or of the whole conversation, with what the template writes at its end.

    Args:
        tokenizer: the reward model's.
        prompt, response: as for `Encoder`.

    Raises:
        UserError: on messages if the tokenizer has no chat template, or one that refuses them.
    """
    from jinja2 import TemplateError

    encoder = Encoder(tokenizer)
    if isinstance(prompt, str):
        return tokenizer(encoder.with_eos(prompt + response))["input_ids"]
    if not tokenizer.chat_template:
        raise UserError(
            f"the reward model {tokenizer.name_or_path} has no chat template, and the data are conversations; choose "
            "one that has, or set tokenizer.chat_template"
        )
    try:
        return encoder.ids(prompt, response)
    except TemplateError as error:
        messages = [*prompt, *([{"role": "assistant"}] if isinstance(response, str) else response)]
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template of the reward model {tokenizer.name_or_path} refuses messages of {roles} ({error}); "
            "choose another, or change the data"
        ) from error
