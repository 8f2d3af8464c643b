"""TODO docstring."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


DTYPES = ("auto", "float32", "bfloat16", "float16")


def default_device() -> "torch.device":
    import torch

    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
    return torch.device("cpu")


def fast_bf16() -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32."""
    import torch

    device = default_device().type
    if device == "cpu":  # AVX-512's bf16 took 1.5 to 2 times as long as float32 where we measured it
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    backend = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device)
    return backend is not None and backend.is_bf16_supported(including_emulation=False)


def default_dtype(role: str) -> str:
    """The dtype in which a model is read if nobody names one, as `load_model` takes it.

    A reference and a trained student are read in float32, as the student is trained; a teacher in bfloat16 where that
    is fast, elsewhere as it is stored.
    """
    if role in ("reference", "student"):
        return "float32"
    return "bfloat16" if fast_bf16() else "auto"
