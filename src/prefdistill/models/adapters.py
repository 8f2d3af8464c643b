"""PEFT adapters: merged into their base where that is exact, else read beside it, or refused."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say
from prefdistill.models.backbone import causal_lm
from prefdistill.models.hub import (
    adapter_base,
    adapter_root,
    adapter_settings,
    loading_place,
    model_file,
    pinned_revision,
)
from prefdistill.models.quantize import stored_quantization

CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"
WEIGHTS = "adapter_model.safetensors"
OTHER_KINDS = {
    "ADAPTION_PROMPT": "adds prompts inside the model",
    "POLY": "has several tasks",
    "XLORA": "mixes several adapters by token",
}
# Initialisations that change the base, and those of them that do so by random numbers or data.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
IRREPRODUCIBLE = ("pissa_niter", "corda", "lora_ga")
PROBE, TOLERANCE = 32, 1e-3  # tokens; difference of the logits, in their root mean square, that is not rounding


def check_adapter(name: str, task: str = CAUSAL_LM) -> None:
    """Check by its settings that an adapter, if this is one, changes the weights of a model for this task.

    Raises:
        UserError: if it does something else, such as adding tokens to the prompt.
        ValueError: if its settings are damaged.
    """
    if adapter_settings(name) is None:
        if not name or (Path(name) / "config.json").exists():
            return
        if below := sorted(Path(name).glob("*/adapter_config.json")):
            names = ", ".join(path.parent.name for path in below)
            raise UserError(f"{name} holds adapters in subdirectories; name one of them: {names}")
        return
    config = _config(name)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    reason = OTHER_KINDS.get(kind)
    if config.is_prompt_learning:
        reason = "adds virtual tokens to the prompt"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "is active only after certain tokens"
    initial = str(getattr(config, "init_lora_weights", ""))
    if initial.startswith(IRREPRODUCIBLE):
        raise UserError(
            f"{name} was trained on a base that its init_lora_weights={initial} had changed, which cannot be computed "
            "again; convert it when it is saved: path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )
    if reason:
        raise UserError(f"{name} is an adapter of the kind {kind} that {reason}; only adapters of weights can be read")
    if config.task_type not in (None, task):
        raise UserError(f"{name} is an adapter for {config.task_type}, not for {task}")


def check_start(name: str, dtype: str) -> None:
    """Check before a training that its start, if it is an adapter, can be merged: in float32, on a plain base.

    Raises:
        UserError: if it cannot.
    """
    try:
        root = adapter_root(name)
    except ValueError:
        return  # loading the model reports what is wrong
    check_adapter(name)
    if root == name:
        return
    if method := stored_quantization(root):
        reason = f"its base {root} is stored quantised ({method})"
    elif (dtype if dtype != "auto" else _stored_dtype(root)) != "float32":
        reason = "in 16 bits that would round the adapter away; train with dtype=float32"
    else:
        return
    raise UserError(f"a training cannot start from the adapter {name}: it cannot be merged into its base: {reason}")


def _stored_dtype(name: str) -> str:
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(**loading_place(name)).dtype or torch.float32).removeprefix("torch.")
    except Exception:
        return "float32"  # loading the model reports what is wrong


def load_adapter(name: str, task: str, load_base: Callable[[frozenset[str]], Any]) -> Any:
    """Return the base of an adapter with the adapter merged in, or, where that is not exact, the PeftModel.

    An adapter is merged in float32 into weights that are not quantised. Where it changes the head or the embeddings of
    a model that ties them, the merged model has them untied. The merged model must give the unmerged one's logits.

    Args:
        name: directory or Hub name.
        task: "CAUSAL_LM" or "SEQ_CLS".
        load_base: returns the base; it gets the names of the weights that the adapter replaces.

    Raises:
        UserError: if the adapter is of another kind or for another task, or lacks weights.
    """
    check_adapter(name, task)
    adapted = read_adapter(name, task, load_base)
    if getattr(adapted, "is_quantized", False) or adapted.dtype != torch.float32:
        return adapted
    try:
        model = merge(adapted)
        reason = "merging changes its logits"
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        model, reason = None, f"it cannot be merged ({' '.join(str(error).split())})"
    if model is None:
        say(f"{name} is read beside its base: {reason}")
        return read_adapter(name, task, load_base)
    model.name_or_path = name
    return model.requires_grad_(True)  # PEFT freezes the base


def read_adapter(name: str, task: str, load_base: Callable[[frozenset[str]], Any]) -> Any:
    """Return the PeftModel of an adapter and its base, see `load_adapter`."""
    from peft import PeftModel

    shapes = saved_shapes(name)
    base = load_base(frozenset(key.removeprefix("base_model.model.") for key in shapes))
    if hasattr(base, "peft_config"):
        raise UserError(
            f"{name} is an adapter on the adapter {adapter_base(name)}, which is merged in float32 only; read it in "
            "float32, without quantization"
        )
    add_rows(base, shapes)
    config = _config(name)
    if task == CAUSAL_LM:  # without a task, PEFT's class has no `generate` of its own
        config.task_type = task
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(base, name, config=config, revision=pinned_revision(name))
    if missing := [str(item.message) for item in caught if "missing adapter keys" in str(item.message)]:
        raise UserError(f"{name} lacks weights of its adapter: {missing[0].split('checkpoint: ')[-1][:200]}")
    return adapted.eval()


def _config(name: str) -> Any:
    from peft import PeftConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings of newer versions
        return PeftConfig.from_pretrained(name, revision=pinned_revision(name))


def saved_shapes(name: str) -> dict[str, list[int]]:
    """Return the shapes of an adapter's weights; empty if they are not stored as safetensors."""
    from safetensors import safe_open

    file = model_file(name, WEIGHTS)
    if file is None:
        return {}
    with safe_open(file, "pt") as weights:
        return {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118


def add_rows(base: Any, shapes: dict[str, list[int]]) -> None:
    """Give a base as many rows as the embeddings that an adapter replaces, for tokens that were added."""
    embeddings = base.get_input_embeddings()
    path = next(path for path, module in base.named_modules() if module is embeddings)
    for key, shape in shapes.items():
        saved = key.removeprefix("base_model.model.")
        if saved in (f"{path}.weight", f"{path}.base_layer.weight") and shape[0] != embeddings.weight.shape[0]:
            base.resize_token_embeddings(shape[0], mean_resizing=False)
            return


@torch.no_grad()
def merge(adapted: Any) -> Any:
    """Return the base of a float32 PeftModel with its adapter merged in; None if its logits change.

    The PeftModel is used up.
    """
    rows = adapted.get_input_embeddings().weight.shape[0]
    tokens = [token for config in adapted.peft_config.values() for token in _trainable_tokens(config)]
    spread = torch.linspace(0, rows - 1, max(PROBE - len(tokens), PROBE // 2)).long()
    ids = torch.cat([torch.tensor(tokens[: PROBE // 2], dtype=torch.long), spread])[None].to(adapted.device)
    adapted.eval()
    before = _logits(adapted, ids)
    untied = _untie(causal_lm(adapted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which are untied here
        model = adapted.merge_and_unload()
    _settle_ties(model)
    after = _logits(model, ids)
    difference = (after - before).square().mean().sqrt() / before.square().mean().sqrt().clamp_min(1e-6)
    if not float(difference) <= TOLERANCE:
        return None
    if untied:
        say(f"the head and the embeddings of {model.name_or_path} are untied: its adapter cannot be merged into both")
    return model


def _trainable_tokens(config: Any) -> list[int]:
    tokens = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    return [token for part in tokens.values() for token in part] if isinstance(tokens, dict) else list(tokens)


def _logits(model: Any, ids: Tensor) -> Any:
    return model(input_ids=ids).logits.float()


def _untie(lm: Any) -> bool:
    """Give the head weights of its own where an adapter's layers change it or the embeddings; return whether it did."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return False
    embeddings, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if head is None or embeddings.weight is not head.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def _settle_ties(lm: Any) -> None:
    """Set the configuration of a model whose head and embeddings have come apart accordingly."""
    embeddings, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head is not None and embeddings.weight is not head.weight:
        for config in (lm.config, lm.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
