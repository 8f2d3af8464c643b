"""Save a trained model ready to serve, and verify that what was saved gives the trained model's logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say
from prefdistill.data.template import template_ending

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer

ARGUMENTS = "training_args.bin"  # a pickle that the Trainer writes beside a model; our own files hold the same
ADAPTER = "adapter"
ROWS, TOKENS = 3, 64  # what is compared: rows, and tokens of each
# Root mean square of the difference, in standard deviations of the logits: more is not rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def save(trainer: "Trainer", out: Path, *, verify: bool = True) -> None:
    """Save the trained model and its tokenizer in `out`, ready to serve.

    An adapter is saved in `out/adapter`, and merged into its base in `out`.

    Args:
        trainer: after its training.
        out: a directory.
        verify: load what was saved and compare its logits on a few rows with the trained model's.

    Raises:
        UserError: on every process, if they differ by more than rounding.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    if verify and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        say("note: what is saved is not verified, because the weights are spread over several processes")
        verify = False
    verify = verify and trainer.is_world_process_zero()
    rows = _rows(trainer.train_dataset, tokenizer) if verify else []
    trained = _logits(model, rows)
    set_generation_config(model, tokenizer)
    adapted = hasattr(model, "peft_config")
    trainer.save_model(str(out / ADAPTER if adapted else out))
    (out / ARGUMENTS).unlink(missing_ok=True)
    if adapted and trainer.is_world_process_zero():
        (out / ADAPTER / ARGUMENTS).unlink(missing_ok=True)
        base, kind, dtype = model.active_peft_config.base_model_name_or_path, type(model.get_base_model()), model.dtype
        merged = model.merge_and_unload()
        merged.save_pretrained(out)
        tokenizer.save_pretrained(out)
        loaders = [(out, _loader(kind, out))]
        if base:  # a model from random weights has no name
            loaders.append((out / ADAPTER, _adapter_loader(kind, base, out / ADAPTER, dtype)))
    else:
        loaders = [(out, _loader(type(model), out))]
    problem = [_difference(loaders, rows, trained) if verify else ""]
    broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])


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
    """Return the logits of each row, without autocast."""
    if not rows:
        return []
    forward = getattr(model, "_original_forward", model.forward)  # accelerate's autocast is around the other one
    with _evaluating(model):
        return [
            forward(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits.float().cpu()
            for row in rows
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
    loaders: list[tuple[Path, Callable[[], Any]]], rows: list[list[int]], trained: list[torch.Tensor]
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
        tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
        if not difference <= tolerance:
            problems.append(
                f"{place} does not give the logits of the trained model: they differ by {difference:.2g} of their "
                f"standard deviation, and rounding in {str(model.dtype).removeprefix('torch.')} by {tolerance:g}"
            )
    if not problems:
        return ""
    adapter = (
        "train all weights (lora=null), or an adapter in dtype float32 on a start that is no adapter itself; "
        if len(loaders) > 1
        else ""
    )
    return (
        f"{'; '.join(problems)}. The training is done and its checkpoint is kept: {adapter}or save it as it is with "
        "--no-verify (verify=false in the training's options)"
    )


def _loader(kind: Any, place: Path) -> Callable[[], Any]:
    return lambda: _placed(kind.from_pretrained(place, dtype="auto"))


def _adapter_loader(kind: Any, base: str, place: Path, dtype: torch.dtype) -> Callable[[], Any]:
    from peft import PeftModel

    return lambda: _placed(PeftModel.from_pretrained(kind.from_pretrained(base, dtype=dtype), str(place)))


def _placed(model: Any) -> Any:
    """Return the model on the accelerator if it fits beside the trained one, else where it is."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        if torch.cuda.mem_get_info()[0] > 1.5 * size:
            return model.cuda()
    return model
