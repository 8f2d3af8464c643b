"""Direct preference knowledge distillation: the teacher's output is preferred to the student's."""

from torch import Tensor

from prefdistill.losses.preference import dpo_loss


def dpkd_loss(
    student_preferred: Tensor, student_other: Tensor, teacher_preferred: Tensor, teacher_other: Tensor, *, beta: float
) -> Tensor:
    r"""Return the DPKD loss: DPO with the teacher as the reference, on a teacher's and a student's output.

    .. math:: -\log\sigma\big(\beta [\log\tfrac{q_\theta(y_t|x)}{p(y_t|x)} - \log\tfrac{q_\theta(y_s|x)}{p(y_s|x)}]\big)

    At the level of sequences y_t is a response of the teacher p and y_s one of the student q. At the level of tokens
    the arguments are single tokens at each state, the most likely ones of each.

    Args:
        student_preferred, student_other: the student's log-probabilities of y_t and y_s, shape [B], in nats.
        teacher_preferred, teacher_other: the teacher's log-probabilities of y_t and y_s, shape [B], in nats.
        beta: strength of the pull towards the teacher, per nat.

    Returns:
        One loss per pair, shape [B].

    Source: DPKD (arXiv 2406.19774), the training objective; tokens: the authors' code.

    Example:
        >>> import torch
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> dpkd_loss(one, zero, zero, zero, beta=1.0)                       # -log sigmoid(1)
        tensor([0.3133])
    """
    return dpo_loss(student_preferred, student_other, teacher_preferred, teacher_other, beta=beta)
