"""How much a method's loss pulls at the student, before anything is learnt."""

from collections.abc import Iterator

import torch
from torch import Tensor

from prefdistill.methods import Student

LEAST = 1e-3  # share of SFT's gradient below which next to nothing is learnt


def gradient_share(loss: Tensor, student: Student) -> float:
    r"""Return the size of a loss's gradient, relative to that of SFT on the same responses.

    Both are sums over states of the size of the gradient on the logits, :math:`\lVert dL/dz \rVert_1`. That of a
    token's log-probability counts as 2, its bound; that of several tokens' is exact. The model is not run backwards.

    Args:
        loss: the mean of a batch, as the method computed it.
        student: what it was computed from, with a graph.
    """
    return sum(float(part) for part in _sizes(loss, student)) / (2 * len(student.logps))


def _sizes(loss: Tensor, student: Student) -> Iterator[Tensor]:
    for response, logps in student.logps.items():
        yield 2 * (_gradient(loss, logps).abs() * student.tokens[response]).sum()
    for logps in (*student.token_logps.values(), *(logps for _, logps in student.likeliest.values())):
        yield 2 * _gradient(loss, logps).abs().sum()
    for response, topk in student.topk.items():
        rest = student.rest[response]
        gradient = torch.cat([_gradient(loss, topk), _gradient(loss, rest)[:, None]], dim=1).nan_to_num()
        mass = torch.cat([topk, rest[:, None]], dim=1).detach().exp()
        yield (gradient - mass * gradient.sum(1, keepdim=True)).abs().sum()


def _gradient(loss: Tensor, of: Tensor) -> Tensor:
    if not (loss.requires_grad and of.requires_grad):
        return torch.zeros_like(of)
    (gradient,) = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True, materialize_grads=True)
    return gradient
