"""Where the tokens of one tokenizer go in another's vocabulary, by their text."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefdistill.core.errors import UserError
from prefdistill.models.scratch import train_tokenizer
from prefdistill.models.token_map import first_tokens, token_bytes
from support.permuted import permuted
from support.texts import sentence
from support.tokenizer_styles import SENTENCES, make_tokenizer

TEXTS = [sentence(20, k) for k in range(50)]


def sentencepiece(texts=TEXTS, vocab_size=400, special=("<pad>", "</s>", "<unk>")):
    """A unigram tokenizer like Llama 2's or T5's: ▁ for a space, one before every text, bytes for the unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=[*special], unk_token="<unk>",
                                       show_progress=False),
    )  # fmt: skip
    rules = json.loads(tokenizer.to_str())
    rules["model"]["vocab"] += [[f"<0x{byte:02X}>", -30.0] for byte in range(256)]
    rules["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], unk_token=special[2]
    )


@pytest.mark.parametrize("make", [lambda: make_tokenizer("llama3"), sentencepiece], ids=["byte-level", "sentencepiece"])
def test_every_token_of_the_same_tokenizer_goes_to_itself_whatever_its_id(make):
    tokenizer = make()
    own = first_tokens(tokenizer, tokenizer)
    np.testing.assert_array_equal(own.ids, np.arange(len(tokenizer)))
    copy, order = permuted(tokenizer)
    assert (order != np.arange(len(order))).mean() > 0.9
    np.testing.assert_array_equal(first_tokens(tokenizer, copy).ids, order)
    assert own.exact.all()
    assert first_tokens(tokenizer, copy).exact.all()


def test_a_token_goes_to_the_one_of_its_text_or_else_to_the_first_that_writes_it():
    """Between two byte-level tokenizers, against their own decoding of every single token."""
    teacher = train_tokenizer(SENTENCES * 4, 500)
    student = train_tokenizer(TEXTS, 320)
    tokens = first_tokens(teacher, student)
    whole = {student.decode([token]): token for token in range(len(student))}
    special = {*teacher.all_special_ids}
    counts = {"exact": 0, "start": 0, "part": 0}
    for token in set(range(len(teacher))) - special:
        text = teacher.decode([token])
        if "\ufffd" in text:
            counts["part"] += 1  # every single byte is a token of both, and the pieces of characters are not
            single = len(token_bytes(teacher)[token]) == 1
            assert (tokens.ids[token] >= 0) == tokens.exact[token] == single
        elif text in whole:
            counts["exact"] += 1
            assert (tokens.ids[token], tokens.exact[token]) == (whole[text], True)
        else:
            counts["start"] += 1
            assert (tokens.ids[token], tokens.exact[token]) == (student(text)["input_ids"][0], False)
    assert min(counts.values()) > 20, counts


def test_spaces_and_bytes_are_the_same_in_both_ways_of_writing_them():
    pieces, bytelevel = sentencepiece(), train_tokenizer(TEXTS, 320)
    there, back = first_tokens(pieces, bytelevel), first_tokens(bytelevel, pieces)

    def id_of(tokenizer, token):
        return tokenizer.get_vocab()[token]

    def goes_to(tokens, teacher, student, token):
        return student.convert_ids_to_tokens(int(tokens.ids[id_of(teacher, token)]))

    assert goes_to(there, pieces, bytelevel, "▁an") == "Ġan"
    assert goes_to(back, bytelevel, pieces, "Ġan") == "▁an"
    assert goes_to(back, bytelevel, pieces, "Ġwhat") == pieces.tokenize("what")[0]
    assert there.ids[id_of(pieces, "<0xE2>")] == id_of(bytelevel, "â")
    assert back.ids[id_of(bytelevel, "â")] == id_of(pieces, "<0xE2>")
    assert back.ids[id_of(bytelevel, "Z")] == id_of(pieces, "<0x5A>")  # the student has no other way to write it
    # inside a text, without the space that the student's tokenizer puts in front of one
    assert goes_to(back, bytelevel, pieces, "tudent") == "t"


def test_special_tokens_go_to_those_of_their_name_and_end_tokens_to_the_end_token():
    teacher, student = make_tokenizer("llama3"), make_tokenizer("gemma")
    ends = {teacher.get_vocab()["<|eot_id|>"]: student.get_vocab()["<end_of_turn>"]}
    tokens = first_tokens(teacher, student, ends)
    names = {
        name: student.convert_ids_to_tokens(int(tokens.ids[teacher.get_vocab()[name]]))
        for name in ("<|end_of_text|>", "<|eot_id|>")
    }
    assert names == {"<|end_of_text|>": "<eos>", "<|eot_id|>": "<end_of_turn>"}
    assert tokens.ids[teacher.get_vocab()["<|start_header_id|>"]] == -1
    chatml, bare = make_tokenizer("chatml"), make_tokenizer("chatml_bare")
    start = chatml.get_vocab()["<|im_start|>"]
    assert first_tokens(chatml, bare).ids[start] == bare.get_vocab()["<|im_start|>"]
    # text that looks like a special token of the student is text
    teacher = train_tokenizer(TEXTS, 300)
    teacher.add_tokens(["<eos>s"])
    looks = teacher.get_vocab()["<eos>s"]
    assert student.convert_ids_to_tokens(int(first_tokens(teacher, student).ids[looks])) == "<"


def test_text_that_the_student_changes_is_not_mapped():
    lower = make_tokenizer("zephyr").backend_tokenizer.to_str()
    lower = Tokenizer.from_str(lower)
    lower.normalizer = normalizers.Lowercase()
    student = PreTrainedTokenizerFast(tokenizer_object=lower, eos_token="</s>")
    teacher = train_tokenizer(["WHAT WHAT"] * 30, 300)
    assert first_tokens(teacher, student).ids[teacher.get_vocab()["WHAT"]] == -1


def test_a_tokenizer_whose_tokens_do_not_write_text_is_refused_unless_the_other_has_the_same_ids():
    def wordpiece(*words):
        backend = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
        backend.decoder = decoders.WordPiece()
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")

    teacher, fewer, other = (
        wordpiece("[UNK]", "the", "##y"),
        wordpiece("[UNK]", "the"),
        wordpiece("[UNK]", "##y", "the"),
    )
    with pytest.raises(UserError, match=r"its decoder has WordPiece\): distributions can be mapped between byte-level"):
        first_tokens(teacher, other)
    assert first_tokens(teacher, teacher).ids.tolist() == [0, 1, 2]
    assert first_tokens(teacher, fewer).ids.tolist() == [0, 1, -1]
