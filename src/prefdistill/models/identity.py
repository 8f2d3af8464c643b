"""Identity of models and tokenizers: what tells two of them apart, with or without loading them."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.files import file_digest, value_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefdistill.models.hub import (
    adapter_base,
    base_revision,
    gguf_parts,
    hub_revision,
    pinned_revision,
)

# Settings of a configuration that do not change what a model computes: origin, storage, training, other tasks, usage.
NOT_COMPUTING = re.compile(
    r"_.*|architectures|transformers_version|(torch_)?dtype|quantization_config|.*dropout.*|.*pdrop|output_.*|use_cache|"
    r"return_dict|.*_token_id|num_labels|id2label|label2id|problem_type|max_length"
)
# Patterns of the files that transformers and PEFT may read to load a model and its tokenizer.
LOADED_FILES = (
    "*.safetensors", "*.bin", "*.index.json", "*config.json", "*.py", "custom_generate/*.py",
    "*token*.json", "*vocab*.json", "*vocab*.txt", "*merges*.txt", "*template*.json", "*.jinja",
    "additional_chat_templates/*.jinja", "*.model", "*.spm", "*.codes", "*.tiktoken", "*.tokenizer", "tekken.json",
    "dict.txt", "emoji.json", "normalizer.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json",
)  # fmt: skip
NOT_LOADED = {"training_args.bin", "optimizer.bin", "scheduler.bin"}


def model_identity(model: "PreTrainedModel", name: str = "") -> dict[str, Any]:
    """Return what identifies a loaded model: name, Hub revision, architecture, dtype, a digest of every weight, the
    configuration, and if it has them, its unmerged adapters and its quantisation."""
    identity = {
        "name": name or model.name_or_path,
        "revision": hub_revision(name),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sha256": weights_digest(model),
        "config": computing_config(model),
    }
    if adapters := adapter_kinds(model):
        identity["adapters"] = adapters
    if getattr(model, "is_quantized", False):
        settings = model.config.quantization_config
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        named = {key: value for key, value in settings.items() if not key.startswith("_")}
        identity["quantization"] = json.loads(json.dumps(named, default=str))
    return identity


def adapter_kinds(model: Any) -> dict[str, Any]:
    """Return the settings of a model's unmerged adapters, such as their scale, that the weights do not show."""
    origin = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"}

    def settings(config: Any) -> dict[str, Any]:
        named = {key: value for key, value in config.to_dict().items() if value and key not in origin}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in named.items()}

    kinds = {name: settings(config) for name, config in getattr(model, "peft_config", {}).items()}
    result: dict[str, Any] = json.loads(json.dumps(kinds, default=str, sort_keys=True))
    return result


def computing_config(model: "PreTrainedModel") -> dict[str, Any]:
    """Return the settings of a configuration that change what a model computes; unset and false ones are left out."""

    def computing(config: dict[Any, Any]) -> dict[str, Any]:
        settings = {str(key): value for key, value in config.items() if value is not None and value is not False}
        return {
            key: computing(value) if isinstance(value, dict) else value
            for key, value in settings.items()
            if not NOT_COMPUTING.fullmatch(key)
        }

    config: dict[str, Any] = json.loads(json.dumps(computing(model.config.to_diff_dict()), default=str))
    return config


def weights_digest(model: "PreTrainedModel", dtype: str | None = None) -> str:
    """Return the SHA-256 of every weight; those in the model's own dtype are cast to `dtype` first if it is given."""
    import torch

    from prefdistill.models.placement import state_entries

    digest = hashlib.sha256()
    for key, value in state_entries(model):
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
    """Return whether casting the weights to `dtype` loses no bits."""
    import torch

    target = getattr(torch, dtype)
    if torch.promote_types(model.dtype, target) == target:  # the usual case costs no pass over the weights
        return True
    weights = (tensor for tensor in model.state_dict().values() if tensor.dtype == model.dtype)
    return all(bool(((tensor.to(target).to(tensor.dtype) == tensor) | tensor.isnan()).all()) for tensor in weights)


def _parts(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a weight, or the tensors that a quantised weight consists of."""
    if not hasattr(value, "__tensor_flatten__"):
        yield key, value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _parts(f"{key}.{name}", getattr(value, name))


def model_key(name: str | None, *, revision: str | None = None, above: tuple[str, ...] = ()) -> Any:
    """Return a cache key of a model without loading it, including the key of an adapter's base.

    Of a directory: digests of the files that loading it may read, independent of its path and of other files. Of a
    GGUF file: its digest. Of a model on the Hub: name and commit, see `pinned_revision`.

    Args:
        revision: of a model on the Hub; None is the newest.
        above: adapters whose base this model is, to end at a cycle, which the loader refuses.
    """
    if name is None:
        return None
    if Path(name).is_dir():
        files = _loaded_files(Path(name))
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            key: dict[str, Any] = dict(zip(files, pool.map(_digest, files.values()), strict=True))
    elif Path(name).is_file() and gguf_parts(name):
        return {"gguf": _digest(Path(name))}
    else:
        key = {"hub": name, "revision": pinned_revision(name, revision)}
    try:
        base = adapter_base(name)
    except ValueError:
        base = name  # loading the model reports what is wrong
    if base in (name, *above):
        return key
    return key | {"base": model_key(base, revision=base_revision(name), above=(*above, name))}


def _loaded_files(directory: Path) -> dict[str, Path]:
    """Return the files that loading a model may read, by their path relative to the directory."""
    files = {path for pattern in LOADED_FILES for path in directory.glob(pattern)}
    for index in directory.glob("*.index.json"):
        # loading the model reports what is wrong
        with suppress(ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files.update(path for shard in shards if (path := directory / shard).is_file())
    return {
        os.path.relpath(path, directory): path
        for path in sorted(files)
        if path.is_file() and path.name not in NOT_LOADED and not path.name.startswith(".")
    }


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_of(path, (state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@functools.cache
def _digest_of(path: Path, state: tuple[int, ...]) -> str:
    """Return the digest of a file, computed once in a process for each state of it; ctime cannot be set by hand."""
    return file_digest(path)


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what identifies a tokenizer: digests of its token map and rules, and of its chat template; and the form
    that its template was given, in words, see `models.form`."""
    return {
        "name": tokenizer.name_or_path,
        "size": len(tokenizer),
        "sha256": _rules_digest(tokenizer),
        "template_sha256": value_digest(tokenizer.chat_template),
        **({"form": tokenizer.form} if hasattr(tokenizer, "form") else {}),
    }


_RULES: dict[str, str] = {}  # what `_rules_digest` has returned, by a digest that is faster to compute


def _rules_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of the tokens and rules; those of a large vocabulary take seconds to parse, once in a process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = [tokenizer.special_tokens_map, getattr(tokenizer, "split_special_tokens", False)]
    if backend is None:
        return value_digest([tokenizer.get_vocab(), *special])
    text = backend.to_str()
    key = value_digest([hashlib.sha256(text.encode()).hexdigest(), *special])
    if key not in _RULES:
        rules = json.loads(text)
        for state in ("truncation", "padding"):  # set by calls of the tokenizer
            rules.pop(state, None)
        _RULES[key] = value_digest([rules, *special])
    return _RULES[key]
