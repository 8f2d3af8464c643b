"""Stages: work that ends in a directory, done once, gone on with after an interruption, and made again when what it
was made from has changed."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefdistill import __version__
from prefdistill.errors import UserError
from prefdistill.files import read_json, value_digest, write_json
from prefdistill.progress import say

REQUEST, DONE, LOCK = "stage-request.json", "stage.json", ".lock"


@dataclass(frozen=True)
class Stage:
    name: str
    directory: Path
    key: str
    seconds: float
    reused: bool


def run_stage(name: str, directory: Path, request: dict[str, Any], make: Callable[[Path], None]) -> Stage:
    """Have `make(directory)` done for this request.

    The key of a stage is a digest of its request, which holds the keys of the stages it builds on. A finished directory
    of the same key is reused, an unfinished one is handed to `make` as it is (to resume), one of another is emptied.

    Raises:
        UserError: if the directory holds files that no stage has put there.
    """
    key = value_digest({**request, "version": __version__})
    if (directory / DONE).is_file():
        done = read_json(directory / DONE)
        if done.get("key") == key:
            say(f"{name}: reused")
            return Stage(name, directory, key, done["seconds"], reused=True)
    before = read_json(directory / REQUEST) if (directory / REQUEST).is_file() else None
    spent = 0.0
    if before is not None and before.get("key") == key:
        say(f"{name}: going on with an interrupted run")
        spent = before.get("seconds", 0.0)
    elif before is not None:
        say(f"{name}: made again, because what it is made from has changed")
        shutil.rmtree(directory)
    elif directory.exists() and any(path.name != LOCK for path in directory.iterdir()):
        raise UserError(f"{directory} is not empty and was not made by prefdistill; give another --out")
    write_json(directory / REQUEST, {"key": key, "request": request})
    start = time.monotonic()
    try:
        make(directory)
    except BaseException:
        write_json(directory / REQUEST, {"key": key, "request": request, "seconds": spent + time.monotonic() - start})
        raise
    seconds = spent + time.monotonic() - start
    write_json(directory / DONE, {"name": name, "key": key, "seconds": round(seconds, 3)})
    say(f"{name}: done in {seconds:.1f} s")
    return Stage(name, directory, key, round(seconds, 3), reused=False)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep a second run out of a directory; the lock goes with the process that holds it.

    Raises:
        UserError: if another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another prefdistill run is working in {directory}; wait for it, or give another --out"
        ) from None
    with lock:
        yield
