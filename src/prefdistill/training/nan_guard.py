"""Stop a training whose loss or weights are not finite."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from prefdistill.core.errors import UserError
from prefdistill.models.sharded import local_part


class NotFinite(UserError):
    """The loss or the weights became inf or nan in training."""


TRY = "try a lower learning rate, max_grad_norm=1, or bf16=false"
TRY_AT_STEP_1 = (
    "no step was taken yet, so the model's weights may be damaged, or their dtype too narrow: try dtype float32 or "
    "bf16=false"
)
TEXTS, TEXT_CHARACTERS = 3, 60  # texts in a message, and characters of each at its start and at its end


def check_loss(loss: Tensor, step: int, where: str) -> None:
    """Raise NotFinite if the loss of a step is not finite; `where` names its rows."""
    if not torch.isfinite(loss):
        raise NotFinite(f"the loss is {loss.item()} at step {step}, {where}: {TRY_AT_STEP_1 if step == 1 else TRY}")


def check_weights(model: nn.Module) -> None:
    """Raise NotFinite, on every process, if a weight is not finite: no loss is computed after the last step."""
    parts = ((name, local_part(weight)) for name, weight in model.named_parameters())
    damaged = [name for name, part in parts if part.is_floating_point() and not bool(torch.isfinite(part).all())]
    names = gather_object(damaged[:1])  # each process looks at its part
    if names:
        raise NotFinite(f"the trained weights are not finite, the first of them {names[0]}: {TRY}")


def with_nan_guard(trainer_class: type[Any]) -> type[Any]:
    """Return a subclass of one of TRL's trainers that raises NotFinite if the loss of a step is not finite.

    Without it the Trainer continues, and logs the mean of the earlier losses. TRL's batches do not say which rows they
    hold, so the message quotes their texts.
    """

    class Guarded(trainer_class):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **options: Any) -> Tensor:
            loss = super().training_step(model, inputs, *more, **options)
            if not torch.isfinite(loss):
                texts = quote_texts(inputs, self.processing_class)
                check_loss(loss, self.state.global_step + 1, f"in the batch with {texts}")
            return loss

    Guarded.__name__ = Guarded.__qualname__ = trainer_class.__name__
    return Guarded


def quote_texts(inputs: dict[str, Any], tokenizer: Any) -> str:
    """Quote the first few texts of a batch as the model reads them, special tokens included.

    Each by its start and its end, since texts often start alike.
    """
    name = next(name for name in inputs if name.endswith("input_ids"))
    masks = inputs.get(name.replace("input_ids", "attention_mask"), torch.ones_like(inputs[name]))
    quotes = []
    for ids, mask in zip(inputs[name][:TEXTS], masks, strict=False):
        text = " ".join(tokenizer.decode(ids[mask.bool()]).split())
        if len(text) > 2 * TEXT_CHARACTERS:
            text = f"{text[:TEXT_CHARACTERS]} ... {text[-TEXT_CHARACTERS:]}"
        quotes.append(repr(text))
    others = len(inputs[name]) - len(quotes)
    return ", ".join(quotes) + (f" and {others} more texts" if others else "")
