"""TODO docstring."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from prefdistill.core.errors import UserError
from prefdistill.core.files import (
    disk_full,
    sweep,
)
from prefdistill.core.processes import processes

LOCK = ".lock"


@contextmanager
def locked(directory: Path, name: str = LOCK, *, wait: bool = False, together: bool = False) -> Iterator[None]:
    """Keep a second run out of a directory; the lock goes with the process that holds it.

    Args:
        directory: made if there is none, and removed again if it ends up empty; one that was there and empty stays.
        name: of the file that is locked: another one for a single result in a directory that others may use.
        wait: for the process that holds it.
        together: for work that the processes of a run share; the main one holds the lock.

    Raises:
        UserError: if another process holds it (without `wait`), or there can be no such directory; if there are several
            processes, for work that is not shared.
    """
    if processes().num_processes > 1 and not together:
        raise UserError("this is work for one process; launch sft, dpo, signals and distill on several")
    try:
        was_empty = directory.is_dir() and not any(directory.iterdir())
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file is in the way, or the place is not ours to write to
        if disk_full(error):
            raise
        raise UserError(f"cannot make the directory {directory} ({error.strerror}); give another --out") from error
    if not processes().is_main_process:
        yield
        return
    lock = FileLock(directory / name)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except PermissionError:
        raise UserError(f"{directory} cannot be written: no permission; give another --out") from None
    except Timeout:
        raise UserError(
            f"another prefdistill run is working in {directory}; wait for it, or give another --out"
        ) from None
    try:
        if name == LOCK:  # then all of it is ours
            sweep(directory)
        yield
    finally:
        (directory / name).unlink(missing_ok=True)  # while it is held: who waits for it sees that and starts over
        lock.release()
        if not was_empty:
            with suppress(OSError):  # not empty, as it should be
                directory.rmdir()
