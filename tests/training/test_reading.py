"""Every stage reads the same rows, as the same tokens, and says how many."""

import json

import pytest
from datasets import Dataset
from torch import nn

from prefdistill import METHODS
from prefdistill.core.errors import UserError
from prefdistill.data import truncation as reasons
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.models.scratch import random_model
from prefdistill.training import trl
from prefdistill.training.factory import make_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import DPOTraining, Training
from support.pairs import conversation
from support.tokenizer_styles import make_tokenizer

SHAPE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
LIMITS = Truncation(24, 12)
ROWS = [
    conversation("Q", "yes", "no"),
    conversation("Q", "yes", "\nno"),  # a token spans the boundary
    conversation("one two three four five six seven", "A", "B"),  # a prompt to cut
    conversation("Q", "A " * 40 + "yes", "A " * 40 + "no"),  # equal after truncation
    conversation("Q", "A " * 40, "B " * 40),
]
PAIRS = {
    "rows": 5,
    "kept": 3,
    "dropped": {reasons.TOKENS_MERGE: 1, reasons.EQUAL_AFTER_CUT: 1},
    "truncated_prompts": 1,
    "truncated_responses": 1,
}
COMPLETIONS = {"rows": 5, "kept": 5, "dropped": {}, "truncated_prompts": 1, "truncated_responses": 2}


def train(kind, rows, tokenizer, start, out, options):
    if kind == "simpo":
        load = lambda: random_model(tokenizer, SHAPE, 0)  # noqa: E731
        training = Training(**options)
        fit(make_trainer(METHODS[kind](), load, rows, tokenizer, training, out, truncation=LIMITS), out, kind)
    else:
        if kind == "sft":
            rows = rows.rename_column("chosen", "completion").select_columns(["prompt", "completion"])
        training = {"sft": Training, "dpo": DPOTraining}[kind](**options)
        trl.train_with_trl(start, rows, tokenizer, training, out, truncation=LIMITS, what=kind)


def test_only_adapters_drop_out_in_dpo(tmp_path, monkeypatch):
    tokenizer, rows, trainers = make_tokenizer("chatml", pad="<|pad|>"), Dataset.from_list(ROWS), []
    shape, options = SHAPE | {"attention_dropout": 0.1}, {"max_steps": 1, "lora": {"dropout": 0.3}}
    random_model(tokenizer, shape, 0).save_pretrained(tmp_path / "start")
    monkeypatch.setattr(trl, "fit", lambda trainer, *_, **__: trainers.append(trainer))
    train("dpo", rows, tokenizer, str(tmp_path / "start"), tmp_path / "out", options)
    modules = [*trainers[0].model.modules()]
    assert {module.p for module in modules if isinstance(module, nn.Dropout)} == {0.3}
    assert {module.attention_dropout for module in modules if hasattr(module, "attention_dropout")} == {0.0}


@pytest.mark.parametrize("kind", ["sft", "dpo", "simpo"])
def test_teacher_and_student_read_the_same_rows(tmp_path, kind, monkeypatch, capsys):
    tokenizer, rows, trainers = make_tokenizer("chatml", pad="<|pad|>"), Dataset.from_list(ROWS), []
    random_model(tokenizer, SHAPE, 0).save_pretrained(tmp_path / "start")
    monkeypatch.setattr(
        trl, "fit", lambda trainer, *args, **more: trainers.append(trainer) or fit(trainer, *args, **more)
    )
    train(kind, rows, tokenizer, str(tmp_path / "start"), tmp_path / "out", {"max_steps": 1, "batch_size": 1})
    expected = COMPLETIONS if kind == "sft" else PAIRS
    reading = json.loads((tmp_path / "out" / "reading.json").read_text())
    assert len(reading.pop("ids")) == 12
    assert reading == expected
    assert f"{expected['kept']} of 5 rows are read" in capsys.readouterr().err
    encoded, _ = encode_pairs(
        rows, tokenizer, LIMITS, responses=("chosen",) if kind == "sft" else ("chosen", "rejected")
    )
    if kind == "sft":
        for row, learnt in zip(encoded, trainers[0].train_dataset, strict=True):
            assert learnt["input_ids"] == row["prompt_ids"] + row["chosen_ids"]
            assert learnt["labels"] == [-100] * len(row["prompt_ids"]) + row["chosen_ids"]
    elif kind == "dpo":
        assert trainers[0].train_dataset.to_dict() == {
            name: encoded[name][:] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        }


def test_no_row_is_left(tmp_path):
    tokenizer, rows = make_tokenizer("chatml"), Dataset.from_list(ROWS[1:2])
    for kind in ("dpo", "simpo"):
        with pytest.raises(UserError, match="No row is left: dropped 1 row: the tokenizer merges tokens"):
            train(kind, rows, tokenizer, "start", tmp_path / "out", {})


@pytest.mark.parametrize("name", ["truncation_mode", "dataset_num_proc", "completion_only_loss"])
def test_arguments_without_an_effect_on_encoded_rows_are_refused(name):
    with pytest.raises(UserError, match=f"arguments.{name} has no effect"):
        trl.check_trl_training(Training(arguments={name: 1}))
