"""Stages: work that ends in a directory, done once, gone on with after an interruption, and made again when what it
was made from has changed."""

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.files import (
    differences,
    first_lost,
    read_json,
    sizes,
    sweep,
    sync,
    temporary_path,
    value_digest,
    write_json,
)
from prefdistill.core.lock import LOCK, locked
from prefdistill.core.memory import PeakMemory, bytes_on_disk
from prefdistill.core.processes import processes
from prefdistill.core.progress import say

REQUEST, DONE, CHECKPOINTS = "stage-request.json", "stage.json", "checkpoints"
NAMED = 5  # differences that a message names


@dataclass(frozen=True)
class Stage:
    name: str
    directory: Path
    key: str
    seconds: float
    reused: bool
    peak_memory: int | None = None  # bytes, see `PeakMemory`; of the last go where it took several
    bytes: int | None = None  # on disk, of the main process


def stage_key(request: dict[str, Any]) -> str:
    return value_digest({**request, "version": __version__})


def finished(directory: Path, key: str) -> dict[str, Any]:
    """What is known of a finished stage with this key; nothing if there is none, or if it has lost weights."""
    done = _done(directory)
    return done if done.get("key") == key and not _lost(directory, done) else {}


def run_stage(
    name: str,
    directory: Path,
    request: dict[str, Any],
    make: Callable[[Path], None],
    *,
    replace: bool = False,
    pool: Path | None = None,
) -> Stage:
    """Have `make(directory)` done for this request.

    The key of a stage is a digest of its request, which holds the keys of the stages it builds on. A finished directory
    of the same key is reused, and an unfinished one is handed to `make` as it is, to go on with. Checkpoints in
    `directory/checkpoints` are removed when the stage is done.

    Args:
        replace: empty a directory of another key: for the parts of a run, which are ours to make again.
        pool: a directory of finished stages by name and key. One that is there is taken from it, and what is made is
            left there for others: as hard links where the file system has them, so it takes no space.

    Raises:
        UserError: if the directory holds files that no stage has put there, or (without `replace`) other work.
    """
    request = {**request, "version": __version__}
    key = stage_key(request)
    team = processes()
    with team.main_process_first():  # it clears the way, the others find it cleared
        if team.is_main_process:
            sweep(directory.parent, directory.name)  # a copy from the pool
            sweep(directory, below=True)
        done, spent = _look(name, directory, request, replace)
        lent = pool / f"{name}-{key}" if pool else None
        if not done and lent and _is_whole(lent):  # only the first process finds it so: then it is here
            empty_stage(directory)
            shutil.rmtree(directory, ignore_errors=True)
            _link(lent, directory)
            done, spent = _look(name, directory, request, replace)
        if done:
            if team.is_main_process:
                _lend(directory, lent)
            return Stage(name, directory, key, spent, True, done.get("peak_memory"), done.get("bytes"))
        if team.is_main_process:
            write_json(directory / REQUEST, {"key": key, "request": request, "seconds": spent})
    start = time.monotonic()
    peak = PeakMemory()
    try:
        with peak:
            make(directory)
    except UserError:
        if not _work(directory):
            (directory / REQUEST).unlink(missing_ok=True)  # refused before anything was made: leave nothing behind
            _remove_checkpoints(directory)
        raise
    except BaseException:
        if team.is_main_process:
            spent += time.monotonic() - start
            write_json(directory / REQUEST, {"key": key, "request": request, "seconds": round(spent, 3)})
        raise
    seconds = round(spent + time.monotonic() - start, 3)
    team.wait_for_everyone()
    size = None
    if team.is_main_process:
        sync(directory)  # what libraries wrote: only then is it true that the stage is done
        told = {"name": name, "key": key, "seconds": seconds, "peak_memory": peak.bytes}
        write_json(directory / DONE, {**told, "weights": _weights(directory)})
        _remove_checkpoints(directory)
        size = bytes_on_disk(directory)
        _lend(directory, lent)
        say(f"{name}: done in {seconds:.1f} s")
    return Stage(name, directory, key, seconds, False, peak.bytes, size)


def _look(name: str, directory: Path, request: dict[str, Any], replace: bool) -> tuple[dict[str, Any], float]:
    """What is known of a finished stage, and the seconds it has taken so far; removes what another request has left."""
    main, key = processes().is_main_process, stage_key(request)
    if done := finished(directory, key):
        if main:
            _remove_checkpoints(directory)  # it was killed when it was done
            say(f"{name}: reused")
        return {**done, "bytes": bytes_on_disk(directory)}, done["seconds"]
    if (done := _done(directory)).get("key") == key:
        if main:
            lost = _lost(directory, done)
            say(f"{name}: made again from the start, because {lost} is missing or not as it was written")
            _remove_checkpoints(directory)
            _forget(directory, done)
        return {}, 0.0
    before = read_json(directory / REQUEST) if (directory / REQUEST).is_file() else None
    if before is None and _work(directory):
        raise UserError(f"{directory} is not empty and was not made by prefdistill; give another --out")
    if before is not None and before.get("key") == key:
        if _work(directory) and main:
            say(f"{name}: going on with an interrupted run")
        return {}, before.get("seconds", 0.0)
    if _work(directory) and not replace:
        told = _told((before or {}).get("request") or request, request)
        raise UserError(
            f"{directory} holds what was made from other inputs or options{told}; delete it or give another --out"
        )
    if _work(directory) and main:
        say(f"{name}: made again, because what it is made from has changed")
        empty_stage(directory)
    return {}, 0.0


def _told(before: dict[str, Any], request: dict[str, Any]) -> str:
    """Where two requests differ, in brackets."""
    found = differences(before, request)
    if len(found) > NAMED:
        found[NAMED:] = [f"{len(found) - NAMED} more"]
    return f" ({'; '.join(found)})" if found else ""


def _weights(directory: Path) -> dict[str, int]:
    """The files of weights in a stage, and their bytes; what else is in it is looked at by who reads it."""
    found = sizes(directory, "*.safetensors")
    return {name: size for name, size in found.items() if not name.startswith(f"{CHECKPOINTS}/")}


def _done(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(directory / DONE) if (directory / DONE).is_file() else {}
    return found


def _lost(directory: Path, done: dict[str, Any]) -> str | None:
    """The first file of weights that is not as a finished stage has left it, by its size."""
    return first_lost(done.get("weights", {}), _weights(directory))


def _is_whole(directory: Path) -> bool:
    done = _done(directory)
    return bool(done) and _lost(directory, done) is None


def _forget(directory: Path, done: dict[str, Any]) -> None:
    """Have a finished stage count as one with nothing made yet; what others have put beside its weights stays."""
    for name in done["weights"]:
        (directory / name).unlink(missing_ok=True)
    (directory / DONE).unlink()  # last: until then it is known for one that has lost weights


def empty_stage(directory: Path) -> None:
    """Remove what a stage has left, so that whoever finds it half done knows it for a stage and takes up none of it."""
    if not _work(directory):
        return
    write_json(directory / REQUEST, {"key": None})
    (directory / DONE).unlink(missing_ok=True)
    for path in directory.iterdir():
        if path.name == CHECKPOINTS and (path.is_dir() or path.is_symlink()):
            _remove_checkpoints(directory, ignore_errors=False)
        elif path.name not in (LOCK, REQUEST):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove_checkpoints(directory: Path, *, ignore_errors: bool = True) -> None:
    """A link to another disk, and what else is there, stay."""
    checkpoints = directory / CHECKPOINTS
    for path in checkpoints_in(checkpoints) if checkpoints.is_symlink() else [checkpoints]:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def checkpoints_in(checkpoints: Path) -> list[Path]:
    """The Trainer's, in a directory that may hold other things."""
    found = [path for path in checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return [path for path in found if path.is_dir()]


def _lend(directory: Path, lent: Path | None) -> None:
    """Leave a finished stage in the pool, if there is one and it is not there yet."""
    if lent is None or _is_whole(lent):
        return
    # waits no longer than making links takes
    with locked(lent.parent, f".{lent.name}.lock", wait=True, together=True):
        sweep(lent.parent, lent.name)
        if not _is_whole(lent):
            shutil.rmtree(lent, ignore_errors=True)
            _link(directory, lent)


def _link(source: Path, target: Path) -> None:
    """Make `target` a copy of a finished stage, whole or not at all; its files are the same ones, by hard links.

    Nothing changes the files of a finished stage: they are replaced or removed, which leaves the other name's as it is.
    """
    temporary = temporary_path(target)
    try:
        shutil.copytree(source, temporary, copy_function=_link_file, ignore=shutil.ignore_patterns(LOCK, CHECKPOINTS))
        sync(temporary)
        temporary.rename(target)
    except OSError:
        if not (target / DONE).is_file():  # there is one: another run has been quicker with the same stage
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _work(directory: Path) -> list[Path]:
    """What is in a directory besides our own notes."""
    if not directory.exists():
        return []
    there = [path for path in directory.iterdir() if path.name not in (REQUEST, LOCK)]
    return [path for path in there if path.name != CHECKPOINTS or _some_checkpoint(path)]


def _some_checkpoint(path: Path) -> bool:
    """Whether anything of ours is there; the Trainer makes the directory before it has looked at the data."""
    if path.is_symlink():
        return bool(checkpoints_in(path))
    return not path.is_dir() or any(path.iterdir())
