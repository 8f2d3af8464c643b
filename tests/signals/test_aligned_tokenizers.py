"""Teachers and students of every pair of tokenizer families, on texts that some of them cannot give back."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_untruncated
from prefdistill.data.load import load_pairs
from prefdistill.data.spans import REASONS, read_spans
from prefdistill.data.truncation import Truncation
from prefdistill.losses import shaping_return
from prefdistill.signals.aligned import CUT_ELSEWHERE, EMPTY, ENDS_DIFFER, EncodedTexts, align
from prefdistill.signals.alignment import Alignment, States
from support.pairs import conversation
from support.stores import random_store
from support.tokenizer_zoo import CLOSED, TEMPLATES, THINKING, ZOO, make_tokenizer

TEXTS = [
    "", " ", "  \n", "Hello", " Hello there", "Hello  there ", "a\r\nb\tc", "the sea is wide\n", "\n\nthe sea",
    "def add(a, b):\n    return a + b\n  # adds", "東京は日本", "naïve café", "nai\u0308ve cafe\u0301",
    "👩‍👩‍👧‍👦 👍🏽 🇫🇷", "ﬁne ①", "a▁b ▁c", "x</s>y", "x<s>", "<end>", "x <mask> y", "x  </s>  y",
    "zero\u200bwidth\u200d\ufeff",
    "नमस्ते दुनिया", "привет мир", "the capital of", "of France?", "한국어 각 각", "hello world", "é", "東", "🙂",
    "a\u00a0b\u3000c", "x<think>y</think>z", "<0xE6>", "Ġx ĠĠ", "the sea is wide and blue",
]  # fmt: skip
PROMPT = "What is the capital of France?"
SIDE = ("chosen",)
DATA = Dataset.from_list([conversation(PROMPT, text, "no") for text in TEXTS])
WHOLE, SHORT = Truncation(None), Truncation(60)
# All templates are used by teachers of some family.
TEACHERS = list(zip(ZOO, itertools.cycle(name for name in TEMPLATES if name != "no_end"), strict=False))


@pytest.fixture(scope="module")
def texts_of():
    """Return the encoded texts of a tokenizer, once."""
    cache = {}

    def encode(family, template="chatml", truncation=WHOLE):
        key = family, template, truncation
        if key not in cache:
            cache[key] = EncodedTexts.of(DATA, make_tokenizer(family, template), truncation, SIDE)
        return cache[key]

    return encode


def returns(store, rows, terminal):
    values = [torch.tensor(part) for part in store.ragged("chosen_values", rows)]
    lengths = torch.tensor(store.scalar("chosen_tokens", rows).astype(np.int64))
    ended = torch.tensor(store.scalar("chosen_ended", rows))
    return shaping_return(torch.nn.utils.rnn.pad_sequence(values, batch_first=True), lengths, 1.0, terminal, ended)


def read_by(tokenizer, template, encoded):
    """The text that a tokenizer reads of each row, by decoding, perhaps without spaces around it; None if another."""
    read = {}
    for row in encoded:
        decoded, text = tokenizer.decode(row["chosen_ids"]), TEXTS[row["row"]]
        wrapper = {"thinks": THINKING, "opens": CLOSED}.get(template, "")
        decoded = decoded.removeprefix(wrapper)
        if row["chosen_truncated"]:
            read[row["row"]] = decoded if text.lstrip().startswith(decoded.lstrip()) and decoded.strip() else None
        else:
            read[row["row"]] = text if text.strip() in decoded else None
    return read


def spaces(read, text):
    """Without the spaces around a text, but for those inside it where it was truncated."""
    return read.lstrip() if text.strip() not in read else read.strip()


@pytest.mark.parametrize(
    ("teacher", "template", "truncation"),
    [*((*teacher, WHOLE) for teacher in TEACHERS), *((*teacher, SHORT) for teacher in TEACHERS[::3])],
)
def test_every_pair_is_exact_or_refused_by_row(texts_of, teacher, template, truncation):
    reader = make_tokenizer(teacher, template)
    store = random_store(DATA, reader, responses=SIDE, shard_rows=20, truncation=truncation)
    teachers = texts_of(teacher, template, truncation).encoded
    teachers_text = read_by(reader, template, teachers)
    tokens = {row["row"]: (len(row["chosen_ids"]), row["chosen_ended"]) for row in teachers}
    for student in ZOO:
        tokenizer, texts = make_tokenizer(student), texts_of(student, truncation=truncation)
        own_text = read_by(tokenizer, "chatml", texts.encoded)
        own_tokens = {row["row"]: (len(row["chosen_ids"]), row["chosen_ended"]) for row in texts.encoded}
        expected = {
            row
            for row in teachers_text.keys() & own_text.keys()
            if None not in (teachers_text[row], own_text[row])
            and spaces(teachers_text[row], TEXTS[row]) == spaces(own_text[row], TEXTS[row])
            and tokens[row][1] == own_tokens[row][1]
            and (tokens[row][0] == 1 or own_tokens[row][0] > 1)
        }
        if not expected:
            with pytest.raises(UserError, match="no row of the teacher signals"):
                align(store, texts, tokenizer, truncation)
            continue
        mapped, reasons = align(store, texts, tokenizer, truncation)
        rows = mapped.rows
        refused = {row: (TEXTS[row], reason) for row, reason in reasons.items()}
        assert {*rows} == expected, (student, {row: refused.get(row, TEXTS[row]) for row in {*rows} ^ expected})
        assert {*reasons} == {*store.rows} & {*texts.encoded["row"][:]} - expected
        for row, reason in reasons.items():
            if reason == CUT_ELSEWHERE:
                assert teachers_text[row] != own_text[row]
            else:
                assert reason in REASONS.values() or reason in (EMPTY, ENDS_DIFFER)
        for terminal in ("last", "bootstrap", "zero"):
            assert torch.equal(returns(mapped, rows, terminal), returns(store, rows, terminal))
        assert (mapped.scalar("chosen_logps", rows) == store.scalar("chosen_logps", rows)).all()
        for own, others in zip(*(part.ragged("chosen_token_logps", rows) for part in (mapped, store)), strict=True):
            assert own.sum(dtype=float) == pytest.approx(others.sum(dtype=float), abs=1e-6 * len(others))


def test_real_pairs(data_dir):
    """Tokenizers that were trained on half of them, and meet characters that they do not know in the others."""
    data = load_pairs(str(data_dir / "alpacaeval_pairs" / "test.jsonl.gz")).select(range(40))
    trained_on = tuple(message["content"] for row in data.select(range(20)) for message in row["chosen"])
    kept = {}
    for own, other in itertools.permutations(("llama3", "gemma", "t5", "cased_wordpiece"), 2):
        student, teacher = make_tokenizer(own, texts=trained_on), make_tokenizer(other, "thinks", trained_on)
        store = random_store(data, teacher, responses=SIDE)
        mapped, _ = align(store, EncodedTexts.of(data, student, WHOLE, SIDE), student, WHOLE)
        kept[own, other] = len(mapped.rows)
        assert mapped.manifest["aligned"]["shared"] > 0.2
        for terminal in ("last", "bootstrap"):
            assert torch.equal(returns(mapped, mapped.rows, terminal), returns(store, mapped.rows, terminal))
        states = mapped.ragged("chosen_offsets", mapped.rows), mapped.ragged("chosen_values", mapped.rows)
        for row, ends, values in zip(mapped.rows, *states, strict=True):
            text, teachers = data[int(row)]["chosen"][0]["content"], store.row(row)["chosen"]
            start = store.scalar("chosen_text_start", np.array([row]))[0]
            places = dict(zip(teachers["offsets"] - start, teachers["values"][1:], strict=True))
            for end, value in zip(ends[:-2], values[1:], strict=False):
                assert end not in places or end >= len(text) or value == places[end]
    assert kept["llama3", "gemma"] == kept["gemma", "llama3"] == 40
    assert 0 < kept["t5", "cased_wordpiece"] <= min(kept["llama3", "t5"], kept["gemma", "cased_wordpiece"])


FRAGMENTS = st.lists(st.sampled_from([*TEXTS, "\n", " ", "\t", "e", "\u0301", "\u200d", "京", "the"]), max_size=5)


class Read:
    """One response as a tokenizer reads it."""

    def __init__(self, family, template, text):
        self.tokenizer, self.text = make_tokenizer(family, template), text
        ((_, self.encoded),) = encode_untruncated([conversation(PROMPT, text, "no")], self.tokenizer)
        self.dropped = self.encoded["dropped"]
        if not self.dropped:
            data = Dataset.from_list([conversation(PROMPT, text, "no")])
            spans = read_spans(Dataset.from_list([self.encoded | {"row": 0}]), data, self.tokenizer, SIDE)["chosen"]
            self.spans, self.dropped = spans, REASONS.get(int(spans.end[0]), "")

    def states(self, length):
        ended = np.array([self.encoded["chosen_ended"]])
        return States.of([np.array(self.encoded["chosen_offsets"])], self.spans, ended, np.array([length]))

    def prefixes(self):
        """The text up to each state before the last; None where it is not whole characters of it."""
        before = self.tokenizer.decode(self.encoded["prompt_ids"])
        ids, last = self.encoded["chosen_ids"], len(self.encoded["chosen_ids"]) - self.encoded["chosen_ended"]
        decoded = [
            self.tokenizer.decode(self.encoded["prompt_ids"] + ids[:n])[len(before) :] for n in range(len(ids) + 1)
        ]
        start = decoded[-1].rfind(self.text.strip())
        parts = [part[start:] for part in decoded[:last]]
        return [part if self.text.lstrip().startswith(part) else None for part in parts]


@settings(max_examples=60, deadline=None)
@example("Hello  \n", ("gpt2", "chatml"), ("gpt2", "trims"))  # the student reads spaces that the teacher does not
@given(FRAGMENTS.map("".join), *[st.sampled_from([*itertools.product(ZOO, TEMPLATES)])] * 2)
def test_states_are_shared_where_both_have_read_the_same_text(text, student, teacher):
    """The oracle decodes every prefix of the tokens."""
    own, others = Read(*student, text), Read(*teacher, text)
    if own.dropped or others.dropped or not text.strip():
        return
    length = min(int(read.spans.end[0] - read.spans.start[0]) for read in (own, others))
    alignment = Alignment.of(own.states(length), others.states(length))
    prefixes, teachers = own.prefixes(), others.prefixes()
    last = {part: n for n, part in enumerate(teachers)}
    complete = not {"t5", "unigram"} & {student[0], teacher[0]}  # several unknown characters are one piece there
    for state, prefix in enumerate(prefixes):
        shared, index = alignment.shared[state], alignment.index[state]
        if shared and state > 0:
            assert prefix is not None
            assert prefix == teachers[index]
        elif complete and prefix and prefix in text.strip() and prefix not in prefixes[state + 1 :]:
            assert prefix not in last, (prefix, state)
    assert alignment.index[0] == 0
    assert alignment.index[len(prefixes)] == len(teachers)
