"""Train with TRL's own trainers: SFT, DPO and reward models."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say
from prefdistill.core.stages import CHECKPOINTS
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import drop_refused, longest_text
from prefdistill.data.encoder import reward_model_ids
from prefdistill.data.load import with_columns
from prefdistill.data.prompts import prompt_columns, prompt_of, template_inputs
from prefdistill.data.truncation import Truncation
from prefdistill.models.load import load_model
from prefdistill.models.positions import check_positions
from prefdistill.models.scratch import random_model
from prefdistill.training.arguments import training_arguments
from prefdistill.training.factory import trl_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import DPOTraining, Training

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def check_trl_training(training: Training) -> None:
    """Check the arguments of `train_with_trl`, before anything is loaded or written.

    Raises:
        UserError: as `training_arguments` does.
    """
    from trl import DPOConfig, SFTConfig

    kind = DPOConfig if isinstance(training, DPOTraining) else SFTConfig
    training_arguments(training, Path(CHECKPOINTS), seed=0, data_seed=0, kind=kind)


def train_with_trl(
    model: str,
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    training: Training,
    out: Path,
    *,
    truncation: Truncation,
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    what: str,
) -> None:
    """Run supervised fine-tuning, or DPO where the training is a `DPOTraining`; save the model in `out`.

    Args:
        model: where to start; it is also the reference of DPO.
        rows: `prompt` and `completion`, with the loss on completions only, or the pairs of DPO.
        what: the training, for messages.

    Raises:
        UserError: if no row has room for a response.
    """
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    dpo = isinstance(training, DPOTraining)
    columns = SIDES if dpo else ("completion",)
    rows = drop_refused(rows, tokenizer, what, columns)

    def models() -> dict[str, Any]:
        load = partial(load_model, model, dtype=dtype, trust_remote_code=trust_remote_code)
        started = {"model": load()}
        return started | {"ref_model": None if training.lora else load()} if dpo else started

    trainer = trl_trainer(
        (DPOConfig, DPOTrainer) if dpo else (SFTConfig, SFTTrainer),
        models,
        trl_rows(rows, columns),
        tokenizer,
        training,
        out,
        seed=seed,
        data_seed=seed,
        max_length=truncation.max_length,
        **({"beta": training.beta} if isinstance(training, DPOTraining) else {}),
    )
    remaining = len(trainer.train_dataset)
    if remaining == 0:
        raise UserError(f"{what}: no row has room for a response within max_length={truncation.max_length}; raise it")
    if dropped := len(rows) - remaining:  # TRL drops rows whose prompt fills max_length
        say(f"{what}: dropped {dropped} of {len(rows)} rows, whose prompts fill max_length={truncation.max_length}")
    longest, limit = longest_text(trainer.train_dataset), truncation.max_length
    check_positions(longest if limit is None else min(longest, limit), trainer.model)
    fit(trainer, out, what, verify=training.verify)


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
        {f"{side}_ids": reward_model_ids(tokenizer, prompt_of(row), row[side])[:positions] for side in SIDES}
        for row in pairs
    ]
    trainer = trl_trainer(
        (RewardConfig, RewardTrainer),
        lambda: {"model": model},
        Dataset.from_list(ids),
        tokenizer,
        training,
        out,
        seed=seed,
        data_seed=seed,
        max_length=None,
    )
    fit(trainer, out, what, verify=training.verify)


def trl_rows(rows: "Dataset", responses: Sequence[str]) -> "Dataset":
    """Return the prompts and responses of rows in the columns from which TRL renders the same texts."""
    plain = rows.select_columns(["prompt", *responses])
    inputs = [template_inputs(row) for row in rows.select_columns(prompt_columns(rows.column_names))]
    if not any(inputs):
        return plain
    tools = [row.pop("tools", None) for row in inputs]
    return with_columns(plain, {"tools": tools, "chat_template_kwargs": inputs})
