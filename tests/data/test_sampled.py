"""Sampled responses are learnt from in the tokens sampled; else rendered if the text stays, or dropped and counted."""

import copy

import pytest
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs, render_pairs
from prefdistill.data.encoder import Encoder
from prefdistill.data.fingerprint import data_fingerprint, demonstrations_fingerprint
from prefdistill.data.load import load_messages, load_pairs
from prefdistill.data.truncation import TEMPLATE_DIFFERS, TEXT_CHANGED, TOKENS_CHANGED, Truncation
from support.pairs import assistant, user, write_jsonl
from support.tokenizer_styles import make_tokenizer

NAME = "student_response"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
ANSWER = "m.content.split('</think>')[-1].strip()"
OF_ASSISTANT = "({!r} if m.role == 'assistant' else '') + "
THINKING = {  # what a template writes of a response in the history
    "as written": "m.content",
    "left out": ANSWER,
    "an empty block": OF_ASSISTANT.format("<think>\n\n</think>\n\n") + ANSWER,
    "taken apart": OF_ASSISTANT.format("<think>\n") + "m.content.split('</think>')[0].strip() + '</think>' + " + ANSWER,
}


@pytest.fixture
def tokenizer():
    return copy.deepcopy(make_tokenizer("chatml"))


def letters(tokenizer, text):
    return [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]


def sampled(tokenizer, prompt, text, ids, *, ended=True):
    """A row as `sample` writes it; plain text where the prompt is."""
    ids = [*ids, *([tokenizer.convert_tokens_to_ids("<|im_end|>")] if ended else [])]
    check = Encoder(tokenizer).check(Encoder(tokenizer).text(prompt), ids, text)
    response = text if isinstance(prompt, str) else [assistant(text)]
    return {
        "prompt": prompt,
        NAME: response,
        f"{NAME}_ended": ended,
        f"{NAME}_ids": ids,
        f"{NAME}_check": check,
    }


def encode(rows, tokenizer, truncation=Truncation(None)):  # noqa: B008
    encoded, dropped = encode_pairs(Dataset.from_list(rows), tokenizer, truncation, responses=(NAME,))
    return encoded, dropped.counts


@pytest.mark.parametrize("history", THINKING)
@pytest.mark.parametrize("ended", [True, False])
def test_tokens_are_those_sampled_whatever_the_template_makes_of_them(tokenizer, history, ended):
    tokenizer.chat_template = TURNS.replace("CONTENT", THINKING[history]) + OPENS
    text = " a poem </think> the sea" if ended else "a poem is a"
    ids = letters(tokenizer, text)
    row = sampled(tokenizer, [user("Write")], text, ids, ended=ended)
    encoded, dropped = encode([row], tokenizer)
    assert not dropped
    assert encoded[0][f"{NAME}_ids"] == row[f"{NAME}_ids"]
    assert encoded[0][f"{NAME}_ended"] is ended
    assert tokenizer.decode(encoded[0]["prompt_ids"]).endswith("<think>\n")
    assert encoded[0][f"{NAME}_offsets"][: len(ids)] == [*range(1, len(ids) + 1)]


def test_ids_of_another_prompt_tokenizer_or_text_are_not_used(tokenizer):
    text, prompt = "the sea is wide", [user("Write")]
    row = sampled(tokenizer, prompt, text, letters(tokenizer, text))
    usual = tokenizer(text, add_special_tokens=False)["input_ids"]
    edited, dropped = encode([row | {NAME: [assistant("the sea is blue")]}], tokenizer)
    assert not dropped
    assert tokenizer.decode(edited[0][f"{NAME}_ids"]) == "the sea is blue<|im_end|>"
    # after another prompt the text must have the tokens that were sampled
    others = [
        sampled(tokenizer, prompt, text, ids) | {"prompt": [user("Write!")]} for ids in (row[f"{NAME}_ids"][:-1], usual)
    ]
    encoded, dropped = encode(others, tokenizer)
    assert (encoded["row"][:], dropped) == ([1], {TOKENS_CHANGED: 1})
    assert encoded[0][f"{NAME}_ids"][:-1] == usual
    renamed = copy.deepcopy(tokenizer)  # the same ids stand for other tokens
    check = Encoder(tokenizer).check("p", [5, 6], "t")
    assert Encoder(renamed).check("p", [5, 6], "t") == check != Encoder(renamed).check("p", [6, 5], "t")
    assert Encoder(make_tokenizer("llama3")).check("p", [5, 6], "t") != check
    assert Encoder(tokenizer).check("p", [5, len(tokenizer)], "t") != check
    renamed.add_tokens(["<tool>"])  # more tokens change nothing
    assert encode([row], renamed)[0][0][f"{NAME}_ids"] == row[f"{NAME}_ids"]
    # where the ids are not used the text must be what the model wrote: rendered, or dropped with the reason
    moved = copy.deepcopy(tokenizer)
    moved.chat_template = "Be brief. " + TURNS.replace("CONTENT", "m.content") + OPENS.replace("<think>\n", "")
    encoded, dropped = encode([sampled(tokenizer, prompt, text, usual)], moved)
    assert encoded[0][f"{NAME}_ids"] == [*usual, moved.convert_tokens_to_ids("<|im_end|>")]
    foreign = make_tokenizer("llama3")  # whose ids mean something else: the text is learnt
    encoded, dropped = encode([row], foreign)
    assert foreign.decode(encoded[0][f"{NAME}_ids"]) == text + "<|eot_id|>"
    spaced = sampled(tokenizer, prompt, " wide ", letters(tokenizer, " wide "))
    moved.chat_template = moved.chat_template.replace("m.content", "m.content | trim")
    with pytest.raises(UserError, match=TEXT_CHANGED):
        encode([spaced], moved)
    moved.chat_template = TURNS.replace("CONTENT", "m.content | trim") + OPENS
    encoded, dropped = encode([row | {"prompt": [user("Write!")]}, sampled(moved, prompt, text, usual)], moved)
    assert dropped == {TEMPLATE_DIFFERS: 1}
    assert encoded["row"][:] == [1]


def test_plain_text_and_truncation(tokenizer):
    text = "e sea is wide"
    row = sampled(tokenizer, "Write about th", text, letters(tokenizer, text))  # merges with the end of the prompt
    encoded, dropped = encode([row], tokenizer)
    assert not dropped
    assert encoded[0][f"{NAME}_ids"] == row[f"{NAME}_ids"]
    assert encoded[0][f"{NAME}_ended"]
    room = len(encoded[0]["prompt_ids"]) + 4
    cut = encode([row], tokenizer, Truncation(room))[0][0]
    assert cut[f"{NAME}_ids"] == row[f"{NAME}_ids"][:4]
    assert (cut[f"{NAME}_ended"], cut[f"{NAME}_truncated"]) == (False, True)
    assert cut[f"{NAME}_offsets"] == [1, 2, 3, 4]


def test_offsets_are_places_in_the_text_that_is_rendered(tokenizer):
    """Pieces of characters, bytes that are no text, special tokens within a response."""
    text = "東京 🙂"
    whole = tokenizer("a 東京 🙂 b", add_special_tokens=False)["input_ids"]
    pieces = letters(tokenizer, text)
    user_turn = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for ids in (pieces, whole, [*pieces, user_turn, *pieces], pieces[:-1], [*pieces[:-1], *whole]):
        row = sampled(tokenizer, [user("Write")], "x", ids)
        row = {**row, "chosen": row[NAME], "rejected": [assistant("no")]}
        row |= {f"chosen_{key}": row[f"{NAME}_{key}"] for key in ("ended", "ids", "check")}
        data = Dataset.from_list([row])
        encoded, _ = encode_pairs(data, tokenizer, Truncation(None))
        ((prompt, chosen, _),) = render_pairs(data, tokenizer)
        assert encoded[0]["chosen_ids"] == row["chosen_ids"]
        shown, ends = chosen[len(prompt) :], encoded[0]["chosen_offsets"]
        assert shown == tokenizer.decode(row["chosen_ids"])
        assert ends == sorted(ends)
        assert ends[-1] == len(shown)
        for i, end in enumerate(ends):  # a prefix of whole characters reads as the text up to there
            prefix = tokenizer.decode(row["chosen_ids"][: i + 1])
            if "\ufffd" not in prefix:
                assert prefix == shown[:end]


def test_demonstrations_are_learnt_in_the_tokens_sampled(tmp_path, tokenizer):
    """`sft` on a file of `sample`, whose column is `completion`, and on the chosen responses of pairs."""
    row = sampled(tokenizer, [user("Write")], " a sea ", letters(tokenizer, " a sea "), ended=False)
    for name, other in (("completion", {}), ("chosen", {"rejected": [assistant("no")]})):
        rows = [
            {"prompt": row["prompt"], **{k.replace(NAME, name): v for k, v in row.items() if k != "prompt"}, **other}
        ]
        data = load_messages(write_jsonl(tmp_path / f"{name}.jsonl", rows))
        encoded, _ = encode_pairs(data, tokenizer, Truncation(None), responses=("completion",))
        assert encoded[0]["completion_ids"] == row[f"{NAME}_ids"]
        assert encoded[0]["completion_ended"] is False
        without = data.remove_columns(["completion_ids", "completion_check"])
        assert demonstrations_fingerprint(without) != demonstrations_fingerprint(data)
        assert (
            encode_pairs(without, tokenizer, Truncation(None), responses=("completion",))[0][0]["completion_ended"]
            is False
        )


def test_sampled_ids_are_part_of_the_data(tmp_path, tokenizer):
    rows = [sampled(tokenizer, [user("Write")], "a sea", letters(tokenizer, "a sea")) for _ in range(2)]
    data = load_pairs(write_jsonl(tmp_path / "own.jsonl", rows), responses=(NAME,))
    assert data[f"{NAME}_ids"][:] == [row[f"{NAME}_ids"] for row in rows]
    data.to_parquet(tmp_path / "own.parquet")
    again = load_pairs(str(tmp_path / "own.parquet"), responses=(NAME,))
    without = data.remove_columns(f"{NAME}_ids")
    prints = [data_fingerprint(part, (NAME,)) for part in (data, again, without)]
    assert prints[0] == prints[1] != prints[2]
    for wrong in ({f"{NAME}_ids": "1 2"}, {f"{NAME}_ids": [0.5]}, {f"{NAME}_check": "x"}):
        source = write_jsonl(tmp_path / "wrong.jsonl", [row | wrong for row in rows])
        with pytest.raises(UserError, match=f"columns '{NAME}_ids' and '{NAME}_check' must hold lists of token ids"):
            load_pairs(source, responses=(NAME,))
    mine = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": [user("a")], NAME: [assistant("b")], f"{NAME}_ids": "x"}])
    assert len(load_pairs(mine, responses=(NAME,))) == 1  # ids without a check are somebody else's
