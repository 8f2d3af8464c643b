"""Quantised models: detect a checkpoint that is stored quantised, quantise others with bitsandbytes."""

from collections.abc import Iterator
from typing import Any, get_args

from prefdistill.core.progress import say
from prefdistill.models.device import fast_bf16
from prefdistill.models.hub import adapter_root, gguf_parts, pinned_revision
from prefdistill.models.options import Quantization

QUANTIZATIONS = get_args(Quantization)


def stored_quantization(name: str) -> str | None:
    """Return how a checkpoint, or the model below an adapter, is stored quantised; None if it is not."""
    from transformers import PreTrainedConfig

    try:
        root = adapter_root(name)
        if gguf_parts(root):
            return None
        config, _ = PreTrainedConfig.get_config_dict(root, revision=pinned_revision(root))
    except Exception:
        return None  # loading the model reports what is wrong
    if not isinstance(config, dict):
        return None
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return str(settings.get("quant_method", "bitsandbytes")) if settings else None


def bitsandbytes_config(quantization: str, dtype: str) -> Any:
    """Return the settings that load a model in "4bit" or "8bit"; `dtype` is that of 4-bit products."""
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if dtype == "auto":
        dtype = "bfloat16" if fast_bf16() else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )


def report_unquantized_experts(model: Any, name: str) -> None:
    """Say which weights bitsandbytes left as they are: it quantises linear layers, not experts in a single tensor."""
    experts = [p for key, p in model.named_parameters() if ".experts." in key and p.is_floating_point()]
    if experts:
        weights, dtype = sum(p.numel() for p in experts), str(model.dtype).removeprefix("torch.")
        say(f"{name}: its experts ({weights:,} weights) stay in {dtype}: bitsandbytes quantises linear layers only")


def repacking(model: Any) -> Iterator[Any]:
    """Yield the 4-bit layers whose weights bitsandbytes repacks in their first forward on a CPU.

    They are then made for products of single tokens: slower for whole batches, always in bf16, and reading the state
    dict afterwards corrupts them (as of 0.50.2).
    """
    return (module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu"))


def keep_packing(model: Any) -> Any:
    """Keep bitsandbytes from repacking the 4-bit weights of a model; return the model."""
    for module in repacking(model):
        module.support_avx512bf16_for_cpu = False
    return model
