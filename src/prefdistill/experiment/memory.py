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
from prefdistill.experiment.dimensions import head_dim, head_rows, hidden_size, matrices, text_config
from prefdistill.models.backbone import backbone_of
from prefdistill.models.logprobs import STORED_ELEMENTS, TILE_ELEMENTS, TRAINING_TILE_ELEMENTS
from prefdistill.training.arguments import adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefdistill.training.options import Training

ADAM = 2  # moments of each trained weight, of its dtype
Strategy = Literal["one", "ddp", "zero2", "fsdp2"]


def weight_bytes(model: PreTrainedModel, dtype: str, quantization: str | None = None) -> int:
    """Return the bytes of the weights, as they are loaded in a dtype or quantised, or are stored quantised."""
    stored: Any = getattr(model.config, "quantization_config", None)
    if stored is not None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        bits = stored.get("bits") or (4 if stored.get("load_in_4bit") else 8)
    elif quantization is not None:
        bits = int(quantization.removesuffix("bit"))
    else:
        bits = 8 * _dtype(model, dtype).itemsize
    return model.num_parameters() * bits // 8


def _dtype(model: PreTrainedModel, dtype: str) -> torch.dtype:
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
        copies: 16-bit copies of the weights that autocast keeps for a pass.
        activations: that the longest micro-batch saves for backward, or the largest that a reading pass holds.
        head: logits in memory at once, with their gradients, and the gradient of the head while it is added.
        unit: of the weights that sharded devices gather at once: two layers, and embeddings with head.
    """

    weights: int = 0
    frozen: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    activations: int = 0
    head: int = 0
    unit: int = 0

    @property
    def state(self) -> int:
        """What is known without the length of the data, on one device: weights, gradients and optimizer."""
        return self.weights + self.frozen + self.gradients + self.optimizer

    def parts(self, strategy: Strategy = "one", devices: int = 1) -> dict[str, int]:
        """Return the bytes per device by part. Every device has a micro-batch of its own.

        Args:
            strategy: "one" and "ddp" hold everything on each device, DDP also the gradients in its buckets; "zero2"
                shards gradients and optimizer, with a float32 copy of its shard of the weights; "fsdp2" (and ZeRO-3)
                shards the weights too, and gathers those of the layers at work in 16 bits in place of autocast's
                copies.
            devices: that share the work.
        """
        n = 1 if strategy == "one" else devices
        weights, gradients, optimizer, copies = self.weights + self.frozen, self.gradients, self.optimizer, self.copies
        if strategy == "ddp" and n > 1:
            gradients *= 2
        elif strategy == "zero2" and n > 1:
            gradients, optimizer = -(-gradients // n), -(-(optimizer + self.gradients) // n)
        elif strategy == "fsdp2" and n > 1:
            weights, gradients, optimizer = (-(-size // n) for size in (weights, gradients, optimizer))
            copies = self.unit
        return {
            "weights": weights,
            "gradients": gradients,
            "optimizer": optimizer,
            "copies": copies,
            "activations": self.activations,
            "head": self.head,
        }


def training_memory(
    model: PreTrainedModel,
    training: Training,
    dtype: str,
    longest: int | None = None,
    *,
    scored: float = 1.0,
    reference: bool = False,
) -> Memory:
    r"""Return what a training holds: with n weights of b bytes, and Adam,

    .. math:: 4 n b \quad\text{or, with adapters of } m \text{ weights,}\quad n b + 16 m

    and, if the tokens of the longest row are known, activations, copies and the head's tiles on top.

    Args:
        scored: share of the tokens whose logits are computed.
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
    held = _dtype(model, dtype)
    autocast = training.autocast and held is torch.float32
    width = 2 if autocast else held.itemsize
    rows = min(training.micro_batch_size, training.batch_size)
    per_layer, around = activation_bytes(model, rows, longest, autocast, held)
    layers = text_config(model).num_hidden_layers
    inputs = rows * longest * hidden_size(model) * held.itemsize  # of one layer: the residual stream
    elements = math.ceil(scored * rows * longest) * head_rows(model)
    # the stored logits, and a tile with its gradient or with the powers of its sum
    head = 4 * min(elements, STORED_ELEMENTS) + 2 * 4 * min(elements, TRAINING_TILE_ELEMENTS)
    return Memory(
        **state,
        copies=2 * model.num_parameters() if autocast else 0,
        activations=around + (layers * inputs + per_layer if training.gradient_checkpointing else layers * per_layer),
        head=head + (0 if adapter else head_rows(model) * hidden_size(model) * width),
        unit=_unit(model, width),
    )


def reading_memory(model: PreTrainedModel, weights: int, tokens: int, cache_tokens: int = 0) -> Memory:
    """Return what a pass without gradients holds.

    Args:
        weights: bytes of the model as it is loaded.
        tokens: in the pass.
        cache_tokens: whose keys and values are kept, for generation.
    """
    width = max(1, weights // model.num_parameters())
    widest = max((p.shape[0] for p in matrices(model)), default=0)
    elements = tokens * head_rows(model)
    return Memory(
        weights=weights,
        activations=tokens * width * (6 * hidden_size(model) + 3 * widest) + cache_tokens * cache_bytes(model, width),
        head=2 * 4 * min(elements, TILE_ELEMENTS["other"]),
        unit=_unit(model, width),
    )


def cache_bytes(model: PreTrainedModel, width: int) -> int:
    """Return the bytes of the keys and values of one token."""
    config = text_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim(model) * width)


def activation_bytes(model: PreTrainedModel, rows: int, tokens: int, bf16: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that a decoder layer saves for backward, and those saved around the layers.

    Counted by autograd, in passes of one and of two layers over tensors without data. A model that cannot run so, such
    as a mixture of experts, is counted as 34 bytes for each element of its hidden states in 16 bits (arXiv 2205.05198).

    Args:
        rows, tokens: of the micro-batch.
        bf16: whether the pass is under autocast, whose copies of weights are not counted.
        dtype: of the weights.
    """
    kind, text = cast(Any, type(model)), text_config(model).to_json_string(use_diff=False)
    try:
        one, two = (
            _saved_bytes(kind, text, rows, tokens, layers, bf16, dtype)
            - _saved_bytes(kind, text, 1, 2, layers, bf16, dtype)
            for layers in (1, 2)
        )
    except Exception:  # models are not written for passes without data, and may raise anything
        hidden = rows * tokens * hidden_size(model)
        return 34 * hidden * dtype.itemsize // 2, 2 * hidden * dtype.itemsize
    return two - one, max(0, 2 * one - two)


@functools.lru_cache(maxsize=256)
def _saved_bytes(kind: Any, config: str, rows: int, tokens: int, layers: int, bf16: bool, dtype: torch.dtype) -> int:
    """Return the bytes that a pass of a model of some layers saves for backward, but for its weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from trl.trainer.utils import disable_dropout_in_model

    settings = kind.config_class.from_dict(json.loads(config))
    settings.num_hidden_layers = layers
    if isinstance(kinds := getattr(settings, "layer_types", None), list):
        settings.layer_types = kinds[:layers]
    storages: dict[int, Any] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        storages.setdefault(storage._cdata, storage)
        return saved

    with FakeTensorMode():
        model = kind._from_config(settings, dtype=dtype).train()  # what every AutoModel's from_config calls
        disable_dropout_in_model(model)
        of_weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            backbone_of(model)(input_ids=ids, use_cache=False)
        return sum(storage.nbytes() for key, storage in storages.items() if key not in of_weights)


def _unit(model: PreTrainedModel, width: int) -> int:
    layers = sum(p.numel() for p in matrices(model)) // text_config(model).num_hidden_layers
    around = model.num_parameters() - sum(p.numel() for p in matrices(model))
    return (2 * layers + around) * width
