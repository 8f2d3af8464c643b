"""Files that are complete or not there: temporary name, fsync, rename, fsync of the directory."""

import contextlib
import errno
import fnmatch
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# messages of safetensors and of PyTorch's writers, which give no error number
FULL_MESSAGES = (*map(os.strerror, FULL), "PytorchStreamWriter failed writing", "iostream error")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that is renamed to `path` when the block ends, and removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.touch(exist_ok=False)  # with the default permissions
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent, below=False)
    finally:
        temporary.unlink(missing_ok=True)


def sync(directory: Path, *, below: bool = True) -> None:
    """Flush a directory and all that is in it to the disk; a renamed file needs its directory flushed."""
    windows = os.name == "nt"  # cannot flush directories, and flushes only files that are open for writing
    for path in [directory, *(directory.rglob("*") if below else ())]:
        if not path.is_file() and (windows or not path.is_dir()):
            continue
        descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Return a temporary path for a file or directory that becomes `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _temporary_pattern(name: str) -> str:
    """Return the glob pattern of the temporary paths of a name, which may be a pattern itself."""
    return f".{name}.{'[0-9a-f]' * 32}.tmp"


def is_temporary(path: Path) -> bool:
    """Return whether a path has a name that `temporary_path` gives."""
    return fnmatch.fnmatchcase(path.name, _temporary_pattern("?*"))


def sweep(directory: Path, name: str = "*", *, below: bool = False) -> None:
    """Remove temporary files of killed processes from a directory, or those of one name.

    Only while other processes are locked out: the temporary files of a running process look the same.
    """
    pattern = _temporary_pattern(name if name == "*" else glob.escape(name))
    for path in list(directory.rglob(pattern) if below else directory.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def link_tree(source: Path, target: Path, without: Collection[str] = ()) -> None:
    """Make `target` a copy of a directory, whole or not at all; its files are the same ones, by hard links.

    Nothing may write to the files of either in place: replacing or removing one leaves the other as it is.

    Args:
        without: names that are left out.
    """
    temporary = temporary_path(target)
    try:
        shutil.copytree(source, temporary, copy_function=_link_file, ignore=shutil.ignore_patterns(*without))
        sync(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def disk_full(error: BaseException | None) -> bool:
    """Return whether an error of any library, or one that caused it, means that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in FULL:
                return True
        elif any(message in str(error) for message in FULL_MESSAGES):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, _json_text(value))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, jsonl(rows))


def jsonl(rows: list[dict[str, Any]]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if it is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise UserError(f"{path} is not valid JSON ({error}); delete it to rebuild it") from error


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with its own checksum as the last key, `sha256`."""
    write_json(path, {**value, "sha256": value_digest(value)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `write_sealed` wrote, without the checksum; None if a single bit of the file has changed."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    # compare the text too: one value has several texts, such as 1e-05 and 1E-05
    if not isinstance(value, dict) or _json_text(value) != text:
        return None
    return value if value.pop("sha256", None) == value_digest(value) else None


def sizes(directory: Path, pattern: str = "*") -> dict[str, int]:
    """Return the size of each file below a directory, by its relative path. Digests would need to read the files."""
    files = sorted(path for path in directory.rglob(pattern) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def first_lost(written: dict[str, int], present: dict[str, int]) -> str | None:
    """Return the first of the written files that is missing or has another size."""
    return next((name for name, size in written.items() if present.get(name) != size), None)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_digest(value: Any) -> str:
    """Return the sha256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
