"""TODO docstring."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """The processes of this run: one, or those that accelerate or torchrun has started."""
    return PartialState(cpu=not torch.accelerator.is_available())
