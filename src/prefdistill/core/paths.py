"""Whether results can go where they are to go: found out before the work, not after it."""

import os
from collections.abc import Sequence
from pathlib import Path

from prefdistill.core.errors import UserError
from prefdistill.core.files import is_temporary


def check_place(out: Path, option: str = "--out") -> None:
    """Raises a UserError if nothing can be written at `out`: a file is in the way, or it is not ours to write to."""
    try:
        above = next(path for path in (out, *out.absolute().parents) if path.exists())
    except PermissionError as error:  # not even seen
        raise UserError(f"{out} cannot be written: no permission to look there; give another {option}") from error
    if above != out and not above.is_dir():
        raise UserError(f"{out} cannot be written, for {above} is a file; give another {option}")
    if not os.access(above, os.W_OK):
        raise UserError(f"{out} cannot be written: no permission in {above}; give another {option}")


def check_file(out: Path, start: str, verb: str) -> None:
    """Raises a UserError if `out` is a file that `verb` has not written, such as one of its inputs, or a directory.

    Args:
        out: where the file is to go.
        start: what all files of this kind start with.
        verb: of `prefdistill`.
    """
    if out.is_dir():
        raise UserError(f"{out} is a directory; --out names the file to write")
    check_place(out)
    if out.exists():
        with out.open("rb") as file:
            found = file.read(len(start.encode()))
        if found not in (b"", start.encode()):
            raise UserError(f"{out} is there and was not made by `prefdistill {verb}`; remove it or give another --out")


def check_own(out: Path, marks: Sequence[str], verb: str) -> None:
    """Raises a UserError if a directory holds something, but none of what `verb` always leaves there."""
    check_place(out)
    found = list(out.iterdir()) if out.is_dir() else []
    there = {path.name for path in found if path.name != ".lock" and not is_temporary(path)}  # of a killed process
    if there and there.isdisjoint(marks):
        raise UserError(f"{out} is not empty and was not made by `prefdistill {verb}`; give another --out")
