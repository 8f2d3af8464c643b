"""Random models of well-known shapes, and the FLOP of their forward pass."""

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _shape(vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


# "wide" is two layers of Llama-3.2-1B with a small vocabulary. The last four have the sizes of SmolLM2-135M,
# Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B, all as Llamas, without Qwen's biases.
SHAPES = {
    "nano": _shape(512, 32, 64, 2, 4, 2, True),
    "tiny": _shape(8_192, 256, 704, 4, 4, 4, True),
    "small": _shape(32_768, 512, 1_408, 8, 8, 8, True),
    "wide": _shape(8_192, 2_048, 8_192, 2, 32, 8, True),
    "smollm2-135m": _shape(49_152, 576, 1_536, 30, 9, 3, True),
    "qwen-0.5b": _shape(151_936, 896, 4_864, 24, 14, 2, True),
    "llama-1b": _shape(128_256, 2_048, 8_192, 16, 32, 8, True),
    "llama-8b": _shape(128_256, 4_096, 14_336, 32, 32, 8, False),
}


def make_model(
    shape: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", seed: int, dtype: "torch.dtype | None" = None
) -> "PreTrainedModel":
    """Create a random model on the accelerator if there is one. The same seed gives the same weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from prefdistill.models.device import default_device

    config = LlamaConfig(
        **shape,
        max_position_embeddings=131_072,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    with torch.device(default_device()):
        return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)


def empty_model(shape: dict[str, Any]) -> "PreTrainedModel":
    """Create a model without weights, for what depends on its dimensions alone."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape))


def compile_layers(model: "PreTrainedModel", backend: str) -> None:
    """Have torch.compile compile the decoder layers, in place, when they are first called; "eager" only traces them."""
    from prefdistill.models.backbone import backbone_of

    for layer in backbone_of(model).layers:
        layer.compile(backend=backend, dynamic=True)


def make_head(shape: dict[str, Any], dtype: "torch.dtype") -> "torch.Tensor":
    """Create a random head [vocabulary, hidden] on the accelerator if there is one."""
    import torch

    from prefdistill.models.device import default_device

    torch.manual_seed(0)
    return 0.02 * torch.randn(shape["vocab_size"], shape["hidden_size"], dtype=dtype, device=default_device())


def forward_flops(shape: dict[str, Any], lengths: Iterable[int], head_states: int) -> float:
    """Return the FLOP of one forward pass, as `prefdistill plan` counts them (experiment/flops.py).

    Only useful work counts: no padding and no recomputation, and of attention the half that is causal. Training takes
    three times as many.

    Args:
        shape: of `SHAPES`.
        lengths: tokens of each sequence.
        head_states: states whose logits are computed.
    """
    from prefdistill.experiment.flops import Text
    from prefdistill.experiment.flops import forward_flops as flops_of

    model = _empty_model(tuple(shape.items()))
    layers = sum(flops_of(model, Text(0, n))[0] for n in lengths)
    return layers + flops_of(model, Text(0, 1, scored=head_states))[1]


@functools.lru_cache(maxsize=4)
def _empty_model(shape: tuple[tuple[str, Any], ...]) -> "PreTrainedModel":
    return empty_model(dict(shape))


def peak_flops(device: str) -> float | None:
    """Return the peak FLOP/s of a GPU by its name, in dense bfloat16; None for a CPU and for GPUs that are not listed.

    All words of a listed name, such as those of H100-PCIe, are words of the device's.
    """
    from prefdistill.experiment.hardware import GPUS

    words = {*re.split(r"\W+", device.upper())}
    listed = {name: {*name.upper().split("-")} for name in GPUS}
    matches = [name for name, needed in listed.items() if needed <= words]
    return GPUS[max(matches, key=lambda name: len(listed[name]))].flops if matches else None
