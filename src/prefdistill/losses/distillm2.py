"""DistiLLM-2: move towards the teacher on its own responses, and away from the student's mistakes on the student's."""

from torch import Tensor

from prefdistill.losses.preference import check_shapes


def distillm2_loss(skew_kl_teacher: Tensor, skew_reverse_kl_student: Tensor) -> Tensor:
    r"""Return the contrastive loss: forward divergence on the teacher's responses, reverse on the student's.

    .. math:: \tfrac12 \big[ KL(p \,\|\, \lambda p + (1-\lambda) q_\theta) \text{ on } y_t
              + KL(q_\theta \,\|\, (1-\lambda) p + \lambda q_\theta) \text{ on } y_s \big]

    Args:
        skew_kl_teacher: `skew_kl(teacher, student)` on the teacher's response y_t, averaged over tokens, shape [B].
        skew_reverse_kl_student: `skew_kl(student, teacher)` on the student's response y_s, averaged, shape [B].

    Returns:
        One loss per pair, shape [B], in nats per token.

    Source: DistiLLM-2 (arXiv 2503.07067), the contrastive objective, without its schedule of the skew.

    Example:
        >>> import torch
        >>> distillm2_loss(torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([0.7500])
    """
    check_shapes(skew_kl_teacher, skew_reverse_kl_student)
    return 0.5 * (skew_kl_teacher + skew_reverse_kl_student)
