"""The bytes that models take, on one device or on several, from shapes alone.

Models are on the meta device; no weights are read.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from prefdistill.core.errors import UserError
from prefdistill.experiment.activations import activation_bytes, pass_bytes
from prefdistill.experiment.dimensions import head_dim, head_rows, hidden_size, matrices, text_config
from prefdistill.models.logprobs import STORED_ELEMENTS, TILE_ELEMENTS, TRAINING_TILE_ELEMENTS, topk_bytes
from prefdistill.training.arguments import adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefdistill.training.options import Training

KEPT = 16  # bytes of an id and its log-probability, once in the results of tiles and once in those of a pass
ADAM = 2  # moments of each trained weight, of its dtype
ZERO3_LIVE = 10**9  # weights that DeepSpeed keeps gathered by default (stage3_max_live_parameters)
Strategy = Literal["one", "ddp", "zero2", "zero3", "fsdp2", "device_map"]


def weight_bytes(model: PreTrainedModel, dtype: str, quantization: str | None = None) -> int:
    """Return the bytes of the weights, as they are loaded in a dtype or quantised, or are stored quantised."""
    stored: Any = getattr(model.config, "quantization_config", None)
    if stored is not None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        bits = stored.get("bits") or (4 if stored.get("load_in_4bit") else 8)
    elif quantization is not None:
        bits = int(quantization.removesuffix("bit"))
    else:
        bits = 8 * dtype_of(model, dtype).itemsize
    return model.num_parameters() * bits // 8


def dtype_of(model: PreTrainedModel, dtype: str) -> torch.dtype:
    """Return a dtype by name; for "auto" that of the model's configuration."""
    if dtype == "auto":
        return cast(torch.dtype, model.config.dtype or torch.float32)
    return cast(torch.dtype, getattr(torch, dtype))


def adapter_bytes(model: PreTrainedModel, training: Training) -> int:
    """Return the bytes that LoRA adds to the weights, in float32; 0 without.

    Raises:
        UserError: if the model has no layers that the adapter names.
    """
    return 0 if training.lora is None else 4 * _adapter_weights(cast(Any, model), training.lora.model_dump_json())


@functools.lru_cache(maxsize=16)
def _adapter_weights(model: Any, lora: str) -> int:
    from peft import get_peft_model

    from prefdistill.training.options import Training

    config = adapter_config(Training.model_validate({"lora": json.loads(lora)}))
    try:
        adapted = get_peft_model(copy.deepcopy(model), cast(Any, config))
    except ValueError as error:
        raise UserError(f"training.lora: {error}") from error
    return adapted.get_nb_trainable_parameters()[0]


def checkpoint_bytes(trained: int, training: Training) -> int:
    """Return the bytes of the checkpoints that are kept, and one more: an old one is removed after the new one is
    whole. They hold weights and moments, no gradients."""
    limit = training.arguments.get("save_total_limit") or 1
    return (cast(int, limit) + 1) * trained * (1 + ADAM)


@dataclass(frozen=True)
class Memory:
    """Bytes that a step holds at its peak, by part.

    Args:
        weights: of the trained model, or of one that is read, with its adapter.
        frozen: of a model beside it: the reference of a teacher's DPO, or what an evaluated model is compared with.
        gradients, optimizer: of the trained weights; 0 for a model that is read.
        copies: 16-bit copies of the weights that autocast keeps for a pass, or that backward needs.
        activations: that the longest micro-batch saves for backward, or the largest that a reading pass holds.
        head: logits in memory at once, with their gradients, and the gradient of the head while it is added.
        last: activations when all gradients are there, those of one layer.
        micro_batches: of a step. In the first there are no gradients yet while activations and head are at their peak.
        unit: of the weights that sharded devices gather at once: two layers, and embeddings with head.
        unit_gradients: of one layer, and of embeddings with head, before FSDP2 reduces them.
        uncached: 16-bit copies that backward needs where autocast keeps none: under FSDP2.
        zero3_unit: of the weights that ZeRO-3 gathers at once.
    """

    weights: int = 0
    frozen: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    activations: int = 0
    head: int = 0
    last: int = 0
    micro_batches: int = 1
    unit: int = 0
    unit_gradients: int = 0
    uncached: int = 0
    zero3_unit: int = 0

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.parts().values())

    @property
    def state(self) -> int:
        """What is known without the length of the data, on one device: weights, gradients and optimizer."""
        return self.weights + self.frozen + self.gradients + self.optimizer

    def parts(self, strategy: Strategy = "one", devices: int = 1) -> dict[str, int]:
        """Return the bytes per device by part. Every device has a micro-batch of its own.

        Args:
            strategy: "one" and "ddp" hold everything on each device, DDP also the gradients in its buckets; "zero2"
                shards gradients and optimizer, with a float32 copy of its shard of the weights; "zero3" and "fsdp2"
                shard the weights too, and gather those of the layers at work: DeepSpeed in 16 bits where it autocasts,
                FSDP2 in float32, with the copies in 16 bits that backward needs. "device_map" spreads the layers of a
                model that is read.
            devices: that share the work.
        """
        n = 1 if strategy == "one" else devices
        weights, gradients, optimizer, copies = self.weights + self.frozen, self.gradients, self.optimizer, self.copies
        before = 0  # gradients while the activations and the head of a step's only micro-batch are at their peak
        if n > 1 and strategy == "ddp":
            before, gradients = gradients, 2 * gradients
        elif n > 1 and strategy == "zero2":
            gradients, optimizer = -(-gradients // n), -(-(optimizer + self.gradients) // n)
        elif n > 1:
            weights, gradients, optimizer = (-(-size // n) for size in (weights, gradients, optimizer))
            if strategy == "zero3":
                copies = self.zero3_unit
            else:
                copies, gradients = self.unit + self.uncached, gradients + self.unit_gradients
        activations, head = self.activations, self.head
        if self.micro_batches <= n:  # the gradients come after the head's logits, and are the rest
            if before + activations + head > gradients + self.last:
                gradients = before
            else:
                activations, head = self.last, 0
        return {
            "weights": weights,
            "gradients": gradients,
            "optimizer": optimizer,
            "copies": copies,
            "activations": activations,
            "head": head,
        }


def training_memory(
    model: PreTrainedModel,
    training: Training,
    dtype: str,
    longest: int | None = None,
    *,
    scored: float = 1.0,
    sequences: int = 1,
    reference: bool = False,
) -> Memory:
    r"""Return what a training holds: with n weights of b bytes, and Adam,

    .. math:: 4 n b \quad\text{or, with adapters of } m \text{ weights,}\quad n b + 16 m

    and, if the tokens of the longest row are known, activations, copies and the head's tiles on top.

    Args:
        longest: tokens of the longest row, or of the longest of its sequences.
        scored: share of the tokens whose logits are computed.
        sequences: of a row, each with its own copy of the prompt and padded to the longest.
        reference: whether a frozen copy of the model is beside it.

    Raises:
        UserError: if training.lora does not fit the model.
    """
    weights, adapter = weight_bytes(model, dtype), adapter_bytes(model, training)
    trained = adapter or weights
    state = {
        "weights": weights + adapter,
        "frozen": weights if reference else 0,
        "gradients": trained,
        "optimizer": ADAM * trained,
    }
    if longest is None:
        return Memory(**state)
    held = dtype_of(model, dtype)
    autocast = training.autocast and held is torch.float32
    width = 2 if autocast else held.itemsize
    rows = training.rows_at_once * sequences
    per_layer, around = activation_bytes(model, rows, longest, autocast, held)
    layers = text_config(model).num_hidden_layers
    inputs = rows * longest * hidden_size(model) * held.itemsize  # of one layer: the residual stream
    elements = math.ceil(scored * rows * longest) * head_rows(model)
    # the stored logits, and a tile with its gradient or with the powers of its sum
    head = 4 * min(elements, STORED_ELEMENTS) + 2 * 4 * min(elements, TRAINING_TILE_ELEMENTS)
    cast = 2 * (_of_layers(model, layers) + _of_head(model))
    # the head's backward is done before a layer is computed once more
    needed = 2 * max(_of_layers(model, 1), _of_head(model)) if training.gradient_checkpointing else cast
    return Memory(
        **state,
        copies=(needed if adapter else cast) if autocast else 0,  # autocast caches no weights that are not trained
        activations=around + (layers * inputs + per_layer if training.gradient_checkpointing else layers * per_layer),
        head=head + (0 if adapter else _of_head(model) * width),
        last=around + per_layer,
        micro_batches=-(-training.batch_size // training.rows_at_once),
        unit=(_of_layers(model, 2) + _around(model)) * held.itemsize,
        unit_gradients=adapter // layers or (_of_layers(model, 1) + _around(model)) * held.itemsize,
        uncached=needed if autocast else 0,
        zero3_unit=_zero3_unit(model, width, held),
    )


def reading_memory(
    model: PreTrainedModel,
    weights: int,
    tokens: int,
    longest: int,
    dtype: str,
    *,
    scored: float = 1.0,
    bf16: bool = False,
    k: int = 0,
) -> Memory:
    """Return what a pass without gradients holds: the widest layer at work, or after all layers the head.

    Args:
        weights: bytes of the model as it is loaded.
        tokens: in the pass; a longer row has a pass of its own.
        longest: tokens of a row.
        dtype: of the hidden states.
        scored: share of the tokens whose logits are computed.
        bf16: whether the pass is under autocast.
        k: tokens kept of each distribution.
    """
    held = dtype_of(model, dtype)
    autocast = bf16 and held is torch.float32
    rows = max(1, tokens // longest)
    states = math.ceil(scored * rows * longest)
    layer = pass_bytes(model, rows, longest, autocast, held)
    hidden = (rows * longest + states) * hidden_size(model) * held.itemsize
    # a tile, with the powers of its sum or what its k largest are taken from; and those of all states
    tile = min(states, max(1, TILE_ELEMENTS["other"] // head_rows(model)))
    head = tile * (4 * head_rows(model) + max(4 * head_rows(model), topk_bytes(head_rows(model), k)))
    head += states * k * KEPT
    activations, head = max((layer, 0), (hidden, head), key=sum)
    return Memory(
        weights=weights,
        copies=2 * (sum(p.numel() for p in matrices(model)) + _of_head(model)) if autocast else 0,
        activations=activations,
        head=head,
        unit=_unit(model, weights),
    )


def sampling_memory(
    model: PreTrainedModel, weights: int, rows: int, prompt: int, new: int, dtype: str, *, top_p: float = 1.0
) -> Memory:
    """Return what `generate` holds: the pass over the prompts with their keys and values, or at the last token all keys
    and values, those of a layer once more with the new token, and the logits of one token of each row.

    Args:
        weights: bytes of the model as it is loaded.
        rows: responses in a batch.
        prompt, new: tokens of the longest prompt, and of a response.
        dtype: of the hidden states.
        top_p: of the draws; below 1 the logits are sorted.
    """
    held = dtype_of(model, dtype)
    kept, layers = cache_bytes(model, held), text_config(model).num_hidden_layers
    first = pass_bytes(model, rows, prompt, False, held) + rows * prompt * kept if prompt else 0
    last = rows * (prompt + new) * kept * (layers + 1) // layers
    # the model's logits, a float32 copy, divided by the temperature, their powers, and random numbers; sorted: with
    # their places, which are 8 bytes
    head = rows * head_rows(model) * (held.itemsize + 4 * (4 if top_p == 1 else 6))
    activations, head = max((first, 0), (last, head), key=sum)
    return Memory(
        weights=weights,
        activations=activations,
        head=head,
        unit=_unit(model, weights),
    )


def cache_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one token."""
    config = text_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim(model) * dtype.itemsize)


def _of_layers(model: PreTrainedModel, layers: int) -> int:
    """Return the weights of the matrices of some layers."""
    return sum(p.numel() for p in matrices(model)) * layers // int(text_config(model).num_hidden_layers)


def _of_head(model: PreTrainedModel) -> int:
    return head_rows(model) * hidden_size(model)


def _around(model: PreTrainedModel) -> int:
    """Return the weights of embeddings and head, and of the norms."""
    return model.num_parameters() - sum(p.numel() for p in matrices(model))


def _unit(model: PreTrainedModel, weights: int) -> int:
    """Return the bytes of two layers, and of embeddings and head, of a model as it is loaded."""
    return (_of_layers(model, 2) + _around(model)) * max(1, weights // model.num_parameters())


def _zero3_unit(model: PreTrainedModel, width: int, held: torch.dtype) -> int:
    """Return the bytes that ZeRO-3 gathers: embeddings, the head, and layers up to its limit, of which two at least.

    Args:
        width: bytes of a weight of a linear layer.
        held: dtype of the others.
    """
    around, head = _around(model), min(_of_head(model), _around(model))
    layers = _of_layers(model, text_config(model).num_hidden_layers)
    gathered = min(layers, max(_of_layers(model, 2), ZERO3_LIVE - around))
    return (gathered + head) * width + (around - head) * held.itemsize
