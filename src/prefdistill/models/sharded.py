"""Models whose weights are spread over several processes: by FSDP2 (`fully_shard`) or by DeepSpeed's ZeRO-3."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether a process holds only a part of the model's weights between two passes."""
    if not _has_processes():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def gathers_its_weights(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own that gather its weights for each call, and free them after it."""
    if not _has_processes():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule) or any(hasattr(weight, "ds_id") for weight in module.parameters())


def _has_processes() -> bool:
    """Return whether this process is one of several; without them the imports, which take a second, are not needed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def whole_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight, of which ZeRO-3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def local_part(weight: Tensor) -> Tensor:
    """Return the part of a weight that this process holds: all of it, where it is not sharded."""
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor):
        return weight.to_local()
    part: Tensor | None = getattr(weight, "ds_tensor", None)
    if part is None:
        return weight
    details: Any = weight
    own = details.ds_numel - details.ds_zero_partition_rank * part.numel()  # the rest is padding, with any content
    return part.flatten()[: max(own, 0)]


def plain_class(model: nn.Module) -> type[Any]:
    """Return the class of a model without what `fully_shard` adds to it."""
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


class _WithoutHooks(nn.Module):
    """Calls a module's own forward, without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple: it is no part of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module[0]
        return type(module).forward(module, *args, **kwargs)


@contextmanager
def head_without_hooks(lm: Any) -> Iterator[None]:
    """Have a language model call its head without hooks inside the block, where its weights are gathered already."""
    head = lm.get_output_embeddings()
    lm.set_output_embeddings(_WithoutHooks(head))
    try:
        yield
    finally:
        lm.set_output_embeddings(head)
