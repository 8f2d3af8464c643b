"""Options of training one model; `training.arguments` turns them into `TrainingArguments`."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from prefdistill.core.options import NOT_IN_KEY, Options, Section


class Lora(Section):
    """Low-rank adapters instead of full fine-tuning."""

    r: PositiveInt = Field(16, description="Rank.")
    alpha: PositiveInt = Field(32, description="Scale; the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapters.")
    target_modules: str | list[str] = Field("all-linear", description="Layers that get an adapter.")


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
    bf16: bool = Field(False, description="bfloat16 autocast; the weights stay in their dtype.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    logging_steps: Annotated[PositiveInt, NOT_IN_KEY] = Field(10, description="Steps between lines of metrics.jsonl.")
    save_steps: Annotated[PositiveInt, NOT_IN_KEY] = Field(200, description="Steps between checkpoints.")
    report_to: Annotated[list[str], NOT_IN_KEY] = Field(
        default_factory=list, description="Trackers of transformers, e.g. [tensorboard]."
    )
    lora: Lora | None = Field(None, description="Train low-rank adapters; null: all weights.")
    arguments: Options = Field(
        default_factory=dict, description="Anything else that `transformers.TrainingArguments` knows."
    )

    @model_validator(mode="after")
    def _allowed_arguments(self) -> "Training":
        for name, value in self.arguments.items():
            if name.endswith("hub_token") and value is not None:
                raise ValueError(f"arguments.{name} would be in the results; set HF_TOKEN in the environment instead")
        if "resume_from_checkpoint" in self.arguments:
            raise ValueError("arguments.resume_from_checkpoint has no effect: a run resumes from its last checkpoint")
        limit = self.arguments.get("save_total_limit")
        if isinstance(limit, int) and limit < 1:
            raise ValueError(f"arguments.save_total_limit={limit}: at least one checkpoint is kept; give 1 or more")
        if self.arguments.get("save_only_model"):
            raise ValueError("arguments.save_only_model: a run cannot resume from such a checkpoint; leave it out")
        return self


class DPOTraining(Training):
    """How TRL's DPO trains one model."""

    beta: PositiveFloat = Field(0.1, description="Strength of the pull towards the reference, per nat.")
