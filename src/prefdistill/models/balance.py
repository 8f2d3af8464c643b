"""The load-balancing loss of mixture-of-experts models, by TRL's rule."""

from typing import Any

import torch
from torch import Tensor

from prefdistill.core.errors import UserError
from prefdistill.models.backbone import causal_lm


@torch.no_grad()
def balance_coefficient(model: Any, coefficient: float | None = None) -> float:
    """Return what a model's load-balancing loss is multiplied by in training; 0 for a model without.

    As in TRL, a model whose configuration knows `output_router_logits` gets the loss, with the coefficient of its
    configuration unless another one is given.

    Args:
        model: a causal language model, possibly wrapped.
        coefficient: in place of the model's own `router_aux_loss_coef`; 0 leaves the loss out.

    Raises:
        UserError: if a coefficient is given for a model that returns no router logits.
    """
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    own = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    if not own:
        return 0.0
    if hasattr(config, "output_router_logits") and _returns_loss(lm):
        return float(own)
    if coefficient:
        raise UserError(
            f"router_aux_loss_coef={coefficient}, but {type(lm).__name__} returns no router logits, so there is no "
            "load-balancing loss to add; leave router_aux_loss_coef out"
        )
    return 0.0


def _returns_loss(lm: Any) -> bool:
    """Return whether the model's own forward gives the loss, on a text of one token."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    try:
        outputs = lm(input_ids=ids, use_cache=False, output_router_logits=True)
    except (TypeError, AttributeError):  # it knows the option and cannot do it
        return False
    return isinstance(getattr(outputs, "aux_loss", None), Tensor)
