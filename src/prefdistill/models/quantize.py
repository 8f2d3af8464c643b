"""TODO docstring."""

from typing import TYPE_CHECKING, Any

from prefdistill.core.progress import say

if TYPE_CHECKING:
    pass

from prefdistill.models.device import fast_bf16
from prefdistill.models.hub import _base_of

QUANTIZATIONS = ("4bit", "8bit")


def _stored_quantization(name: str) -> str | None:
    """The method that a checkpoint, or the base of an adapter's, is stored quantised with."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(_base_of(name))
    except Exception:
        return None  # whoever loads it says what is wrong
    if not isinstance(config, dict):
        return None
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return str(found.get("quant_method", "bitsandbytes")) if found else None


def _say_unquantised(model: Any, name: str) -> None:
    """bitsandbytes quantises linear layers; experts that are one tensor are none."""
    experts = [p for key, p in model.named_parameters() if ".experts." in key and p.is_floating_point()]
    if experts:
        kept, dtype = sum(p.numel() for p in experts), str(model.dtype).removeprefix("torch.")
        say(f"{name}: its experts ({kept:,} weights) stay in {dtype}: bitsandbytes quantises linear layers only")


def _bitsandbytes(quantization: str, dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if dtype == "auto":
        dtype = "bfloat16" if fast_bf16() else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
