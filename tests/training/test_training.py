"""The student's trainer: TRL's trajectory, TVKD as DPO, resuming, accumulation, adapters."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from prefdistill import METHODS, LiveTeacher, PrefDistillTrainer
from prefdistill.core.errors import UserError
from prefdistill.core.stages import run_stage
from prefdistill.data.truncation import Truncation
from prefdistill.signals import extract_signals
from prefdistill.training.checkpoints import WHOLE
from prefdistill.training.factory import trl_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import Training
from support.interrupt import StopAt


def arguments(out, **more):
    options = {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 11,
    }
    return TrainingArguments(**(options | more))


@pytest.fixture
def reference(tmp_path, make_model, pairs, tokenizer):
    return extract_signals(make_model(), pairs, tokenizer, ("logps",), tmp_path / "reference", role="reference")


@pytest.fixture
def teacher(tmp_path, make_model, pairs, tokenizer):
    return extract_signals(make_model(5), pairs, tokenizer, ("values",), tmp_path / "teacher")


@pytest.fixture
def train(tmp_path, make_model, pairs, tokenizer, reference, teacher):
    """Train a fresh copy of the student; returns the trainer after its run."""

    def run(method, *, args=None, model=None, signals=None, data=None, **more):
        trainer = PrefDistillTrainer(
            model=model or make_model(),
            method=method,
            args=args or arguments(tmp_path),
            train_dataset=data or pairs,
            signals=[reference, teacher] if signals is None else signals,
            processing_class=tokenizer,
            **more,
        )
        trainer.train()
        return trainer

    return run


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_dpo_has_the_trajectory_of_trl(tmp_path, train, make_model, pairs, tokenizer):
    """Same model, data, seed and arguments as TRL's DPOTrainer: the same loss at every step, the same weights."""
    from trl import DPOConfig, DPOTrainer

    ours = train(METHODS["dpo"](beta=0.2))
    options = arguments(tmp_path).to_dict()
    keep = ("output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "lr_scheduler_type")
    keep += ("warmup_steps", "logging_steps", "save_strategy", "disable_tqdm", "use_cpu", "seed")
    config = DPOConfig(
        **{key: options[key] for key in keep}, report_to="none", beta=0.2, max_length=None, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trl = DPOTrainer(
        model=make_model(),
        ref_model=make_model(),
        args=config,
        train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
    )
    trl.train()
    assert len(history(ours)) == 8
    assert max(history(ours)) - min(history(ours)) > 0.05  # something is learnt, or agreement says nothing
    np.testing.assert_allclose(history(ours), history(trl), atol=2e-5, rtol=1e-4)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        np.testing.assert_allclose(history(ours, key), history(trl, key), atol=2e-3)
    learning = slice(2, None)  # before, every reward is 0 but for rounding
    assert history(ours, "rewards/accuracies")[learning] == history(trl, "rewards/accuracies")[learning]
    for (name, a), b in zip(weights(ours).items(), weights(trl).values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_alpha_zero_equals_dpo_exactly(train):
    dpo, tvkd = train(METHODS["dpo"]()), train(METHODS["tvkd"](alpha=0.0))
    assert history(dpo) == history(tvkd)
    assert all(torch.equal(a, b) for a, b in zip(weights(dpo).values(), weights(tvkd).values(), strict=True))


def test_zero_terminal_without_discount_equals_dpo_exactly(train):
    dpo, tvkd = train(METHODS["dpo"]()), train(METHODS["tvkd"](alpha=0.7, terminal="zero"))
    assert history(dpo) == history(tvkd)
    assert all(torch.equal(a, b) for a, b in zip(weights(dpo).values(), weights(tvkd).values(), strict=True))


def test_tvkd_is_dpo_with_shifted_references(train, reference, teacher, monkeypatch):
    """Any DPO trainer that takes reference columns can train TVKD: ref'(y) = ref(y) - alpha/beta * Psi(y)."""
    method = METHODS["tvkd"](alpha=0.7, beta=0.1, terminal="bootstrap")
    tvkd = train(method)

    class Shifted(METHODS["dpo"]):
        needs = method.needs

        def row_signals(self, signals):
            found = method.row_signals(signals)
            return {f"ref_{s}": found[f"ref_{s}"] - 7.0 * found[f"shaping_{s}"] for s in ("chosen", "rejected")}

    shifted = train(Shifted(beta=0.1))
    dpo = train(METHODS["dpo"](beta=0.1))
    np.testing.assert_allclose(history(tvkd), history(shifted), atol=1e-5)
    assert not np.allclose(history(tvkd), history(dpo), atol=1e-2)


def test_a_loss_without_a_gradient_is_named_before_the_first_step(tmp_path, train, pairs, make_model, capsys):
    """Of the methods with a sensible setting none is; saturated margins, weights of almost 0 and a teacher that is the
    student are."""
    data = pairs.add_column("far", [-30.0] * 24).add_column("faint", [1e-6] * 24)
    args = arguments(tmp_path, max_steps=1)
    for method, warned in (
        (METHODS["dpo"](), False),
        (METHODS["tvkd"](), False),
        (METHODS["dpo"](margin="far"), True),
        (METHODS["dpo"](weight="faint"), True),
    ):
        train(method, args=args, data=data)
        assert ("next to nothing is learnt" in capsys.readouterr().err) == warned, method
    topk = {"k": 20, "topk_coding": "float32"}
    for model, skew, warned in ((5, 0.1, False), (0, 0.1, True), (5, 0.9999, True)):
        sampled = data.rename_columns({"chosen": "teacher_response", "rejected": "student_response"})
        teacher = LiveTeacher(make_model(model), "teacher", **topk)
        train(METHODS["distillm2"](skew=skew), args=args, signals=[teacher], data=sampled)
        err = capsys.readouterr().err
        assert ("warning: the gradient of the loss at the start is" in err) == warned
        assert ("warning: DistiLLM2: skew=0.9999 leaves 1e-08 of the gradient" in err) == (skew > 0.9)


def test_gradient_checkpointing_does_not_change_the_trajectory(tmp_path, train):
    plain = train(METHODS["tvkd"]())
    saving = train(METHODS["tvkd"](), args=arguments(tmp_path, gradient_checkpointing=True))
    np.testing.assert_allclose(history(plain), history(saving), atol=1e-5)


def test_bf16_autocast_is_active_and_close_to_float32(tmp_path, train):
    """Accelerate puts autocast on the model's forward, which scoring bypasses."""
    plain = train(METHODS["dpo"]())
    half = train(METHODS["dpo"](), args=arguments(tmp_path, bf16=True))
    assert history(plain) != history(half)
    np.testing.assert_allclose(history(plain), history(half), atol=0.15)
    assert all(p.dtype == torch.float32 for p in weights(half).values())


def test_the_seed_determines_training_and_the_data_seed_the_order(tmp_path, train):
    first, second = train(METHODS["tvkd"]()), train(METHODS["tvkd"]())
    assert history(first) == history(second)
    other = train(METHODS["tvkd"](), args=arguments(tmp_path, data_seed=12))
    assert history(first) != history(other)


def test_adapters_train_and_the_base_is_unchanged(tmp_path, train, make_model):
    from peft import LoraConfig

    student = make_model()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = train(
        METHODS["tvkd"](),
        model=student,
        peft_config=LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"),
    )
    after = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in weights(trainer).items()
    }
    for name, value in before.items():
        assert torch.equal(after[name], value)
    assert any(p.abs().sum() > 0 for name, p in after.items() if "lora_B" in name)
    assert history(trainer)[0] == pytest.approx(history(train(METHODS["tvkd"]()))[0], abs=1e-5)


def test_adapter_initialisation_depends_only_on_the_seed(tmp_path, train):
    from peft import LoraConfig

    def trained(seed):
        torch.rand(3)  # as an earlier stage of the same process does
        config = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
        return train(METHODS["tvkd"](), peft_config=config, args=arguments(tmp_path, seed=seed))

    first, second, other = trained(3), trained(3), trained(4)
    assert history(first) == history(second)
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(weights(first).values(), weights(other).values(), strict=True))


def test_sft_reads_chosen_responses_only(tmp_path, train, make_model, pairs, tokenizer):
    store = extract_signals(make_model(), pairs, tokenizer, ("logps",), tmp_path / "s", role="reference")
    rows = range(len(pairs))
    expected = np.mean([-store.row(i)["chosen"]["logps"] / store.row(i)["chosen"]["tokens"] for i in rows])
    args = arguments(tmp_path, per_device_train_batch_size=24, max_steps=1)
    trainer = train(METHODS["sft"](), signals=[], truncation=Truncation(), args=args)
    assert history(trainer) == pytest.approx([expected], abs=1e-4)


def test_evaluation_during_training(tmp_path, train, pairs, reference, teacher):
    trainer = train(
        METHODS["tvkd"](),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=4),
        eval_dataset=pairs,
        eval_signals=[reference, teacher],
    )
    losses = history(trainer, "eval_loss")
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def test_resuming_after_ctrl_c_gives_the_weights_of_an_uninterrupted_run(
    tmp_path, make_model, pairs, tokenizer, reference, teacher
):
    def trainer(out):
        return PrefDistillTrainer(
            model=make_model(),
            method=METHODS["tvkd"](),
            args=arguments(out, save_strategy="steps", save_steps=100),
            train_dataset=pairs,
            signals=[reference, teacher],
            processing_class=tokenizer,
        )

    straight = trainer(tmp_path / "straight")
    fit(straight, tmp_path / "straight", "straight")

    broken = trainer(tmp_path / "broken")
    broken.callback_handler.callbacks.insert(0, StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tmp_path / "broken", "broken")
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    again = trainer(tmp_path / "broken")
    reading = tmp_path / "broken" / "reading.json"
    whole = reading.read_text()
    reading.write_text(json.dumps(json.loads(whole) | {"ids": "of another day"}))
    with pytest.raises(UserError, match=r"checkpoint-3 is of a training on other token ids .* delete .*checkpoints to"):
        fit(again, tmp_path / "broken", "broken")
    reading.write_text(whole)
    fit(again, tmp_path / "broken", "broken")

    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))
    logs = [
        [entry["loss"] for entry in map(json.loads, (tmp_path / run / "metrics.jsonl").open()) if "loss" in entry]
        for run in ("straight", "broken")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 8


def test_a_resumed_run_has_the_log_of_an_uninterrupted_one(tmp_path, make_model, pairs, tokenizer):
    """TRL counts tokens, and the Trainer averages the loss, from the start of the process."""
    from trl import DPOConfig, DPOTrainer

    training = Training(max_steps=4, batch_size=4, micro_batch_size=4, logging_steps=1)
    rows = pairs.select_columns(["prompt", "chosen", "rejected"])

    def trainer(out):
        models = lambda: {"model": make_model(), "ref_model": make_model()}  # noqa: E731
        kinds = (DPOConfig, DPOTrainer)
        return trl_trainer(kinds, models, rows, tokenizer, training, out, seed=0, data_seed=0, max_length=None)

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    fit(trainer(straight), straight, "straight")
    first = trainer(broken)
    first.callback_handler.callbacks.insert(0, StopAt(2))
    with pytest.raises(KeyboardInterrupt):
        fit(first, broken, "broken")
    fit(trainer(broken), broken, "broken")
    times = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    logs = [
        [{key: value for key, value in json.loads(line).items() if key not in times} for line in path.open()]
        for path in (straight / "metrics.jsonl", broken / "metrics.jsonl")
    ]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0]] == [1, 2, 3, 4, 4]


def whole_run(out, make_model, pairs, tokenizer, signals, **more):
    more = {"max_steps": 7, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 7} | more
    return PrefDistillTrainer(make_model(), METHODS["tvkd"](), arguments(out, **more), pairs, signals, tokenizer)


def test_a_finished_training_that_was_not_saved_is_only_saved(
    tmp_path, make_model, pairs, tokenizer, reference, teacher, monkeypatch
):
    """Killed between the last checkpoint and the end: resuming must not take an eighth step of seven."""
    signals = [reference, teacher]
    trained = whole_run(tmp_path, make_model, pairs, tokenizer, signals)
    fit(trained, tmp_path, "whole")
    expected = weights(trained)
    again = whole_run(tmp_path, make_model, pairs, tokenizer, signals)
    fit(again, tmp_path, "again")
    assert again.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(expected.values(), weights(again).values(), strict=True))


def test_tracker_logs_are_kept(tmp_path, make_model, pairs, tokenizer, reference, teacher):
    signals = [reference, teacher]
    fit(whole_run(tmp_path, make_model, pairs, tokenizer, signals, report_to="tensorboard"), tmp_path, "logged")
    assert list((tmp_path / "runs").rglob("*tfevents*"))


def test_an_incomplete_checkpoint_is_discarded(tmp_path, make_model, pairs, tokenizer, reference, teacher):
    signals = [reference, teacher]
    fit(whole_run(tmp_path / "straight", make_model, pairs, tokenizer, signals), tmp_path / "straight", "straight")
    first = whole_run(tmp_path / "cut", make_model, pairs, tokenizer, signals, save_steps=4)
    first.callback_handler.callbacks.insert(0, StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        fit(first, tmp_path / "cut", "first")
    partial = tmp_path / "cut" / "checkpoints" / "checkpoint-6"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    again = whole_run(tmp_path / "cut", make_model, pairs, tokenizer, signals)
    fit(again, tmp_path / "cut", "again")
    assert again.state.global_step == 7
    a, b = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("straight", "cut"))
    assert a == b


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "trainer_state.json": cut,
    "model.safetensors": cut,
    "optimizer.pt": Path.unlink,
    "scheduler.pt": Path.unlink,
    "rng_state.pth": cut,
    WHOLE: cut,
}


@pytest.mark.parametrize(("name", "earlier"), [*((name, True) for name in DAMAGE), ("optimizer.pt", False)])
def test_a_checkpoint_with_a_lost_file_is_discarded(
    name, earlier, tmp_path, make_model, pairs, tokenizer, reference, teacher, capsys
):
    """Training resumes from an earlier checkpoint or starts again. The damaged one is removed: it is newer than the one
    at step 2 and would outlive it."""
    signals = [reference, teacher]
    every = {"save_steps": 2, "save_total_limit": 2 if earlier else 1}
    fit(whole_run(tmp_path / "straight", make_model, pairs, tokenizer, signals), tmp_path / "straight", "straight")
    first = whole_run(tmp_path / "cut", make_model, pairs, tokenizer, signals, **every)
    first.callback_handler.callbacks.insert(0, StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        fit(first, tmp_path / "cut", "first")
    damaged = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    DAMAGE[name](damaged / name)
    capsys.readouterr()
    again = whole_run(tmp_path / "cut", make_model, pairs, tokenizer, signals, **every)
    again.callback_handler.callbacks.insert(0, StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        fit(again, tmp_path / "cut", "again")
    output = capsys.readouterr().err
    assert f"{damaged} is removed: its {name} is missing or has changed size" in output
    assert ("again: resuming from step 2" in output) is earlier
    assert not damaged.exists()
    fit(whole_run(tmp_path / "cut", make_model, pairs, tokenizer, signals, **every), tmp_path / "cut", "last")
    assert "last: resuming from step 3" in capsys.readouterr().err
    a, b = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("straight", "cut"))
    assert a == b


@pytest.mark.parametrize(("limit", "gone"), [(None, (2, 4, 6)), (2, (2, 4))])
def test_a_checkpoint_is_synced_before_an_old_one_is_removed(
    limit, gone, tmp_path, make_model, pairs, tokenizer, reference, teacher, monkeypatch
):
    """And the model before its stage is marked done: a power loss can undo what was not synced."""
    synced, removed = set(), []
    fsync, rmtree = os.fsync, shutil.rmtree

    def record_sync(descriptor):
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_removal(path, *args, **options):
        if Path(path).name.startswith("checkpoint-"):
            made = max(Path(path).parent.glob("checkpoint-*"))
            left = {made.parent, made, *made.rglob("*")} - synced - {made / WHOLE}  # renamed since it was synced
            removed.append((Path(path).name, sorted(left), (made / WHOLE).is_file()))
        rmtree(path, *args, **options)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(shutil, "rmtree", record_removal)
    out = tmp_path / "out"

    def make(out):
        options = {"save_steps": 2, "save_total_limit": limit}
        fit(whole_run(out, make_model, pairs, tokenizer, [reference, teacher], **options), out, "distill")

    run_stage("distill", out, {}, make)
    assert removed == [(f"checkpoint-{step}", [], True) for step in gone]
    assert {out, out / "model.safetensors", out / "config.json", out / "tokenizer.json"} <= synced


def test_adapters_can_be_stacked_without_loss(tmp_path, make_model, pairs, tokenizer, teacher):
    """A second adapter is trained on base and first adapter; what is saved holds both."""
    from peft import LoraConfig

    from prefdistill.models.load import load_model

    lora = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")

    def adapt(model, out):
        own = extract_signals(model, pairs, tokenizer, ("logps",), out / "reference", role="reference")
        trainer = PrefDistillTrainer(
            model, METHODS["tvkd"](), arguments(out, learning_rate=1e-2), pairs, [own, teacher], tokenizer,
            peft_config=lora,
        )  # fmt: skip
        fit(trainer, out, "adapter")
        return load_model(str(out)).state_dict()

    base = make_model()
    base.save_pretrained(tmp_path / "base")
    first = adapt(load_model(str(tmp_path / "base")), tmp_path / "first")
    second = adapt(load_model(str(tmp_path / "first")), tmp_path / "second")
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b, c = base.state_dict()[name], first[name], second[name]
    assert (b - a).abs().max() > 1e-4
    assert (c - b).abs().max() > 1e-4
    update = torch.linalg.matrix_rank(c - a, atol=1e-5)
    assert update > 4  # two adapters of rank 4: more than the last alone can do
    assert (tmp_path / "second" / "adapter" / "adapter_config.json").exists()


def test_disable_dropout_in_models_that_hold_it_as_a_number():
    import transformers as tf

    from prefdistill.training.trainer import disable_dropout

    config = tf.OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        dropout=0.5, attention_dropout=0.5,
    )  # fmt: skip
    model = tf.OPTForCausalLM(config).train()
    ids = torch.randint(3, 97, (2, 9))
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    disable_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_missing_signal_names_the_command_that_extracts_it(train, reference):
    with pytest.raises(UserError, match=r"TVKD lacks teacher.values of chosen, rejected. .*teacher --kind values"):
        train(METHODS["tvkd"](), signals=[reference])
    with pytest.raises(UserError, match=r"DPO lacks reference.logps of chosen, rejected"):
        train(METHODS["dpo"](), signals=[])
    with pytest.raises(UserError, match=r"teacher_reference.logps of chosen, rejected"):
        train(METHODS["tvkd"](potential="implicit_reward"))


def test_signals_of_another_tokenizer_are_refused(tmp_path, make_model, pairs, tokenizer, reference):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|assistant|>", "<|assistant|>:")
    with pytest.raises(UserError, match=r"another tokenizer .*template_sha256"):
        PrefDistillTrainer(make_model(), METHODS["dpo"](), arguments(tmp_path), pairs, [reference], other)


def test_values_of_another_temperature_are_refused(train):
    with pytest.raises(UserError, match=r"value_temperature=1\.0, the method needs 0\.5"):
        train(METHODS["tvkd"](value_temperature=0.5))


def test_a_constant_signal_is_an_error(tmp_path, train, make_model, pairs, tokenizer, reference):
    """A head of zeros gives every state the same value."""
    model = make_model()
    model.lm_head.weight.data.zero_()
    flat = extract_signals(model, pairs, tokenizer, ("values",), tmp_path / "flat")
    with pytest.raises(UserError, match="it carries no information"):
        train(METHODS["tvkd"](), signals=[reference, flat])


def test_a_non_finite_loss_stops_and_names_step_and_rows(tmp_path, train, make_model, pairs, tokenizer):
    distributions = extract_signals(make_model(5), pairs, tokenizer, ("topk",), tmp_path / "topk", k=4)
    student = make_model()
    student.lm_head.weight.data[5] = float("inf")
    with pytest.raises(UserError, match=r"loss is nan at step 1, rows \[\d+, \d+, \d+, \d+\]"):
        train(METHODS["dckd"](), model=student, signals=[distributions])


def test_a_reference_that_is_not_the_student_is_refused(tmp_path, train, make_model):
    train(METHODS["dpo"]())
    other = make_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 2] += 1e-3  # of one weight, which no loss would show
    other.save_pretrained(tmp_path / "other")
    named = rf"another model .*in float32\) than the student starts from \({tmp_path}/other, in float32\)"
    with pytest.raises(UserError, match=named):
        train(METHODS["dpo"](), model=str(tmp_path / "other"))
    with pytest.raises(UserError, match="another model"):
        train(METHODS["dpo"](), model=make_model(num_hidden_layers=1))


def test_held_out_reference_signals_are_checked_too(tmp_path, train, make_model, pairs, tokenizer):
    other = extract_signals(make_model(3), pairs, tokenizer, ("logps",), tmp_path / "other", role="reference")
    with pytest.raises(UserError, match="the reference signals were made from another model"):
        train(METHODS["dpo"](), eval_dataset=pairs, eval_signals=[other])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_reference_in_another_dtype_passes_if_its_weights_are_equal(
    tmp_path, train, make_model, pairs, tokenizer, dtype
):
    """16-bit weights loaded in 32 bits are the same model; weights that lost bits are not."""
    stored = make_model().to(dtype)
    narrow = extract_signals(stored, pairs, tokenizer, ("logps",), tmp_path / "narrow", role="reference")
    train(METHODS["dpo"](), model=make_model().to(dtype).float(), signals=[narrow])
    wide = extract_signals(make_model(), pairs, tokenizer, ("logps",), tmp_path / "wide", role="reference")
    with pytest.raises(UserError, match=rf"in float32\) than the student .*in {str(dtype)[6:]}"):
        train(METHODS["dpo"](), model=make_model().to(dtype), signals=[wide])
    with pytest.raises(UserError, match=rf"in {str(dtype)[6:]}\) than the student .*in float32.* --dtype float32"):
        train(METHODS["dpo"](), model=make_model(), signals=[narrow])


def test_a_reference_with_another_configuration_warns(tmp_path, train, make_model, pairs, tokenizer, capsys):
    same_weights = make_model(rms_norm_eps=1e-2)
    store = extract_signals(same_weights, pairs, tokenizer, ("logps",), tmp_path / "s", role="reference")
    train(METHODS["dpo"](), signals=[store])
    assert "computed with another configuration (rms_norm_eps is 1e-06, was 0.01)" in capsys.readouterr().err


def test_a_reference_in_another_precision_warns(tmp_path, train, make_model, pairs, tokenizer, capsys):
    store = extract_signals(make_model(), pairs, tokenizer, ("logps",), tmp_path / "s", role="reference", bf16=True)
    train(METHODS["dpo"](), signals=[store])
    assert "note: the student is trained with bf16=False and its reference signals were computed with bf16=True" in (
        capsys.readouterr().err
    )


def test_an_adapter_that_differs_from_its_reference_warns(train, make_model, capsys):
    """With a model that is wrapped in an adapter already: its weights are not compared, its log-probs are."""
    from peft import LoraConfig, get_peft_model

    def adapted(**options):
        torch.manual_seed(0)
        return get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "up_proj"], **options))

    train(METHODS["dpo"](), model=adapted())
    assert "differ by" not in capsys.readouterr().err
    train(METHODS["dpo"](), model=adapted(init_lora_weights=False))
    assert "student and its reference signals differ by" in capsys.readouterr().err


def test_a_checkpoint_saved_twice_is_complete(tmp_path, make_model, tokenizer, pairs):
    """Once for the step that Ctrl-C ends, and once for the epoch that ends with it."""
    from transformers import TrainerControl, TrainerState

    from prefdistill.training.checkpoints import SealCheckpoints, last_checkpoint

    args, state = TrainingArguments(output_dir=str(tmp_path)), TrainerState(global_step=3)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.safetensors").write_text("weights")
    for _ in range(2):
        SealCheckpoints().on_save(args, state, TrainerControl())
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
