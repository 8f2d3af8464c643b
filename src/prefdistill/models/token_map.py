"""Map the tokens of one tokenizer to those of another by their text: each to the first token that writes it there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.models.vocabulary import token_conflicts

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class TokenMap:
    """Where each token of a teacher goes in a student's vocabulary.

    Args:
        ids: by the teacher's id, the student's token, [teacher's ids]; -1 where there is none.
        exact: whether that token writes the same text, and not only its start, bool [teacher's ids].
    """

    ids: np.ndarray
    exact: np.ndarray


def first_tokens(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    ends: Mapping[int | None, int | None] | None = None,
) -> TokenMap:
    """Return the student's token that the text of each of the teacher's tokens begins with.

    That is the student's token of the same text, or else the first of those that the student's tokenizer writes the
    text in. A token without such a one is not mapped: a part of a character that the student has no token for, text
    that its tokenizer changes, a special token that it does not have.

    Args:
        teacher, student: byte-level tokenizers, or SentencePiece-like ones; any two of one vocabulary.
        ends: the teacher's end tokens and the student's of the same meaning; its EOS is the student's unless said here.

    Raises:
        UserError: if single tokens of a tokenizer do not say what they write, as those of WordPiece.

    Example:
        >>> first_tokens(gemma, smollm).ids[gemma.convert_tokens_to_ids("▁Hello")]                # doctest: +SKIP
        38699
    """
    tokens = _by_text(teacher, student) if token_conflicts(teacher, student) else _by_id(teacher, student)
    for end, student_end in {teacher.eos_token_id: student.eos_token_id, **(ends or {})}.items():
        if end is not None and student_end is not None:
            tokens.ids[end], tokens.exact[end] = student_end, True
    return tokens


def _by_id(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> TokenMap:
    ids = np.arange(max(teacher.get_vocab().values()) + 1)
    exact = np.isin(ids, [*student.get_vocab().values()])
    return TokenMap(np.where(exact, ids, -1), exact)


def _by_text(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> TokenMap:
    texts, student_texts = token_bytes(teacher), token_bytes(student)
    names, student_names, vocabulary = _names(teacher), _names(student), student.get_vocab()
    with_text = {text: token for token, text in enumerate(student_texts) if text}
    with_text |= {
        text: token
        for token, text in enumerate(student_texts)
        if text and not BYTE_TOKEN.fullmatch(student_names[token])
    }
    special, student_special = _special_tokens(teacher), _special_tokens(student)
    ids, exact = np.full(len(texts), -1), np.zeros(len(texts), dtype=bool)
    to_write: dict[int, str] = {}
    for token, text in enumerate(texts):
        namesake = vocabulary.get(names.get(token, ""), -1)
        if token in special:
            ids[token] = namesake if namesake in student_special else -1
        elif text:
            same = namesake >= 0 and student_texts[namesake] == text
            ids[token] = namesake if same else with_text.get(text, -1)
            if ids[token] < 0 and (words := _decoded(text)):
                to_write[token] = words
    exact[ids >= 0] = True
    for token, written in zip(to_write, _inside_text(student).encode_batch([*to_write.values()]), strict=True):
        first = written.ids[0] if written.ids else -1
        start = student_texts[first] if first >= 0 else None
        if start and (texts[token] or b"").startswith(start):
            ids[token] = first
    return TokenMap(ids, exact)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """Return the bytes that each token writes inside a text, by id; None for special tokens and ids without a token.

    Raises:
        UserError: if that depends on the tokens around it, as with WordPiece.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    steps = [*_parts(decoder)]
    types = {step["type"] for step in steps}
    marks = [mark for step in steps if (mark := _space_mark(step))]
    of_text = all(_space_mark(step) or step["type"] in ("ByteFallback", "Fuse", "Strip") for step in steps)
    if "ByteLevel" in types:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

        def text_of(token: str) -> bytes:
            known = all(character in byte_of for character in token)  # else an added token, which is text
            return bytes(byte_of[character] for character in token) if known else token.encode()
    elif steps and of_text:  # tokens are text, but for marks in place of spaces

        def text_of(token: str) -> bytes:
            if "ByteFallback" in types and (byte := BYTE_TOKEN.fullmatch(token)):
                return bytes.fromhex(byte[1])
            for mark in marks:
                token = token.replace(mark, " ")
            return token.encode()
    else:
        name, of = tokenizer.name_or_path or "a tokenizer in memory", ", ".join(sorted(types)) or "no steps"
        raise UserError(
            f"a single token of {name} does not say what text it writes (its decoder has {of}): distributions can be "
            "mapped between byte-level and SentencePiece-like tokenizers only"
        )
    names, special = _names(tokenizer), _special_tokens(tokenizer)
    return [
        text_of(names[token]) if token in names and token not in special else None for token in range(max(names) + 1)
    ]


def _names(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token: name for name, token in tokenizer.get_vocab().items()}


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def _decoded(text: bytes) -> str:
    """Return bytes as text; empty if they are not whole characters."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return ""


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder, in order."""
    if part is not None and part["type"] == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(key, ()):
                yield from _parts(inner)
    elif part is not None:
        yield part


def _space_mark(step: Mapping[str, Any]) -> str | None:
    """Return the character that a decoder turns into a space, if this step does so."""
    if step["type"] == "Metaspace":
        return str(step["replacement"])
    if step["type"] == "Replace" and step["content"] == " ":
        return step["pattern"].get("String")
    return None


def _inside_text(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the tokenizer that writes a text as inside a longer one: with no space in front, no tokens
    around it, and special tokens as the text they look like."""
    from tokenizers import Tokenizer

    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["truncation"] = rules["padding"] = rules["post_processor"] = None
    for step in _parts(rules["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for step in _parts(rules["normalizer"]):
        if step["type"] == "Prepend":
            step["prepend"] = ""
    copy = Tokenizer.from_str(json.dumps(rules))
    copy.encode_special_tokens = True
    return copy
