"""TODO docstring."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def _base_of(name: str) -> str:
    """The model that the configuration of an adapter names, here or on the Hub; of anything else, the name itself."""
    adapter = Path(name) / "adapter_config.json" if Path(name).is_dir() else _fetched(name, "adapter_config.json")
    if adapter is None or not adapter.is_file():
        return name
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not isinstance(base, str):
        raise ValueError(f"adapter_config.json names no base model: {base!r}")
    return base


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
