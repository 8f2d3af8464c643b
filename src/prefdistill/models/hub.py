"""Files of models on the Hugging Face Hub: revisions, small files, the base model of an adapter."""

import json
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base"  # the start of an adapter that was trained on an adapter is saved beside it, under this name


def model_file(name: str, file: str) -> Path | None:
    """Return the place of a small file of a model, a directory or Hub name; None if it has none."""
    if not Path(name).is_dir():
        return fetch_hub_file(name, file)
    path = Path(name) / file
    return path if path.is_file() else None


def adapter_settings(name: str) -> dict[str, Any] | None:
    """Return the settings of a PEFT adapter, a directory or Hub name; None if it is no adapter.

    Raises:
        ValueError: if adapter_config.json is damaged.
    """
    config = model_file(name, ADAPTER_CONFIG)
    if config is None:
        return None
    settings = json.loads(config.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{ADAPTER_CONFIG} names no base model: {base!r}")
    return settings


def adapter_base(name: str) -> str:
    """Return the base model, a directory or Hub name, of a PEFT adapter; of any other model, its own name.

    Raises:
        ValueError: if adapter_config.json is damaged.
        UserError: if it names a place that is missing.
    """
    settings = adapter_settings(name)
    if settings is None:
        return name
    base = Path(settings["base_model_name_or_path"])
    beside = Path(name).parent / BASE
    moved = base.name == BASE and not base.exists() and beside.is_dir()
    if base.is_absolute() and not base.exists() and not moved:
        raise UserError(
            f"the base of the adapter {name} is missing: {base}; set base_model_name_or_path in its {ADAPTER_CONFIG} "
            "to where that model is"
        )
    return str(beside) if moved else settings["base_model_name_or_path"]


def adapter_root(name: str) -> str:
    """Return the model below all adapters.

    Raises:
        ValueError: if an adapter_config.json is damaged, or adapters name each other as base.
    """
    names = [name]
    while (base := adapter_base(names[-1])) != names[-1]:
        if base in names:
            raise ValueError(f"the adapters {' and '.join(names)} name each other as base")
        names.append(base)
    return names[-1]


def base_revision(name: str) -> str | None:
    """Return the revision of its base that a PEFT adapter asks for; None if it asks for none."""
    return (adapter_settings(name) or {}).get("revision")


def hub_revision(name: str) -> str | None:
    """Return the commit of the cached Hub snapshot of a model or adapter; None for a directory."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or Path(name).exists():
        return None
    try:
        paths = [try_to_load_from_cache(name, file) for file in ("config.json", ADAPTER_CONFIG)]
    except HFValidationError:
        return None
    return next((Path(path).parent.name for path in paths if isinstance(path, str)), None)


def fetch_hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return the path of a small file of a Hub repository, fetched into the cache; None if it cannot be fetched."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError):  # no such file or repository, or no connection: loading the model reports it
        return None
