"""TODO docstring."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    create_model,
    model_validator,
)

from prefdistill.core.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

from prefdistill.core.options import Options, Section, validate

OPTIMIZERS_OF_A_MODEL = ("galore", "lomo", "adalomo", "apollo")  # they cannot be made without one


class Lora(Section):
    """Low-rank adapters instead of full fine-tuning."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"

    def config(self) -> "LoraConfig":
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )


class Training(Section):
    """How one model is trained; `arguments` takes anything else `transformers.TrainingArguments` knows."""

    learning_rate: PositiveFloat = 5e-7
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 64  # rows per optimiser step, over all processes and accumulation steps
    micro_batch_size: PositiveInt = 4  # rows per process in memory at once
    warmup: float = Field(0.1, ge=0)  # share of the steps, or steps if 1 or more
    schedule: str = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    bf16: bool = False
    gradient_checkpointing: bool = False
    logging_steps: PositiveInt = 10
    save_steps: PositiveInt = 200
    report_to: list[str] = Field(default_factory=list)
    lora: Lora | None = None
    arguments: Options = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_keys(self) -> "Training":
        for name, value in self.arguments.items():
            if name.endswith("hub_token") and value is not None:
                raise ValueError(f"arguments.{name} would be in the results; set HF_TOKEN in the environment instead")
        if "resume_from_checkpoint" in self.arguments:
            raise ValueError("arguments.resume_from_checkpoint has no effect: a run goes on from its last checkpoint")
        limit = self.arguments.get("save_total_limit")
        if isinstance(limit, int) and limit < 1:
            raise ValueError(f"arguments.save_total_limit={limit}: one checkpoint is kept at least; give 1 or more")
        if self.arguments.get("save_only_model"):
            raise ValueError("arguments.save_only_model: a run could not go on from such a checkpoint; leave it out")
        return self

    def peft_config(self) -> "LoraConfig | None":
        return self.lora.config() if self.lora else None

    def essence(self) -> Options:
        """What the trained weights depend on: everything but how the training is watched."""
        return self.model_dump(exclude={"report_to", "logging_steps", "save_steps"})

    def to_arguments(self, out: Path, *, seed: int, data_seed: int, kind: type[Any] | None = None, **more: Any) -> Any:
        """The matching `TrainingArguments` (or `kind` of them, such as TRL's SFTConfig)."""
        import torch
        from transformers import TrainingArguments

        from prefdistill.core.processes import processes

        team = processes().num_processes
        accelerator = torch.accelerator.is_available()
        micro = min(self.micro_batch_size, self.batch_size)
        if self.batch_size % (micro * team):
            raise UserError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size x processes = "
                f"{micro} x {team}; change one of them"
            )
        options: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps or -1,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": self.batch_size // (micro * team),
            "warmup_steps": self.warmup,
            "lr_scheduler_type": self.schedule,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "bf16": self.bf16,
            "use_cpu": not accelerator,  # bf16 on a CPU is refused without
            "gradient_checkpointing": self.gradient_checkpointing,
            "logging_steps": self.logging_steps,
            "save_steps": self.save_steps,
            "report_to": self.report_to or "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": accelerator,
            "seed": seed,
            "data_seed": data_seed,
            **more,
            **self.arguments,
        }
        kind = kind or TrainingArguments
        _check_numbers(kind, self.arguments)
        try:
            arguments = kind(output_dir=str(out), **options)
            _try_optimizer(arguments)
        except (TypeError, ValueError, ImportError) as error:
            raise UserError(f"training arguments: {error}".splitlines()[0]) from error
        return arguments


def _check_numbers(kind: type[Any], arguments: Options) -> None:
    """Whether what `kind`, a dataclass, says to be a number is one: it takes all, and so does the Trainer at first.

    Raises:
        UserError: naming the first that is none.
    """
    numbers = {
        name: hint
        for name, hint in get_type_hints(kind).items()
        if name in arguments and hint in (int, float, int | None, float | None)
    }
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in numbers.items()}
    checked = create_model("Arguments", __base__=Section, **fields)
    validate(checked, {name: arguments[name] for name in numbers}, "training arguments")


def _try_optimizer(arguments: Any) -> None:
    """Make the optimiser and the schedule for one weight: what only they refuse is known before the signals are made.

    Raises:
        TypeError, ValueError, ImportError: whatever they say.
    """
    import torch
    from transformers import Trainer, get_scheduler

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


class DPOTraining(Training):
    beta: PositiveFloat = 0.1
