"""Check up front that output paths are writable and hold nothing of anybody else."""

import os
from collections.abc import Sequence
from pathlib import Path

from prefdistill.core.errors import UserError
from prefdistill.core.files import is_temporary
from prefdistill.core.lock import LOCK


def check_place(out: Path, option: str = "--out") -> None:
    """Check that something can be written at a path.

    Raises:
        UserError: if a file is in the way, or there is no permission.
    """
    try:
        existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    except PermissionError as error:
        raise UserError(f"{out} cannot be written: no permission to look there; give another {option}") from error
    if existing != out and not existing.is_dir():
        raise UserError(f"{out} cannot be written, because {existing} is a file; give another {option}")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{out} cannot be written: no permission in {existing}; give another {option}")


def check_file(out: Path, start: str, verb: str) -> None:
    """Check that a file can be written, and that one that exists was written by the same verb.

    Args:
        out: the file.
        start: the text that all files of this kind start with.
        verb: of `prefdistill`.

    Raises:
        UserError: if it is a directory, cannot be written, or is another file, such as one of the inputs.
    """
    if out.is_dir():
        raise UserError(f"{out} is a directory; --out names the file to write")
    check_place(out)
    if out.exists():
        with out.open("rb") as file:
            content = file.read(len(start.encode()))
        if content not in (b"", start.encode()):
            raise UserError(f"{out} was not made by `prefdistill {verb}`; remove it or give another --out")


def check_own(out: Path, marks: Sequence[str], verb: str) -> None:
    """Check that a directory can be written, and is empty or holds a file that the verb always writes.

    Args:
        out: the directory.
        marks: names, of which the verb writes at least one.
        verb: of `prefdistill`.

    Raises:
        UserError: if it cannot be written, or holds something else.
    """
    check_place(out)
    entries = list(out.iterdir()) if out.is_dir() else []
    names = {path.name for path in entries if path.name != LOCK and not is_temporary(path)}  # left by a killed process
    if names and names.isdisjoint(marks):
        raise UserError(f"{out} is not empty and was not made by `prefdistill {verb}`; give another --out")
