"""Options of training one model; `training.arguments` turns them into `TrainingArguments`."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from prefdistill.core.options import NOT_IN_KEY, Options, Section
from prefdistill.models.device import fast_bf16

# Keys of `arguments` that say what an option says, and that option.
SAME_AS = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "seed": "the seed of the recipe or --seed",
    "data_seed": "the seed of the recipe or --seed",
    "output_dir": "--out",
    "max_length": "max_length of the data, or --max-length",
    "max_prompt_length": "max_prompt_length of the data, or --max-prompt-length",
    "max_completion_length": "max_length of the data, or --max-length",
    "trust_remote_code": "model.trust_remote_code, or --trust-remote-code",
    "beta": "beta",
}
_NO_EVALUATION = "a training evaluates nothing; `prefdistill evaluate` does"
_NO_PACKING = "batch_size counts rows, so they are not packed"
_TOKENIZER = "the tokenizer is the model's own; change it there"
# Keys of `arguments` without an effect, and why.
UNUSED = {
    **dict.fromkeys(("packing", "packing_strategy", "eval_packing", "padding_free"), _NO_PACKING),
    **dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), _TOKENIZER),
    **dict.fromkeys(("do_train", "do_predict"), "a training trains"),
    **dict.fromkeys(
        (
            "batch_eval_metrics",
            "bf16_full_eval",
            "do_eval",
            "eval_accumulation_steps",
            "eval_delay",
            "eval_do_concat_batches",
            "eval_on_start",
            "eval_steps",
            "eval_strategy",
            "eval_use_gather_object",
            "fp16_full_eval",
            "generate_during_eval",
            "greater_is_better",
            "include_for_metrics",
            "load_best_model_at_end",
            "metric_for_best_model",
            "per_device_eval_batch_size",
            "prediction_loss_only",
        ),
        _NO_EVALUATION,
    ),
    "dataset_text_field": "rows have the columns of docs/data.md",
    "ddp_timeout": "the processes have met before the training; they wait for each other for three hours",
    "is_encoder_decoder": "models are decoders",
    "label_names": "a trainer knows its labels",
    "model_init_kwargs": "the model is loaded before; see dtype and trust_remote_code",
    "remove_unused_columns": "the columns are chosen by the training",
}


class Lora(Section):
    """Low-rank adapters instead of full fine-tuning."""

    r: PositiveInt = Field(16, description="Rank.")
    alpha: PositiveInt = Field(32, description="Scale; the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapters.")
    target_modules: str | list[str] = Field("all-linear", description="Layers that get an adapter.")
    use_rslora: bool = Field(False, description="Multiply the update by alpha / sqrt(r) (rsLoRA).")
    use_dora: bool = Field(False, description="Learn the magnitude of each weight column apart (DoRA); slower.")


class Training(Section):
    """How one model is trained."""

    learning_rate: PositiveFloat = Field(5e-7, description="Peak learning rate.")
    epochs: PositiveFloat = Field(1.0, description="Passes over the data.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps, in place of epochs.")
    batch_size: PositiveInt = Field(
        64, description="Rows per optimizer step, over all processes and accumulation steps."
    )
    micro_batch_size: PositiveInt = Field(4, description="Rows per process in memory at once.")
    warmup: NonNegativeFloat = Field(0.1, description="Share of the steps, or steps if 1 or more.")
    schedule: str = Field("cosine", description="Learning rate schedule of transformers, e.g. cosine or linear.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Weight decay of AdamW.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Gradient clipping; 0: none.")
    bf16: bool | None = Field(
        False, description="bfloat16 autocast; the weights stay in their dtype. null: where the hardware is faster so."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    router_aux_loss_coef: NonNegativeFloat | None = Field(
        None, description="Weight of a mixture of experts' load-balancing loss; null: the model's own; 0: leave it out."
    )
    logging_steps: Annotated[PositiveInt, NOT_IN_KEY] = Field(10, description="Steps between lines of metrics.jsonl.")
    save_steps: Annotated[PositiveInt, NOT_IN_KEY] = Field(200, description="Steps between checkpoints.")
    report_to: Annotated[list[str], NOT_IN_KEY] = Field(
        default_factory=list, description="Trackers of transformers, e.g. [tensorboard]."
    )
    verify: Annotated[bool, NOT_IN_KEY] = Field(
        True, description="Check that the saved model gives the trained model's logits (--no-verify: do not)."
    )
    lora: Lora | None = Field(None, description="Train low-rank adapters; null: all weights.")
    arguments: Options = Field(
        default_factory=dict,
        description="Anything else that `transformers.TrainingArguments` knows and no option sets.",
    )

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch: no more than a batch has."""
        return min(self.micro_batch_size, self.batch_size)

    @property
    def autocast(self) -> bool:
        """Whether bfloat16 autocast is on, on this hardware."""
        return fast_bf16() if self.bf16 is None else self.bf16

    def cache_key(self) -> dict[str, Any]:
        return super().cache_key() | {"bf16": self.autocast}

    @model_validator(mode="after")
    def _allowed_arguments(self) -> "Training":
        for name, value in self.arguments.items():
            if name.endswith("hub_token") and value is not None:
                raise ValueError(f"arguments.{name} would be in the results; set HF_TOKEN in the environment instead")
        if clashes := argument_problems(self.arguments):
            raise ValueError("; ".join(clashes))
        if "resume_from_checkpoint" in self.arguments:
            raise ValueError("arguments.resume_from_checkpoint has no effect: a run resumes from its last checkpoint")
        limit = self.arguments.get("save_total_limit")
        if isinstance(limit, int) and limit < 1:
            raise ValueError(f"arguments.save_total_limit={limit}: at least one checkpoint is kept; give 1 or more")
        if self.arguments.get("save_only_model"):
            raise ValueError("arguments.save_only_model: a run cannot resume from such a checkpoint; leave it out")
        return self


def argument_problems(
    arguments: Iterable[str], of_method: Iterable[str] = (), unused: Mapping[str, str] = UNUSED
) -> list[str]:
    """Return what is wrong with the names of arguments: those that an option sets, and those without an effect.

    Args:
        arguments: names of `training.arguments`.
        of_method: names that the method sets.
        unused: names without an effect, and why.
    """
    own = {**{name: name for name in Training.model_fields}, **dict.fromkeys(of_method, "the method"), **SAME_AS}
    names = list(arguments)
    return [
        *(f"arguments.{name} is set by {own[name]}; leave it out" for name in names if name in own),
        *(f"arguments.{name} has no effect: {unused[name]}" for name in names if name in unused),
    ]


class DPOTraining(Training):
    """How TRL's DPO trains one model."""

    beta: PositiveFloat = Field(0.1, description="Strength of the pull towards the reference, per nat.")
