"""Divergences of two token distributions, given at k ids and as one bucket for the rest of the mass.

Every state has its own k ids, the same for both models. A log-probability of -inf pads a state with fewer ids. If the k
ids are the whole vocabulary, the rest is empty, and all values and gradients are those of the full distributions.
"""

import math

import torch
from torch import Tensor


def rest_logprob(logprobs: Tensor) -> Tensor:
    r"""Return the log of the mass outside k log-probabilities: `log(1 - sum_a exp(logprobs_a))`.

    A remainder that is within rounding of zero counts as empty. If a small rest matters, compute it from the logits
    instead, as `logprobs.topk_logps` does.

    Args:
        logprobs: shape [..., k], in nats.

    Returns:
        Shape [...]; -inf where the rest is empty.

    Example:
        >>> import torch
        >>> rest_logprob(torch.tensor([0.25, 0.25]).log())              # log 0.5
        tensor(-0.6931)
    """
    total = torch.logsumexp(logprobs, dim=-1)
    empty = total > -_rounding(logprobs)
    rest = torch.log(-torch.expm1(total.masked_fill(empty, -math.log(2))))
    return rest.masked_fill(empty, -math.inf)


def _rounding(logprobs: Tensor) -> float:
    """Return the rounding error of a sum of k probabilities."""
    return 4 * logprobs.shape[-1] * torch.finfo(logprobs.dtype).eps


def skew_kl(
    p_logprobs: Tensor,
    q_logprobs: Tensor,
    *,
    skew: float,
    p_rest: Tensor | None = None,
    q_rest: Tensor | None = None,
) -> Tensor:
    r"""Return the skew Kullback-Leibler divergence: from p to a mixture of p and q.

    .. math:: KL\big(p \,\|\, \lambda p + (1 - \lambda) q\big), \qquad \lambda = skew

    Over k tokens and the bucket of the rest, which bounds the divergence over the whole vocabulary from below.

    Args:
        p_logprobs, q_logprobs: log-probabilities of the same ids, shape [N, k], in nats.
        skew: lambda in 0..1; 0 is the plain divergence.
        p_rest, q_rest: log of the mass of all other ids, shape [N]. Default: `rest_logprob`.

    Returns:
        Shape [N], in nats, at least 0 (to rounding). Its gradient reaches both p and q.

    Raises:
        ValueError: if the shapes do not match, or the skew is outside 0..1.

    Source: DistiLLM (arXiv 2402.03898), equation 4; the bucket is added here.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
        >>> skew_kl(p, q, skew=0.0)                                     # 0.5 log 2 + 0.25 log(1/2)
        tensor([0.1733])
    """
    if p_logprobs.shape != q_logprobs.shape or p_logprobs.dim() != 2:
        raise ValueError(f"both must be [N, k], got {list(p_logprobs.shape)} and {list(q_logprobs.shape)}")
    if not 0 <= skew <= 1:
        raise ValueError(f"skew must lie in 0..1, got {skew}")
    if q_rest is None:  # rounding must not turn a small bucket into an empty one, and an infinite loss
        q_rest = rest_logprob(q_logprobs).clamp(min=math.log(_rounding(q_logprobs)))
    p, q = with_rest(p_logprobs, p_rest), with_rest(q_logprobs, q_rest)
    # Where p has no mass the term is 0; masking keeps -inf - -inf out of the gradient.
    empty = p == -math.inf
    p, q = p.masked_fill(empty, 0.0), q.masked_fill(empty, 0.0)
    mixture = torch.logaddexp(p + math.log(skew), q + math.log1p(-skew)) if 0 < skew < 1 else p if skew else q
    return (p.exp() * (p - mixture)).masked_fill(empty, 0.0).sum(-1)


def topk_kl(
    teacher_logprobs: Tensor,
    student_logprobs: Tensor,
    teacher_rest: Tensor | None = None,
    student_rest: Tensor | None = None,
) -> Tensor:
    r"""Return the forward divergence from a teacher to a student at the teacher's k ids and the bucket of the rest.

    .. math:: KL(\pi_T \| \pi_\theta) = \sum_{a \in k} \pi_T(a) \log\frac{\pi_T(a)}{\pi_\theta(a)}
              + \bar\pi_T \log\frac{\bar\pi_T}{\bar\pi_\theta}, \qquad \bar\pi = 1 - \sum_{a \in k} \pi(a)

    Equal to the divergence over the vocabulary if the k ids are all of it, and never above it otherwise.

    Args:
        teacher_logprobs, student_logprobs: log-probabilities of the same ids, shape [N, k], in nats.
        teacher_rest, student_rest: log of the mass of all other ids, shape [N]. Default: `rest_logprob`.

    Returns:
        Shape [N], in nats.

    Raises:
        ValueError: if the shapes do not match.

    Source: Hinton et al. (arXiv 1503.02531) per token; ADPA (arXiv 2502.17927) on both responses of a pair.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> topk_kl(p, p)
        tensor([0.])
    """
    return skew_kl(teacher_logprobs, student_logprobs, skew=0.0, p_rest=teacher_rest, q_rest=student_rest)


def with_rest(logprobs: Tensor, rest: Tensor | None = None) -> Tensor:
    """Return the k log-probabilities and that of the rest as one tensor: [N, k], [N] -> [N, k + 1].

    Example:
        >>> import torch
        >>> with_rest(torch.tensor([[0.5]]).log())
        tensor([[-0.6931, -0.6931]])
    """
    rest = rest_logprob(logprobs) if rest is None else rest
    if rest.shape != logprobs.shape[:-1]:
        raise ValueError(f"the rest must be [N] beside [N, k], got {list(rest.shape)} and {list(logprobs.shape)}")
    return torch.cat([logprobs, rest[..., None]], dim=-1)
