"""Training with every method: special cases of one another, live and stored signals, TRL's trainers."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from prefdistill import METHODS, PrefDistillTrainer
from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.models.identity import weights_digest
from prefdistill.models.scratch import random_model
from prefdistill.signals import extract_signals
from prefdistill.training.factory import make_trainer
from prefdistill.training.options import Training
from support.methods import (
    OURS,
    SAMPLED,
    SIDES,
    THEIRS,
    assert_same_trajectory,
    batch_of,
    history,
    live_signals,
    trained,
    weights,
)
from support.tokenizer_styles import STYLES, make_tokenizer


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


def test_trl_computes_its_reference_during_training(trainer_of):
    with pytest.raises(UserError, match="precompute_ref_log_probs has no effect: TRL computes"):
        trainer_of(METHODS["wpo"](), arguments={"precompute_ref_log_probs": True})


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


@pytest.mark.parametrize("name", [name for name in OURS if METHODS[name]().needs])
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


def assert_tokens_are(trainer, ours, places):
    """What the loss of a TRL trainer is made of: prompt and response tokens of each row."""
    assert len(trainer.train_dataset) == len(ours)
    for place in places:
        batch, row = batch_of(trainer, [place]), ours[place]
        for n, side in enumerate(SIDES):
            if "chosen_labels" in batch:  # of SimPO
                tokens, labels, kept = (batch[f"{side}_{x}"][0] for x in ("input_ids", "labels", "attention_mask"))
                mask = labels != -100
                assert labels[mask].tolist() == row[f"{side}_ids"]
            else:
                tokens, mask, kept = (batch[x][n] for x in ("input_ids", "completion_mask", "attention_mask"))
            assert tokens[kept.bool()].tolist() == row["prompt_ids"] + row[f"{side}_ids"]
            assert tokens[mask.bool()].tolist() == row[f"{side}_ids"]


@pytest.mark.parametrize("truncation", [Truncation(None), Truncation(20), Truncation(1024, max_prompt_length=6)])
@pytest.mark.parametrize("name", THEIRS)
def test_trl_trains_on_our_tokens(name, truncation, tmp_path, model_of, rows, tokenizer):
    """The same prompt and response tokens, cut at the same places; no limit means none, also beyond TRL's defaults."""
    long = dict(rows[0])
    long["chosen"] = [{"role": "assistant", "content": "the small teacher reads " * 300}]
    data = Dataset.from_list([dict(row) for row in rows] + [long])
    training = Training(batch_size=1, max_steps=1)
    trainer = make_trainer(
        METHODS[name](), lambda: model_of("student"), data, tokenizer, training, tmp_path, truncation=truncation
    )
    ours, _ = encode_pairs(data, tokenizer, truncation)
    assert len(ours) == (24 if truncation.max_length == 20 else 25)  # one prompt leaves no room
    longest = max(map(len, ours["chosen_ids"]))
    assert (longest > 1024) == (truncation.max_length is None)
    assert (max(map(len, ours["prompt_ids"])) == 6) == (truncation.max_prompt_length is not None)
    assert_tokens_are(trainer, ours, (0, 5, len(ours) - 1))


@pytest.mark.parametrize("style", ["llama3", "chatml", "zephyr", "phi3"])
@pytest.mark.parametrize("name", THEIRS)
def test_trl_trains_on_nothing_after_the_end_token(name, style, tmp_path):
    """Neither on what the template writes there nor on an end token that TRL adds."""
    tokenizer = make_tokenizer(style)
    row = {"prompt": ("user", "a"), "chosen": ("assistant", "b"), "rejected": ("assistant", "c")}
    row = {name: [{"role": role, "content": text}] for name, (role, text) in row.items()}
    data, training = Dataset.from_list([row, row]), Training(batch_size=1, max_steps=1)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    trainer = make_trainer(
        METHODS[name](), lambda: random_model(tokenizer, shape, 0), data, tokenizer, training, tmp_path
    )
    ours, _ = encode_pairs(data, tokenizer, Truncation())
    assert tokenizer.decode(ours[0]["chosen_ids"]) == "b" + STYLES[style].end
    assert_tokens_are(trainer, ours, (0, 1))


def test_trl_needs_no_signals(trainer_of, stores):
    for name in THEIRS:
        with pytest.raises(UserError, match="trained by TRL on the pairs alone; leave the signals out"):
            trainer_of(METHODS[name](), signals=stores())
        with pytest.raises(UserError, match=r"use prefdistill\.training\.factory\.make_trainer"):
            PrefDistillTrainer(None, METHODS[name](), None, None)
