"""Distillation by divergence: VanillaKD on the chosen response, DCKD on both."""

from torch import Tensor

from prefdistill.losses.preference import check_shapes


def vanillakd_loss(sft: Tensor, kl_chosen: Tensor, *, alpha: float) -> Tensor:
    r"""Return the loss of supervised fine-tuning with the teacher's token distributions on the chosen response.

    .. math:: -\tfrac{1}{T}\log \pi_\theta(y_w|x) + \alpha \, KL_w

    Args:
        sft: `sft_loss` of the chosen responses, shape [B], in nats per token.
        kl_chosen: `topk_kl` averaged over the response's tokens, shape [B], in nats per token.
        alpha: weight of the divergence; 0 is SFT.

    Returns:
        One loss per pair, shape [B].

    Source: Hinton et al. (arXiv 1503.02531), as a baseline in ADPA (arXiv 2502.17927).

    Example:
        >>> import torch
        >>> vanillakd_loss(torch.tensor([2.0]), torch.tensor([0.5]), alpha=1.0)
        tensor([2.5000])
    """
    check_shapes(sft, kl_chosen)
    return sft + alpha * kl_chosen


def dckd_loss(sft: Tensor, kl_chosen: Tensor, kl_rejected: Tensor, *, alpha: float) -> Tensor:
    r"""Return the DCKD loss: the teacher's token distributions on the chosen and on the rejected response.

    .. math:: -\tfrac{1}{T}\log \pi_\theta(y_w|x) + \alpha \, (KL_w + KL_l), \qquad
              KL = \tfrac{1}{T}\sum_t KL(\pi_T(\cdot|s_t) \,\|\, \pi_\theta(\cdot|s_t))

    Args:
        sft: `sft_loss` of the chosen responses, shape [B], in nats per token.
        kl_chosen, kl_rejected: `topk_kl` averaged over each response's tokens, shape [B], in nats per token.
        alpha: weight of the divergences; 0 is SFT.

    Returns:
        One loss per pair, shape [B].

    Source: DCKD in ADPA (arXiv 2502.17927).

    Example:
        >>> import torch
        >>> dckd_loss(torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([0.25]), alpha=1.0)
        tensor([2.7500])
    """
    check_shapes(sft, kl_chosen, kl_rejected)
    return sft + alpha * (kl_chosen + kl_rejected)
