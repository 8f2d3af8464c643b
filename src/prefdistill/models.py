"""Models and tokenizers: load them by Hub name or directory, make small ones from scratch, tell them apart."""

import difflib
import functools
import hashlib
import inspect
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.errors import UserError
from prefdistill.files import disk_full, file_digest, value_digest
from prefdistill.progress import say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
# Of a configuration: where it comes from, how it is stored, what is for training or other tasks or set in use.
NOT_COMPUTING = re.compile(
    r"_.*|architectures|transformers_version|(torch_)?dtype|quantization_config|.*dropout.*|.*pdrop|output_.*|use_cache|"
    r"return_dict|.*_token_id|num_labels|id2label|label2id|problem_type|max_length"
)
# Say which weights are missing or have another shape, in place of warnings and a bare error: `_check_weights` refuses.
LOOKED_AT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
TOKEN_ARGUMENTS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")  # of a configuration: the tokenizer's
# Files of a directory that loading a model and its tokenizer may read, by their names in transformers and PEFT.
LOADED = (
    "*.safetensors", "*.bin", "*.index.json", "*config.json", "*.py", "custom_generate/*.py",
    "*token*.json", "*vocab*.json", "*vocab*.txt", "*merges*.txt", "*template*.json", "*.jinja",
    "additional_chat_templates/*.jinja", "*.model", "*.spm", "*.codes", "*.tiktoken", "*.tokenizer", "tekken.json",
    "dict.txt", "emoji.json", "normalizer.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json",
)  # fmt: skip
UNLOADED = {"training_args.bin", "optimizer.bin", "scheduler.bin"}

# Every role marker is a special token and nothing follows the end token, so no token can merge across the boundary
# between prompt and response, and a training conversation ends where a generated one does.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def default_device() -> "torch.device":
    import torch

    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
    return torch.device("cpu")


def fast_bf16() -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32."""
    import torch

    device = default_device().type
    if device == "cpu":  # AVX-512's bf16 took 1.5 to 2 times as long as float32 where we measured it
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    backend = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device)
    return backend is not None and backend.is_bf16_supported(including_emulation=False)


def default_dtype(role: str) -> str:
    """The dtype in which a model is read if nobody names one, as `load_model` takes it.

    A reference and a trained student are read in float32, as the student is trained; a teacher in bfloat16 where that
    is fast, elsewhere as it is stored.
    """
    if role in ("reference", "student"):
        return "float32"
    return "bfloat16" if fast_bf16() else "auto"


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


def _stored_quantization(name: str) -> str | None:
    """The method that a checkpoint, or the base of an adapter's, is stored quantised with."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(_base_of(name))
    except Exception:
        return None  # whoever loads it says what is wrong
    if not isinstance(config, dict):
        return None
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return str(found.get("quant_method", "bitsandbytes")) if found else None


def _base_of(name: str) -> str:
    """The model that the configuration of an adapter names, here or on the Hub; of anything else, the name itself."""
    adapter = Path(name) / "adapter_config.json" if Path(name).is_dir() else _fetched(name, "adapter_config.json")
    if adapter is None or not adapter.is_file():
        return name
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not isinstance(base, str):
        raise ValueError(f"adapter_config.json names no base model: {base!r}")
    return base


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


def _say_unquantised(model: Any, name: str) -> None:
    """bitsandbytes quantises linear layers; experts that are one tensor are none."""
    experts = [p for key, p in model.named_parameters() if ".experts." in key and p.is_floating_point()]
    if experts:
        kept, dtype = sum(p.numel() for p in experts), str(model.dtype).removeprefix("torch.")
        say(f"{name}: its experts ({kept:,} weights) stay in {dtype}: bitsandbytes quantises linear layers only")


def _bitsandbytes(quantization: str, dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if dtype == "auto":
        dtype = "bfloat16" if fast_bf16() else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )


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


def model_identity(model: "PreTrainedModel", name: str = "") -> dict[str, Any]:
    """What makes two models the same for us: name, Hub revision, architecture, dtype, a digest of every weight, and how
    they are quantised, if they are."""
    identity = {
        "name": name or model.name_or_path,
        "revision": hub_revision(name),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sha256": weights_digest(model),
        "config": computing_config(model),
    }
    if getattr(model, "is_quantized", False):
        settings = model.config.quantization_config
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        told = {key: value for key, value in settings.items() if not key.startswith("_")}
        identity["quantization"] = json.loads(json.dumps(told, default=str))
    return identity


def computing_config(model: "PreTrainedModel") -> dict[str, Any]:
    """What a configuration says of how a model computes, in JSON's terms; what is not set, or off, is left out."""

    def kept(config: dict[Any, Any]) -> dict[str, Any]:
        said = {str(key): value for key, value in config.items() if value is not None and value is not False}
        return {
            key: kept(value) if isinstance(value, dict) else value
            for key, value in said.items()
            if not NOT_COMPUTING.fullmatch(key)
        }

    found: dict[str, Any] = json.loads(json.dumps(kept(model.config.to_diff_dict()), default=str))
    return found


def weights_digest(model: "PreTrainedModel", dtype: str | None = None) -> str:
    """sha256 of every weight: of those in the model's own dtype, as they are in another one, if that is named."""
    import torch

    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        for part, tensor in _parts(key, value):
            if isinstance(tensor, torch.Tensor):
                if dtype is not None and tensor.dtype == model.dtype:
                    tensor = tensor.to(getattr(torch, dtype))
                digest.update(f"{part} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
            else:
                digest.update(f"{part} {tensor!r}".encode())
    return digest.hexdigest()


def fits_in(model: "PreTrainedModel", dtype: str) -> bool:
    """Whether no weight loses bits in another dtype."""
    import torch

    narrow = getattr(torch, dtype)
    if torch.promote_types(model.dtype, narrow) == narrow:  # the usual case costs no pass over the weights
        return True
    of_its_own = (tensor for tensor in model.state_dict().values() if tensor.dtype == model.dtype)
    return all(bool(((tensor.to(narrow).to(tensor.dtype) == tensor) | tensor.isnan()).all()) for tensor in of_its_own)


def _parts(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A weight, or the tensors that a quantised one is made of."""
    if not hasattr(value, "__tensor_flatten__"):
        yield key, value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _parts(f"{key}.{name}", getattr(value, name))


def model_key(name: str | None, *, above: tuple[str, ...] = ()) -> Any:
    """What tells two states of a model apart without loading it: digests of the files of a directory that loading it
    may read, wherever it lies and whatever else is there, or name and revision on the Hub; and the key of an adapter's
    base.

    Args:
        above: adapters whose base it is; one of them as its base in turn is for the loader to refuse.
    """
    if name is None:
        return None
    if Path(name).is_dir():
        files = _loaded_files(Path(name))
        with ThreadPoolExecutor() as pool:  # hashing many gigabytes lets go of the interpreter
            found: dict[str, Any] = dict(zip(files, pool.map(_digest, files.values()), strict=True))
    else:
        config = _fetched(name, "config.json") or _fetched(name, "adapter_config.json")
        found = {"hub": name, "revision": config.parent.name if config else None}
    try:
        base = _base_of(name)
    except (ValueError, KeyError, TypeError):
        base = name  # whoever loads it says what is wrong
    return found if base in (name, *above) else found | {"base": model_key(base, above=(*above, name))}


def _loaded_files(directory: Path) -> dict[str, Path]:
    """By their names relative to the directory."""
    found = {path for pattern in LOADED for path in directory.glob(pattern)}
    for index in directory.glob("*.index.json"):
        # whoever loads it says what is wrong
        with suppress(ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            found.update(path for shard in shards if (path := directory / shard).is_file())
    return {
        os.path.relpath(path, directory): path
        for path in sorted(found)
        if path.is_file() and path.name not in UNLOADED and not path.name.startswith(".")
    }


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_of(path, (state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@functools.cache
def _digest_of(path: Path, state: tuple[int, ...]) -> str:
    """Computed once in a process for each state of the file, whose ctime cannot be set by hand."""
    return file_digest(path)


def hub_revision(name: str) -> str | None:
    """Commit of the cached Hub snapshot that a model or an adapter was loaded from; None for a directory."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or Path(name).exists():
        return None
    try:
        found = [try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json")]
    except HFValidationError:
        return None
    return next((Path(path).parent.name for path in found if isinstance(path, str)), None)


def _fetched(name: str, file: str) -> Path | None:
    """A small file of a Hub repository, fetched into the cache if it is not there yet; None where there is none."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError):  # no such file or repository, or it cannot be reached: whoever loads it says so
        return None


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Digests of the token map and rules, and of the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    split = getattr(tokenizer, "split_special_tokens", False)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # set by use, not part of what the tokenizer is
        rules.pop(state, None)
    return {
        "name": tokenizer.name_or_path,
        "size": len(tokenizer),
        "sha256": value_digest([rules, tokenizer.special_tokens_map, split]),
        "template_sha256": value_digest(tokenizer.chat_template),
    }


def token_conflicts(ours: "PreTrainedTokenizerBase", theirs: "PreTrainedTokenizerBase") -> list[str]:
    """Tokens of ours that have another id in theirs, or whose id is another token's there."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    taken = set(b.values())
    moved = [token for token in sorted(a.keys() & b.keys()) if a[token] != b[token]]
    return moved + [token for token, i in a.items() if token not in b and i in taken]


def check_same_tokens(ours: "PreTrainedTokenizerBase", theirs: "PreTrainedTokenizerBase") -> None:
    """Two models can speak of the same tokens only if no id means two things; ids that one of them lacks are trimmed.

    Raises:
        UserError: naming the first token that has two ids.
    """
    a, b = ours.get_vocab(), theirs.get_vocab()
    if clash := token_conflicts(ours, theirs):
        raise UserError(
            f"{ours.name_or_path} and {theirs.name_or_path} have different tokenizers: {len(clash)} of {len(a)} tokens "
            f"differ, e.g. {clash[0]!r}; choose a teacher and a student of one family"
        )
    if len(a) != len(b):
        shared = len(a.keys() & b.keys())
        say(f"{ours.name_or_path} has {len(a)} tokens, {theirs.name_or_path} {len(b)}; the {shared} they share agree")


def check_ids(highest: int, model: Any, tokenizer: Any) -> None:
    """Whether a model can be given tokens up to this id, and padding: an id without an embedding ends in an IndexError,
    or on a GPU in the loss of the whole process.

    Raises:
        UserError: naming the token that the model has no row for.
    """
    top, rows = max(highest, tokenizer.pad_token_id or 0), model.get_input_embeddings().weight.shape[0]
    if top >= rows:
        raise UserError(
            f"the token {tokenizer.convert_ids_to_tokens(top)!r} has the id {top:,} and the model {rows:,} embedding "
            "rows; use the tokenizer it was trained with, or resize its embeddings (model.resize_token_embeddings)"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Byte-level BPE tokenizer with a chat template, trained on `texts`.

    Args:
        texts: what to learn the merges from.
        vocab_size: ids in all, at least 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        extra_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
    )


def random_model(
    tokenizer: "PreTrainedTokenizerBase", shape: dict[str, Any], seed: int, *, reward: bool = False
) -> "PreTrainedModel":
    """A randomly initialised Llama with the tokenizer's vocabulary.

    Args:
        tokenizer: its length is the vocabulary.
        shape: `LlamaConfig` arguments: hidden_size, num_hidden_layers, ...
        seed: of the weights.
        reward: a sequence classifier with one label in place of a language model.

    Raises:
        UserError: on an argument that `LlamaConfig` does not have, or a shape that does not fit together.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    ours: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **({"num_labels": 1} if reward else {}),
    }
    check_shape(shape, ours)
    config = LlamaConfig(**shape, **ours)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        return kind.from_config(config, dtype=torch.float32)


def check_shape(shape: dict[str, Any], ours: dict[str, Any] | None = None) -> None:
    """Whether a model from scratch can have this shape; `ours` are the arguments that are not the user's.

    Raises:
        UserError: as `random_model` does.
    """
    import torch
    from transformers import LlamaConfig, LlamaModel

    ours = ours or {}
    known = inspect.signature(LlamaConfig).parameters.keys() - {*ours, *TOKEN_ARGUMENTS}
    if unknown := [key for key in shape if key not in known]:  # transformers would take them and do nothing
        close = difflib.get_close_matches(str(unknown[0]), sorted(known), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "it has hidden_size, num_hidden_layers, ..."
        raise UserError(f"the shape of a model from scratch has no {unknown[0]!r}; {hint}")
    try:
        with torch.device("meta"):
            LlamaModel(LlamaConfig(**shape, **ours))
    except Exception as error:  # what strange values make it raise has no narrower class
        reason = " ".join(str(error).split())
        reason = f"there is no {reason}" if isinstance(error, KeyError) else reason
        raise UserError(f"a model of this shape cannot be made: {reason}") from error


def texts_of(dataset: Any) -> Iterator[str]:
    """Every text of preference pairs, to train a tokenizer on."""
    for row in dataset:
        for column in ("prompt", "chosen", "rejected"):
            value = row.get(column)
            if isinstance(value, str):
                yield value
            elif value:
                yield from (message["content"] for message in value)
