"""Losses and the quantities they are built from: pure functions of tensors, a file per family, loaded on first use."""

from typing import TYPE_CHECKING

from prefdistill.core.lazy import lazy_names

if TYPE_CHECKING:
    from prefdistill.losses.adpa import adpa_loss, advantage_score
    from prefdistill.losses.dadpo import dadpo_loss
    from prefdistill.losses.dckd import dckd_loss, vanillakd_loss
    from prefdistill.losses.distillm2 import distillm2_loss
    from prefdistill.losses.distribution import rest_logprob, skew_kl, topk_kl, with_rest
    from prefdistill.losses.dpkd import dpkd_loss
    from prefdistill.losses.preference import dpo_loss, sft_loss, simpo_loss, tvkd_loss
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
    "simpo_loss",
    "skew_kl",
    "soft_value",
    "topk_kl",
    "tvkd_loss",
    "vanillakd_loss",
    "with_rest",
]

__getattr__ = lazy_names(
    __name__,
    {
        "TERMINALS": "value",
        "adpa_loss": "adpa",
        "advantage_score": "adpa",
        "dadpo_loss": "dadpo",
        "dckd_loss": "dckd",
        "distillm2_loss": "distillm2",
        "dpkd_loss": "dpkd",
        "dpo_loss": "preference",
        "rest_logprob": "distribution",
        "sft_loss": "preference",
        "shaping_return": "value",
        "simpo_loss": "preference",
        "skew_kl": "distribution",
        "soft_value": "value",
        "topk_kl": "distribution",
        "tvkd_loss": "preference",
        "vanillakd_loss": "dckd",
        "with_rest": "distribution",
    },
)
