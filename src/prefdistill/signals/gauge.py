"""How much of the value is the policy's, and how much is an arbitrary offset of the logits (a gauge).

Adding u.h(s), any linear function of the last hidden state, to all logits of a state changes no probability, so no
policy and no loss that the teacher was trained on; but it changes V(s) by u.h(s). `evaluation.gauge_flips` counts the
pairs whose ordering by V flips under such a u no longer than a row of the head.
"""

from functools import lru_cache

import torch
from torch import Tensor

DIRECTIONS = 8


@lru_cache(maxsize=1)  # for the model in use
def gauge_directions(vocabulary: int, device: torch.device | None = None) -> Tensor:
    """Return random weights c over the tokens that can be emitted, [vocabulary, DIRECTIONS], always the same ones.

    u = sum_a c_a W_a, a combination of the head's rows W_a, is about as long as one of them, and u.h(s) is the same
    combination of the logits (unless the model soft-caps them).
    """
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(vocabulary, DIRECTIONS, generator=generator) / vocabulary**0.5).to(device)


def gauge_shifts(logits: Tensor) -> Tensor:
    """Return u.h(s) for each direction: [n, vocab] -> [n, DIRECTIONS]. Tokens with logit -inf have no part in u."""
    with torch.autocast(logits.device.type, enabled=False):  # a sum over the vocabulary needs all of float32
        return logits.masked_fill(logits.isinf(), 0.0) @ gauge_directions(logits.shape[-1], logits.device)
