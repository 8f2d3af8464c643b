"""TODO docstring."""

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

from prefdistill.models.hub import _base_of, _fetched, hub_revision

# Of a configuration: where it comes from, how it is stored, what is for training or other tasks or set in use.
NOT_COMPUTING = re.compile(
    r"_.*|architectures|transformers_version|(torch_)?dtype|quantization_config|.*dropout.*|.*pdrop|output_.*|use_cache|"
    r"return_dict|.*_token_id|num_labels|id2label|label2id|problem_type|max_length"
)
# Say which weights are missing or have another shape, in place of warnings and a bare error: `_check_weights` refuses.
LOOKED_AT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
# Files of a directory that loading a model and its tokenizer may read, by their names in transformers and PEFT.
LOADED = (
    "*.safetensors", "*.bin", "*.index.json", "*config.json", "*.py", "custom_generate/*.py",
    "*token*.json", "*vocab*.json", "*vocab*.txt", "*merges*.txt", "*template*.json", "*.jinja",
    "additional_chat_templates/*.jinja", "*.model", "*.spm", "*.codes", "*.tiktoken", "*.tokenizer", "tekken.json",
    "dict.txt", "emoji.json", "normalizer.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json",
)  # fmt: skip
UNLOADED = {"training_args.bin", "optimizer.bin", "scheduler.bin"}


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
