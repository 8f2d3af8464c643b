"""Load models and tokenizers by Hub name or directory, and check before a long run that they can be loaded."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full
from prefdistill.core.progress import say, say_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefdistill.models.adapters import CAUSAL_LM, SEQ_CLS, add_rows, check_adapter, load_adapter, saved_shapes
from prefdistill.models.device import DTYPES, default_device
from prefdistill.models.gguf import dequantizing_config, remove_added_tokens
from prefdistill.models.hub import (
    adapter_base,
    adapter_root,
    base_revision,
    gguf_parts,
    loading_place,
    model_file,
)
from prefdistill.models.placement import check_placement, is_spread, report_placement
from prefdistill.models.quantize import (
    QUANTIZATIONS,
    bitsandbytes_config,
    keep_packing,
    repacking,
    report_unquantized_experts,
    stored_quantization,
)

# `from_pretrained` then returns which weights are missing or have another shape, for `check_weights` to refuse.
WITH_LOADING_INFO: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def ready(model: Any) -> "PreTrainedModel":
    """Return the model in eval mode on the accelerator if there is one; a quantised model, and one that is spread over
    several devices, stays where it was loaded.

    Raises:
        UserError: if bitsandbytes has repacked a 4-bit model.
    """
    for module in repacking(model):
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UserError(
                "this 4-bit model has been run on the CPU, which repacks its weights in a way that cannot be read "
                "back; load it again and pass it before its first forward, or pass its name"
            )
    keep_packing(model)
    stays = getattr(model, "is_quantized", False) or is_spread(model)
    return (model if stays else model.to(default_device())).eval()


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a Hub name or directory; one without a padding token pads with its end token.

    A PEFT adapter without a tokenizer has that of its base. A GGUF file has the tokens and merges of a tokenizer, but
    not all of its rules.
    """
    from transformers import AutoTokenizer

    try:
        owner, revision = tokenizer_owner(name)
        tokenizer = AutoTokenizer.from_pretrained(**loading_place(owner, revision), trust_remote_code=trust_remote_code)
        tokenizer.name_or_path = owner
        if gguf_parts(owner):
            remove_added_tokens(tokenizer)
            say_once(
                f"{owner}: the tokenizer is rebuilt from what the GGUF file holds; if the original is at hand, name it "
                "as --tokenizer (model.teacher_tokenizer): its tokens may be others"
            )
    except Exception as error:
        raise load_error("tokenizer", name, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end token (eos_token); set one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_owner(name: str) -> tuple[str, str | None]:
    """Return the model whose tokenizer a model has, and its revision: an adapter may have its base's.

    Raises:
        ValueError: if an adapter_config.json is damaged.
    """
    revision, root = None, adapter_root(name)
    while name != root and not any(_has_file(name, file) for file in ("tokenizer_config.json", "tokenizer.json")):
        name, revision = adapter_base(name), base_revision(name)
    return name, revision


def tokenizer_file(name: str) -> Path | None:
    """Return the tokenizer.json of a Hub name or directory; None if it has none."""
    owner, _ = tokenizer_owner(name)
    return model_file(owner, "tokenizer.json")


def _has_file(name: str, file: str) -> bool:
    return model_file(name, file) is not None


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
    max_memory: dict[int | str, int | str] | None = None,
) -> "PreTrainedModel":
    """Return the causal language model of a Hub name or directory.

    A PEFT adapter is merged into a base in float32, and otherwise stays beside it, as a PeftModel: merging would round
    it. A checkpoint that is stored quantised is loaded as it is, whatever the dtype; a GGUF file is dequantised to it.

    Args:
        name: Hub name or directory, or a GGUF file in one: `models/model.gguf`, `org/name/model.gguf`.
        dtype: "auto" (as the checkpoint is stored), "float32", "bfloat16" or "float16".
        quantization: "4bit" (NF4) or "8bit" (LLM.int8) by bitsandbytes, on the accelerator if there is one. The dtype
            is that of everything else and of 4-bit products; "auto" multiplies in bfloat16 where that is fast, else in
            float32. In 8 bits a large activation changes how its whole batch is rounded, so the outputs for a sequence
            depend a little on the others in its batch.
        trust_remote_code: let the model's repository run its own code.
        device_map, max_memory: of `Placement`: spread the layers over devices, main memory and disk.

    Raises:
        UserError: if there is no such model, it cannot be loaded as a causal language model, it is an adapter that is
            not one of weights, a package or hardware that its quantisation needs is missing, or it cannot be spread.
    """
    check_placement(name, device_map)
    model = _load_model(
        name, dtype, quantization, trust_remote_code, placement={"device_map": device_map, "max_memory": max_memory}
    )
    report_placement(name, model)
    return model


def _load_model(
    name: str,
    dtype: str,
    quantization: str | None,
    trust_remote_code: bool,
    revision: str | None = None,
    replaced: frozenset[str] = frozenset(),
    placement: dict[str, Any] | None = None,
) -> "PreTrainedModel":
    """Load a model of a revision; the weights that an adapter replaces may be missing."""
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise UserError(f"quantization must be {' or '.join(QUANTIZATIONS)}, got {quantization!r}")
    stored, gguf = stored_quantization(name), gguf_parts(name)
    if gguf and quantization:
        raise UserError(f"{name} is quantised already (GGUF) and is dequantised; leave quantization={quantization} out")
    if stored and quantization:
        raise UserError(f"{name} is stored quantised already ({stored}); leave the quantization {quantization} out")
    if stored and dtype != "auto":
        say(f"{name} is stored quantised ({stored}) and loaded as it is, not in {dtype}")
        dtype = "auto"
    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
    }
    method = stored or (quantization and "bitsandbytes")
    try:
        if method:
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about every 8-bit product
            options["device_map"] = {"": default_device()}
        if quantization:
            options["quantization_config"] = bitsandbytes_config(quantization, dtype)
        if gguf:
            options |= dequantizing_config()
        if placement and placement["device_map"] is not None:
            options |= placement
        check_adapter(name)
        if adapter_root(name) != name:
            load_base = functools.partial(
                _load_model, adapter_base(name), dtype, quantization, trust_remote_code, base_revision(name)
            )
            return load_adapter(name, CAUSAL_LM, load_base)
        with without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **loading_place(name, revision), **options, **WITH_LOADING_INFO
            )
    except Exception as error:
        # of a quantised model these errors are about a package or hardware that it needs
        if not method or not isinstance(error, (ImportError, NameError, RuntimeError)):
            raise load_error("model", name, error) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if isinstance(error, ImportError) and "bitsandbytes" in str(error):
            raise UserError(f'{name} needs bitsandbytes: pip install "prefdistill[quantized]"') from error
        raise UserError(f"{name} cannot be loaded quantised ({method}) here: {_first_line(error)}") from error
    model, loading_info = loaded
    if placement and placement["device_map"] is not None and not is_spread(model):
        model.hf_device_map = {"": str(model.device)}  # transformers notes it only of several places
    check_weights("model", name, loading_info, replaced)
    if gguf:
        model.name_or_path = model.config.name_or_path = name
        say(f"{name} is dequantised: {model.num_parameters():,} weights in {str(model.dtype).removeprefix('torch.')}")
    if quantization:
        report_unquantized_experts(model, name)
    return keep_packing(model)


def empty_model(name: str, *, reward: bool = False, trust_remote_code: bool = False) -> "PreTrainedModel":
    """Return the model of a Hub name or directory without its weights, on the meta device; of a PEFT adapter, its base
    with the rows of the tokens that were added.

    Args:
        reward: return a sequence classifier with one label, not a language model.

    Raises:
        UserError: if there is no such model, or it is not of this kind.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    base = name
    try:
        base = adapter_root(name)
        labels: dict[str, Any] = {"num_labels": 1} if reward else {}
        config = AutoConfig.from_pretrained(**loading_place(base), trust_remote_code=trust_remote_code, **labels)
        kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=trust_remote_code)
            if Path(name).is_dir() and base != name:
                add_rows(model, saved_shapes(name))
            return model
    except Exception as error:
        raise load_error("reward model" if reward else "model", base, error) from error


def check_model(name: str, *, trust_remote_code: bool = False, fetch: bool = True) -> None:
    """Check before a long run that a causal language model can be loaded, by the names and shapes of its weights.

    No weight is read. Of a PEFT adapter its base is checked, of a GGUF file its configuration; a model that is stored
    quantised is not checked.

    Args:
        name: Hub name or directory.
        trust_remote_code: let the model's repository run its own code.
        fetch: check a model on the Hub too, which fetches its weights.

    Raises:
        UserError: if there is no such model, it is no causal language model, or weights are missing or do not fit.
    """
    from transformers import AutoModelForCausalLM

    base = name
    try:
        check_adapter(name)
        base = adapter_root(name)
        if stored_quantization(base) or not (fetch or Path(base).exists()):
            return
        if gguf_parts(base):  # its weights would be dequantised to read their names
            empty_model(base, trust_remote_code=trust_remote_code)
            return
        with without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **loading_place(base), device_map="meta", trust_remote_code=trust_remote_code, **WITH_LOADING_INFO
            )
    except Exception as error:
        raise load_error("model", base, error) from error
    check_weights("model", base, loaded[1])


def check_reward_model(name: str, *, trust_remote_code: bool = False) -> None:
    """Check before a long run that a model is a sequence classifier with one label, by its configuration.

    Of a PEFT adapter its kind is checked: its head may be its own.

    Raises:
        UserError: if there is no such model, or it is a language model or has several labels.
    """
    from transformers import AutoConfig

    try:
        check_adapter(name, SEQ_CLS)
        if adapter_root(name) != name:
            AutoConfig.from_pretrained(**loading_place(adapter_root(name)), trust_remote_code=trust_remote_code)
            return
        config = AutoConfig.from_pretrained(**loading_place(name), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise load_error("reward model", name, error) from error
    if language_models := [kind for kind in config.architectures or [] if "CausalLM" in kind]:
        raise UserError(_not_loaded("reward model", name, f"it is a language model, {language_models[0]}"))
    if config.num_labels != 1:
        raise UserError(f"{name} has {config.num_labels} labels; a reward model has one, the score of a response")


def load_reward_model(
    name: str, *, trust_remote_code: bool = False
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a sequence classifier with one label, which scores a text, and its tokenizer.

    Raises:
        UserError: see `check_reward_model`; also if weights are missing, such as a head that was never trained.
    """
    check_reward_model(name, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return _load_reward_model(name, trust_remote_code), tokenizer


def _load_reward_model(
    name: str, trust_remote_code: bool, revision: str | None = None, replaced: frozenset[str] = frozenset()
) -> "PreTrainedModel":
    from transformers import AutoModelForSequenceClassification

    try:
        if adapter_root(name) != name:
            load_base = functools.partial(
                _load_reward_model, adapter_base(name), trust_remote_code, base_revision(name)
            )
            return load_adapter(name, SEQ_CLS, load_base)
        # the head of an adapter's base may be that of a language model
        labels: dict[str, Any] = {"num_labels": 1} if replaced else {}
        with without_report():
            model, loading_info = AutoModelForSequenceClassification.from_pretrained(
                **loading_place(name, revision),
                dtype="auto",
                trust_remote_code=trust_remote_code,
                **labels,
                **WITH_LOADING_INFO,
            )
    except Exception as error:
        raise load_error("reward model", name, error) from error
    check_weights("reward model", name, loading_info, replaced)
    return model


@contextmanager
def without_report() -> Iterator[None]:
    """Suppress transformers' table of missing and mismatched weights, which `check_weights` reports in one line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def others(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(others)  # a level of ERROR would log notes on tensor parallelism
    try:
        yield
    finally:
        logger.removeFilter(others)


def check_weights(what: str, name: str, loading_info: dict[str, Any], replaced: frozenset[str] = frozenset()) -> None:
    """Refuse a checkpoint with missing or mismatched weights, which transformers would initialise at random."""
    if missing := sorted(set(loading_info["missing_keys"]) - replaced):
        raise UserError(_not_loaded(what, name, f"{len(missing)} weights are missing, the first is {missing[0]}"))
    if mismatched := sorted(loading_info["mismatched_keys"]):
        key, stored, configured = mismatched[0]
        shapes = f"{key} has the shape {list(stored)}, its config.json says {list(configured)}"
        raise UserError(_not_loaded(what, name, f"{len(mismatched)} weights do not fit, the first is {shapes}"))


def load_error(what: str, name: str, error: Exception) -> Exception:
    """Return the error to raise for an error of a loader, which raises anything on strange files."""
    import torch

    if isinstance(error, (UserError, MemoryError, torch.OutOfMemoryError)) or disk_full(error):
        return error
    if isinstance(error, ValueError) and "offload_folder" in str(error):
        return UserError(
            f"{name} does not fit on the devices and in main memory, and its files cannot stand in for the rest: it is "
            "not stored as safetensors, or transformers changes its weights while loading; raise max_memory"
        )
    if isinstance(error, ImportError) and "gguf" in str(error):
        return UserError(f'{name} needs gguf: pip install "prefdistill[gguf]"')
    readable = isinstance(error, (OSError, ValueError, ImportError, RuntimeError))
    reason = _first_line(error)
    return UserError(_not_loaded(what, name, reason if readable else f"{type(error).__name__}: {reason}"))


def _not_loaded(what: str, name: str, reason: str) -> str:
    if name and Path(name).exists():
        return f"{name} exists but holds no {what} that transformers can load: {reason}"
    return f"no {what} at {name!r}: it is not a local directory, and loading it from the Hub failed ({reason})"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
