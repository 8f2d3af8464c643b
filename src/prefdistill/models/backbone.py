"""Find the parts of any transformers language model: its backbone, attention kernel and inputs."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

DOCUMENT = 1024  # segments are numbered document * 1024 + response; 0 is the prompt


def model_inputs(batch: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the keyword arguments of a model's forward, from a batch on its device."""
    names = ("input_ids", "attention_mask", "position_ids")
    inputs: dict[str, Tensor] = {name: batch[name] for name in names if name in batch}
    if "segments" in batch:
        inputs["attention_mask"] = visible_mask(batch["segments"], model)
    return inputs


def causal_lm(model: Any) -> Any:
    """Return the transformers model inside its wrappers (data parallel, PEFT)."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def backbone_of(model: Any) -> Any:
    """Return the part of a causal language model that ends in the last hidden state."""
    lm = causal_lm(model)
    decoder = lm.get_decoder()
    if decoder is lm or not isinstance(decoder, PreTrainedModel):  # some families return themselves, or a layer
        decoder = getattr(lm, "model", decoder)
    return decoder


def attention_of(model: Any) -> str:
    """Return transformers' name of the attention kernel, e.g. "sdpa"."""
    return str(causal_lm(model).config.get_text_config()._attn_implementation)  # there is no public attribute


def visible_mask(segments: Tensor, model: nn.Module) -> Tensor:
    """Return the mask [N, 1, L, L] under which a token sees the earlier tokens of its own segment and of its prompt.

    Padding sees itself, so that no row of the softmax is empty.
    """
    prompts = segments.div(DOCUMENT, rounding_mode="floor") * DOCUMENT
    own, prompt = segments[:, :, None] == segments[:, None, :], prompts[:, :, None] == segments[:, None, :]
    width = segments.shape[1]
    before = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    visible = ((own | prompt) & before)[:, None]
    if attention_of(model) != "eager":
        return visible
    # transformers' own attention adds the mask to the scores
    dtype = causal_lm(model).dtype
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
