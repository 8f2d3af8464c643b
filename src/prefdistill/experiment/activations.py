"""The bytes of hidden states and of what layers compute from them, counted in passes over tensors without data."""

from __future__ import annotations

import functools
import json
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefdistill.experiment.dimensions import hidden_size, matrices, text_config
from prefdistill.models.backbone import backbone_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def activation_bytes(model: PreTrainedModel, rows: int, tokens: int, bf16: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that a decoder layer saves for backward, and those saved around the layers.

    Counted by autograd, in passes of one and of two layers, each of which saves the mask of its rows as numbers. A
    model that cannot run without data, such as a mixture of experts, is counted as 34 bytes for each element of its
    hidden states in 16 bits (arXiv 2205.05198).

    Args:
        rows, tokens: of the micro-batch.
        bf16: whether the pass is under autocast, whose copies of weights are not counted.
        dtype: of the weights.
    """
    kind, text = _kind(model)
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


def pass_bytes(model: PreTrainedModel, rows: int, tokens: int, bf16: bool, dtype: torch.dtype) -> int:
    """Return the most bytes that the layers of a pass without gradients hold at once, with the mask of the rows.

    Counted in a pass of two layers; the others hold as much as the second one. A model that cannot run without data is
    counted as three hidden states, three as wide as its widest weight, and a mask.

    Args:
        rows, tokens: of the pass.
        bf16: whether it is under autocast, whose copies of weights are not counted.
        dtype: of the weights.
    """
    kind, text = _kind(model)
    try:
        return _held_bytes(kind, text, rows, tokens, bf16, dtype) - _held_bytes(kind, text, 1, 2, bf16, dtype)
    except Exception:  # as above
        widest = max((p.shape[0] for p in matrices(model)), default=0)
        states = 3 * (hidden_size(model) + widest) * dtype.itemsize
        return rows * tokens * (states + tokens * (2 + dtype.itemsize))


def _kind(model: PreTrainedModel) -> tuple[Any, str]:
    """Return the class of a model and the configuration of its language model, which can be keys of a cache."""
    return cast(Any, type(model)), text_config(model).to_json_string(use_diff=False)


def _shallow(kind: Any, config: str, layers: int, dtype: torch.dtype) -> Any:
    """Return a model of some layers; under FakeTensorMode, one without data."""
    settings = kind.config_class.from_dict(json.loads(config))
    settings.num_hidden_layers = layers
    if isinstance(kinds := getattr(settings, "layer_types", None), list):
        settings.layer_types = kinds[:layers]
    return kind._from_config(settings, dtype=dtype)  # what every AutoModel's from_config calls


def _inputs(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids, and the mask that hides responses from each other, or padding."""
    return torch.zeros(rows, tokens, dtype=torch.long), torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)


@functools.lru_cache(maxsize=256)
def _saved_bytes(kind: Any, config: str, rows: int, tokens: int, layers: int, bf16: bool, dtype: torch.dtype) -> int:
    """Return the bytes that a pass of a model of some layers saves for backward, but for its weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from trl.trainer.utils import disable_dropout_in_model

    storages: dict[int, Any] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        storages.setdefault(storage._cdata, storage)
        return saved

    with FakeTensorMode():
        model = _shallow(kind, config, layers, dtype).train()
        disable_dropout_in_model(model)
        of_weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        ids, mask = _inputs(rows, tokens)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            backbone_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)
        return sum(storage.nbytes() for key, storage in storages.items() if key not in of_weights)


@functools.lru_cache(maxsize=256)
def _held_bytes(kind: Any, config: str, rows: int, tokens: int, bf16: bool, dtype: torch.dtype) -> int:
    """Return the most bytes that a pass of two layers without gradients holds at once, but for its weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        model = _shallow(kind, config, 2, dtype).eval()
        held = Held(model)
        with held, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            ids, mask = _inputs(rows, tokens)
            backbone_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)
        return held.peak


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, for as long as they are alive; not a model's weights.

    Args:
        model: that computes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive = {part.untyped_storage()._cdata for part in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return returned

    def _add(self, storage: Any) -> None:
        if (key := storage._cdata) not in self.alive:
            self.alive.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size
