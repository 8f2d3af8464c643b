"""Training with every method: special cases of one another, live and stored signals, TRL's trainers."""

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from prefdistill import METHODS, PrefDistillTrainer
from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.models.identity import weights_digest
from prefdistill.signals import extract_signals
from prefdistill.training.factory import make_trainer
from prefdistill.training.options import Training
from support.methods import (
    SAMPLED,
    SIDES,
    assert_same_trajectory,
    history,
    live_signals,
    trained,
    weights,
)


def test_evaluation_reads_the_signals_of_the_rows_it_is_given(tmp_path_factory, model_of, rows, tokenizer, stores):
    """Held-out rows have stores of their own, with the same row numbers."""
    from transformers import TrainingArguments

    from prefdistill import PrefDistillTrainer

    held_out = rows.select(range(len(rows) - 1, -1, -1))
    exact = {"k": 20, "topk_coding": "float32"}
    teacher = extract_signals(
        model_of("teacher"), held_out, tokenizer, ("topk",), tmp_path_factory.mktemp("e"), **exact
    )
    method = METHODS["dckd"]()
    ours = next(s for s in stores(20, None, "") if s.role == "teacher" and {"topk"} <= set(s.kinds)
                and set(SIDES) <= set(s.responses))  # fmt: skip
    trainer = PrefDistillTrainer(
        model_of("student"), method, TrainingArguments(str(tmp_path_factory.mktemp("o")), use_cpu=True,
        report_to="none"), rows, [ours], tokenizer, eval_dataset=held_out, eval_signals=[teacher],
    )  # fmt: skip
    both = [trainer.evaluate(data)["eval_loss"] for data in (None, trainer.train_dataset)]
    assert both[0] == pytest.approx(both[1], abs=1e-5)  # the same rows in another order
    with pytest.raises(UserError, match="these rows have no signals"):
        trainer.evaluate(trainer.train_dataset.select(range(2)))


# -- where one method becomes another ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_training_does_not_depend_on_micro_batches(name, trainer_of, model_of):
    whole = trained(trainer_of(METHODS[name](), k=7))
    assert len(set(history(whole))) == 8
    start = torch.cat([p.detach().flatten() for p in model_of("student").parameters()])
    assert float((weights(whole) - start).abs().max()) > 1e-3
    parts = trained(trainer_of(METHODS[name](), k=7, micro_batch_size=2))
    assert parts.args.gradient_accumulation_steps == 2
    np.testing.assert_allclose(history(whole), history(parts), atol=1e-5)
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().needs])
def test_training_on_live_signals_has_the_trajectory_of_stored_ones(name, trainer_of, model_of):
    stored = trained(trainer_of(METHODS[name](), max_steps=3))
    live = trained(trainer_of(METHODS[name](), signals=live_signals(METHODS[name](), model_of), max_steps=3))
    np.testing.assert_allclose(history(live), history(stored), atol=1e-5)
    torch.testing.assert_close(weights(live), weights(stored), atol=1e-4, rtol=1e-3)


def test_vanillakd_without_its_teacher_has_the_trajectory_of_sft(trainer_of):
    sft, other = trained(trainer_of(METHODS["sft"]())), trained(trainer_of(METHODS["vanillakd"](alpha=0.0)))
    assert_same_trajectory(sft, other, 1e-5)


def test_dckd_without_its_teacher_has_the_trajectory_of_sft(trainer_of):
    sft, other = trained(trainer_of(METHODS["sft"]())), trained(trainer_of(METHODS["dckd"](alpha=0.0)))
    assert_same_trajectory(sft, other, 1e-5)


def test_adpa_with_teachers_that_agree_has_the_trajectory_of_sft(trainer_of):
    sft = trained(trainer_of(METHODS["sft"]()))
    agreeing = trained(trainer_of(METHODS["adpa"](gamma=3.0), k=20, same="student"))
    assert history(agreeing, "advantage") == [0.0] * 8
    assert_same_trajectory(sft, agreeing, 1e-5)
    other = trained(trainer_of(METHODS["adpa"](gamma=3.0), k=20))
    assert not np.allclose(history(sft), history(other), atol=0.01)


def test_dpkd_is_dpo_with_the_teacher_as_reference_to_the_last_bit(
    tmp_path, trainer_of, model_of, rows, tokenizer, stores
):
    dpkd = trained(trainer_of(METHODS["dpkd"](beta=0.2)))
    names = {f"{response}{flag}": f"{side}{flag}" for response, side in zip(SAMPLED[::1], SIDES, strict=True)
             for flag in ("", "_ended")}  # fmt: skip
    renamed = rows.remove_columns([*SIDES, "score_chosen", "score_rejected"]).rename_columns(names)
    teacher = extract_signals(model_of("teacher"), renamed, tokenizer, ("logps",), tmp_path / "s", role="reference")
    teacher.manifest["model"]["weights_sha256"] = weights_digest(model_of("student"))  # or DPO would refuse it
    training = Training(batch_size=4, max_steps=8, learning_rate=1e-3, logging_steps=1)
    dpo = make_trainer(
        METHODS["dpo"](beta=0.2), lambda: model_of("student"), renamed, tokenizer, training, tmp_path / "out",
        signals=[teacher], seed=11,
    )  # fmt: skip
    dpo.train()
    assert history(dpkd) == history(dpo)
    assert torch.equal(weights(dpkd), weights(dpo))


def test_a_topk_method_is_evaluated_with_the_signals_of_the_held_out_rows(tmp_path, rows, model_of, tokenizer):
    """Before anything is learnt, the loss on rows held out is what training on them would start from."""
    first, last = rows.select(range(16)), rows.select(range(16, 24))
    stores = [
        [extract_signals(model_of("teacher"), part, tokenizer, ("topk",), tmp_path / str(n), k=7)]
        for n, part in enumerate((first, last))
    ]

    def trainer(part, signals, **more):
        sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 3, "max_steps": 1}
        options = {"learning_rate": 0.0, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
        args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, **sizes, **options)
        return PrefDistillTrainer(model_of("student"), METHODS["dckd"](), args, part, signals, tokenizer, **more)

    held_out = trainer(first, stores[0], eval_dataset=last, eval_signals=stores[1])
    on_them = history(trained(trainer(last, stores[1])))
    assert held_out.evaluate()["eval_loss"] == pytest.approx(on_them[0], abs=1e-5)
    assert history(trained(held_out)) != on_them


# -- baselines of TRL --------------------------------------------------------------------------------------------------


def cpo_row(row):
    """A row of `encode_pairs` in the columns of TRL's CPOTrainer."""
    columns = {}
    for side in SIDES:
        prompt, response = row["prompt_ids"], row[f"{side}_ids"]
        columns[f"{side}_input_ids"] = prompt + response
        columns[f"{side}_attention_mask"] = [1] * len(prompt + response)
        columns[f"{side}_labels"] = [-100] * len(prompt) + response
    return columns


def trl_trainer(name, trainer, model_of, rows, tokenizer, out):
    """TRL's trainer of a method, on the tokens and with the arguments of ours."""
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    names = ("per_device_train_batch_size", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed",
             "data_seed", "logging_steps", "max_grad_norm", "weight_decay")  # fmt: skip
    common = {name: getattr(trainer.args, name) for name in names} | {
        "output_dir": str(out), "use_cpu": True, "report_to": "none", "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "no", "max_length": 10_000, "beta": trainer.method.beta,
    }  # fmt: skip
    kind, config = {
        "simpo": (CPOTrainer, lambda: CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, remove_unused_columns=False,
                                                simpo_gamma=trainer.method.gamma)),
        "wpo": (DPOTrainer, lambda: DPOConfig(**common, use_weighting=True)),
    }[name]  # fmt: skip
    models = {"model": model_of("student")} | ({"ref_model": model_of("student")} if name == "wpo" else {})
    pairs = rows.select_columns(["prompt", *SIDES])
    trl = kind(**models, args=config(), train_dataset=pairs, processing_class=tokenizer)
    encoded, _ = encode_pairs(rows, tokenizer, Truncation())
    columns = ["prompt_ids", *(f"{side}_ids" for side in SIDES)]
    trl.train_dataset = (
        encoded.map(cpo_row, remove_columns=encoded.column_names)
        if name == "simpo"
        else encoded.select_columns(columns)
    )
    return trl


@pytest.mark.parametrize("name", ["simpo", "wpo"])
def test_a_method_that_trl_has_too_has_its_trajectory(name, tmp_path, trainer_of, model_of, rows, tokenizer):
    """WPO without signals: its reference is computed from the start, as TRL does."""
    ours = trained(trainer_of(METHODS[name](), signals=[]))
    trl = trained(trl_trainer(name, ours, model_of, rows, tokenizer, tmp_path))
    assert np.ptp(history(ours, "rewards/margins")) > 0.05  # something is learnt, or agreement says nothing
    np.testing.assert_allclose(history(ours), history(trl), rtol=1e-3)
    torch.testing.assert_close(weights(ours), weights(trl), atol=1e-4, rtol=0)
    for key in ("rewards/margins", "rewards/chosen"):
        np.testing.assert_allclose(history(ours, key), history(trl, key), atol=2e-3)


def test_wpo_uses_the_reference_it_is_given(trainer_of, capsys):
    stored = trained(trainer_of(METHODS["wpo"](), max_steps=3))
    assert "no reference signals are given" not in capsys.readouterr().err
    computed = trained(trainer_of(METHODS["wpo"](), signals=[], max_steps=3))
    assert "no reference signals are given; they are computed from the student's start" in capsys.readouterr().err
    np.testing.assert_allclose(history(stored), history(computed), atol=1e-6)
