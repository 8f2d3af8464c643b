"""Default device and dtypes of models."""

from typing import TYPE_CHECKING, get_args

from prefdistill.models.options import Dtype

if TYPE_CHECKING:
    import torch


DTYPES = get_args(Dtype)


def default_device() -> "torch.device":
    """Return the accelerator, or the CPU if there is none."""
    import torch

    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
    return torch.device("cpu")


def fast_bf16() -> bool:
    """Return whether the hardware multiplies bfloat16 faster than float32."""
    import torch

    device = default_device().type
    if device == "cpu":  # AVX-512's bf16 took 1.5 to 2 times as long as float32 in our measurements
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    backend = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device)
    return backend is not None and backend.is_bf16_supported(including_emulation=False)


def default_dtype(role: str) -> str:
    """Return the default dtype of a model with this role, for `load_model`.

    A reference and a trained student load in float32, as the student is trained; a teacher in bfloat16 where that is
    fast, elsewhere as it is stored.
    """
    if role in ("reference", "student"):
        return "float32"
    return "bfloat16" if fast_bf16() else "auto"
