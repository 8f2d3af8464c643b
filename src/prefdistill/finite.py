"""Where training has gone wrong: a loss or weights that are not finite."""

from typing import Any

import torch
from torch import Tensor, nn

from prefdistill.errors import UserError

TRY = "try a lower learning rate, max_grad_norm=1, or bf16=false"
TEXT_CHARACTERS = 60


def check_loss(loss: Tensor, step: int, where: str) -> None:
    """Raises a UserError if the loss of a step is not finite; `where` names the rows it is of."""
    if not torch.isfinite(loss):
        raise UserError(f"the loss is {loss.item()} at step {step}, {where}: {TRY}")


def check_weights(model: nn.Module) -> None:
    """Raises a UserError if a weight is not finite: the last step of a training has no loss after it."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise UserError(f"the trained weights are not finite, the first of them {name}: {TRY}")


def watched(kind: type[Any]) -> type[Any]:
    """A trainer like `kind`, one of TRL's, that stops where the loss of a step is not finite.

    The Trainer itself trains on, with the mean of the losses before in the log. TRL's batches do not say which rows of
    the data they are made of, so that they are told by their first text.
    """

    class Watched(kind):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **options: Any) -> Tensor:
            text = next((value for name, value in inputs.items() if name.endswith("input_ids")), None)
            loss = super().training_step(model, inputs, *more, **options)
            if not torch.isfinite(loss):
                told = "" if text is None else self.processing_class.decode(text[0], skip_special_tokens=True)
                told = " ".join(told.split())[:TEXT_CHARACTERS]
                check_loss(loss, self.state.global_step + 1, f"in the batch with {told!r}")
            return loss

    Watched.__name__ = Watched.__qualname__ = kind.__name__
    return Watched
