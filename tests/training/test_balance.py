"""The load-balancing loss of mixtures of experts: TRL's trajectory, layouts, models without one."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from prefdistill import METHODS, PrefDistillTrainer
from prefdistill.core.errors import UserError
from prefdistill.data.batches import Document, Layout, make_batch
from prefdistill.models.balance import balance_coefficient
from prefdistill.models.logprobs import reduce_logits, token_logps
from prefdistill.signals import LiveTeacher
from prefdistill.training.arguments import training_arguments
from prefdistill.training.options import DPOTraining, Training

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS | {"head_dim": 8, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def mixture(tokenizer):
    """A small model of a family of mixtures of experts, with routers that are far from balanced."""

    def make(family="mixtral", **more):
        torch.manual_seed(0)
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        shape = SHAPE | {"intermediate_size": 32, "vocab_size": len(tokenizer)}
        options = shape | ids | FAMILIES.get(family, {}) | more
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).float()
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and len(weight) == 4 and "gate" in name:
                weight.data *= 40.0
        return model

    return make


OPTIONS = {
    "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none",
    "save_strategy": "no", "use_cpu": True, "seed": 1, "disable_tqdm": True,
}  # fmt: skip


def trained(model, reference, pairs, tokenizer, out, coefficient=None, **more):
    trainer = PrefDistillTrainer(
        model, METHODS["dpo"](beta=0.2), TrainingArguments(str(out), **OPTIONS | more), pairs,
        [LiveTeacher(reference, "reference")], tokenizer, router_aux_loss_coef=coefficient,
    )  # fmt: skip
    trainer.train()
    return trainer


def trained_by_trl(model, reference, pairs, tokenizer, out, coefficient=None):
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        str(out), **OPTIONS, beta=0.2, max_length=None, bf16=False, gradient_checkpointing=False,
        router_aux_loss_coef=coefficient,
    )  # fmt: skip
    rows = pairs.select_columns(["prompt", "chosen", "rejected"])
    trainer = DPOTrainer(model=model, ref_model=reference, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(
    ("family", "coefficient", "own"),
    [
        ("mixtral", None, 0.5),
        ("mixtral", 0.0, 0.5),
        ("mixtral", 0.7, 0.001),
        ("qwen2_moe", None, 0.5),
        ("qwen3_moe", None, 0.5),
        ("olmoe", None, 0.5),
    ],
)
def test_dpo_has_the_trajectory_of_trl(family, coefficient, own, mixture, pairs, tokenizer, tmp_path):
    """With the model's own coefficient, another one, and none."""
    models = [mixture(family, router_aux_loss_coef=own) for _ in range(4)]
    ours = trained(*models[:2], pairs, tokenizer, tmp_path / "ours", coefficient)
    trl = trained_by_trl(*models[2:], pairs, tokenizer, tmp_path / "trl", coefficient)
    shares_prompts = ours.data_collator.pairs.layout.kind == "masked"  # TRL shares none
    assert shares_prompts == (family != "qwen2_moe")
    assert len(history(ours, "loss")) == 4
    for key in ("loss", "grad_norm", *(["aux_loss"] if coefficient != 0 else [])):
        np.testing.assert_allclose(history(ours, key), history(trl, key), rtol=2e-4, atol=2e-5, err_msg=key)
    assert bool(history(ours, "aux_loss")) == (coefficient != 0)


def test_the_loss_changes_what_is_learnt_and_checkpointing_does_not(mixture, pairs, tokenizer, tmp_path):
    with_loss, saving, without = (
        trained(*(mixture(router_aux_loss_coef=own) for _ in range(2)), pairs, tokenizer, tmp_path, **more)
        for own, more in ((0.5, {}), (0.5, {"gradient_checkpointing": True}), (0.0, {}))
    )
    np.testing.assert_allclose(history(with_loss, "grad_norm"), history(saving, "grad_norm"), rtol=1e-4)
    assert not np.allclose(history(with_loss, "grad_norm"), history(without, "grad_norm"), rtol=0.05)


@pytest.mark.parametrize("kind", ["padded", "masked"])
def test_the_loss_is_that_of_documents_of_one_response(kind, mixture, tokenizer):
    """In any layout: padding does not count, and a shared prompt counts for each of its responses."""
    model = mixture()
    texts = [([5, 6, 7, 8, 9, 10, 11], [[12, 13], [14, 15, 16]]), ([20, 21], [[22], [23, 24]])]
    documents = [
        Document(prompt, [(2 * n + place, ids) for place, ids in enumerate(responses)])
        for n, (prompt, responses) in enumerate(texts)
    ]
    layout = Layout(kind)
    shared = documents if kind == "masked" else [part for document in documents for part in document.split()]
    batch = make_batch(layout.rows(shared), tokenizer.pad_token_id)
    assert ("occurrences" in batch) == (kind == "masked")
    logps, loss = reduce_logits(model, batch, token_logps, batch["tokens"], balance=True)
    model.config.output_router_logits = True  # as TRL's SFT leaves it: what is read of a teacher is the same
    (same,) = reduce_logits(model, batch, token_logps, batch["tokens"])
    assert torch.equal(logps, same)
    logits = []
    for prompt, responses in texts:
        for response in responses:
            logits.append(model.model(torch.tensor([prompt + response]), output_router_logits=True).router_logits)
    layers = tuple(torch.cat(parts) for parts in zip(*logits, strict=True))
    assert loss.item() == pytest.approx(load_balancing_loss_func(layers, 4, 2).item(), rel=1e-5)


def test_models_without_the_loss(make_model, mixture):
    dense, mute = make_model(num_hidden_layers=1), mixture("deepseek_v3", **DEEPSEEK)
    assert balance_coefficient(dense) == balance_coefficient(mute) == 0.0
    for model in (dense, mute):
        with pytest.raises(UserError, match=r"router_aux_loss_coef=0\.1, but .* returns no router logits"):
            balance_coefficient(model, 0.1)
    assert balance_coefficient(mixture()) == 0.001  # Mixtral's default


DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip


def test_the_option_reaches_trl_and_is_refused_for_a_reward_model(tmp_path):
    from trl import DPOConfig, RewardConfig, SFTConfig

    training = DPOTraining(router_aux_loss_coef=0.3)
    for kind in (DPOConfig, SFTConfig):
        args = training_arguments(training, tmp_path, seed=0, data_seed=0, kind=kind)
        assert args.router_aux_loss_coef == 0.3
    with pytest.raises(UserError, match=r"router_aux_loss_coef has no effect on a training with RewardConfig"):
        training_arguments(training, tmp_path, seed=0, data_seed=0, kind=RewardConfig)
    with pytest.raises(UserError, match=r"arguments\.router_aux_loss_coef is set by router_aux_loss_coef"):
        Training.checked("training", arguments={"router_aux_loss_coef": 0.1})
