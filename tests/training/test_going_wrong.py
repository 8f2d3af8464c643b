"""Training that goes wrong says so: before it begins where it can, else at the step, and with what to try."""

import json
import re

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json
from prefdistill.methods import METHODS
from prefdistill.training.factory import make_trainer
from prefdistill.training.loop import fit
from prefdistill.training.nan_guard import _texts, check_weights
from prefdistill.training.options import Training

FAST = ["batch_size=2", "micro_batch_size=2", "max_steps=2"]
DATA = ["--data", "pairs.jsonl"]


@pytest.fixture
def place(tmp_path, monkeypatch, make_model, tokenizer, pairs):
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs.select(range(8))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    model.save_pretrained(tmp_path / "flat")
    for name in ("model", "flat"):
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def test_a_constant_value_is_reported_before_training(place, capsys):
    """Of a teacher whose logits are all alike, every state has the same value: log of the vocabulary."""
    assert main(["signals", "--model", "flat", *DATA, "--kind", "values", "--out", "values"]) == 0
    start = ["--role", "reference", "--kind", "logps", "--out", "start"]
    assert main(["signals", "--model", "model", *DATA, *start]) == 0
    stores = ["--signals", "values", "--signals", "start"]
    capsys.readouterr()
    assert main(["distill", "--student", "model", *DATA, "--method", "tvkd", *stores, "--out", "out", *FAST]) == 2
    told = capsys.readouterr().err
    assert told.startswith("prefdistill: the teacher's value is the same number, 5.77, in every state")
    assert "raw logits are needed" in told
    assert not (place / "out").exists()
    # a discount would make lengths of it
    refused = ["distill", "--student", "model", *DATA, "--method", "tvkd", *stores, "--out", "out", *FAST]
    assert main([*refused, "discount=0.9"]) == 2
    assert "is the same number" in capsys.readouterr().err


def test_shaping_that_outweighs_the_margin_is_warned_of_with_numbers(place, capsys):
    (place / "recipe.yaml").write_text(
        "name: x\ndata: {train: pairs.jsonl, test: pairs.jsonl}\nmodel: {teacher: model, student: model}\n"
        "training: {max_steps: 2, learning_rate: 0.01, batch_size: 2, micro_batch_size: 2}\nbaseline: faint\n"
        "methods: {tvkd: {alpha: 1000}, faint: {method: tvkd, alpha: 1.0e-9}}\n"
    )
    assert main(["run", "recipe.yaml", "--out", "run"]) == 0
    results = read_json(place / "run" / "results.json")
    (warning,) = (text for text in results["warnings"] if "outweighs" in text)
    spread, margin = (results["shaping"]["tvkd"][key] for key in ("std", "dpo_margin_std"))
    assert spread > 3 * margin
    assert warning == (
        f"tvkd: the shaping margin (spread {spread:.2f}) outweighs the DPO margin (spread {margin:.2f}); use a "
        "lower alpha or a higher beta"
    )
    assert warning in (place / "run" / "report.html").read_text(encoding="utf-8")
    assert f"warning: {warning}" in capsys.readouterr().err


@pytest.mark.parametrize(("alpha", "outweighs"), [(1000, True), (1e-9, False)])
def test_shaping_that_outweighs_the_margin_of_one_training(place, capsys, alpha, outweighs):
    for name, role, kind in (("values", "teacher", "values"), ("start", "reference", "logps")):
        assert main(["signals", "--model", "model", *DATA, "--role", role, "--kind", kind, "--out", name]) == 0
    stores = ["--signals", "values", "--signals", "start", "--out", "out", "logging_steps=1", "learning_rate=0.01"]
    assert main(["distill", "--student", "model", *DATA, "--method", "tvkd", *stores, *FAST, f"alpha={alpha}"]) == 0
    last = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()][1]
    told = f"tvkd: the shaping margin (mean size {last['shaping/margins_abs']:.2f}) outweighs the DPO margin"
    assert (told in capsys.readouterr().err) == outweighs


def spoil(place, value):
    """The model's output weights are no numbers, as they are loaded."""
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(value)
    model.save_pretrained(place / "model")


VERBS = {
    "sft": ["sft", "--model", "model"],
    "dpo": ["dpo", "--model", "model"],
    "simpo": ["distill", "--student", "model", "--method", "simpo"],
    "distill": ["distill", "--student", "model", "--method", "sft"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_first_loss_that_is_no_number_is_not_laid_to_the_learning_rate(place, capsys, verb):
    spoil(place, float("nan"))
    assert main([*VERBS[verb], *DATA, "--out", "out", "batch_size=8", "micro_batch_size=8", "max_steps=2"]) == 2
    (told,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("prefdistill: "))
    assert "the loss is nan at step 1, " in told
    assert "no step was taken yet, so the model's weights may be damaged" in told
    assert "learning rate" not in told
    if verb == "distill":
        assert "rows [" in told
        return
    texts = re.findall(r"'(<\|bos\|><\|user\|>[^']*)'", told)
    assert len(texts) == len(set(texts)) == 3
    assert all("<|assistant|>" in text and "pad" not in text and len(text) <= 125 for text in texts)
    assert f"' and {8 * (1 + (verb == 'dpo')) - 3} more texts: " in told


def test_of_long_texts_the_start_and_the_end_are_shown(tokenizer):
    ids = [tokenizer(f"{'the teacher ' * 99}{end}", add_special_tokens=False)["input_ids"] for end in ("reads", "says")]
    width = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    }
    one, other = _texts(batch, tokenizer).split(", ")
    assert one.startswith("'the teacher the")
    assert (one[-10:], other[-9:]) == ("her reads'", "her says'")
    assert max(len(one), len(other)) == 2 * 60 + len("'' ... ")


class Spoiled(torch.optim.SGD):
    """An optimiser whose step makes weights that are no numbers."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.fill_(float("nan"))


@pytest.mark.parametrize("method", ["sft", "simpo"])
def test_weights_that_are_no_numbers_are_not_kept(tmp_path, make_model, tokenizer, pairs, method):
    """After the last step there is no loss that would show it."""
    training = Training(max_steps=1, batch_size=2, micro_batch_size=2)
    model = make_model(num_hidden_layers=1)
    out = tmp_path / "out"
    rows = pairs.select(range(4)).select_columns(["prompt", "chosen", "rejected"])
    trainer = make_trainer(METHODS[method](), lambda: model, rows, tokenizer, training, out)
    trainer.optimizer = Spoiled(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"the trained weights are not finite, the first of them model\.embed_tokens"):
        fit(trainer, out, method)
    assert not (out / "model.safetensors").exists()


def test_whole_weights_pass(make_model):
    check_weights(make_model(num_hidden_layers=1))


def test_what_was_logged_stays_to_be_looked_at(place, capsys, make_model, tokenizer):
    """A training that goes wrong late leaves its log; one that is wrong at once leaves nothing."""
    given = ["sft", "--model", "model", *DATA, "--out", "out", "batch_size=2", "micro_batch_size=2", "max_steps=8"]
    assert main([*given, "learning_rate=1e30", "max_grad_norm=0", "logging_steps=1"]) == 2
    told = capsys.readouterr().err
    assert "the loss is nan at step" in told
    assert "try a lower learning rate" in told
    (first, *_) = (json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines())
    assert first["step"] == 1
    assert not (place / "out" / "model.safetensors").exists()
