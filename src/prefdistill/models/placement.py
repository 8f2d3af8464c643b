"""Models whose layers are spread over several devices, main memory and disk (`device_map` of transformers).

accelerate moves the weights of a layer that is not on a device there for each call of the layer; between calls they are
on the meta device.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prefdistill.core.errors import UserError
from prefdistill.core.processes import processes
from prefdistill.core.progress import say
from prefdistill.models.device import default_device
from prefdistill.models.hub import adapter_root, gguf_parts


def is_spread(model: Any) -> bool:
    """Return whether `device_map` has placed the layers of a model: they stay there."""
    return bool(getattr(model, "hf_device_map", None))


def input_device(model: Any) -> torch.device:
    """Return the device that the inputs of a model go to."""
    device: torch.device = model.device
    return default_device() if device.type == "meta" else device


def check_placement(name: str, device_map: str | None) -> None:
    """Check that a model can be spread.

    Raises:
        UserError: if it is an adapter or a GGUF file, or there are several processes.
    """
    if device_map is None:
        return
    if processes().num_processes > 1:
        raise UserError(
            f"device_map={device_map} spreads a model over all devices of this machine, for one process; leave it out, "
            "or start one process"
        )
    if adapter_root(name) != name:
        raise UserError(f"{name} is an adapter, which is merged on one device; save it merged, or leave device_map out")
    if gguf_parts(name):
        raise UserError(f"{name} is a GGUF file, which is dequantised on one device; leave device_map out")


def report_placement(name: str, model: Any) -> None:
    """Say where the parts of a model are that is not on devices alone: each pass reads these again."""
    places = Counter(str(place) for place in (getattr(model, "hf_device_map", None) or {}).values())
    elsewhere = {"disk"} | ({"cpu"} if default_device().type != "cpu" else set())
    if elsewhere & set(places):
        parts = ", ".join(f"{count} on {place}" for place, count in places.items())
        say(f"{name} does not fit on the devices: of its parts are {parts}; every pass reads them from there")


def state_entries(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a model's state dict by name, those from outside the devices read one after the other."""
    from accelerate.utils import align_module_device

    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor) and value.device.type == "meta":
            owner, _, own_name = name.rpartition(".")
            module = model.get_submodule(owner)
            with align_module_device(module, torch.device("cpu")):
                yield name, getattr(module, own_name)
        else:
            yield name, value
