"""The teacher's soft value, and the return of its shaping term."""

import torch
from torch import Tensor

TERMINALS = ("last", "bootstrap", "zero")


def soft_value(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return the soft (maximum-entropy) value of a state under a policy's logits.

    .. math:: V(s) = b \log \sum_a \exp(z(s, a) / b)

    Args:
        logits: raw final logits `z(s, .)`, shape [..., vocab]. From normalised log-probabilities and `temperature=1`
            the value is 0 everywhere: use raw logits.
        temperature: the value temperature b > 0, in units of the logits.

    Returns:
        Values in nats, shape [...], in float32 or the logits' own dtype if that is wider.

    Raises:
        ValueError: if `temperature` is not positive and finite.

    Source: TVKD (arXiv 2509.16965), the soft value function of a DPO-trained teacher.

    Example:
        >>> import torch
        >>> soft_value(torch.zeros(2, 4))            # log 4, twice
        tensor([1.3863, 1.3863])
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"the value temperature must be positive and finite, got {temperature}")
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 1:
        return torch.logsumexp(scores, dim=-1)
    return temperature * torch.logsumexp(scores / temperature, dim=-1)


def shaping_return(
    values: Tensor,
    lengths: Tensor,
    discount: float = 1.0,
    terminal: str = "last",
    ended: Tensor | None = None,
) -> Tensor:
    r"""Return the sum of the potential-based shaping term over a response.

    .. math:: \Psi(y) = \sum_{t=0}^{T-1} \gamma V(s_{t+1}) - V(s_t)

    With `discount=1` the sum telescopes to `V(s_T) - V(s_0)`. `terminal` defines `V(s_T)` where the response
    ended: "last" takes `V(s_{T-1})`, the last state before the end token; "bootstrap" takes the value after
    the end token, as the formula reads; "zero" takes 0, which with `discount=1` keeps the optimal policy of the task
    unchanged where every response ends. A truncated response has no terminal state, so its `V(s_T)` is used as it is.

    Args:
        values: `V(s_0) .. V(s_T)` per response, shape [B, T_max + 1]; entries after `s_T` are never read.
        lengths: response tokens T of each row, shape [B], at least 1 each.
        discount: the discount gamma.
        terminal: "last", "bootstrap" or "zero".
        ended: whether the response has its end token, shape [B], bool. Default: all do.

    Returns:
        Psi in nats, shape [B], in the dtype of `values`.

    Raises:
        ValueError: on an unknown `terminal`, shapes that do not match, or a length below 1 or beyond `values`.

    Source: TVKD (arXiv 2509.16965), shaping term psi; Ng, Harada & Russell (1999) for the invariance.

    Example:
        >>> import torch
        >>> shaping_return(torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([2]), terminal="bootstrap")
        tensor([4.])
    """
    if terminal not in TERMINALS:
        raise ValueError(f"terminal must be one of {', '.join(TERMINALS)}, got {terminal!r}")
    if values.dim() != 2 or lengths.shape != values.shape[:1]:
        raise ValueError(f"values must be [B, T+1] and lengths [B], got {list(values.shape)} and {list(lengths.shape)}")
    if lengths.numel() and not (int(lengths.min()) >= 1 and int(lengths.max()) < values.shape[1]):
        raise ValueError(f"lengths must lie in 1..{values.shape[1] - 1}, the number of states less one")
    ended = torch.ones_like(lengths, dtype=torch.bool) if ended is None else ended.bool()
    if ended.shape != lengths.shape:
        raise ValueError(f"ended must be [B] like lengths, got {list(ended.shape)} and {list(lengths.shape)}")

    last = values.gather(1, (lengths - 1)[:, None])[:, 0]
    final = values.gather(1, lengths[:, None])[:, 0]
    if terminal == "last":
        final = torch.where(ended, last, final)
    elif terminal == "zero":
        final = torch.where(ended, torch.zeros_like(final), final)

    if discount == 1:
        return final - values[:, 0]
    # sum_t gamma V(s_{t+1}) - V(s_t) = gamma V(s_T) - V(s_0) - (1 - gamma) * sum_{0 < t < T} V(s_t)
    steps = torch.arange(values.shape[1], device=values.device)
    between = (steps > 0) & (steps < lengths[:, None])
    return discount * final - values[:, 0] - (1 - discount) * torch.where(between, values, 0).sum(1)
