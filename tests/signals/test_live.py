"""A live teacher has the interface and the numbers of a store."""

import pickle

import numpy as np
import pytest

from prefdistill import LiveTeacher, Signals, extract_signals
from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES
from prefdistill.data.truncation import Truncation
from prefdistill.signals import Need, SignalSet
from prefdistill.signals.live import bind_live

KINDS = ("values", "logprob_values", "logps", "q", "token_logps", "topk")
OPTIONS = {"value_temperature": 2.0, "k": 5, "shard_rows": 10}


def assert_same_signals(live, store):
    for row in store.rows:
        for response in store.responses:
            expected, signals = store.row(int(row))[response], live.row(int(row))[response]
            assert signals.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(signals[name], value)


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | {"topk_coding": "float32", "value_dtype": "float16"}])
def test_the_numbers_of_a_store_to_the_last_bit(options, tmp_path, make_model, pairs, tokenizer):
    store = extract_signals(make_model(), pairs, tokenizer, KINDS, tmp_path, **options)
    live = LiveTeacher(make_model(), kinds=KINDS, dataset=pairs, tokenizer=tokenizer, **options)
    assert isinstance(live, Signals)
    assert live.kinds == store.kinds
    assert live.role == store.role == "teacher"
    assert live.digest == store.digest
    np.testing.assert_array_equal(live.rows, store.rows)
    assert_same_signals(live, store)
    rows = np.array([20, 1, 11])
    np.testing.assert_array_equal(live.scalar("chosen_logps", rows), store.scalar("chosen_logps", rows))
    for one, other in zip(live.ragged("rejected_values", rows), store.ragged("rejected_values", rows), strict=True):
        np.testing.assert_array_equal(one, other)
    for name in ("ids", "logps", "rest"):
        both = (getattr(signals.topk("chosen", rows), name) for signals in (live, store))
        np.testing.assert_array_equal(*both)


def test_what_is_not_given_comes_from_the_trainer(tmp_path, make_model, pairs, tokenizer):
    """Data, tokenizer and truncation; kinds and settings of what the method needs; ids of the teacher's signals."""
    needs = (
        Need("teacher", "topk"),
        Need("teacher", "values", settings={"value_temperature": 0.5}),
        Need("reference", "topk"),
    )
    truncation = Truncation(max_length=40)
    live = [LiveTeacher(make_model(1), "reference"), LiveTeacher(make_model(), k=4)]
    teacher, reference = bind_live(live, pairs, tokenizer, truncation, needs)
    common = {"truncation": truncation}
    store = extract_signals(
        make_model(), pairs, tokenizer, ("topk", "values"), tmp_path / "t", k=4, value_temperature=0.5, **common
    )
    at_ids = extract_signals(
        make_model(1), pairs, tokenizer, ("topk",), tmp_path / "r", role="reference", ids_from=store, **common
    )
    assert (teacher.digest, reference.digest) == (store.digest, at_ids.digest)
    SignalSet.of([teacher, reference], pairs).check_settings(needs)
    copy = pickle.loads(pickle.dumps(teacher))  # for the workers of a data loader
    assert_same_signals(copy, store)


def test_stored_and_live_signals_go_together(tmp_path, make_model, pairs, tokenizer):
    store = extract_signals(
        make_model(), pairs, tokenizer, ("logps",), tmp_path / "t", truncation=Truncation(max_length=30)
    )
    live = LiveTeacher(make_model(1), "reference", ("logps",))
    signals = SignalSet.of(bind_live([live, store], pairs, tokenizer, None, ()), pairs)
    assert signals.missing([Need(role, "logps", SIDES) for role in ("teacher", "reference")]) == []


def test_a_live_teacher_without_data_or_use_says_so(make_model, pairs, tokenizer):
    with pytest.raises(UserError, match="is not bound to data yet: give it dataset, tokenizer and kinds"):
        LiveTeacher(make_model()).row(0)
    with pytest.raises(UserError, match="the method needs no signals of the teacher"):
        bind_live([LiveTeacher(make_model())], pairs, tokenizer, None, (Need("reference", "logps"),))
    with pytest.raises(UserError, match=r"LiveTeacher: .*temperature"):
        LiveTeacher(make_model(), kinds=("logprob_values",), dataset=pairs, tokenizer=tokenizer).row(0)
    with pytest.raises(AttributeError):
        _ = LiveTeacher(make_model(), kinds=("logps",), dataset=pairs, tokenizer=tokenizer).nothing
