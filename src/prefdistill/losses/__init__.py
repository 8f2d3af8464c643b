"""Losses and the quantities they are made of: pure functions of tensors, one file per family."""

from prefdistill.losses.preference import dpo_loss, sft_loss, tvkd_loss
from prefdistill.losses.value import TERMINALS, shaping_return, soft_value

__all__ = ["TERMINALS", "dpo_loss", "sft_loss", "shaping_return", "soft_value", "tvkd_loss"]
