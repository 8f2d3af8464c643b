"""Lock a directory against other processes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full, sweep
from prefdistill.core.processes import processes, require_one_process

LOCK = ".lock"


@contextmanager
def locked(directory: Path, name: str = LOCK, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Lock a directory inside the block; the lock ends with the process that holds it.

    Args:
        directory: created if it does not exist, and removed again if it ends up empty, unless it was there and empty.
        name: of the lock file; another one than `LOCK` for a single result in a directory that others may use.
        wait: until the lock is free, instead of refusing.
        shared: for work that the processes of a run share; the main process holds the lock.

    Raises:
        UserError: if another process holds the lock (without `wait`), the directory cannot be created, or there are
            several processes (without `shared`).
    """
    if not shared:
        require_one_process("this", processes().num_processes)
    try:
        was_empty = directory.is_dir() and not any(directory.iterdir())
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file is in the way, or no permission
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
        if name == LOCK:  # the whole directory is locked
            sweep(directory)
        yield
    finally:
        (directory / name).unlink(missing_ok=True)  # while it is held: a process that waits for it then tries again
        lock.release()
        if not was_empty:
            with suppress(OSError):  # not empty
                directory.rmdir()
