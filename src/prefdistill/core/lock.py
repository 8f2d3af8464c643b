"""Lock a directory against other processes."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full, sweep, temporary_path
from prefdistill.core.processes import processes, require_one_process

LOCK = ".lock"
APPEARS = 60.0  # seconds after which a file that one machine has written shows on all, on slow network storage


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


@contextmanager
def locked_together(directory: Path) -> Iterator[None]:
    """Lock a directory for work that all processes of a run share, see `locked`; every process must come here.

    Raises:
        UserError: if another run holds the lock; in all processes, if some have another directory under this name.
    """
    with locked(directory, shared=True):
        if processes().num_processes > 1:
            _check_one_directory(directory)
        yield


def _check_one_directory(directory: Path) -> None:
    """Check that all processes see a file that the main one makes."""
    from accelerate.utils import broadcast_object_list, gather_object

    team = processes()
    (marker,) = broadcast_object_list([temporary_path(directory / "shared").name])
    if team.is_main_process:
        (directory / marker).touch()
    team.wait_for_everyone()
    hosts = gather_object([None if appears(directory / marker) else socket.gethostname()])
    if team.is_main_process:
        (directory / marker).unlink(missing_ok=True)
    if others := sorted({host for host in hosts if host is not None}):
        raise not_shared(directory, *others)


def appears(path: Path) -> bool:
    """Return whether a file shows within `APPEARS` seconds, on storage that several machines share."""
    end = time.monotonic() + APPEARS
    while True:
        with suppress(OSError):  # no such directory
            if path.name in os.listdir(path.parent):  # a look at the file alone may be answered from a cache
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(1)


def not_shared(directory: Path, *hosts: str) -> UserError:
    """Return the error of machines, by default this one, that have another directory under a name."""
    where = ", ".join(hosts) or socket.gethostname()
    return UserError(
        f"{directory} on {where} is not the directory that the other machines have under this name; several machines "
        "need --out on storage that all of them share, such as NFS or Lustre"
    )
