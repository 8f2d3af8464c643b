"""Gather the weights of a sharded model, to save it; read those of a checkpoint."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights
from accelerate.utils.constants import FSDP_MODEL_NAME

from prefdistill.models.backbone import causal_lm
from prefdistill.models.sharded import plain_class
from prefdistill.training.engines import FSDP2, load_whole_models

if TYPE_CHECKING:
    from transformers import Trainer


def gathered_model(trainer: "Trainer") -> Any:
    """Return the trained model with all its weights, on the CPU of the main process; None on the others.

    All processes call it: together they gather the weights, one after the other, into the memory of the main one.
    """
    from torch.distributed.tensor import DTensor

    main = trainer.is_world_process_zero()
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:
        parts = model.state_dict().items()
        gathered = ((name, part.full_tensor() if isinstance(part, DTensor) else part) for name, part in parts)
        weights = {name: weight.cpu() for name, weight in gathered if main}
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not main:
        return None
    whole = _without_weights(model)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    whole.name_or_path = model.name_or_path
    return whole.eval()


def _without_weights(model: Any) -> Any:
    """Return a model of the same classes and configuration that is not sharded, its weights on the meta device."""
    lm = causal_lm(model)
    build: Any = plain_class(lm)._from_config  # what every AutoModel's from_config calls
    with init_empty_weights(include_buffers=False):
        whole = build(copy.deepcopy(lm.config), dtype=lm.dtype)
    whole.generation_config = copy.deepcopy(lm.generation_config)
    if model is lm:
        return whole
    from peft import get_peft_model

    config = model.active_peft_config
    empty = copy.deepcopy(config)
    empty.init_lora_weights = False  # nothing is computed of weights that are not there
    whole = get_peft_model(whole, empty, low_cpu_mem_usage=True)
    whole.peft_config["default"] = config
    return whole


def load_weights(model: Any, checkpoint: Path, engine: str) -> None:
    """Load the weights of a finished training's checkpoint into a model that is not sharded."""
    load_whole_models()
    if engine == FSDP2:
        _load_sharded(model, checkpoint / f"{FSDP_MODEL_NAME}_0")
    elif hasattr(model, "peft_config"):
        model.load_adapter(str(checkpoint), adapter_name="default")
    else:
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())


def _load_sharded(model: Any, directory: Path) -> None:
    """Load the weights, or those of the adapter, that all processes have written together."""
    from torch.distributed import checkpoint

    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        weights = get_peft_model_state_dict(model)
    else:
        weights = model.state_dict()
    checkpoint.load({"model": weights}, storage_reader=checkpoint.FileSystemReader(directory))
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights)
