"""Where training has gone wrong: a loss or weights that are not finite."""

from typing import Any

import torch
from torch import Tensor, nn

from prefdistill.core.errors import UserError


class NotFinite(UserError):
    """A loss or weights became inf or nan while training."""


TRY = "try a lower learning rate, max_grad_norm=1, or bf16=false"
LOADED = (
    "no step was taken yet, so that the model's weights may be damaged, or their dtype too narrow: try dtype float32 "
    "or bf16=false"
)
TEXTS, TEXT_CHARACTERS = 3, 60  # that a message shows, and how much of each at its start and at its end


def check_loss(loss: Tensor, step: int, where: str) -> None:
    """Raises NotFinite if the loss of a step is not finite; `where` names the rows it is of."""
    if not torch.isfinite(loss):
        raise NotFinite(f"the loss is {loss.item()} at step {step}, {where}: {LOADED if step == 1 else TRY}")


def check_weights(model: nn.Module) -> None:
    """Raises NotFinite if a weight is not finite: the last step of a training has no loss after it."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise NotFinite(f"the trained weights are not finite, the first of them {name}: {TRY}")


def watched(kind: type[Any]) -> type[Any]:
    """A trainer like `kind`, one of TRL's, that stops where the loss of a step is not finite.

    The Trainer itself trains on, with the mean of the losses before in the log. TRL's batches do not say which rows of
    the data they are made of, so that they are told by their texts.
    """

    class Watched(kind):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **options: Any) -> Tensor:
            loss = super().training_step(model, inputs, *more, **options)
            if not torch.isfinite(loss):
                texts = _texts(inputs, self.processing_class)
                check_loss(loss, self.state.global_step + 1, f"in the batch with {texts}")
            return loss

    Watched.__name__ = Watched.__qualname__ = kind.__name__
    return Watched


def _texts(inputs: dict[str, Any], tokenizer: Any) -> str:
    """The texts of a batch, the first few of them, as the model reads them: special tokens part prompt and response.

    Of each its start and its end, for texts often start alike.
    """
    name = next(name for name in inputs if name.endswith("input_ids"))
    masks = inputs.get(name.replace("input_ids", "attention_mask"), torch.ones_like(inputs[name]))
    told = []
    for ids, mask in zip(inputs[name][:TEXTS], masks, strict=False):
        text = " ".join(tokenizer.decode(ids[mask.bool()]).split())
        if len(text) > 2 * TEXT_CHARACTERS:
            text = f"{text[:TEXT_CHARACTERS]} ... {text[-TEXT_CHARACTERS:]}"
        told.append(repr(text))
    others = len(inputs[name]) - len(told)
    return ", ".join(told) + (f" and {others} more texts" if others else "")
