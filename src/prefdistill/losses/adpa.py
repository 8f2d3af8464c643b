"""Advantage-guided distillation: move the student along the change that preference training made to a teacher."""

import torch
from torch import Tensor

from prefdistill.losses.preference import check_shapes


def advantage_score(student_logprobs: Tensor, advantages: Tensor) -> Tensor:
    r"""Return the expected advantage of the student's next token.

    .. math:: \sum_a \pi_\theta(a|s) A(s, a), \qquad A(s, a) = \log\pi_T(a|s) - \log\pi_{T,ref}(a|s)

    Args:
        student_logprobs: shape [N, k], in nats. For k < vocabulary, let the last column be the rest of the mass.
        advantages: of the same tokens, shape [N, k], in nats. Ignored where the student's log-probability is -inf (an
            empty rest has no advantage): it may be NaN there.

    Returns:
        Shape [N], in nats.

    Raises:
        ValueError: if the shapes differ.

    Source: ADPA (arXiv 2502.17927), the advantage-guided term.

    Example:
        >>> import torch
        >>> advantage_score(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, -2.0]]))
        tensor([-0.5000])
    """
    if student_logprobs.shape != advantages.shape or student_logprobs.dim() != 2:
        raise ValueError(f"both must be [N, k], got {list(student_logprobs.shape)} and {list(advantages.shape)}")
    empty = student_logprobs == -torch.inf
    return (student_logprobs.exp() * advantages.masked_fill(empty, 0.0)).sum(-1)


def adpa_loss(sft: Tensor, score: Tensor, *, gamma: float) -> Tensor:
    r"""Return the ADPA loss: supervised fine-tuning, and the teacher's advantage at states that the student visits.

    .. math:: -\tfrac{1}{T}\log \pi_\theta(y_w|x)
              - \gamma \, \tfrac{1}{\hat T}\sum_t \sum_a \pi_\theta(a|\hat s_t) A(\hat s_t, a)

    Args:
        sft: `sft_loss` of the chosen responses, shape [B], in nats per token.
        score: `advantage_score` averaged over the tokens of the student's own response, shape [B], in nats.
        gamma: weight of the advantage; 0 is SFT.

    Returns:
        One loss per pair, shape [B].

    Source: ADPA (arXiv 2502.17927), the training objective.

    Example:
        >>> import torch
        >>> adpa_loss(torch.tensor([2.0]), torch.tensor([0.5]), gamma=1.0)
        tensor([1.5000])
    """
    check_shapes(sft, score)
    return sft - gamma * score
