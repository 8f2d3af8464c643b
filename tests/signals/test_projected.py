"""Which states a teacher with other tokens teaches, and where a store's tokens go."""

import numpy as np
import pytest

from prefdistill.core.errors import UserError
from prefdistill.data.spans import Spans
from prefdistill.models.identity import tokenizer_identity
from prefdistill.models.token_map import TokenMap
from prefdistill.signals.alignment import Alignment, States
from prefdistill.signals.projected import ProjectedSignals, taught_states, token_map
from support.stores import store_by_hand
from support.tokenizer_styles import make_tokenizer


@pytest.mark.parametrize(
    ("student", "teacher", "starts", "expected"),
    [
        ([2, 4, 6, 9], [2, 4, 6, 9], (0, 0), [0, 1, 2, 3]),  # 9: the end token
        ([1, 2, 4, 6, 9], [2, 4, 6, 9], (0, 0), [0, -1, 1, 2, 3]),  # the student's are finer
        ([2, 6, 9], [2, 4, 6, 9], (0, 0), [0, -1, 3]),  # the teacher's are: its token after 2 ends inside the student's
        ([3, 4, 6, 9], [2, 4, 6, 9], (0, 0), [-1, -1, 2, 3]),  # across each other
        ([2, 2, 6, 9], [2, 2, 6, 9], (0, 0), [0, -1, 2, 3]),  # two tokens of one character, perhaps of other bytes
        ([2, 2, 6, 9], [2, 6, 9], (0, 0), [0, -1, 1, 2]),  # the character is one token of the teacher's
        ([2, 6, 9], [2, 2, 6, 9], (0, 0), [-1, 2, 3]),  # or of the student's: the teacher's first is a part of it
        ([2, 6, 9], [3, 7, 10, 14, 17], (0, 8), [-1, 3, 4]),  # the teacher's template writes two tokens before the text
        ([3, 7, 10, 14, 17], [2, 6, 9], (8, 0), [-1, -1, -1, 1, 2]),  # the student's does
    ],
)
def test_states_that_are_taught(student, teacher, starts, expected):
    states = [
        States.of([np.array(ends)], Spans(np.array([at]), np.array([at + 6])), np.array([True]), np.array([6]))
        for ends, at in zip((student, teacher), starts, strict=True)
    ]
    (taught,) = taught_states(*states, Alignment.of(*states))
    assert taught.tolist() == expected


def test_a_teacher_that_teaches_no_state_is_refused():
    manifest = {"role": "teacher", "kinds": ["topk"], "responses": ["chosen"]}
    source = store_by_hand(manifest, [{"row": 0, "chosen_tokens": 2}])
    aligned = store_by_hand(manifest, [{"row": 0, "chosen_tokens": 2, "chosen_topk_state": [-1, -1]}])
    signals = ProjectedSignals(manifest, aligned.shards, source, TokenMap(np.arange(4), np.ones(4, dtype=bool)))
    with pytest.raises(UserError, match=r"teach no state of the student's: the two split the texts at no common place"):
        _ = signals.shares


def store_of(tokenizer):
    return store_by_hand({"role": "teacher", "tokenizer": tokenizer_identity(tokenizer)}, [{"row": 0}])


@pytest.mark.parametrize(
    ("plain", "teacher", "student", "expected"),
    [
        (False, "llama3", "gemma", {"<|eot_id|>": "<end_of_turn>", "<|end_of_text|>": "<eos>"}),
        (True, "llama3", "gemma", {"<|eot_id|>": None, "<|end_of_text|>": "<eos>"}),
        (False, "chatml", "gemma", {"<|im_end|>": "<end_of_turn>"}),  # whose end token is EOS as well
        (True, "chatml", "gemma", {"<|im_end|>": "<eos>"}),
        (False, "gemma", "chatml", {"<end_of_turn>": "<|im_end|>", "<eos>": "<|im_end|>"}),
    ],
)
def test_the_end_token_of_the_data_goes_to_the_students(plain, teacher, student, expected, tmp_path):
    teacher, student = make_tokenizer(teacher), make_tokenizer(student)
    teacher.save_pretrained(tmp_path)
    store = store_of(teacher)
    store.manifest["tokenizer"]["name"] = str(tmp_path)
    ids = token_map(store, student, plain=plain).ids
    for token, own in expected.items():
        goes_to = int(ids[teacher.get_vocab()[token]])
        assert (student.convert_ids_to_tokens(goes_to) if goes_to >= 0 else None) == own


def test_a_tokenizer_that_is_not_at_hand_is_refused(tmp_path):
    teacher, student = make_tokenizer("llama3"), make_tokenizer("gemma")
    with pytest.raises(UserError, match=r"signals \(in memory\) was in memory; its tokens are to be mapped: save it"):
        token_map(store_of(teacher), student, plain=False)
    student.save_pretrained(tmp_path)
    store = store_of(teacher)
    store.manifest["tokenizer"]["name"] = str(tmp_path)
    with pytest.raises(UserError, match=r"has changed since they were extracted; extract them again"):
        token_map(store, student, plain=False)
