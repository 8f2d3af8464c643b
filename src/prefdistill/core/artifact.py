"""Work that is done once: one protocol that decides whether to reuse, resume, rebuild or refuse.

A piece of work has a *request* (a JSON object; its digest is the cache key), a *note* of the request that is written
when the work begins, *parts* that survive an interruption, and a *seal* that is written last. What is on disk is in
one of six states, and each leads to one action:

| state | on disk | action |
|---|---|---|
| missing | nothing | note the request, do the work |
| unfinished | this request, no seal | resume |
| finished | this request, sealed, every part whole | reuse |
| damaged | this request, sealed, a part is lost | rebuild, or refuse with the command that repairs it |
| stale | another request | refuse; rebuild where the caller owns the directory (`replace`) |
| foreign | files of somebody else | refuse |

`DirectoryArtifact` here, and `FileArtifact` and `RecordArtifact` in `prefdistill.core.file_artifact`, say where
request, parts and seal lie; the states, the actions and the messages are the same for all. What has to be on the disk
before the seal is synced before it.
"""

import copy
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from prefdistill.core.differences import NAMES, compare, listed
from prefdistill.core.errors import UserError
from prefdistill.core.files import (
    link_tree,
    read_json,
    sweep,
    sync,
    value_digest,
    write_json,
)
from prefdistill.core.lock import LOCK, locked, locked_together
from prefdistill.core.processes import processes
from prefdistill.core.progress import say

State = StrEnum("State", ["MISSING", "UNFINISHED", "FINISHED", "DAMAGED", "STALE", "FOREIGN"])


@dataclass(frozen=True)
class Inspection:
    """What is on disk for a request.

    Args:
        state: see the table above.
        seal: of finished or damaged work.
        note: of the request that the work was begun with.
        reason: the lost part of damaged work, the differences of stale work, what is wrong with foreign files.
    """

    state: State
    seal: dict[str, Any] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class Artifact(ABC):
    """One piece of work.

        with artifact.session() as seal:
            if seal is None:
                ...                     # the parts that are missing, then
                artifact.seal(...)

    Args:
        name: for messages: "teacher-sft", "sample".
        place: the directory or the file that it ends in.
        request: everything that the result depends on.
        replace: rebuild stale work instead of refusing: for work that the caller owns.
    """

    ignored: ClassVar[Collection[str]] = NAMES  # keys of the request that do not count
    repair: ClassVar[str] = ""  # how to repair damaged work; if empty, it is rebuilt

    def __init__(self, name: str, place: Path, request: dict[str, Any], *, replace: bool = False) -> None:
        self.name, self.place, self.replace = name, place, replace
        self.request: dict[str, Any] = json.loads(json.dumps(request))  # as it will be read again

    @property
    def key(self) -> str:
        """The cache key."""
        return value_digest(self.request)

    # -- where request, parts and seal lie -----------------------------------------------------------------------------

    @abstractmethod
    def read_note(self) -> dict[str, Any] | None:
        """Return `{"request": ..., "key": ...}` as noted when the work began, or None. Either key is enough."""

    @abstractmethod
    def write_note(self, note: dict[str, Any]) -> None:
        """Note the request; `note` is the one of an earlier attempt, or empty."""

    @abstractmethod
    def read_seal(self) -> dict[str, Any] | None:
        """Return what was written last, with "request" or "key"; None if there is none."""

    @abstractmethod
    def has_work(self) -> bool:
        """Return whether anything is there besides the note."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all of it; interrupted at any point, the rest is not resumed."""

    def damage(self, seal: dict[str, Any]) -> str | None:
        """Return the first part that is not as the seal says."""
        return None

    def foreign(self) -> str | None:
        """Return what is wrong if the place holds files of somebody else."""
        if self.has_work() and self.read_note() is None and self.read_seal() is None:
            return f"{self.place} is not empty and was not made by prefdistill; give another --out"
        return None

    def lock(self) -> Any:
        """Keep other processes out."""
        return locked_together(self.place)

    def sweep(self) -> None:  # noqa: B027
        """Remove the temporary files of killed processes."""

    def fetch(self) -> bool:
        """Put finished work of the same request in place, if another run has shared it."""
        return False

    def unseal(self, seal: dict[str, Any]) -> None:
        """Make damaged work count as not begun."""
        self.clear()

    def withdraw(self) -> None:  # noqa: B027
        """Leave no trace of work that was refused, if it had made nothing yet."""

    def interrupted(self, error: BaseException) -> None:
        """Note what is known of work that stopped."""
        if isinstance(error, UserError):
            self.withdraw()

    def tidy(self) -> None:  # noqa: B027
        """Remove what finished work has no use for."""

    # -- the protocol --------------------------------------------------------------------------------------------------

    def is_for(self, record: dict[str, Any]) -> bool:
        """Return whether a note or a seal is of this request."""
        if "key" in record:
            return bool(record["key"] == self.key)
        return "request" in record and not self.changes(record)

    def changes(self, record: dict[str, Any]) -> list[str]:
        """Name where this request differs from that of a note or a seal."""
        before = record.get("request", self.request)
        return [str(difference) for difference in compare(before, self.request, self.ignored)]

    def inspect(self) -> Inspection:
        """Look at what is on disk, and change nothing."""
        seal, note = self.read_seal(), self.read_note()
        if seal is not None and self.is_for(seal):
            lost = self.damage(seal)
            return Inspection(State.DAMAGED if lost else State.FINISHED, seal, note or {}, lost or "")
        if reason := self.foreign():
            return Inspection(State.FOREIGN, reason=reason)
        before = seal if note is None else note
        if not self.has_work() or before is None:
            return Inspection(State.MISSING, note=note if note and self.is_for(note) else {})
        if note is not None and self.is_for(note):
            return Inspection(State.UNFINISHED, seal or {}, note)
        return Inspection(State.STALE, seal or {}, note or {}, listed(self.changes(before)))

    def prepare(self, *, reuse: bool = True) -> dict[str, Any] | None:
        """Decide what to do, say so, and clear the way for it.

        Args:
            reuse: whether finished work is reused; not if it is quickly derived again from its parts.

        Returns:
            The seal of finished work, which is reused; None if the work is to be done, in whole or in part.

        Raises:
            UserError: if the place holds other work or files, or damaged work that needs a repair.
        """
        team = processes()
        with team.main_process_first():  # it clears the way; the others then find it cleared
            main = team.is_main_process
            if main:
                self.sweep()
            inspection = self.inspect()
            self._refuse(inspection)
            if main and inspection.state is not State.FINISHED and self.fetch():
                inspection = self.inspect()
            if inspection.state is State.FINISHED and reuse:
                if main:
                    self.tidy()
                    say(f"{self.name}: reused")
                return inspection.seal
            if inspection.state is State.UNFINISHED:
                self.request |= inspection.note.get("request", {})  # keeps the names that it was begun with
            elif main:
                self._rebuild(inspection)
            if main:
                if inspection.state is State.UNFINISHED:
                    say(f"{self.name}: resuming")
                self.write_note({} if inspection.state in (State.STALE, State.DAMAGED) else inspection.note)
        return None

    def _refuse(self, inspection: Inspection) -> None:
        if inspection.state is State.FOREIGN:
            raise UserError(inspection.reason)
        if inspection.state is State.DAMAGED and self.repair:
            raise self.damaged(inspection.reason)
        if inspection.state is State.STALE and not self.replace:
            changes = f" ({inspection.reason})" if inspection.reason else ""
            raise UserError(f"{self.place} holds work of another request{changes}; delete it or give another --out")

    def damaged(self, reason: str) -> UserError:
        """Return the error that says how to repair damaged work."""
        return UserError(f"{reason}; {self.repair}")

    def _rebuild(self, inspection: Inspection) -> None:
        if inspection.state is State.DAMAGED:
            say(f"{self.name}: rebuilding: {inspection.reason} is missing or damaged")
            self.unseal(inspection.seal)
        elif inspection.state is State.STALE:
            changes = (
                f"its inputs changed ({inspection.reason})"
                if inspection.reason
                else "it is of an unknown earlier request"
            )
            say(f"{self.name}: rebuilding: {changes}")
            self.clear()

    @contextmanager
    def session(self, *, lock: bool = True, reuse: bool = True) -> Iterator[dict[str, Any] | None]:
        """Hold the lock, decide, and yield what `prepare` returns; work that was refused leaves nothing.

        Args:
            lock: whether to lock the place; not if the caller holds the lock already.
            reuse: see `prepare`.
        """
        with self.lock() if lock else nullcontext():
            seal = self.prepare(reuse=reuse)
            if seal is not None:
                yield seal
                return
            try:
                yield None
            except BaseException as error:
                self.interrupted(error)
                raise
            if processes().is_main_process:
                self.tidy()


class DirectoryArtifact(Artifact):
    """A directory that holds its request, its parts and its seal.

    Subclasses name the two files, and may read and write them in another form.

    Args:
        pool: a directory that shares finished work between runs, by name and key. What is there already is taken from
            it, and what is finished here is put there (`share`), as hard links.
        twin: another directory for the same request. Finished work there is taken as hard links.
    """

    NOTE: ClassVar[str] = "request.json"
    SEAL: ClassVar[str] = "seal.json"
    passing: ClassVar[tuple[str, ...]] = ()  # what finished work has no use for

    def __init__(
        self,
        name: str,
        place: Path,
        request: dict[str, Any],
        *,
        replace: bool = False,
        pool: Path | None = None,
        twin: Path | None = None,
    ) -> None:
        super().__init__(name, place, request, replace=replace)
        self.pool, self.twin = pool, twin

    def read_note(self) -> dict[str, Any] | None:
        return read_json(self.place / self.NOTE) if (self.place / self.NOTE).is_file() else None

    def write_note(self, note: dict[str, Any]) -> None:
        write_json(self.place / self.NOTE, {"key": self.key, "request": self.request})

    def read_seal(self) -> dict[str, Any] | None:
        return read_json(self.place / self.SEAL) if (self.place / self.SEAL).is_file() else None

    @property
    def pooled(self) -> Path | None:
        return self.pool / f"{self.name}-{self.key}" if self.pool else None

    def is_whole_at(self, directory: Path) -> bool:
        """Return whether another directory holds this work, finished."""
        elsewhere = copy.copy(self)
        elsewhere.place = directory
        return elsewhere.inspect().state is State.FINISHED

    def fetch(self) -> bool:
        source = next((place for place in (self.pooled, self.twin) if place and self.is_whole_at(place)), None)
        if source is None:
            return False
        self.clear()
        shutil.rmtree(self.place, ignore_errors=True)
        self._link(source, self.place)
        return True

    def share(self) -> None:
        """Put finished work into the pool, if there is one that lacks it."""
        if self.pooled is None or self.is_whole_at(self.pooled):
            return
        # the wait is short: making links takes no time
        with locked(self.pooled.parent, f".{self.pooled.name}.lock", wait=True, shared=True):
            sweep(self.pooled.parent, self.pooled.name)
            if not self.is_whole_at(self.pooled):
                shutil.rmtree(self.pooled, ignore_errors=True)
                self._link(self.place, self.pooled)

    def _link(self, source: Path, target: Path) -> None:
        try:
            link_tree(source, target, without=(LOCK, *self.passing))
        except OSError:
            if not (target / self.SEAL).is_file():  # else another run was quicker with the same work
                raise

    def seal(self, about: dict[str, Any]) -> None:
        """Finish the work: what libraries wrote is synced first. Called by the main process, after all have ended."""
        sync(self.place)
        write_json(self.place / self.SEAL, about)

    def sweep(self) -> None:
        sweep(self.place, below=True)

    def contents(self) -> list[Path]:
        """List what is there besides note and lock."""
        if not self.place.is_dir():
            return []
        return [path for path in self.place.iterdir() if path.name not in (self.NOTE, LOCK)]

    def has_work(self) -> bool:
        return bool(self.contents())

    def withdraw(self) -> None:
        if not self.contents():
            (self.place / self.NOTE).unlink(missing_ok=True)

    def clear(self) -> None:
        if not self.has_work():
            return
        write_json(self.place / self.NOTE, {"key": None})  # a tombstone: an interrupted cleanup is not resumed
        (self.place / self.SEAL).unlink(missing_ok=True)
        for path in self.contents():
            self.remove(path)

    def remove(self, path: Path) -> None:
        """Remove one thing of the directory."""
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
