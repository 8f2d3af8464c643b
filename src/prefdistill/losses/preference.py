"""Losses on preference pairs: SFT on the chosen response, DPO, and TVKD as DPO with an offset."""

import torch.nn.functional as F
from torch import Tensor


def sft_loss(policy_chosen: Tensor, tokens: Tensor) -> Tensor:
    r"""Return the negative log-likelihood of the chosen response per response token.

    .. math:: -\log \pi_\theta(y | x) / T

    Args:
        policy_chosen: sequence log-probabilities in nats, shape [B].
        tokens: response tokens T of each, shape [B]; a response without any has loss 0.

    Returns:
        One loss per response, shape [B], in nats per token. Their mean does not depend on how a batch is cut into
        micro-batches, as a mean over all tokens of each micro-batch would.

    Example:
        >>> import torch
        >>> sft_loss(torch.tensor([-4.0, -2.0]), torch.tensor([2, 1]))
        tensor([2., 2.])
    """
    check_shapes(policy_chosen, tokens)
    return -policy_chosen / tokens.clamp(min=1)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    margin: Tensor | float = 0.0,
) -> Tensor:
    r"""Return the loss of direct preference optimisation.

    .. math:: -\log\sigma\big(\beta [\log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)}
              - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}] - m\big)

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: sequence log-probabilities in nats, shape [B].
        beta: strength of the pull towards the reference, per nat.
        margin: m, by how much the chosen response shall win, in units of the scaled log-ratio: one number, or [B].

    Returns:
        One loss per pair, shape [B].

    Source: Rafailov et al. (arXiv 2305.18290), equation 7; with a margin ODPO (arXiv 2402.10571), equation 7.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> dpo_loss(zero, zero, zero, zero, beta=0.1)
        tensor([0.6931])
    """
    check_shapes(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *tensors(margin))
    return -F.logsigmoid(beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)) - margin)


def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    tokens_chosen: Tensor,
    tokens_rejected: Tensor,
    *,
    beta: float,
    gamma: float,
    margin: Tensor | float = 0.0,
) -> Tensor:
    r"""Return the SimPO loss: the log-probability per token is the reward, and the chosen one has a target margin.

    .. math:: -\log\sigma\big(\beta [\tfrac{1}{T_w}\log\pi_\theta(y_w)
              - \tfrac{1}{T_l}\log\pi_\theta(y_l)] - \gamma\big)

    Args:
        policy_chosen, policy_rejected: sequence log-probabilities in nats, shape [B].
        tokens_chosen, tokens_rejected: response tokens of each, shape [B]; one without any has reward 0.
        beta: scale of the reward.
        gamma: target margin, in units of the scaled reward.
        margin: of each pair, beside gamma: one number, or [B].

    Returns:
        One loss per pair, shape [B].

    Source: SimPO (arXiv 2405.14734), equation 6.

    Example:
        >>> import torch
        >>> chosen, rejected = torch.tensor([-2.0]), torch.tensor([-6.0])
        >>> simpo_loss(chosen, rejected, torch.tensor([2]), torch.tensor([3]), beta=2.0, gamma=1.0)  # -log sigmoid(1)
        tensor([0.3133])
    """
    check_shapes(policy_chosen, policy_rejected, tokens_chosen, tokens_rejected, *tensors(margin))
    per_token = policy_chosen / tokens_chosen.clamp(min=1) - policy_rejected / tokens_rejected.clamp(min=1)
    return -F.logsigmoid(beta * per_token - gamma - margin)


def tvkd_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    shaping_chosen: Tensor,
    shaping_rejected: Tensor,
    *,
    beta: float,
    alpha: float,
    margin: Tensor | float = 0.0,
) -> Tensor:
    r"""Return the TVKD loss: the DPO margin plus the margin of the teacher's shaping return.

    .. math:: -\log\sigma\big(\beta [\log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)}
              - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}] + \alpha [\Psi(y_w) - \Psi(y_l)]\big)

    The shaping returns carry no gradient. A response whose return is high needs less log-ratio for the same loss: over
    many pairs whose labels follow a reward R the minimiser is `ref(y) exp((R(y) - alpha Psi(y)) / beta)`, normalised.
    Equal to `dpo_loss` with reference log-probabilities `ref(y) - alpha / beta * Psi(y)`, and to `dpo_loss` itself, bit
    for bit, at `alpha=0` (finite Psi).

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: sequence log-probabilities in nats, shape [B].
        shaping_chosen, shaping_rejected: `shaping_return` of each response, shape [B].
        beta: strength of the pull towards the reference, per nat.
        alpha: weight of the teacher's term; negative values turn its sign.
        margin: as for `dpo_loss`.

    Returns:
        One loss per pair, shape [B].

    Source: TVKD (arXiv 2509.16965), the training objective.

    Example:
        >>> import torch
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> tvkd_loss(zero, zero, zero, zero, one, zero, beta=0.1, alpha=0.7)     # -log sigmoid(0.7)
        tensor([0.4032])
    """
    logps = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_shapes(*logps, shaping_chosen, shaping_rejected, *tensors(margin))
    ratio = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return -F.logsigmoid(ratio + alpha * (shaping_chosen - shaping_rejected).detach() - margin)


def tensors(*values: Tensor | float) -> list[Tensor]:
    """Return those values that are tensors."""
    return [value for value in values if isinstance(value, Tensor)]


def check_shapes(first: Tensor, *others: Tensor) -> None:
    """Refuse to broadcast: a [B, 1] beside a [B] would silently become B x B losses."""
    for other in others:
        if other.shape != first.shape:
            raise ValueError(f"every argument must have shape [B], got {list(first.shape)} and {list(other.shape)}")
