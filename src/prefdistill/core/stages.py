"""Stages: work that ends in a directory of a run, see `prefdistill.core.artifact`."""

import re
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefdistill import __version__
from prefdistill.core.artifact import DirectoryArtifact, Inspection
from prefdistill.core.errors import UserError
from prefdistill.core.files import first_lost, sizes, sweep, value_digest, write_json
from prefdistill.core.memory import PeakMemory, bytes_on_disk
from prefdistill.core.processes import processes
from prefdistill.core.progress import say

REQUEST, DONE, CHECKPOINTS = "stage-request.json", "stage.json", "checkpoints"
Make = Callable[[Path], int | None]  # may return the peak memory of other processes that did the work, in bytes
READING = "reading.json"  # how the rows were read, written before the work begins


@dataclass(frozen=True)
class Stage:
    """What is known of a stage that is done.

    Args:
        seconds: of all attempts.
        peak_memory: bytes, see `PeakMemory`; of the last attempt.
        bytes: on disk; known to the main process.
    """

    name: str
    directory: Path
    key: str
    seconds: float
    reused: bool
    peak_memory: int | None = None
    bytes: int | None = None


def stage_key(request: dict[str, Any]) -> str:
    """Return the cache key of a stage: another version of this package is another key."""
    return value_digest(_versioned(request))


def inspect_stage(directory: Path, request: dict[str, Any]) -> Inspection:
    """Look at what is on disk for a stage, and change nothing."""
    return StageArtifact(directory.name, directory, _versioned(request)).inspect()


def run_stage(
    name: str,
    directory: Path,
    request: dict[str, Any],
    make: Make,
    *,
    replace: bool = False,
    pool: Path | None = None,
    twin: Path | None = None,
) -> Stage:
    """Have `make(directory)` done for a request: reuse, resume, rebuild or refuse, see `prefdistill.core.artifact`.

    An unfinished directory is handed to `make` as it is. Checkpoints in `directory/checkpoints` are removed when the
    stage is done. The caller holds the lock of the directory.

    Args:
        request: with the keys of the stages it builds on.
        replace: rebuild a directory of another request: for the parts of a run.
        pool: a directory of finished stages that several runs share.
        twin: another directory for the same request, to take a finished stage from.

    Raises:
        UserError: if the directory holds files that no stage has written, or (without `replace`) other work.
    """
    stage = StageArtifact(name, directory, _versioned(request), replace=replace, pool=pool, twin=twin)
    team, peak = processes(), PeakMemory()
    with stage.session(lock=False) as seal:
        if seal is None:
            stage.attempt(make, peak)
            team.wait_for_everyone()
            if team.is_main_process:
                about = {"name": name, "key": stage.key, "seconds": stage.seconds, "peak_memory": peak.bytes}
                stage.seal({**about, "weights": stage.weights()})
    size = bytes_on_disk(directory) if team.is_main_process else None
    if team.is_main_process:
        stage.share()
    if seal is not None:
        return Stage(name, directory, stage.key, seal["seconds"], True, seal.get("peak_memory"), size)
    if team.is_main_process:
        say(f"{name}: done in {stage.seconds:.1f} s")
    return Stage(name, directory, stage.key, stage.seconds, False, peak.bytes, size)


def empty_stage(directory: Path) -> None:
    """Remove what a stage has made; an interrupted removal is not resumed."""
    StageArtifact(directory.name, directory, {}).clear()


class StageArtifact(DirectoryArtifact):
    """A stage's directory. Its seal lists the files of weights with their sizes; readers check the other files."""

    NOTE, SEAL = REQUEST, DONE
    ignored: ClassVar[Collection[str]] = ()
    passing = (CHECKPOINTS,)
    seconds = 0.0  # of all attempts so far

    def attempt(self, make: Make, peak: PeakMemory) -> None:
        """Call `make`, and count its time and memory."""
        spent = (self.read_note() or {}).get("seconds", 0.0)
        start = time.monotonic()
        try:
            with peak:
                elsewhere = make(self.place)
            peak.bytes = elsewhere or peak.bytes
        finally:
            self.seconds = round(spent + time.monotonic() - start, 3)

    def write_note(self, note: dict[str, Any]) -> None:
        seconds = note.get("seconds", self.seconds)
        write_json(self.place / REQUEST, {"key": self.key, "request": self.request, "seconds": seconds})

    def weights(self) -> dict[str, int]:
        """Return the sizes of the files of weights."""
        files = sizes(self.place, "*.safetensors")
        return {name: size for name, size in files.items() if not name.startswith(f"{CHECKPOINTS}/")}

    def damage(self, seal: dict[str, Any]) -> str | None:
        return first_lost(seal.get("weights", {}), self.weights())

    def contents(self) -> list[Path]:
        return [path for path in super().contents() if path.name != CHECKPOINTS or _holds_something(path)]

    def sweep(self) -> None:
        sweep(self.place.parent, self.place.name)  # a copy from the pool
        super().sweep()

    def unseal(self, seal: dict[str, Any]) -> None:
        """Remove the weights; what others have put beside them stays."""
        self.tidy()
        for name in seal["weights"]:
            (self.place / name).unlink(missing_ok=True)
        (self.place / DONE).unlink()  # last: until then the stage counts as damaged

    def interrupted(self, error: BaseException) -> None:
        if isinstance(error, UserError) and not self._made_something():
            self.withdraw()
        elif processes().is_main_process:
            self.write_note({})

    def _made_something(self) -> bool:
        """Whether a refused stage has left more than empty logs and directories, and how it read the rows."""
        for path in self.contents():
            if path.name == CHECKPOINTS:
                if checkpoints_in(path):
                    return True
            elif path.name != READING and (not path.is_file() or path.stat().st_size):
                return True
        return False

    def withdraw(self) -> None:
        self.tidy()
        for path in self.contents():
            path.unlink(missing_ok=True)
        (self.place / REQUEST).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the checkpoints."""
        _remove_checkpoints(self.place / CHECKPOINTS, ignore_errors=True)

    def remove(self, path: Path) -> None:
        if path.name == CHECKPOINTS and (path.is_dir() or path.is_symlink()):
            _remove_checkpoints(path, ignore_errors=False)
        else:
            super().remove(path)


def _versioned(request: dict[str, Any]) -> dict[str, Any]:
    return {**request, "version": __version__}


def _remove_checkpoints(checkpoints: Path, *, ignore_errors: bool) -> None:
    """Remove checkpoints; a link to another disk stays, and so does what else is there."""
    for path in checkpoints_in(checkpoints) if checkpoints.is_symlink() else [checkpoints]:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def checkpoints_in(checkpoints: Path) -> list[Path]:
    """List the Trainer's checkpoints in a directory that may hold other things."""
    named = [path for path in checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return [path for path in named if path.is_dir()]


def _holds_something(checkpoints: Path) -> bool:
    """Whether anything of ours is there; the Trainer makes the directory before it looks at the data."""
    if checkpoints.is_symlink():
        return bool(checkpoints_in(checkpoints))
    return not checkpoints.is_dir() or any(checkpoints.iterdir())
