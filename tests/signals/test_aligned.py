"""Signals of a teacher with other tokens than the student's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefdistill import METHODS, LiveTeacher
from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.data.spans import Spans
from prefdistill.data.truncation import Truncation
from prefdistill.losses import shaping_return
from prefdistill.models.scratch import random_model, train_tokenizer
from prefdistill.signals import extract_signals
from prefdistill.signals.aligned import EncodedTexts, align
from prefdistill.signals.alignment import Alignment, States
from prefdistill.training.rows import prepare_rows
from support.permuted import permuted, with_ids
from support.texts import sentence

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = ("values", "logps", "token_logps")


@pytest.fixture(scope="module")
def other_tokenizer():
    """Splits the words of the pairs otherwise, and has another chat template."""
    tokenizer = train_tokenizer([sentence(20, k)[1::2] for k in range(50)], vocab_size=290)
    tokenizer.chat_template = "[teacher] " + tokenizer.chat_template
    return tokenizer


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory, pairs):
    """Extracts a teacher's signals with a tokenizer."""

    def extract(tokenizer, kinds=KINDS, model=None, **options):
        model = model_of(tokenizer) if model is None else model
        out = tmp_path_factory.mktemp("store") / "teacher"
        return extract_signals(model, pairs, tokenizer, kinds, out, shard_rows=10, **options)

    return extract


def aligned(store, pairs, tokenizer):
    truncation = Truncation()
    texts = EncodedTexts.of(pairs, tokenizer, truncation, store.responses)
    return align(store, texts, tokenizer, truncation)


def returns(store, side, terminal="last"):
    values = store.ragged(f"{side}_values", store.rows)
    lengths = torch.tensor(store.scalar(f"{side}_tokens", store.rows).astype(np.int64))
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in values], batch_first=True)
    return shaping_return(padded, lengths, 1.0, terminal, torch.tensor(store.scalar(f"{side}_ended", store.rows)))


def test_the_same_tokenizer_gives_the_same_signals(teacher_of, pairs, tokenizer):
    store = teacher_of(tokenizer)
    same, reasons = aligned(store, pairs, tokenizer)
    assert not reasons
    assert same.manifest["aligned"]["shared"] == 1
    for row in store.rows:
        for side in SIDES:
            for name, expected in store.row(row)[side].items():
                np.testing.assert_array_equal(same.row(row)[side][name], expected)


@pytest.mark.parametrize("coarser", ["student", "teacher"])
def test_values_hold_between_shared_states_and_the_return_is_the_teachers_own(
    coarser, teacher_of, pairs, tokenizer, other_tokenizer
):
    own, others = (tokenizer, other_tokenizer) if coarser == "student" else (other_tokenizer, tokenizer)
    store = teacher_of(others)
    mapped, reasons = aligned(store, pairs, own)
    assert not reasons
    shared = mapped.manifest["aligned"]["shared"]
    assert shared > 0.95 if coarser == "student" else 0.1 < shared < 0.5
    encoded, _ = encode_pairs(pairs, own, Truncation())
    for side in SIDES:
        assert (mapped.scalar(f"{side}_tokens", mapped.rows) == [len(ids) for ids in encoded[f"{side}_ids"]]).all()
        for terminal in ("last", "bootstrap"):
            assert torch.equal(returns(mapped, side, terminal), returns(store, side, terminal))
        assert (mapped.scalar(f"{side}_logps", mapped.rows) == store.scalar(f"{side}_logps", store.rows)).all()
        for row, per_token in enumerate(mapped.ragged(f"{side}_token_logps", mapped.rows)):
            assert per_token.sum() == pytest.approx(store.row(row)[side]["token_logps"].sum(), abs=1e-4)
            # a state that both share has the teacher's value of the same text
            text = pairs[row][side][0]["content"]
            values, teachers = mapped.row(row)[side]["values"], store.row(row)[side]
            places = {end: at for at, end in enumerate([0, *teachers["offsets"]])}
            for end, value in zip([0, *mapped.row(row)[side]["offsets"]], values, strict=True):
                if end <= len(text) and end in places:
                    assert value == teachers["values"][places[end]]


def test_a_permuted_vocabulary_has_the_same_returns(teacher_of, pairs, tokenizer, make_model):
    """The same model with its vocabulary in another order is the same teacher."""
    model = make_model(5)
    reordered, order = permuted(tokenizer)
    direct = teacher_of(tokenizer, model=model)
    of_permuted = teacher_of(reordered, model=with_ids(model, order))
    assert not of_permuted.is_read_with(tokenizer)
    mapped, _ = aligned(of_permuted, pairs, tokenizer)
    for side in SIDES:
        torch.testing.assert_close(returns(mapped, side), returns(direct, side), rtol=0, atol=1e-4)
    start = reference(pairs, tokenizer, model)
    shaping = [
        prepare_rows(pairs, METHODS["tvkd"](terminal="bootstrap"), [store, start], tokenizer, None)[0]
        for store in (of_permuted, direct)
    ]
    for side in SIDES:
        np.testing.assert_allclose(*(rows[f"feature_shaping_{side}"] for rows in shaping), rtol=0, atol=1e-4)


def reference(pairs, tokenizer, model, truncation=None):
    return LiveTeacher(model, "reference", ("logps",), dataset=pairs, tokenizer=tokenizer, truncation=truncation).bind()


def model_of(tokenizer):
    return random_model(tokenizer, SHAPE, 5)


@given(st.data())
def test_any_two_tokenisations_share_the_places_of_their_common_boundaries(data):
    text_length = data.draw(st.integers(1, 12))
    ends = st.lists(st.integers(1, text_length), max_size=8).map(lambda x: sorted([*x, text_length]))
    n = data.draw(st.integers(1, 4))
    ended = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    spans, lengths = Spans(np.zeros(n, int), np.full(n, text_length)), np.full(n, text_length)

    def draw():
        parts = [[*data.draw(ends), *[text_length + 3] * bool(end)] for end in ended]
        return States.of([np.array(part) for part in parts], spans, ended, lengths)

    student, teacher = draw(), draw()
    alignment = Alignment.of(student, teacher)
    which = teacher.places[alignment.index]
    assert (which <= student.places).all()
    assert (which[alignment.shared] == student.places[alignment.shared]).all()
    for at, (start, length) in enumerate(zip(student.starts, student.lengths, strict=True)):
        own = slice(start, start + length + 1)
        other = slice(teacher.starts[at], teacher.starts[at] + teacher.lengths[at] + 1)
        common = set(student.places[own]) & set(teacher.places[other])
        assert common <= set(which[own]) | {0}
        assert alignment.index[start] == teacher.starts[at]
        assert alignment.index[start + length] == teacher.starts[at] + teacher.lengths[at]


def test_rows_that_the_two_truncate_at_different_characters_are_dropped_and_counted(
    teacher_of, pairs, tokenizer, other_tokenizer
):
    limit = Truncation(60)
    store = teacher_of(other_tokenizer, ("values",), truncation=limit)
    start = reference(pairs, tokenizer, model_of(tokenizer), limit)
    rows, _, _, reading = prepare_rows(pairs, METHODS["tvkd"](), [store, start], tokenizer, limit)
    whole, _ = encode_pairs(pairs, other_tokenizer, Truncation(None))
    own, _ = encode_pairs(pairs, tokenizer, Truncation(None))
    fits = [
        all(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) <= 60 for row in both for side in SIDES)
        for both in zip(whole, own, strict=True)
    ]
    assert 0 < sum(fits) < len(pairs)
    assert rows["row"][:] == [row for row, fit in enumerate(fits) if fit]
    assert 0 < reading.across["shared"] <= 1
    (reason,) = reading.dropped.counts
    assert "truncate a response at different characters" in reason
    assert reading.dropped.first_rows[reason] == fits.index(False)


def test_distributions_are_refused_with_the_reason(teacher_of, pairs, tokenizer, other_tokenizer):
    store = teacher_of(other_tokenizer, ("topk",), k=4)
    with pytest.raises(
        UserError,
        match=r"of other tokens than the student.*token distributions .* one vocabulary only: map .*, or use a method",
    ):
        prepare_rows(pairs, METHODS["vanillakd"](), [store], tokenizer, None)


def test_the_reference_is_of_the_students_tokens(pairs, tokenizer, other_tokenizer):
    start = reference(pairs, other_tokenizer, model_of(other_tokenizer))
    with pytest.raises(UserError, match="the reference signals were made with another tokenizer"):
        prepare_rows(pairs, METHODS["dpo"](), [start], tokenizer, None)
