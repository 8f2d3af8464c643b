"""Where the text of a response stands in what a chat template renders of it.

Two models with other tokenizers and templates read other tokens of one response. What they have in common is its text:
places in it mean the same for both. The text of a response is that of its row, such as the content of its message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.data.messages import normal_messages

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Why places in the text are not known, as `text_end` has it.
NO_TEXT, PROMPT_CUT, NOT_GIVEN_BACK, CUT_INSIDE = -1, -2, -3, -4
REASONS = {
    NO_TEXT: "a response is not one message of text, or the chat template rewrites it",
    PROMPT_CUT: "the prompt is truncated, which other tokens cut at another place",
    NOT_GIVEN_BACK: "the tokenizer changes the text of a response (its tokens do not give it back)",
    CUT_INSIDE: "a response is truncated inside a character",
}
BATCH = 1_024


def response_text(response: Any) -> str | None:
    """Return the text of a response; None if it is not text or one message of text.

    Example:
        >>> response_text([{"role": "assistant", "content": "Hi"}])
        'Hi'
    """
    if isinstance(response, str):
        return response
    messages = normal_messages(response)
    content = messages[0].get("content") if len(messages) == 1 else None
    return content if isinstance(content, str) and not messages[0].get("tool_calls") else None


def locate(text: str | None, rendered: str, ends: Sequence[str]) -> tuple[int, int]:
    """Return where the first character of a response's text stands in what is rendered of it, and where the text ends.

    A template may strip the spaces around the text: then its first character stands before what is left of it.

    Args:
        text: of the response, see `response_text`.
        rendered: what the template writes after the prompt.
        ends: what may stand after the text: the end token, with what the template writes before it.

    Returns:
        Characters of `rendered`; the second is `NO_TEXT` if the text does not stand there.

    Example:
        >>> locate("Hi", "<think></think>Hi<end>", ["<end>"]), locate(" Hi", "Hi<end>", ["<end>"])
        ((15, 17), (-1, 2))
    """
    body = rendered.removesuffix(next((end for end in ends if end and rendered.endswith(end)), ""))
    if text is not None and body.endswith(text):
        return len(body) - len(text), len(body)
    stripped, body = (text or "").strip(), body.rstrip()  # the text may be spaces alone
    if text is not None and body.endswith(stripped):
        return len(body) - len(stripped) - text.index(stripped), len(body)
    return 0, NO_TEXT


@dataclass(frozen=True)
class Spans:
    """Where the texts of responses stand in what was read of them, in characters of the offsets of their tokens.

    Args:
        start: of the first character of the text, [n]; negative where the template has stripped it.
        end: of the text that was read, [n]; one of `REASONS` where places in the text are not known.
    """

    start: np.ndarray
    end: np.ndarray


def read_spans(
    encoded: Dataset, data: Dataset, tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]
) -> Mapping[str, Spans]:
    """Return the spans of encoded responses, after checking that their tokens give the text back.

    Args:
        encoded: what `encode_pairs` returns.
        data: the rows that `encoded` counts.
        tokenizer: that of `encoded`.
        responses: columns of the data.
    """
    prompt_cut = np.array(encoded["prompt_truncated"][:], dtype=bool)
    spans: dict[str, Spans] = {}
    for name in responses:
        start, end = (np.array(encoded[f"{name}_text_{part}"][:], dtype=np.int32) for part in ("start", "end"))
        place = 0
        columns = [f"{name}_ids", f"{name}_offsets", f"{name}_truncated", "row"]
        for batch in encoded.select_columns(columns).iter(BATCH):
            texts = tokenizer.batch_decode(batch[f"{name}_ids"], clean_up_tokenization_spaces=False)
            values = data.select_columns([name]).select(batch["row"])[name][:]
            for decoded, offsets, truncated, value in zip(
                texts, batch[f"{name}_offsets"], batch[f"{name}_truncated"], values, strict=True
            ):
                if end[place] >= 0:
                    if truncated:
                        end[place] = min(end[place], offsets[-1])
                    text = (response_text(value) or "")[: max(end[place] - start[place], 0)]
                    if text.strip() not in decoded:
                        end[place] = CUT_INSIDE if truncated and decoded.endswith("\ufffd") else NOT_GIVEN_BACK
                place += 1
        end[prompt_cut & (end >= 0)] = PROMPT_CUT
        spans[name] = Spans(start, end)
    return spans
