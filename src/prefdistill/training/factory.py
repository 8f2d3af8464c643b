"""Make the trainer of any method: `PrefDistillTrainer`, or TRL's own for the methods that TRL has."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say
from prefdistill.core.stages import CHECKPOINTS
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs, longest_text, reading_of
from prefdistill.data.truncation import Truncation
from prefdistill.methods import Method, TRLMethod
from prefdistill.models.positions import check_positions
from prefdistill.signals.store import Signals
from prefdistill.training.arguments import adapter_config, training_arguments
from prefdistill.training.nan_guard import with_nan_guard
from prefdistill.training.options import argument_problems
from prefdistill.training.trainer import PrefDistillTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefdistill.training.options import Training


# Arguments of TRL without an effect on rows that are encoded before it sees them, and why.
UNUSED_IN_TRL = {
    **dict.fromkeys(("dataset_num_proc", "truncation_mode"), "the rows are encoded and truncated before"),
    **dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_ref_batch_size"), "TRL computes reference log-probs during training"
    ),
}


def check_training(method: Method, training: "Training") -> None:
    """Check the arguments of a method's training, before anything is loaded or written.

    Raises:
        UserError: as `training_arguments` does.
    """
    if isinstance(method, TRLMethod):
        kind, own = method.classes()[0], _arguments_of(method, training)
        training_arguments(training, Path(CHECKPOINTS), seed=0, data_seed=0, kind=kind, **own)
    else:
        training_arguments(training, Path(CHECKPOINTS), seed=0, data_seed=0)


def _arguments_of(method: TRLMethod, training: "Training") -> dict[str, Any]:
    """Return the arguments that a method sets itself."""
    if clashes := argument_problems(training.arguments, unused=UNUSED_IN_TRL):
        raise UserError(*clashes, where="training arguments")
    return {"max_length": sys.maxsize, **method.arguments()}  # `encode_pairs` has truncated the rows


def make_trainer(
    method: Method,
    load: Callable[[], "PreTrainedModel"],
    pairs: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    training: "Training",
    out: Path,
    *,
    signals: Sequence[Signals] = (),
    truncation: Truncation | None = None,
    seed: int = 0,
    data_seed: int | None = None,
) -> Trainer:
    """Return the trainer of any method, with its checkpoints under `out`.

    Args:
        method: of `METHODS`.
        load: loads the student's start; TRL's trainers may call it twice.
        pairs, tokenizer, signals, truncation: as for `PrefDistillTrainer`.
        training: steps, sizes, adapters.
        out: directory for the trained model.
        seed, data_seed: of everything random, and of the order of the rows (default: `seed`).

    Raises:
        UserError: as `PrefDistillTrainer` does.
    """
    data_seed = seed if data_seed is None else data_seed
    if isinstance(method, TRLMethod):
        if signals:
            raise UserError(f"{type(method).__name__} is trained by TRL on the pairs alone; leave the signals out")
        encoded, dropped = encode_pairs(pairs, tokenizer, truncation or Truncation())
        if not (reading := reading_of(encoded, dropped)).complete:
            say(f"training: {reading}")
        trainer = trl_trainer(
            method.classes(),
            lambda: method.models(load, adapter=training.lora is not None),
            pairs.select(encoded["row"][:1]).select_columns(["prompt", *SIDES]),
            tokenizer,
            training,
            out,
            seed=seed,
            data_seed=data_seed,
            **_arguments_of(method, training),
        )
        columns = ["prompt_ids", *(f"{side}_ids" for side in SIDES)]
        check_positions(longest_text(encoded.select_columns(columns)), trainer.model)
        # The same tokens that every other method is trained on. TRL's own rows have more of them after the end token:
        # what the template writes there, or an EOS.
        trainer.train_dataset = method.rows(encoded)
        return trainer
    with _trainer_errors():
        return PrefDistillTrainer(
            model=load(),
            method=method,
            args=training_arguments(training, out / CHECKPOINTS, seed=seed, data_seed=data_seed),
            train_dataset=pairs,
            signals=signals,
            processing_class=tokenizer,
            peft_config=adapter_config(training),
            truncation=truncation,
        )


def trl_trainer(
    classes: tuple[type[Any], type[Any]],
    models: Callable[[], dict[str, Any]],
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    training: "Training",
    out: Path,
    *,
    seed: int,
    data_seed: int,
    **arguments: Any,
) -> Any:
    """Return one of TRL's trainers, with its checkpoints under `out`.

    Args:
        classes: of TRL's arguments and trainer.
        models: loads the trainer's models, by parameter.
        rows: in the form that the trainer takes.
        arguments: of the trainer, besides those of `training`.
    """
    config_class, trainer_class = classes
    args = training_arguments(
        training, out / CHECKPOINTS, seed=seed, data_seed=data_seed, kind=config_class, **arguments
    )
    with _trainer_errors():
        return with_nan_guard(trainer_class)(
            **models(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter_config(training)
        )


@contextmanager
def _trainer_errors() -> Iterator[None]:
    """Turn a ValueError of a trainer's constructor, such as for an adapter of unknown layers, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the trainer cannot be made: {' '.join(str(error).split())}") from error
