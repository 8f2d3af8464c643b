"""Models and tokenizers: load them by Hub name or directory, make small ones from scratch, tell them apart."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full
from prefdistill.core.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefdistill.models.device import DTYPES, default_device
from prefdistill.models.hub import _base_of
from prefdistill.models.identity import LOOKED_AT
from prefdistill.models.quantize import QUANTIZATIONS, _bitsandbytes, _say_unquantised, _stored_quantization


def ready(model: Any) -> "PreTrainedModel":
    """The model in eval mode on the accelerator, where there is one; a quantised one stays where it was loaded.

    Raises:
        UserError: if bitsandbytes has packed a 4-bit model anew.
    """
    for module in model.modules():
        # In its first forward on a CPU, bitsandbytes packs 4-bit weights for products of single tokens: slower for
        # whole batches, in bf16 whatever was asked for, and a state dict read afterwards spoils them (as of 0.50.2).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise UserError(
                    "this 4-bit model has been run on the CPU, which packs its weights in a way that cannot be read "
                    "back; load it anew and hand it over before its first forward, or give its name"
                )
            module.support_avx512bf16_for_cpu = False
    return (model if getattr(model, "is_quantized", False) else model.to(default_device())).eval()


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Tokenizer of a Hub name or directory; one without a padding token pads with its end token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _refused("tokenizer", name, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end token (eos_token); set one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, *, dtype: str = "auto", quantization: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """Causal language model of a Hub name or directory.

    A PEFT adapter is merged into its base, or stays beside it where the base is quantised: merging would round it. A
    checkpoint that is stored quantised is read as it is, whatever the dtype.

    Args:
        name: Hub name or directory.
        dtype: "auto" (as the checkpoint is stored), "float32", "bfloat16" or "float16".
        quantization: "4bit" (NF4) or "8bit" (LLM.int8) by bitsandbytes, on the accelerator where there is one. The
            dtype is that of everything else and of 4-bit products; "auto" multiplies in bfloat16 where that is fast,
            else in float32. In 8 bits a large activation changes how its whole batch is rounded, so what is said of a
            sequence depends a little on those beside it.
        trust_remote_code: let the model's repository run its own code. Off unless asked for.

    Raises:
        UserError: if there is no such model, it cannot be loaded as a causal language model, or what its quantisation
            needs is not here.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise UserError(f"quantization must be {' or '.join(QUANTIZATIONS)}, got {quantization!r}")
    stored = _stored_quantization(name)
    if stored and quantization:
        raise UserError(f"{name} is stored quantised already ({stored}); leave the quantization {quantization} out")
    if stored and dtype != "auto":
        say(f"{name} is stored quantised ({stored}) and read as it is, not in {dtype}")
        dtype = "auto"
    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
    }
    method = stored or (quantization and "bitsandbytes")
    try:
        if method:
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of every 8-bit product
            options["device_map"] = {"": default_device()}
        if quantization:
            options["quantization_config"] = _bitsandbytes(quantization, dtype)
        if _base_of(name) != name:
            from peft import AutoPeftModelForCausalLM

            adapted = AutoPeftModelForCausalLM.from_pretrained(name, **options)
            # PEFT has frozen the base
            return adapted if method else adapted.merge_and_unload().requires_grad_(True)
        with _without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options, **LOOKED_AT)
    except Exception as error:
        # of a quantised one these speak of a package or hardware that it needs
        if not method or not isinstance(error, (ImportError, NameError, RuntimeError)):
            raise _refused("model", name, error) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if isinstance(error, ImportError) and "bitsandbytes" in str(error):
            raise UserError(f'{name} needs bitsandbytes: pip install "prefdistill[quantized]"') from error
        raise UserError(f"{name} cannot be read quantised ({method}) here: {_first_line(error)}") from error
    model, found = loaded
    _check_weights("model", name, found)
    if quantization:
        _say_unquantised(model, name)
    return model


def empty_model(name: str, *, reward: bool = False, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model of a Hub name or directory without its weights, on the meta device; of a PEFT adapter, its base.

    Args:
        reward: a sequence classifier in place of a language model.

    Raises:
        UserError: if there is no such model, or it is not of this kind.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    base = name
    try:
        base = _base_of(name)
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _refused("reward model" if reward else "model", base, error) from error


def check_model(name: str, *, trust_remote_code: bool = False, fetch: bool = True) -> None:
    """Whether a causal language model can be loaded, by the names and shapes of its weights, of which none is read:
    before anything long begins. Of a PEFT adapter, its base; what is stored quantised is found out when it is loaded.

    Args:
        name: Hub name or directory.
        trust_remote_code: let the model's repository run its own code.
        fetch: look at a model of the Hub too, whose weights are fetched for it.

    Raises:
        UserError: if there is no such model, it is no causal language model, or weights are missing or do not fit.
    """
    from transformers import AutoModelForCausalLM

    base = name
    try:
        base = _base_of(name)
        if _stored_quantization(base) or not (fetch or Path(base).exists()):
            return
        with _without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base, device_map="meta", trust_remote_code=trust_remote_code, **LOOKED_AT
            )
    except Exception as error:
        raise _refused("model", base, error) from error
    _check_weights("model", base, loaded[1])


def check_reward_model(name: str, *, trust_remote_code: bool = False) -> None:
    """Whether a model is a sequence classifier with one label, by its configuration: before anything long begins.

    Raises:
        UserError: if there is no such model, or it is a language model or has several labels.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _refused("reward model", name, error) from error
    if language := [kind for kind in config.architectures or [] if "CausalLM" in kind]:
        raise UserError(_not_loaded("reward model", name, f"it is a language model, {language[0]}"))
    if config.num_labels != 1:
        raise UserError(f"{name} has {config.num_labels} labels; a reward model has one, the score of a response")


def load_reward_model(
    name: str, *, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Sequence classifier with one label, which scores a text, and its own tokenizer.

    Raises:
        UserError: see `check_reward_model`; also if weights are missing, such as a head that was never trained.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_reward_model(name, trust_remote_code=trust_remote_code)
    try:
        with _without_report():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                **LOOKED_AT,
            )
    except Exception as error:
        raise _refused("reward model", name, error) from error
    _check_weights("reward model", name, found)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:  # by which a classifier finds the last token
        text_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of weights that are missing or do not fit: `_check_weights` says it in a line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def others(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(others)  # a level of ERROR would have it speak of tensor parallelism
    try:
        yield
    finally:
        logger.removeFilter(others)


def _check_weights(what: str, name: str, found: dict[str, Any]) -> None:
    """transformers makes up weights that are missing, or of another shape than the configuration says."""
    if missing := sorted(found["missing_keys"]):
        raise UserError(_not_loaded(what, name, f"{len(missing)} weights are missing, the first is {missing[0]}"))
    if other := sorted(found["mismatched_keys"]):
        key, stored, configured = other[0]
        shapes = f"{key} has the shape {list(stored)}, its config.json says {list(configured)}"
        raise UserError(_not_loaded(what, name, f"{len(other)} weights do not fit, the first is {shapes}"))


def _refused(what: str, name: str, error: Exception) -> Exception:
    """What to raise for an error of a loader: what strange files make it raise has no narrower class than Exception."""
    import torch

    if isinstance(error, (UserError, MemoryError, torch.OutOfMemoryError)) or disk_full(error):
        return error
    plain = isinstance(error, (OSError, ValueError, ImportError, RuntimeError))
    reason = _first_line(error)
    return UserError(_not_loaded(what, name, reason if plain else f"{type(error).__name__}: {reason}"))


def _not_loaded(what: str, name: str, reason: str) -> str:
    if name and Path(name).exists():
        return f"{name} is there but holds no {what} that transformers can load: {reason}"
    return f"no {what} at {name!r}: neither a directory here nor a name the Hub gave us ({reason})"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
