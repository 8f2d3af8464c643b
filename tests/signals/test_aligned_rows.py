"""Stores of teachers with other tokens, beside the student's own: which rows they serve, and what is refused."""

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from prefdistill import METHODS, LiveTeacher
from prefdistill.core.errors import UserError
from prefdistill.data.encoder import Encoder
from prefdistill.data.spans import NO_TEXT, NOT_GIVEN_BACK, REASONS
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.pairs import evaluate_pairs
from prefdistill.experiment.doctor.across import UNSERVED
from prefdistill.models.scratch import random_model
from prefdistill.signals import KINDS, Kind, Need, Signals
from prefdistill.signals.aligned import CUT_ELSEWHERE, EMPTY, ENDS_DIFFER, EncodedTexts, align
from prefdistill.signals.join import join
from prefdistill.signals.live import bind_live
from prefdistill.signals.shaping import shaping_returns
from prefdistill.training.rows import prepare_rows
from support.pairs import assistant, conversation, plain, user
from support.stores import random_store
from support.tokenizer_zoo import TEMPLATES, make_tokenizer

SIDES, NAME = ("chosen", "rejected"), "student_response"
STUDENT, TEACHER = make_tokenizer("llama3"), make_tokenizer("gemma", "trims")
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DATA = Dataset.from_list(
    [
        conversation("What is it?", chosen, rejected)
        for chosen, rejected in (
            ("the sea is wide", " the sea "), ("Hello there", "a  b"), ("東京は日本", "x"), ("a▁b", "lost ▁"),
            ("def add(a, b):\n    return a + b", "naïve café"),
        )
    ]
)  # fmt: skip


def reference(data=DATA, **options):
    return random_store(data, STUDENT, ("logps",), role="reference", **options)


def joined(stores, data=DATA, student=STUDENT, responses=SIDES, **options):
    return join(stores, data, student, responses=responses, **options)


def test_every_reason_has_its_check_in_doctor():
    assert {*UNSERVED} == {*REASONS.values(), CUT_ELSEWHERE, EMPTY, ENDS_DIFFER}


# ---- Rows


def test_stores_that_drop_other_rows_serve_those_that_all_have():
    """Several shards; a teacher and its reference that change other texts; a student's store without one row."""
    cased = make_tokenizer("cased_wordpiece", "thinks")
    teacher = random_store(DATA, TEACHER, ("values", "logps"), shard_rows=2)
    before = random_store(DATA, cased, ("logps",), role="teacher_reference", shard_rows=3, seed=1)
    result = joined([reference(), teacher])
    assert result.encoded["row"][:] == [0, 1, 2, 4]  # U+2581 is a space in row 3
    assert result.dropped.counts == {REASONS[NOT_GIVEN_BACK]: 1}
    both = joined([teacher, before, reference()])
    assert both.encoded["row"][:] == [0]
    assert both.dropped.counts == {REASONS[NOT_GIVEN_BACK]: 4}
    for role, store in (("teacher", teacher), ("teacher_reference", before)):
        for side in SIDES:
            assert (both.signals.scalar(role, "logps", side) == store.scalar(f"{side}_logps", np.array([0]))).all()
    rows, *_ = prepare_rows(DATA, METHODS["tvkd"](), [reference(), teacher], STUDENT, None)
    assert rows["row"][:] == [0, 1, 2, 4]
    unread = make_tokenizer("nfc", "no_end")
    with pytest.raises(
        UserError, match=rf"no row of the teacher signals \(in memory\) fits .* {ENDS_DIFFER} \(5, first"
    ):
        joined([random_store(DATA, unread), reference()])


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (("values",), {"positions": "endpoints"}),
        (("values", "logps", "q"), {"value_dtype": "float16"}),
        (("logprob_values",), {"value_temperature": 2.0}),
    ],
)
def test_every_form_of_values_has_the_teachers_return(kinds, options):
    store = random_store(DATA, TEACHER, kinds, shard_rows=2, **options)
    mapped = joined([store, reference()]).signals
    (own,) = (part for part in mapped.stores if part.role == "teacher")
    for side in SIDES:
        for terminal in ("last", "zero"):
            got = shaping_returns(mapped, side, discount=1.0, terminal=terminal, kind=kinds[0])
            values = np.stack(
                [
                    (store.scalar("start_value", mapped.rows), store.scalar(f"{side}_end_value", mapped.rows))
                    if "positions" in options
                    else [(part[0], part[-2]) for part in store.ragged(f"{side}_{kinds[0]}", mapped.rows)]
                ]
            )
            start, end = values[0] if "positions" in options else values[0].T
            np.testing.assert_array_equal(got, (end if terminal == "last" else 0) - start.astype(np.float32))
        for name in set(own.columns) & {f"{side}_{kinds[0]}"}:
            assert own.ragged(name, mapped.rows)[0].dtype == store.ragged(name, mapped.rows)[0].dtype


def test_the_same_tokenizer_gives_the_very_same_numbers():
    """Also inside characters that are several tokens. Of another tokenizer these tokens could be split otherwise."""
    store = random_store(DATA, STUDENT, ("values", "logps", "token_logps"))
    texts = EncodedTexts.of(DATA, STUDENT, Truncation(None), SIDES)
    mapped, reasons = align(store, texts, STUDENT, Truncation(None))
    assert not reasons
    for row, side in itertools.product(store.rows, SIDES):
        for name, expected in store.row(row)[side].items():
            np.testing.assert_array_equal(mapped.row(row)[side][name], expected)
    renamed = Signals(store.manifest | {"tokenizer": {"name": "", "sha256": "of other rules"}}, store.shards)
    mapped, _ = align(renamed, texts, STUDENT, Truncation(None))
    values, (own,) = store.row(2)["chosen"]["values"], mapped.ragged("chosen_values", np.array([2]))
    assert own[0] == values[0]
    assert (own[-2:] == values[-2:]).all()
    ends = store.row(2)["chosen"]["offsets"]
    inside = np.flatnonzero(ends[:-1] == ends[1:]) + 1
    assert len(inside) >= 5
    assert (own[inside] != values[inside]).all()


def test_plain_text_needs_no_template():
    data = Dataset.from_list([plain("Once upon a time,", " the sea\n", "b"), plain("x", "東京  is", " y")])
    for family in ("t5", "gemma", "llama2", "unsplit"):
        teacher = random_store(data, make_tokenizer(family, None))
        result = joined([teacher, reference(data)], data)
        assert {*result.encoded["row"][:]} == {*teacher.rows} >= {1}
        for side in SIDES:
            own = shaping_returns(result.signals, side, discount=1.0, terminal="bootstrap")
            values = teacher.ragged(f"{side}_values", result.signals.rows)
            np.testing.assert_array_equal(own, [part[-1] - part[0] for part in values])


def test_responses_that_are_not_one_message_of_text_are_dropped_with_the_reason():
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    several = [assistant("a"), assistant("c")]
    data = Dataset.from_list(
        [
            {"prompt": [user("q")], "chosen": chosen, "rejected": [assistant("d")]}
            for chosen in ([assistant("a")], several, [call])
        ]
    )
    result = joined([random_store(data, make_tokenizer("gemma")), reference(data)], data)
    assert result.encoded["row"][:] == [0]
    assert result.dropped.counts == {REASONS[NO_TEXT]: 2}


# ---- Sampled responses


def sampled(tokenizer, text, *, ended, name=NAME, prompt="Write it"):
    """A row as `sample` writes it, of a model that writes single characters."""
    ids = [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    ids += [Encoder(tokenizer).ending.token] * ended
    check = Encoder(tokenizer).check(Encoder(tokenizer).text([user(prompt)]), ids, text)
    columns = {f"{name}_ended": ended, f"{name}_ids": ids, f"{name}_check": check}
    return {"prompt": [user(prompt)], name: [assistant(text)], **columns}


WRITTEN = [("the sea is", True), (" the sea ", True), ("the sea is wi", False), ("東京 🙂", True), ("x ", False)]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "no_end"])
def test_the_students_responses_are_read_by_a_teacher_with_other_tokens(template):
    """The student reads the ids that it sampled; the teacher reads the text, whatever its template writes around it."""
    data = Dataset.from_list([sampled(STUDENT, text, ended=ended) for text, ended in WRITTEN])
    own = random_store(data, STUDENT, ("logps",), role="reference", responses=(NAME,))
    for family in ("gemma", "t5", "llama2"):
        teacher = random_store(data, make_tokenizer(family, template), responses=(NAME,))
        result = joined([teacher, own], data, responses=(NAME,))
        assert not result.dropped
        assert result.encoded[f"{NAME}_ids"][:] == data[f"{NAME}_ids"][:]
        values = teacher.ragged(f"{NAME}_values", np.arange(5))
        got = shaping_returns(result.signals, NAME, discount=1.0, terminal="bootstrap")
        np.testing.assert_array_equal(got, [part[-1] - part[0] for part in values])


def test_dpkd_of_texts_compares_the_responses_of_two_models_with_other_tokens():
    """Each model reads what it sampled in the tokens sampled, and the other's text in its own."""
    of_teacher = [sampled(TEACHER, text, ended=ended, name="teacher_response") for text, ended in WRITTEN]
    of_student = [sampled(STUDENT, text + "!", ended=ended) for text, ended in WRITTEN]
    data = Dataset.from_list([one | other for one, other in zip(of_teacher, of_student, strict=True)])
    method = METHODS["dpkd"](level="sequence")
    teacher = random_store(data, TEACHER, ("logps",), responses=method.responses)
    rows, *_ = prepare_rows(data, method, [teacher], STUDENT, None)
    assert rows["row"][:] == [0, 1, 2, 3, 4]
    assert rows[f"{NAME}_ids"][:] == data[f"{NAME}_ids"][:]
    for name in method.responses:
        np.testing.assert_array_equal(rows[f"feature_teacher_{name}"][:], teacher.scalar(f"{name}_logps", teacher.rows))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_teachers_responses_are_learnt_by_a_student_with_other_tokens(template):
    name, student = "teacher_response", make_tokenizer("llama3", template)
    data = Dataset.from_list([sampled(TEACHER, text, ended=ended, name=name) for text, ended in WRITTEN])
    rows, _, _, reading = prepare_rows(data, METHODS["seqkd"](), [], student, None)
    assert not reading.dropped
    for ids, (text, ended) in zip(rows[f"{name}_ids"][:], WRITTEN, strict=True):
        assert text.strip() in student.decode(ids)
        assert (ids[-1] in (student.eos_token_id, Encoder(student).ending.token)) == (ended and template != "no_end")


# ---- Refused


class Surprise(Kind):
    """A kind of another package, with a number per token."""

    name = "surprise"
    description = "surprise at each token"


@dataclass(frozen=True, kw_only=True)
class Surprised(METHODS["sft"]):
    @property
    def needs(self):
        return (Need("teacher", "surprise", ("chosen",)),)


def test_a_kind_of_single_tokens_is_refused_with_the_reason():
    KINDS.register("surprise", Surprise)
    try:
        store = random_store(DATA, TEACHER, ("surprise", "logps"), responses=("chosen",))
        with pytest.raises(UserError, match=r"needs teacher\.surprise .*numbers are of the model's own tokens.*across"):
            prepare_rows(DATA, Surprised(), [store], STUDENT, None)
        own = random_store(DATA, STUDENT, ("surprise",), responses=("chosen",))
        assert prepare_rows(DATA, Surprised(), [own], STUDENT, None)[0]["row"][:] == [0, 1, 2, 3, 4]
        # beside it, what is of whole texts serves
        mapped = joined([store], responses=("chosen",), needs=[Need("teacher", "logps", ("chosen",))])
        assert mapped.signals.stores[0].kinds == ("logps",)
    finally:
        KINDS._things.pop("surprise")


def test_stores_of_other_data_are_refused_as_such_before_they_are_aligned():
    other = Dataset.from_list([conversation("What is it?", "quite other words", "東京") for _ in range(9)])
    with pytest.raises(UserError, match=r"the teacher signals were made from other data .*9 rows"):
        joined([random_store(other, TEACHER), reference()])
    more = random_store(DATA.add_column(NAME, DATA["chosen"][:]), TEACHER, responses=("chosen", NAME))
    with pytest.raises(UserError, match="made from other data"):
        joined([more, reference()])


@pytest.mark.parametrize("schema", [5, 6])
def test_stores_of_older_versions_serve_the_same_tokens_only(schema):
    def old(store):
        table = store.shards[0].file.read()
        gone = [name for name in table.column_names if "_text_" in name or (schema == 5 and "_crc32" in name)]
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table.drop_columns(gone), sink)
        return Signals(store.manifest | {"schema": schema}, [type(store.shards[0])(sink.getvalue())])

    teacher = random_store(DATA, TEACHER)
    with pytest.raises(UserError, match=r"of an older version, without places .* extract them again with `prefdistill"):
        joined([old(teacher), reference()])
    assert len(joined([old(random_store(DATA, STUDENT)), old(reference())]).encoded) == 5
    assert len(joined([teacher, old(reference())]).encoded) == 4


def test_truncation_is_that_of_the_students_tokens():
    teacher, other = random_store(DATA, TEACHER, truncation=Truncation(500)), Truncation(400)
    assert joined([teacher]).truncation == Truncation(500)
    assert joined([teacher], truncation=other).truncation == other
    assert joined([teacher, reference(truncation=other)]).truncation == other
    with pytest.raises(UserError, match="the reference signals were made with"):
        joined([teacher, reference(truncation=other)], truncation=Truncation(300))
    model = random_model(STUDENT, SHAPE, 0)
    stores = [teacher, reference(truncation=other), LiveTeacher(model, "student", ("logps",))]
    assert bind_live(stores, DATA, STUDENT, None, ())[-1].manifest["truncation"]["max_length"] == 400


# ---- Models


def test_a_live_teacher_with_its_own_tokenizer_and_evaluation():
    student, teacher = (random_model(tokenizer, SHAPE, 0) for tokenizer in (STUDENT, TEACHER))
    live = LiveTeacher(teacher, "teacher", ("values", "logps"), tokenizer=TEACHER)
    start = LiveTeacher(student, "reference", ("logps",))
    stores = bind_live([start, live], DATA, STUDENT, None, METHODS["tvkd"]().needs)
    rows, *_ = prepare_rows(DATA, METHODS["tvkd"](), stores, STUDENT, None)
    assert rows["row"][:] == [0, 1, 2, 4]
    result = evaluate_pairs(student, DATA, STUDENT, stores)
    assert result["pairs"] == 5  # of the student's own numbers
    assert {result["margin_accuracy"][term]["n"] for term in ("shaping return", "teacher log-prob")} == {1}  # prompts
