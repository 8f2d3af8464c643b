"""Methods on the distributions of a teacher with other tokens: VanillaKD, DCKD and DistiLLM-2 with `across`."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

from prefdistill import METHODS, LiveTeacher
from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.models.load import load_tokenizer
from prefdistill.models.scratch import random_model, train_tokenizer
from prefdistill.models.token_map import first_tokens
from prefdistill.signals import extract_signals
from prefdistill.training.rows import prepare_rows
from support.methods import ROWS, SAMPLED, SIDES, assert_same_gradient, batch_of, value_and_gradient
from support.permuted import permuted, with_ids
from support.texts import sentence

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def teachers(tmp_path_factory, model_of, rows, tokenizer):
    """Stores of one teacher's distributions: read with the student's tokenizer, with one whose template is another that
    renders the same, and with one in which every token has another id."""
    root = tmp_path_factory.mktemp("teachers")
    same = copy.deepcopy(tokenizer)
    same.chat_template += "{# the same #}"
    other, order = permuted(tokenizer)
    model = model_of("teacher")
    readings = {"direct": (tokenizer, model), "same": (same, model), "permuted": (other, with_ids(model, order))}
    stores = {}
    for name, (own, teacher) in readings.items():
        own.save_pretrained(root / name)
        loaded = type(own).from_pretrained(root / name)
        for k in (6, "vocab"):
            stores[name, k] = extract_signals(
                teacher,
                rows,
                loaded,
                ("topk",),
                root / f"{name}-{k}",
                k=k,
                responses=(*SIDES, *SAMPLED),
                topk_coding="float32",
            )
    return stores


@pytest.mark.parametrize("name", ["vanillakd", "dckd", "distillm2"])
@pytest.mark.parametrize("k", [6, "vocab"])
def test_tokens_with_other_ids_give_the_loss_of_the_students_own(name, k, teachers, trainer_of):
    direct = trainer_of(METHODS[name](), signals=[teachers["direct", k]])
    loss, gradient = value_and_gradient(direct, batch_of(direct, ROWS))
    for reading in ("same", "permuted"):
        trainer = trainer_of(METHODS[name](across="first_token"), signals=[teachers[reading, k]])
        batch = batch_of(trainer, ROWS)
        states, own = batch["features"]["states"], batch_of(direct, ROWS)["features"]["states"]
        for response in trainer.method.responses:
            np.testing.assert_array_equal(states[f"{response}_ids"], own[f"{response}_ids"])
        other_loss, other_gradient = value_and_gradient(trainer, batch)
        if reading == "same":
            assert other_loss == loss
            assert torch.equal(other_gradient, gradient)
        else:
            assert other_loss == pytest.approx(loss, rel=1e-5)
            assert_same_gradient(other_gradient, gradient)
    with pytest.raises(UserError, match="across=first_token"):
        trainer_of(METHODS[name](), signals=[teachers["permuted", k]])


TEXTS = ["the naïve café 🙂🙂 reads", "東京 what it says", "every 👩‍🚀 teacher", "", " a\r\n\tlong prompt "]


@pytest.fixture(scope="session")
def two_tokenizers(tmp_path_factory):
    """Two tokenizers on disk: one of the data's words and characters, the other of pieces, with another template."""
    root, sentences = tmp_path_factory.mktemp("tokenizers"), [sentence(20, k) for k in range(50)]
    coarse = train_tokenizer([*sentences, *TEXTS * 20], 400)
    finer = train_tokenizer([text[1::2] for text in sentences], 290)
    finer.chat_template = "[teacher]" + finer.chat_template
    for name, tokenizer in (("coarse", coarse), ("finer", finer)):
        tokenizer.save_pretrained(root / name)
    return load_tokenizer(str(root / "coarse")), load_tokenizer(str(root / "finer"))


@pytest.fixture(scope="session")
def multilingual(pairs):
    """Pairs, some with characters of several bytes and tokens."""
    texts = [
        {
            "prompt": pairs[i]["prompt"],
            "chosen": [{"role": "assistant", "content": text}],
            "rejected": pairs[i]["chosen"],
        }
        for i, text in enumerate(TEXTS)
    ]
    return Dataset.from_list([*pairs.select(range(8)), *texts])


@pytest.mark.parametrize("finer_is", ["teacher", "student"])
def test_the_student_learns_the_teachers_distributions_at_shared_states(
    finer_is, two_tokenizers, multilingual, tmp_path
):
    """Against a loop over states and tokens, in which a state is the text that its tokens decode to."""
    student, teacher = two_tokenizers if finer_is == "teacher" else two_tokenizers[::-1]
    model = random_model(teacher, {**SHAPE, "num_hidden_layers": 1}, 3)
    model.get_output_embeddings().weight.data *= 40
    store = extract_signals(
        model, multilingual, teacher, ("topk",), tmp_path / "store", k=7, responses=SIDES, topk_coding="float32"
    )
    method = METHODS["dckd"](across="first_token")
    encoded, collate, _, reading = prepare_rows(multilingual, method, [store], student, None)
    live = LiveTeacher(model, tokenizer=teacher, kinds=("topk",), dataset=multilingual, k=7, topk_coding="float32")
    from_memory = prepare_rows(multilingual, method, [live.bind()], student, None)[1]
    read, _ = encode_pairs(multilingual, teacher, Truncation())
    of_teacher = {row["row"]: row for row in read}
    tokens = first_tokens(teacher, student)
    counts = []
    for row in encoded:
        batch = collate([row])["features"]["states"]
        for name, numbers in from_memory([row])["features"]["states"].items():
            np.testing.assert_array_equal(numbers, batch[name])
        for side in SIDES:
            ids, teachers = row[f"{side}_ids"], of_teacher[row["row"]][f"{side}_ids"]
            places = {teacher.decode(teachers[:j]): j for j in range(len(teachers) - 1, -1, -1)}
            stored = store.topk(side, np.array([row["row"]]))
            for i in range(len(ids)):
                j = places.get(text := student.decode(ids[:i]))
                taught = j is not None and "\ufffd" not in text
                if taught and i < len(ids) - 1:  # at the end both have their end tokens
                    after = (student.decode(ids[: i + 1]), teacher.decode(teachers[: j + 1]))
                    taught = len(after[0].rstrip("\ufffd")) <= len(after[1].rstrip("\ufffd"))
                expected, rest = {}, 1.0
                if taught:
                    for token, logp in zip(stored.ids[j], stored.logps[j], strict=True):
                        goes_to = int(tokens.ids[token])
                        if goes_to >= 0:
                            expected[goes_to] = expected.get(goes_to, 0.0) + float(np.exp(logp))
                    rest = 1 - sum(expected.values())
                found = {
                    int(token): float(np.exp(logp))
                    for token, logp in zip(batch[f"{side}_ids"][i], batch[f"teacher_{side}_topk"][i], strict=True)
                    if token >= 0
                }
                assert found == pytest.approx(expected, abs=1e-6), (row["row"], side, i, text)
                assert np.exp(batch[f"teacher_{side}_rest"][i]) == pytest.approx(rest, abs=1e-6)
                counts.append(taught)
    assert 0.1 < np.mean(counts) < 0.9
    assert reading.across["taught"] == pytest.approx(np.mean(counts))
    assert sum(reading.across[name] for name in ("exact", "start", "unmapped", "rest")) == pytest.approx(1, abs=1e-5)
