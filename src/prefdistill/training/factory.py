"""Make the trainer of any method, and TRL's trainers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from prefdistill.core.errors import UserError
from prefdistill.core.stages import CHECKPOINTS
from prefdistill.data.truncation import Truncation
from prefdistill.methods import Method
from prefdistill.signals.store import Signals
from prefdistill.training.arguments import adapter_config, training_arguments
from prefdistill.training.engines import check_trainable, load_whole_models, with_sharding
from prefdistill.training.nan_guard import with_nan_guard
from prefdistill.training.row_means import with_row_means
from prefdistill.training.trainer import PrefDistillTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefdistill.training.options import Training


def check_training(training: "Training") -> None:
    """Check the arguments of a method's training, before anything is loaded or written.

    Raises:
        UserError: as `training_arguments` does.
    """
    training_arguments(training, Path(CHECKPOINTS), seed=0, data_seed=0)


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
        load: loads the student's start.
        pairs, tokenizer, signals, truncation: as for `PrefDistillTrainer`.
        training: steps, sizes, adapters.
        out: directory for the trained model.
        seed, data_seed: of everything random, and of the order of the rows (default: `seed`).

    Raises:
        UserError: as `PrefDistillTrainer` does.
    """
    data_seed = seed if data_seed is None else data_seed
    args = training_arguments(training, out / CHECKPOINTS, seed=seed, data_seed=data_seed)
    load_whole_models()
    with _trainer_errors():
        return PrefDistillTrainer(
            model=_plain(load(), args),
            method=method,
            args=args,
            train_dataset=pairs,
            signals=signals,
            processing_class=tokenizer,
            peft_config=adapter_config(training),
            truncation=truncation,
            router_aux_loss_coef=training.router_aux_loss_coef,
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
    load_whole_models()
    with _trainer_errors():
        loaded = {name: model and _plain(model, args) for name, model in models().items()}
        return with_nan_guard(with_row_means(with_sharding(trainer_class)))(
            **loaded, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter_config(training)
        )


def _plain(model: Any, args: Any) -> Any:
    """Return the model if it has no unmerged adapter, whose base would not be trained, and the engine can shard it.

    Raises:
        UserError: if not.
    """
    check_trainable(model, args)
    if hasattr(model, "peft_config"):
        raise UserError(
            "a training cannot start from an adapter that is not merged into its base; train in dtype=float32, or save "
            "it merged first"
        )
    return model


@contextmanager
def _trainer_errors() -> Iterator[None]:
    """Turn a ValueError of a trainer's constructor, such as for an adapter of unknown layers, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the trainer cannot be made: {' '.join(str(error).split())}") from error
