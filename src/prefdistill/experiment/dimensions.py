"""Dimensions of language models of any architecture: width, heads, matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prefdistill.models.backbone import backbone_of
from prefdistill.models.logprobs import vocabulary_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def matrices(model: Any) -> list[torch.nn.Parameter]:
    """Return the weights of the layers that hidden states are multiplied by."""
    backbone = model.base_model if model.get_output_embeddings() is None else backbone_of(model)
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    return [p for p in backbone.parameters() if p.dim() > 1 and id(p) not in tables]


def text_config(model: PreTrainedModel) -> Any:
    """Return the configuration of the language model."""
    return model.config.get_text_config()


def hidden_size(model: PreTrainedModel) -> int:
    """Return the width of the hidden states."""
    return int(text_config(model).hidden_size)


def head_dim(model: PreTrainedModel) -> int:
    """Return the width of an attention head."""
    config = text_config(model)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def head_rows(model: PreTrainedModel) -> int:
    """Return the rows of the head; 1 for a classifier with one score."""
    return 1 if model.get_output_embeddings() is None else vocabulary_rows(model)
