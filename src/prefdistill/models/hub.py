"""Files of models on the Hugging Face Hub: revisions, small files, GGUF files, the base model of an adapter."""

import json
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base"  # the start of an adapter that was trained on an adapter is saved beside it, under this name
COMMITS: dict[tuple[str, str | None], str] = {}  # which this process reads, by repository and revision asked for


def gguf_parts(name: str) -> tuple[str, str] | None:
    """Return the directory or repository and the file of a model that is a GGUF file; None for any other model.

    Example:
        >>> gguf_parts("org/model-GGUF/model-Q8_0.gguf")
        ('org/model-GGUF', 'model-Q8_0.gguf')
        >>> gguf_parts("org/model")
    """
    path = Path(name)
    if path.suffix.lower() != ".gguf" or path.is_dir():
        return None
    parts = name.split("/")
    if len(parts) > 2 and not path.is_absolute() and not path.parent.is_dir():
        return "/".join(parts[:2]), "/".join(parts[2:])
    return str(path.parent), path.name


def loading_place(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where a model is.

    Raises:
        UserError: if a GGUF file is not in its directory.
    """
    place, file = gguf_parts(name) or (name, None)
    if file and Path(place).is_dir() and not (Path(place) / file).is_file():
        there = ", ".join(sorted(path.name for path in Path(place).glob("*.gguf"))) or "none"
        raise UserError(f"no GGUF file {file} in {place}; its GGUF files: {there}")
    at = {"revision": pinned_revision(name, revision)}
    return {"pretrained_model_name_or_path": place, **at, **({"gguf_file": file} if file else {})}


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
    """Return the commit of a model or adapter on the Hub that this process reads, or that is cached; None for a
    directory."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or Path(name).exists():
        return None
    place, file = gguf_parts(name) or (name, None)
    if (place, None) in COMMITS:
        return COMMITS[place, None]
    files = [file] if file else ["config.json", ADAPTER_CONFIG]
    try:
        paths = {part: try_to_load_from_cache(place, part) for part in files}
    except HFValidationError:
        return None
    return next((commit_of(Path(path), part) for part, path in paths.items() if isinstance(path, str)), None)


def commit_of(path: Path, file: str) -> str:
    """Return the commit of a file of a repository, from its path in the Hub's cache: `.../snapshots/COMMIT/FILE`."""
    return path.parents[len(Path(file).parts) - 1].name


def fetch_hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return the path of a small file of a Hub repository, fetched into the cache; None if it cannot be fetched.

    The first file that is fetched pins the commit of the others.
    """
    from huggingface_hub import hf_hub_download

    repository = name, revision
    try:
        path = Path(hf_hub_download(name, file, revision=COMMITS.get(repository, revision)))
    except (OSError, ValueError):  # no such file or repository, or no connection: loading the model reports it
        return None
    COMMITS.setdefault(repository, commit_of(path, file))
    return path


def pinned_revision(name: str, revision: str | None = None) -> str | None:
    """Return the commit of a model or tokenizer on the Hub that this process reads: the newest when it first asked.

    Key, weights and tokenizer belong together, whatever is pushed meanwhile. Of a directory, and of what cannot be
    fetched, this is the revision itself.
    """
    place, file = gguf_parts(name) or (name, None)
    if (place, revision) not in COMMITS and not Path(place).is_dir():
        files = (file,) if file else ("config.json", ADAPTER_CONFIG, "tokenizer_config.json")
        any(fetch_hub_file(place, one, revision) for one in files)
    return COMMITS.get((place, revision), revision)


def pinned_commits() -> list[list[str | None]]:
    """Return the commits that this process reads, for `pin_commits` in a process that works for it."""
    return [[*repository, commit] for repository, commit in COMMITS.items()]


def pin_commits(commits: list[list[str | None]]) -> None:
    """Read the commits that another process reads."""
    COMMITS.update({(str(name), revision): str(commit) for name, revision, commit in commits})
