"""TRL's trainers give every row of a batch the same weight, however the batch is cut into micro-batches."""

import pytest
import torch
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from prefdistill.models.scratch import random_model
from prefdistill.training.factory import trl_trainer
from prefdistill.training.options import Training

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SGD = {"optim": "sgd"}
OPTIONS = {"batch_size": 4, "epochs": 1, "learning_rate": 0.5, "warmup": 0, "schedule": "constant", "max_grad_norm": 0,
           "logging_steps": 1, "arguments": SGD}  # fmt: skip
KINDS = {
    "dpo": ((DPOConfig, DPOTrainer), ("rewards/margins", "rewards/chosen", "logps/rejected")),
    "reward": ((RewardConfig, RewardTrainer), ("margin", "accuracy", "mean_reward")),
    "sft": ((SFTConfig, SFTTrainer), ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_micro_batch_weighs_its_rows_like_others(kind, pairs, tokenizer, tmp_path):
    """Seven rows in batches of 4: the second has 3. TRL's logged means over tokens are not compared."""
    classes, keys = KINDS[kind]
    rows = pairs.select(range(7)).select_columns(["prompt", "chosen", "rejected"])
    if kind == "sft":
        rows = rows.rename_column("chosen", "completion").remove_columns("rejected")

    def trained(micro):
        def models():
            model = {"model": random_model(tokenizer, SHAPE, 0, reward=kind == "reward")}
            return model | ({"ref_model": random_model(tokenizer, SHAPE, 0)} if kind == "dpo" else {})

        training = Training(**OPTIONS, micro_batch_size=micro)
        out = tmp_path / str(micro)
        trainer = trl_trainer(classes, models, rows, tokenizer, training, out, seed=0, data_seed=0, max_length=None)
        trainer.train()
        logged = [[entry[key] for key in ("loss", *keys)] for entry in trainer.state.log_history if "loss" in entry]
        return torch.tensor(logged), torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    whole, weights = trained(4)
    assert len(whole) == 2
    assert not torch.equal(whole[0], whole[1])
    for micro in (2, 1):
        logged, other = trained(micro)
        torch.testing.assert_close(logged, whole, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other, weights, atol=1e-6, rtol=0)
