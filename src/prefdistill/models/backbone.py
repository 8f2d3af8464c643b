"""TODO docstring."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from prefdistill.data.load.batches import _visible


def model_inputs(batch: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The keyword arguments of a model's forward, from a batch on its device."""
    names = ("input_ids", "attention_mask", "position_ids")
    inputs: dict[str, Tensor] = {name: batch[name] for name in names if name in batch}
    if "segments" in batch:
        inputs["attention_mask"] = _visible(batch["segments"], model)
    return inputs


def causal_lm(model: Any) -> Any:
    """The transformers model inside whatever wraps it (data parallel, PEFT)."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def backbone_of(model: Any) -> Any:
    """The part of a causal language model that ends in the last hidden state."""
    lm = causal_lm(model)
    found = lm.get_decoder()
    if found is lm or not isinstance(found, PreTrainedModel):  # some families name themselves, or a layer of their head
        found = getattr(lm, "model", found)
    return found


def attention_of(model: Any) -> str:
    """transformers' name of the attention kernel, e.g. "sdpa"."""
    return str(causal_lm(model).config.get_text_config()._attn_implementation)  # it has no public name
