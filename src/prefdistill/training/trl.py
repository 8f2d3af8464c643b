"""Train with TRL's own trainers: SFT, DPO and reward models."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say
from prefdistill.core.stages import CHECKPOINTS
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import drop_refused, encode_pairs, longest_text
from prefdistill.data.encoder import reward_model_ids
from prefdistill.data.prompts import prompt_of
from prefdistill.data.sources import NO_CACHE
from prefdistill.data.truncation import Reading, Truncation
from prefdistill.models.load import load_model
from prefdistill.models.positions import check_positions
from prefdistill.training.arguments import training_arguments
from prefdistill.training.factory import trl_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import DPOTraining, Training
from prefdistill.training.rows import reading_with_ids
from prefdistill.training.trainer import disable_dropout

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_trl_training(training: Training) -> None:
    """Check the arguments of `train_with_trl`, before anything is loaded or written.

    Raises:
        UserError: as `training_arguments` does; also for an adapter on the head, which TRL's losses do not run.
    """
    from trl import DPOConfig, SFTConfig

    targets = training.lora.target_modules if training.lora else []
    if "lm_head" in (name.rpartition(".")[2] for name in ([targets] if isinstance(targets, str) else targets)):
        raise UserError(
            "lora.target_modules: TRL's losses use the weight of lm_head, not its adapter, which would not be trained; "
            "leave lm_head out"
        )

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

    Rows become the same tokens as for every method. TRL's own would have more of them after the end token, what the
    template writes there, and would keep rows whose response cannot be separated from the prompt.

    Args:
        model: where to start; it is also the reference of DPO.
        rows: `prompt` and `completion`, with the loss on completions only, or the pairs of DPO.
        what: the training, for messages.

    Raises:
        UserError: as `encode_pairs` does.
    """
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    dpo = isinstance(training, DPOTraining)
    responses = SIDES if dpo else ("completion",)
    encoded, dropped = encode_pairs(rows, tokenizer, truncation, responses=responses)
    reading = reading_with_ids(encoded, dropped, responses)
    if not reading.complete:
        say(f"{what}: {reading}")

    def models() -> dict[str, Any]:
        load = partial(load_model, model, dtype=dtype, trust_remote_code=trust_remote_code)
        if not dpo:
            return {"model": load()}
        student, reference = load(), None if training.lora else load().requires_grad_(False)
        for one in filter(None, (student, reference)):
            disable_dropout(one)  # TRL would turn off that of an adapter, `lora.dropout`, as well
        return {"model": student, "ref_model": reference}

    trainer = trl_trainer(
        (DPOConfig, DPOTrainer) if dpo else (SFTConfig, SFTTrainer),
        models,
        _placeholder(tokenizer) if dpo else _sft_rows(encoded),
        tokenizer,
        training,
        out,
        seed=seed,
        data_seed=seed,
        max_length=None,  # `encode_pairs` has truncated the rows
        **({"beta": training.beta, "disable_dropout": False} if isinstance(training, DPOTraining) else {}),
    )
    if dpo:
        trainer.train_dataset = encoded.select_columns(["prompt_ids", *(f"{side}_ids" for side in SIDES)])
    check_positions(longest_text(trainer.train_dataset), trainer.model)
    fit(trainer, out, what, verify=training.verify, reading=reading)


def _sft_rows(encoded: "Dataset") -> "Dataset":
    """Return rows of `encode_pairs` in the columns of TRL's SFT, with the loss on completions."""

    def row(pair: dict[str, list[int]]) -> dict[str, list[int]]:
        prompt, completion = pair["prompt_ids"], pair["completion_ids"]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    return encoded.map(row, remove_columns=encoded.column_names, **NO_CACHE)


def _placeholder(tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """Return a row for the constructor of TRL's DPO, which renders and tokenizes rows itself."""
    from datasets import Dataset

    texts = {"prompt": ("user", "a"), **dict.fromkeys(SIDES, ("assistant", " b"))}  # a blank, where no token merges
    if tokenizer.eos_token is not None:  # plain text, which no chat template refuses
        return Dataset.from_list([{name: text for name, (_, text) in texts.items()}])
    return Dataset.from_list([{name: [{"role": role, "content": text}] for name, (role, text) in texts.items()}])


def train_reward(
    make_model: Callable[[], "PreTrainedModel"],
    pairs: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    training: Training,
    out: Path,
    *,
    seed: int = 0,
    what: str = "reward model",
) -> None:
    """Train a reward model with the Bradley-Terry loss; save it in `out`.

    A response is scored as `RewardModel` scores it later: whole, or up to the last position of the model.

    Args:
        make_model: returns the one-label classifier to train.
        pairs: to learn from; those that its template refuses are dropped.
        tokenizer: the classifier's.
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs, dropped = drop_refused(pairs, tokenizer, what)
    model = make_model()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids = [{side: reward_model_ids(tokenizer, prompt_of(row), row[side]) for side in SIDES} for row in pairs]
    cut = sum(max(map(len, row.values())) > positions for row in ids) if positions else 0
    trainer = trl_trainer(
        (RewardConfig, RewardTrainer),
        lambda: {"model": model},
        Dataset.from_list([{f"{side}_ids": row[side][:positions] for side in SIDES} for row in ids]),
        tokenizer,
        training,
        out,
        seed=seed,
        data_seed=seed,
        max_length=None,
    )
    fit(trainer, out, what, verify=training.verify, reading=Reading(len(pairs), dropped, 0, cut))
