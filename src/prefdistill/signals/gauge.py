"""How much of the value's word is the model's, and how much its gauge.

Adding u.h(s), any linear function of the last hidden state, to all logits of a state changes no probability, so no
policy and no loss the teacher was trained on; but it moves V(s) by u.h(s). `evaluation.gauge_flips` asks how many pairs
V would order the other way under such a u no longer than a row of the head.
"""

from functools import lru_cache

import torch
from torch import Tensor

DIRECTIONS = 8


@lru_cache(maxsize=1)  # of the model that is being read
def gauge_directions(vocabulary: int, device: torch.device | None = None) -> Tensor:
    """Random weights c over the tokens that can be, [vocabulary, DIRECTIONS], always the same ones.

    u = sum_a c_a W_a, a combination of the head's rows W_a, is about as long as one of them, and u.h(s) is the same
    combination of the logits (where the model does not bend them).
    """
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(vocabulary, DIRECTIONS, generator=generator) / vocabulary**0.5).to(device)


def gauge_shifts(logits: Tensor) -> Tensor:
    """u.h(s) for each direction: [n, vocab] -> [n, DIRECTIONS]. Tokens that cannot be (-inf) have no part in u."""
    with torch.autocast(logits.device.type, enabled=False):  # a sum over the vocabulary needs all of float32
        return logits.masked_fill(logits.isinf(), 0.0) @ gauge_directions(logits.shape[-1], logits.device)
