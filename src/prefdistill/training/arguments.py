"""Convert training options to `TrainingArguments` and `LoraConfig`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from pydantic import create_model
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from prefdistill.core.errors import UserError
from prefdistill.core.options import Options, Section, validate
from prefdistill.core.processes import processes
from prefdistill.core.progress import say_once
from prefdistill.training.engines import check_engine, device_arguments
from prefdistill.training.options import Training, argument_problems

if TYPE_CHECKING:
    from peft import LoraConfig

UNUSED_BUT_IN_SFT = {"label_smoothing_factor": "the method has its own loss"}
_ENCODED = "rows are encoded and truncated before TRL sees them"
UNUSED_IN_TRL = {
    **dict.fromkeys(("dataset_kwargs", "dataset_num_proc", "truncation_mode"), _ENCODED),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "the loss is that of the completion"),
    **dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_ref_batch_size"), "TRL computes reference log-probs during training"
    ),
}
OPTIMIZERS_OF_A_MODEL = ("galore", "lomo", "adalomo", "apollo")  # they need the whole model


def adapter_config(training: Training) -> "LoraConfig | None":
    """Return the `LoraConfig` of a training with adapters; None without."""
    lora = training.lora
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )


def training_arguments(
    training: Training, out: Path, *, seed: int, data_seed: int, kind: type[Any] = TrainingArguments, **more: Any
) -> Any:
    """Return the matching `TrainingArguments`, or `kind` of them, such as TRL's SFTConfig.

    Raises:
        UserError: if transformers refuses them, `training.arguments` repeats an option or has no effect, a tracker of
            `report_to` is unknown or not installed, or the batch size does not fit the number of processes.
    """
    unused = UNUSED_IN_TRL | ({} if kind.__name__ == "SFTConfig" else UNUSED_BUT_IN_SFT)
    if clashes := argument_problems(training.arguments, more, unused):
        raise UserError(*clashes, where="training arguments")
    accelerator = torch.accelerator.is_available()
    micro, accumulation = split_batch(training, processes().num_processes)
    options: dict[str, Any] = {
        "learning_rate": training.learning_rate,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "warmup_steps": training.warmup,
        "lr_scheduler_type": training.schedule,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        **device_arguments(accelerator, training.autocast),
        "gradient_checkpointing": training.gradient_checkpointing,
        "logging_steps": training.logging_steps,
        "save_steps": training.save_steps,
        "report_to": training.report_to or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": accelerator,
        "seed": seed,
        "data_seed": data_seed,
        **more,
        **training.arguments,
    }
    if "router_aux_loss_coef" in get_type_hints(kind):
        options["router_aux_loss_coef"] = training.router_aux_loss_coef
    elif training.router_aux_loss_coef and kind is not TrainingArguments:
        raise UserError(f"router_aux_loss_coef has no effect on a training with {kind.__name__}; leave it out")
    _check_numbers(kind, training.arguments)
    try:
        arguments = kind(output_dir=str(out), **options)
        arguments.bf16 = training.autocast
        _check_launched_precision(arguments)
        _use_one_device(arguments)
        check_engine(arguments)
        _check_late_arguments(arguments)
        _try_optimizer(arguments)
        _try_trackers(arguments)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"training arguments: {error}".splitlines()[0]) from error
    return arguments


def _check_launched_precision(arguments: TrainingArguments) -> None:
    """Check that the launcher asks for no other precision: accelerate would train in the launcher's."""
    wanted = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", wanted):
        raise ValueError(
            f"the launcher sets mixed_precision {launched}, and this training has bf16={str(arguments.bf16).lower()}; "
            "set bf16, or launch it with --mixed_precision no"
        )


def _use_one_device(arguments: TrainingArguments) -> None:
    """Train on the first device if a single process sees several: DataParallel would multiply the batch."""
    if arguments.n_gpu > 1:
        say_once(
            f"note: training on the first of {arguments.n_gpu} GPUs; to use all, start it with `accelerate launch`, or "
            "name it under `launch` in a recipe"
        )
        arguments._n_gpu = 1  # transformers has no public name for it


def split_batch(training: Training, processes: int) -> tuple[int, int]:
    """Return the rows of a micro-batch, and how many of these a process accumulates for a step.

    Raises:
        UserError: if the batch size does not fit the number of processes.
    """
    micro = training.rows_at_once
    if not can_split(training, processes):
        raise UserError(
            f"batch_size={training.batch_size} is not a multiple of micro_batch_size x processes = "
            f"{micro} x {processes}; change one of them"
        )
    return micro, training.batch_size // (micro * processes)


def can_split(training: Training, processes: int) -> bool:
    """Return whether processes can share a batch in whole micro-batches."""
    return training.batch_size % (training.rows_at_once * processes) == 0


def _check_numbers(kind: type[Any], arguments: Options) -> None:
    """Check the types of numeric arguments of `kind`, a dataclass, which itself takes any value.

    Raises:
        UserError: naming every argument of the wrong type.
    """
    numbers = {
        name: hint
        for name, hint in get_type_hints(kind).items()
        if name in arguments and hint in (int, float, int | None, float | None)
    }
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in numbers.items()}
    checked = create_model("Arguments", __base__=Section, **fields)
    validate(checked, {name: arguments[name] for name in numbers}, "training arguments")


def _check_late_arguments(arguments: Any) -> None:
    """Check what transformers would refuse only after the training has begun.

    Raises:
        ValueError, ImportError: about an argument that cannot work here.
    """
    if arguments.train_sampling_strategy == "group_by_length":
        raise ValueError("arguments.train_sampling_strategy=group_by_length needs one text per row, and rows are pairs")
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("arguments.use_liger_kernel needs the package liger-kernel")


def _try_trackers(arguments: Any) -> None:
    """Make the callback of every tracker, which starts none, so that their errors show before anything is written.

    Raises:
        ValueError, ImportError, RuntimeError: if one is unknown or not installed.
    """
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        callback()


def _try_optimizer(arguments: Any) -> None:
    """Build the optimizer and the schedule for one weight, so that their errors show before any signal is extracted.

    Raises:
        TypeError, ValueError, ImportError: as they do.
    """
    if str(arguments.optim.value).startswith(OPTIMIZERS_OF_A_MODEL):
        return
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    get_scheduler(
        arguments.lr_scheduler_type,
        kind([torch.nn.Parameter(torch.zeros(1))], **options),
        num_warmup_steps=1,
        num_training_steps=2,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
