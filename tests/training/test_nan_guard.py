"""Trainings that fail: signals without effect, shaping that drowns the margin, non-finite losses and weights."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json
from prefdistill.methods import METHODS
from prefdistill.methods.base import LOG_RATIO
from prefdistill.training.factory import make_trainer
from prefdistill.training.loop import fit
from prefdistill.training.nan_guard import check_weights, quote_texts
from prefdistill.training.options import Training

FAST = ["batch_size=2", "micro_batch_size=2", "max_steps=2"]
DATA = ["--data", "pairs.jsonl"]


@pytest.fixture
def flat(workdir, make_model, tokenizer):
    """A model whose logits are all equal."""
    model = make_model(num_hidden_layers=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    model.save_pretrained("flat")
    tokenizer.save_pretrained("flat")
    return "flat"


def test_a_constant_value_is_reported_before_training(workdir, flat, capsys):
    """If a teacher's logits are all equal, every state has the same value: the log of the vocabulary size."""
    assert main(["signals", "--model", flat, *DATA, "--kind", "values", "--out", "values"]) == 0
    start = ["--role", "reference", "--kind", "logps", "--out", "start"]
    assert main(["signals", "--model", "model", *DATA, *start]) == 0
    stores = ["--signals", "values", "--signals", "start"]
    capsys.readouterr()
    assert main(["distill", "--student", "model", *DATA, "--method", "tvkd", *stores, "--out", "out", *FAST]) == 2
    message = capsys.readouterr().err
    assert message.startswith("prefdistill: the teacher's value is the same number, 5.77, in every state")
    assert "raw logits are needed" in message
    assert not (workdir / "out").exists()
    # with a discount the returns would only measure lengths
    refused = ["distill", "--student", "model", *DATA, "--method", "tvkd", *stores, "--out", "out", *FAST]
    assert main([*refused, "discount=0.9"]) == 2
    assert "is the same number" in capsys.readouterr().err


def test_shaping_larger_than_the_margin_warns_with_numbers(workdir, capsys):
    (workdir / "recipe.yaml").write_text(
        "name: x\ndata: {train: pairs.jsonl, test: pairs.jsonl}\nmodel: {teacher: model, student: model}\n"
        "training: {max_steps: 2, learning_rate: 0.01, batch_size: 2, micro_batch_size: 2}\nbaseline: faint\n"
        "methods: {tvkd: {alpha: 1000}, faint: {method: tvkd, alpha: 1.0e-9}}\n"
    )
    assert main(["run", "recipe.yaml", "--out", "run"]) == 0
    results = read_json(workdir / "run" / "results.json")
    (warning,) = (text for text in results["warnings"] if "outweighs" in text)
    spread, margin = (results["shaping"]["tvkd"][key] for key in ("std", "dpo_margin_std"))
    assert spread > 3 * margin
    assert warning == (
        f"tvkd: the shaping margin (spread {spread:.2f}) outweighs the DPO margin (spread {margin:.2f}); use a lower "
        "alpha or a higher beta"
    )
    assert warning in (workdir / "run" / "report.html").read_text(encoding="utf-8")
    before = next(text for text in results["warnings"] if "will have" not in text and "spread of about" in text)
    assert before.startswith(
        f"tvkd: the shaping margin of the pairs has a spread of about {spread:.2g} nats (alpha=1000)"
    )
    fit = float(before.partition("Use alpha=")[2].partition(",")[0])
    assert fit * spread / 1000 == pytest.approx(0.1 * LOG_RATIO, rel=0.1)
    log = capsys.readouterr().err
    assert f"warning: {warning}" in log
    assert log.count(f"warning: TVKD: {before.removeprefix('tvkd: ')}") == 1
    again = main(["run", "recipe.yaml", "--out", "run"])  # reused steps have warned too
    assert (again, read_json(workdir / "run" / "results.json")["warnings"]) == (0, results["warnings"])


@pytest.mark.parametrize(("alpha", "outweighs"), [(1000, True), (1e-9, False)])
def test_shaping_larger_than_the_margin_of_a_finished_training_warns(workdir, capsys, alpha, outweighs):
    for name, role, kind in (("values", "teacher", "values"), ("start", "reference", "logps")):
        assert main(["signals", "--model", "model", *DATA, "--role", role, "--kind", kind, "--out", name]) == 0
    stores = ["--signals", "values", "--signals", "start", "--out", "out", "logging_steps=1", "learning_rate=0.01"]
    assert main(["distill", "--student", "model", *DATA, "--method", "tvkd", *stores, *FAST, f"alpha={alpha}"]) == 0
    last = [json.loads(line) for line in (workdir / "out" / "metrics.jsonl").read_text().splitlines()][1]
    message = f"tvkd: the shaping margin (mean size {last['shaping/margins_abs']:.2f}) outweighs the DPO margin"
    assert (message in capsys.readouterr().err) == outweighs


def set_weights(workdir, value):
    """Fill the model's output weights with a value that is not finite."""
    model = AutoModelForCausalLM.from_pretrained(workdir / "model")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(value)
    model.save_pretrained(workdir / "model")


VERBS = {
    "sft": ["sft", "--model", "model"],
    "dpo": ["dpo", "--model", "model"],
    "distill": ["distill", "--student", "model", "--method", "sft"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_nan_at_step_1_does_not_blame_the_learning_rate(workdir, capsys, verb):
    set_weights(workdir, float("nan"))
    assert main([*VERBS[verb], *DATA, "--out", "out", "batch_size=8", "micro_batch_size=8", "max_steps=2"]) == 2
    (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("prefdistill: "))
    assert "the loss is nan at step 1, " in message
    assert "no step was taken yet, so the model's weights may be damaged" in message
    assert "learning rate" not in message
    if verb == "distill":
        assert "rows [" in message
        return
    texts = re.findall(r"'(<\|bos\|><\|user\|>[^']*)'", message)
    assert len(texts) == len(set(texts)) == 3
    assert all("<|assistant|>" in text and "pad" not in text and len(text) <= 125 for text in texts)
    assert f"' and {8 * (1 + (verb == 'dpo')) - 3} more texts: " in message


def test_long_texts_are_quoted_by_start_and_end(tokenizer):
    ids = [tokenizer(f"{'the teacher ' * 99}{end}", add_special_tokens=False)["input_ids"] for end in ("reads", "says")]
    width = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    }
    one, other = quote_texts(batch, tokenizer).split(", ")
    assert one.startswith("'the teacher the")
    assert (one[-10:], other[-9:]) == ("her reads'", "her says'")
    assert max(len(one), len(other)) == 2 * 60 + len("'' ... ")


class NanOptimizer(torch.optim.SGD):
    """An optimiser whose step sets weights to nan."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.fill_(float("nan"))


def test_non_finite_weights_are_not_saved(tmp_path, make_model, tokenizer, pairs):
    """No loss is computed after the last step."""
    training = Training(max_steps=1, batch_size=2, micro_batch_size=2)
    model = make_model(num_hidden_layers=1)
    out = tmp_path / "out"
    rows = pairs.select(range(4)).select_columns(["prompt", "chosen", "rejected"])
    trainer = make_trainer(METHODS["sft"](), lambda: model, rows, tokenizer, training, out)
    trainer.optimizer = NanOptimizer(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"the trained weights are not finite, the first of them model\.embed_tokens"):
        fit(trainer, out, "sft")
    assert not (out / "model.safetensors").exists()


def test_finite_weights_pass(make_model):
    check_weights(make_model(num_hidden_layers=1))


def test_logs_of_a_failed_training_are_kept(workdir, capsys, make_model, tokenizer):
    """If the first steps were logged; a training that fails at its first step leaves nothing."""
    arguments = ["sft", "--model", "model", *DATA, "--out", "out", "batch_size=2", "micro_batch_size=2", "max_steps=8"]
    assert main([*arguments, "learning_rate=1e30", "max_grad_norm=0", "logging_steps=1"]) == 2
    message = capsys.readouterr().err
    assert "the loss is nan at step" in message
    assert "try a lower learning rate" in message
    (first, *_) = (json.loads(line) for line in (workdir / "out" / "metrics.jsonl").read_text().splitlines())
    assert first["step"] == 1
    assert not (workdir / "out" / "model.safetensors").exists()
