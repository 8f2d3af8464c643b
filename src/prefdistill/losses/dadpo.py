"""Distribution-aware DPO: the DPO margin against two references, the student's start and the teacher."""

import torch.nn.functional as F
from torch import Tensor

from prefdistill.losses.preference import check_shapes, tensors


def dadpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    teacher_chosen: Tensor,
    teacher_rejected: Tensor,
    *,
    beta: float,
    teacher_beta: float,
    margin: Tensor | float = 0.0,
) -> Tensor:
    r"""Return the DPO loss of a policy that is regularised towards both its reference and the teacher.

    .. math:: -\log\sigma\big(\beta [\log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)}
              - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}] + \beta_T [\log\tfrac{\pi_\theta(y_w)}{\pi_T(y_w)}
              - \log\tfrac{\pi_\theta(y_l)}{\pi_T(y_l)}]\big)

    The optimum of a reward less `beta KL(pi || ref) + beta_T KL(pi || teacher)`, solved for the reward as DPO does.
    `teacher_beta=0` is DPO; equal teacher and reference is DPO with `beta + teacher_beta`; `beta=0` is DPKD.

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, teacher_chosen, teacher_rejected: sequence
            log-probabilities in nats, shape [B].
        beta, teacher_beta: strength of the pull towards the reference and the teacher, per nat.
        margin: as for `dpo_loss`.

    Returns:
        One loss per pair, shape [B].

    Source: daDPO (arXiv 2506.15717).

    Example:
        >>> import torch
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> dadpo_loss(one, zero, zero, zero, zero, zero, beta=0.5, teacher_beta=0.5)     # -log sigmoid(1)
        tensor([0.3133])
    """
    logps = (policy_chosen, policy_rejected, ref_chosen, ref_rejected, teacher_chosen, teacher_rejected)
    check_shapes(*logps, *tensors(margin))
    ratio = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    teacher_ratio = (policy_chosen - teacher_chosen) - (policy_rejected - teacher_rejected)
    return -F.logsigmoid(beta * ratio + teacher_beta * teacher_ratio - margin)
