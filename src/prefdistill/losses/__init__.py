"""Losses and the quantities they are built from: pure functions of tensors, a file per family, loaded on first use."""

from typing import TYPE_CHECKING

from prefdistill.core.lazy import lazy_imports

if TYPE_CHECKING:
    from prefdistill.losses.adpa import adpa_loss, advantage_score
    from prefdistill.losses.dadpo import dadpo_loss
    from prefdistill.losses.dckd import dckd_loss, vanillakd_loss
    from prefdistill.losses.distillm2 import distillm2_loss
    from prefdistill.losses.distribution import rest_logprob, skew_kl, topk_kl, with_rest
    from prefdistill.losses.dpkd import dpkd_loss
    from prefdistill.losses.preference import dpo_loss, sft_loss, simpo_loss, tvkd_loss
    from prefdistill.losses.value import TERMINALS, shaping_return, soft_value

__all__, __getattr__, __dir__ = lazy_imports(__name__)
