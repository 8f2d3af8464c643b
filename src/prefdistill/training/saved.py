"""Save a trained model ready to serve, and verify that what was saved gives the trained model's logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json, write_json
from prefdistill.core.memory import free_devices
from prefdistill.core.progress import say
from prefdistill.data.template import template_ending
from prefdistill.models.adapters import CAUSAL_LM, CHANGES_BASE, merge, read_adapter
from prefdistill.models.backbone import causal_lm
from prefdistill.models.hub import ADAPTER_CONFIG, BASE, adapter_base, gguf_parts, loading_place
from prefdistill.models.quantize import keep_packing
from prefdistill.models.sharded import is_sharded, plain_class
from prefdistill.training.engines import load_whole_models
from prefdistill.training.gather import gathered_model

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer

ARGUMENTS = "training_args.bin"  # a pickle that the Trainer writes beside a model; our own files hold the same
ADAPTER = "adapter"
ROWS, TOKENS = 3, 64  # what is compared: rows, and tokens of each
# Root mean square of the difference, in standard deviations of the logits: more is not rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LOST = 0.1  # share of an adapter's change of the weights that the merged model may lose to rounding


def save(trainer: "Trainer", out: Path, *, verify: bool = True) -> None:
    """Save the trained model and its tokenizer in `out`, ready to serve.

    An adapter is saved in `out/adapter`, and merged into its base in `out`. If it was trained on another adapter, its
    base, the merged start, is saved in `out/base`.

    Args:
        trainer: after its training.
        out: a directory.
        verify: load what was saved and compare its logits on a few rows with the trained model's.

    Raises:
        UserError: on every process, if they differ by more than rounding.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    main, sharded = trainer.is_world_process_zero(), is_sharded(model)
    rows = _rows(trainer.train_dataset, tokenizer) if verify and (main or sharded) else []
    # the weights of a sharded model are gathered by all processes together
    trained = _logits(trainer.model_wrapped if sharded else model, rows)
    load_whole_models()
    verify = verify and main
    adapted, kind, dtype = hasattr(model, "peft_config"), plain_class(causal_lm(model)), model.dtype
    quantised = bool(getattr(model, "is_quantized", False))
    place = out / ADAPTER if adapted else out
    if sharded or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # a Trainer with such an engine saves only what it has trained itself, not what was read from a checkpoint
        model = gathered_model(trainer) if sharded else model
        if main:
            set_generation_config(model, tokenizer)
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
    else:
        set_generation_config(model, tokenizer)
        trainer.save_model(str(place))
    (out / ARGUMENTS).unlink(missing_ok=True)
    loaders = [(out, _loader(kind, out))]
    if adapted and main:
        (out / ADAPTER / ARGUMENTS).unlink(missing_ok=True)
        if _save_merged(model, tokenizer, out):  # a model from random weights has no name
            loaders.append((out / ADAPTER, _adapter_loader(kind, out / ADAPTER, "auto" if quantised else dtype)))
    # products of quantised weights may be made in bfloat16; DeepSpeed gathers weights in it where it autocasts
    narrow = quantised or (sharded and trainer.is_deepspeed_enabled and trainer.args.bf16)
    rounding = TOLERANCE[torch.bfloat16] if narrow else _tolerance(dtype)
    del model  # a gathered one makes room for the saved one, which is loaded again
    problem = [_difference(loaders, rows, trained, rounding) if verify else ""]
    broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])


def _save_merged(model: Any, tokenizer: "PreTrainedTokenizerBase", out: Path) -> str:
    """Save a trained adapter merged into its base in `out`, and name its base in `out/adapter`; return that name.

    The base is saved in `out/base` where PEFT cannot load it from its place: a merged adapter, a GGUF file, or weights
    that the initialisation of the adapter has changed. The model is used up.
    """
    config, place = model.active_peft_config, out / ADAPTER
    settings: dict[str, Any] = {}
    name = config.base_model_name_or_path or ""
    start = model.unload()
    changed = str(getattr(config, "init_lora_weights", "")).startswith(CHANGES_BASE)
    if changed:
        settings["init_lora_weights"] = True
    if changed or (name and (adapter_base(name) != name or gguf_parts(name))):
        start.save_pretrained(out / BASE)
        tokenizer.save_pretrained(out / BASE)
        name = str(out / BASE)
    if Path(name).is_dir():  # PEFT looks for a relative path in the current directory
        name = str(Path(name).absolute())
    settings["base_model_name_or_path"] = name or None
    write_json(place / ADAPTER_CONFIG, read_json(place / ADAPTER_CONFIG) | settings)
    quantised = bool(getattr(start, "is_quantized", False))
    merged = _merged(start.dequantize() if quantised else start, place, config.task_type)
    merged.save_pretrained(out, save_original_format=not quantised)  # transformers cannot undo quantising
    tokenizer.save_pretrained(out)
    return name


@torch.no_grad()
def _merged(start: Any, place: Path, task: str | None) -> Any:
    """Return a base with its adapter merged in, in the dtype of the base unless that rounds away what was learnt."""
    dtype, before = start.dtype, {}
    if dtype != torch.float32:
        before = {name: weight.to("cpu", copy=True) for name, weight in start.state_dict().items()}
        start = start.to("cpu", torch.float32)
    merged = merge(read_adapter(str(place), task or CAUSAL_LM, lambda _: start))
    if merged is None:
        raise UserError(f"the adapter is saved in {place}; merged into its base it does not give the same logits")
    lost = update = 0.0
    for name, weight in merged.state_dict().items():
        if name in before and weight.shape == before[name].shape:
            update += float((weight - before[name]).square().sum())
            lost += float((weight - weight.to(before[name].dtype)).square().sum())
    if lost > (LOST**2) * update:
        share, narrow = (lost / update) ** 0.5, str(dtype).removeprefix("torch.")
        say(f"the merged model is saved in float32: {narrow} would round {share:.0%} of what the adapter learnt away")
    elif before:
        merged.to(dtype)
    return merged


def set_generation_config(model: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make `generate` stop where the training's responses end, and pad as the training padded.

    The end tokens are that of the chat template, the tokenizer's, and those of the model's own list that are special
    tokens of the tokenizer. A classifier generates nothing and is left as it is.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ends = [template_ending(tokenizer).token, tokenizer.eos_token_id, *(token for token in own if token in special)]
    ids = [token for token in dict.fromkeys(ends) if token is not None]
    config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    config.pad_token_id = tokenizer.pad_token_id


def _rows(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the token ids of a few rows, cut short; each is a part of every column of ids."""
    columns = [name for name in dataset.column_names or [] if name.endswith("_ids") and name != "position_ids"]
    rows = [
        [token for name in columns for token in list(row[name] or ())[: TOKENS // len(columns)]]
        for row in (dataset[i] for i in range(min(ROWS, len(dataset))))
    ]
    return [row for row in rows if row] or [[tokenizer.eos_token_id]]


@torch.no_grad()
def _logits(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits of each row, without autocast but DeepSpeed's."""
    if not rows:
        return []
    device = next(model.parameters()).device
    # accelerate's autocast is around the other one; the hooks of a sharded model are around its call
    forward = model if is_sharded(model) else getattr(model, "_original_forward", model.forward)
    with _evaluating(model):
        return [
            forward(input_ids=torch.tensor([row], device=device), use_cache=False).logits.float().cpu() for row in rows
        ]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _difference(
    loaders: list[tuple[Path, Callable[[], Any]]],
    rows: list[list[int]],
    trained: list[torch.Tensor],
    rounding: float,
) -> str:
    """Return which of the saved models gives other logits than the trained one; empty if none does."""
    problems = []
    for place, load in loaders:
        try:
            model = load()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            problems.append(f"{place} cannot be loaded again ({' '.join(str(error).split())[:300]})")
            continue
        expected, logits = torch.cat([part.flatten() for part in trained]), _logits(model, rows)
        actual = torch.cat([part.flatten() for part in logits])
        if actual.shape != expected.shape:
            problems.append(f"{place} has another number of logits than the trained model")
            continue
        difference = float((actual - expected).square().mean().sqrt() / expected.std().clamp_min(1e-6))
        tolerance = max(rounding, _tolerance(model.dtype))
        if 0 < difference <= tolerance:  # as of a merged adapter
            say(f"{place}: loaded again, its logits differ by {difference:.1g} of their standard deviation")
        elif difference:
            problems.append(
                f"{place} does not give the logits of the trained model: they differ by {difference:.2g} of their "
                f"standard deviation, and rounding in {str(model.dtype).removeprefix('torch.')} by {tolerance:g}"
            )
    if not problems:
        return ""
    adapter = "train all weights (lora=null), or the adapter in dtype float32; " if len(loaders) > 1 else ""
    return (
        f"{'; '.join(problems)}. The training is done and its checkpoint is kept: {adapter}or save it as it is with "
        "--no-verify (verify=false in the training's options)"
    )


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def _loader(kind: Any, place: Path) -> Callable[[], Any]:
    return lambda: _placed(kind.from_pretrained(place, dtype="auto"))


def _adapter_loader(kind: Any, place: Path, dtype: torch.dtype | str) -> Callable[[], Any]:
    def load() -> Any:
        settings = read_json(place / ADAPTER_CONFIG)
        base, task = settings["base_model_name_or_path"], settings.get("task_type") or CAUSAL_LM
        load_base = lambda _: keep_packing(kind.from_pretrained(**loading_place(base), dtype=dtype))  # noqa: E731
        return _placed(read_adapter(str(place), task, load_base))

    return load


def _placed(model: Any) -> Any:
    """Return the model on the accelerator if it fits beside the trained one, else where it is."""
    if torch.cuda.is_available():
        free_devices()
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        if torch.cuda.mem_get_info()[0] > 1.5 * size:
            return model.cuda()
    return model
