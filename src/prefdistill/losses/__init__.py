"""Losses and the quantities they are made of: pure functions of tensors, one file per family."""

from prefdistill.losses.adpa import adpa_loss, advantage_score
from prefdistill.losses.dadpo import dadpo_loss
from prefdistill.losses.dckd import dckd_loss, vanillakd_loss
from prefdistill.losses.distillm2 import distillm2_loss
from prefdistill.losses.distribution import rest_logprob, skew_kl, topk_kl, with_rest
from prefdistill.losses.dpkd import dpkd_loss
from prefdistill.losses.preference import dpo_loss, sft_loss, tvkd_loss
from prefdistill.losses.value import TERMINALS, shaping_return, soft_value

__all__ = [
    "TERMINALS",
    "adpa_loss",
    "advantage_score",
    "dadpo_loss",
    "dckd_loss",
    "distillm2_loss",
    "dpkd_loss",
    "dpo_loss",
    "rest_logprob",
    "sft_loss",
    "shaping_return",
    "skew_kl",
    "soft_value",
    "topk_kl",
    "tvkd_loss",
    "vanillakd_loss",
    "with_rest",
]
