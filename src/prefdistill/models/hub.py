"""Files of models on the Hugging Face Hub: revisions, small files, the base model of an adapter."""

import json
from pathlib import Path


def adapter_base(name: str) -> str:
    """Return the base model, a directory or Hub name, of a PEFT adapter; of any other model, its own name.

    Raises:
        ValueError, KeyError, TypeError: if adapter_config.json is damaged.
    """
    config = Path(name) / "adapter_config.json" if Path(name).is_dir() else fetch_hub_file(name, "adapter_config.json")
    if config is None or not config.is_file():
        return name
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not isinstance(base, str):
        raise ValueError(f"adapter_config.json names no base model: {base!r}")
    return base


def hub_revision(name: str) -> str | None:
    """Return the commit of the cached Hub snapshot of a model or adapter; None for a directory."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or Path(name).exists():
        return None
    try:
        paths = [try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json")]
    except HFValidationError:
        return None
    return next((Path(path).parent.name for path in paths if isinstance(path, str)), None)


def fetch_hub_file(name: str, file: str) -> Path | None:
    """Return the path of a small file of a Hub repository, fetched into the cache; None if it cannot be fetched."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError):  # no such file or repository, or no connection: loading the model reports it
        return None
