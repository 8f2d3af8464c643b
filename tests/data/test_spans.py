"""Where the text of a response stands in what is read of it."""

import numpy as np
import pytest
from datasets import Dataset

from prefdistill.data.encode import encode_pairs, encode_untruncated
from prefdistill.data.spans import CUT_INSIDE, NO_TEXT, NOT_GIVEN_BACK, PROMPT_CUT, locate, read_spans, response_text
from prefdistill.data.truncation import Truncation
from support.pairs import assistant, conversation
from support.tokenizer_zoo import make_tokenizer


@pytest.mark.parametrize(
    ("text", "rendered", "expected"),
    [
        ("Hi", "Hi<end>", (0, 2)),
        ("Hi", "Hi\n<end>", (0, 2)),
        ("Hi", "<think>Hi</think>Hi<end>", (17, 19)),
        ("  Hi ", "Hi<end>", (-2, 2)),
        (" Hi ", "x  Hi \n<end>", (2, 6)),
        ("Hi<end>", "Hi<end><end>", (0, 7)),
        ("Hi</s>", "Hi</s>", (0, NO_TEXT)),  # whose end token is that of the text
        ("Hi", "Hi", (0, 2)),
        ("", "<think></think><end>", (15, 15)),
        ("  ", "<end>", (0, 0)),
        ("  ", "  <end>", (0, 2)),
        ("Hi", "HI<end>", (0, NO_TEXT)),
        ("a\nb", "a b<end>", (0, NO_TEXT)),
        (None, "<end>", (0, NO_TEXT)),
    ],
)
def test_locate(text, rendered, expected):
    assert locate(text, rendered, ("\n<end>", "<end>", "</s>")) == expected


def test_the_text_of_a_response():
    call = assistant("") | {"tool_calls": [{"function": {"name": "f"}}]}
    assert response_text([assistant(" a ")]) == response_text(" a ") == " a "
    assert [response_text(x) for x in ([assistant("a"), assistant("b")], [call])] == [None, None]


def ends(family, text, template="chatml"):
    """Each token of a response with the text up to its end."""
    tokenizer = make_tokenizer(family, template)
    ((_, row),) = encode_untruncated([conversation("q", text, "no")], tokenizer)
    return [text[:end] for end in row["chosen_offsets"][:-1]], tokenizer.convert_ids_to_tokens(row["chosen_ids"][:-1])


@pytest.mark.parametrize("family", ["neox", "neox_unsplit", "roberta"])
def test_tokens_end_after_their_spaces_also_where_offsets_leave_them_out(family):
    """As GPT-NeoX and RoBERTa report them: `trim_offsets`."""
    text = "def add(a, b):\n    return a  \n  # the sea "
    prefixes, tokens = ends(family, text)
    written = ["".join(tokens[: n + 1]).replace("Ġ", " ").replace("Ċ", "\n") for n in range(len(tokens))]
    assert prefixes == written
    assert any(
        prefix.endswith(" ") and not token.startswith("Ġ") for prefix, token in zip(prefixes, tokens, strict=True)
    )


@pytest.mark.parametrize("family", ["bytes", "gemma", "llama2"])
def test_a_response_truncated_inside_a_character_has_its_own_reason(family):
    tokenizer, text = make_tokenizer(family), "a 🤖🤖"
    data = Dataset.from_list([conversation("q", text, "no")])
    whole, _ = encode_pairs(data, tokenizer, Truncation(None))
    prompt, length = len(whole[0]["prompt_ids"]), len(whole[0]["chosen_ids"])
    reasons = []
    for room in range(1, length + 1):
        encoded, _ = encode_pairs(data, tokenizer, Truncation(prompt + room))
        end = int(read_spans(encoded, data, tokenizer, ("chosen",))["chosen"].end[0])
        decoded = tokenizer.decode(encoded[0]["chosen_ids"]).removesuffix("</s>")
        assert end == (CUT_INSIDE if decoded.endswith("\ufffd") else len(decoded))
        reasons.append(end)
    assert reasons.count(CUT_INSIDE) >= 6
    short, _ = encode_pairs(data, tokenizer, Truncation(prompt + length, prompt - 1))
    assert read_spans(short, data, tokenizer, ("chosen",))["chosen"].end.tolist() == [PROMPT_CUT]


def test_text_that_a_tokenizer_changes_has_no_places():
    texts = ["cafe\u0301", "caf\u00e9", "ﬁne", "fine", "a▁b", "a b", "ABC", "abc", "a  b"]
    data = Dataset.from_list([conversation("q", text, "no") for text in texts])
    changed = {"nfc": {0}, "t5": {0, 2, 4}, "gemma": {4}, "wordpiece": {0, 1, 2, 4, 6, 8}, "gpt2": set()}
    for family, rows in changed.items():
        tokenizer = make_tokenizer(family)
        encoded, _ = encode_pairs(data, tokenizer, Truncation(None))
        found = read_spans(encoded, data, tokenizer, ("chosen",))["chosen"].end
        assert {*np.flatnonzero(found == NOT_GIVEN_BACK)} == rows, family
        assert (found[[row for row in range(len(texts)) if row not in rows]] >= 0).all()
