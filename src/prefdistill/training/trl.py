"""Train with TRL's own trainers: SFT, DPO and reward models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say
from prefdistill.core.stages import CHECKPOINTS
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import drop_refused
from prefdistill.data.encoder import reward_model_ids
from prefdistill.data.truncation import Truncation
from prefdistill.models.load import load_model
from prefdistill.models.scratch import random_model
from prefdistill.training.arguments import adapter_config, training_arguments
from prefdistill.training.factory import trainer_errors
from prefdistill.training.loop import fit
from prefdistill.training.nan_guard import with_nan_guard
from prefdistill.training.options import DPOTraining, Training

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def train_sft(
    model: str,
    demonstrations: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    training: Training,
    out: Path,
    *,
    truncation: Truncation,
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    what: str = "sft",
) -> None:
    """Run supervised fine-tuning on `prompt`/`completion` rows, loss on completions only; save the model in `out`."""
    from trl import SFTConfig, SFTTrainer

    demonstrations = drop_refused(demonstrations, tokenizer, what, ("completion",))
    args = training_arguments(
        training, out / CHECKPOINTS, seed=seed, data_seed=seed, kind=SFTConfig, max_length=truncation.max_length
    )
    with trainer_errors():
        trainer = with_nan_guard(SFTTrainer)(
            model=load_model(model, dtype=dtype, trust_remote_code=trust_remote_code),
            args=args,
            train_dataset=demonstrations.select_columns(["prompt", "completion"]),
            processing_class=tokenizer,
            peft_config=adapter_config(training),
        )
    _report_dropped(trainer, len(demonstrations), truncation, what)
    fit(trainer, out, what)


def train_dpo(
    model: str,
    pairs: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    training: DPOTraining,
    out: Path,
    *,
    truncation: Truncation,
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    what: str = "dpo",
) -> None:
    """Run DPO with the model itself as the reference; save the model in `out`."""
    from trl import DPOConfig, DPOTrainer

    pairs = drop_refused(pairs, tokenizer, what)
    args = training_arguments(
        training,
        out / CHECKPOINTS,
        seed=seed,
        data_seed=seed,
        kind=DPOConfig,
        max_length=truncation.max_length,
        beta=training.beta,
    )
    with trainer_errors():
        trainer = with_nan_guard(DPOTrainer)(
            model=load_model(model, dtype=dtype, trust_remote_code=trust_remote_code),
            ref_model=None if training.lora else load_model(model, dtype=dtype, trust_remote_code=trust_remote_code),
            args=args,
            train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
            processing_class=tokenizer,
            peft_config=adapter_config(training),
        )
    _report_dropped(trainer, len(pairs), truncation, what)
    fit(trainer, out, what)


def train_reward(
    shape: dict[str, Any],
    pairs: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    training: Training,
    out: Path,
    *,
    seed: int = 0,
    what: str = "reward model",
) -> None:
    """Train a reward model of this shape from random weights with the Bradley-Terry loss; save it in `out`.

    A response is scored as `RewardModel` scores it later: whole, or up to the last position of the model.
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs = drop_refused(pairs, tokenizer, what)
    model = random_model(tokenizer, shape, seed, reward=True)
    positions = model.config.max_position_embeddings
    ids = [
        {f"{side}_ids": reward_model_ids(tokenizer, row["prompt"], row[side])[:positions] for side in SIDES}
        for row in pairs
    ]
    args = training_arguments(
        training, out / CHECKPOINTS, seed=seed, data_seed=seed, kind=RewardConfig, max_length=None
    )
    with trainer_errors():
        trainer = with_nan_guard(RewardTrainer)(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(ids),
            processing_class=tokenizer,
            peft_config=adapter_config(training),
        )
    fit(trainer, out, what)


def _report_dropped(trainer: Any, rows: int, truncation: Truncation, what: str) -> None:
    """Say how many rows TRL dropped because their prompt fills max_length; refuse if none is left."""
    remaining = len(trainer.train_dataset)
    if remaining == 0:
        raise UserError(f"{what}: no row has room for a response within max_length={truncation.max_length}; raise it")
    if remaining < rows:
        say(f"{what}: dropped {rows - remaining} of {rows} rows, whose prompts fill max_length={truncation.max_length}")
