"""Files that are either whole or not there: temporary name, fsync, rename, fsync of the directory."""

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
# of safetensors and of PyTorch's writers, which give no number
FULL_IN_WORDS = (*map(os.strerror, FULL), "PytorchStreamWriter failed writing", "iostream error")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends, and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.touch(exist_ok=False)  # with the permissions that any new file gets here
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent, below=False)
    finally:
        temporary.unlink(missing_ok=True)


def sync(directory: Path, *, below: bool = True) -> None:
    """Have a directory on the disk, and all that is in it: a name, as a rename leaves it, is in the directory."""
    windows = os.name == "nt"  # which has no such thing for directories, and wants the right to write for files
    for path in [directory, *(directory.rglob("*") if below else ())]:
        if not path.is_file() and (windows or not path.is_dir()):
            continue
        descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Where what is to become `path` is made."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _temporaries(name: str) -> str:
    """The pattern of all temporary paths of a name, which may be one itself."""
    return f".{name}.{'[0-9a-f]' * 32}.tmp"


def is_temporary(path: Path) -> bool:
    """Whether a name is one that `temporary_path` gives."""
    return fnmatch.fnmatchcase(path.name, _temporaries("?*"))


def sweep(directory: Path, name: str = "*", *, below: bool = False) -> None:
    """Remove what killed processes have left half written in a directory, or of one name there.

    Only for who keeps others from writing there: what a living process is writing looks the same.
    """
    pattern = _temporaries(name if name == "*" else glob.escape(name))
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
    """Whether an error, of whatever library, or one that it was raised from, says that a file could not grow."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in FULL:
                return True
        elif any(words in str(error) for words in FULL_IN_WORDS):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, _json_text(value))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, jsonl(rows))


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise UserError(f"{path} is not valid JSON ({error}); delete it to have it made again") from error


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with a checksum of its own as its last key, `sha256`."""
    write_json(path, {**value, "sha256": value_digest(value)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote, without the checksum; None if a single bit of the file has changed since."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    # the text too, for there are several of the same value: 1e-05 and 1E-05
    if not isinstance(value, dict) or _json_text(value) != text:
        return None
    return value if value.pop("sha256", None) == value_digest(value) else None


def sizes(directory: Path, pattern: str = "*") -> dict[str, int]:
    """Bytes of each file below a directory, by its name there. Digests would tell more, and cost a pass over them."""
    files = sorted(path for path in directory.rglob(pattern) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def first_lost(made: dict[str, int], there: dict[str, int]) -> str | None:
    """The first file, of those that were made, that is not there or has another size."""
    return next((name for name, size in made.items() if there.get(name) != size), None)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_digest(value: Any) -> str:
    """sha256 of a JSON value, the same for equal values whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
