"""A signal store as work that is done once: its files, one shard of it, and the manifest that finishes it."""

import shutil
from pathlib import Path
from typing import Any, Protocol

from prefdistill.core.artifact import DirectoryArtifact
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_sealed, write_sealed
from prefdistill.core.parts import Parts, read_checksum
from prefdistill.core.processes import processes
from prefdistill.core.progress import Progress, say
from prefdistill.signals.request import Encoding, finished_manifest, parts_of
from prefdistill.signals.shards import Shard, open_shards, write_shard
from prefdistill.signals.store import DamagedSignals, Signals


class StoreArtifact(DirectoryArtifact):
    """A signal store as work that is done once: `request.json`, shards with their checksums, `manifest.json`.

    Args:
        alone: whether no other process writes its shards, see `Shards.alone`.
    """

    SEAL = "manifest.json"
    repair = "prefdistill signals --repair"

    def __init__(self, name: str, place: Path, request: dict[str, Any], *, alone: bool = False) -> None:
        super().__init__(name, place, request)
        self.alone = alone

    def read_note(self) -> dict[str, Any] | None:
        if not (self.place / self.NOTE).is_file():
            return None
        if (request := read_sealed(self.place / self.NOTE)) is None:
            raise self.damaged(f"{self.place / self.NOTE} is damaged (its checksum differs)")
        return {"request": request}

    def write_note(self, note: dict[str, Any]) -> None:
        if not note:
            write_sealed(self.place / self.NOTE, self.request)

    def read_seal(self) -> dict[str, Any] | None:
        if not (self.place / self.SEAL).is_file():
            return None
        if not (self.place / self.NOTE).is_file():
            raise self.damaged(f"{self.place / self.NOTE} is missing")
        return self.read_note()  # whether the manifest and the shards are whole is checked when the store is opened

    def damaged(self, reason: str) -> UserError:
        return DamagedSignals(reason, self.place)

    def shards(self, count: int) -> Parts:
        return Parts(self.place / "shards", count, ".parquet", checksums=True)

    def withdraw(self) -> None:
        if self.alone and not any((self.place / "shards").glob("*.parquet")):
            shutil.rmtree(self.place, ignore_errors=True)

    def seal(self, about: dict[str, Any]) -> None:
        write_sealed(self.place / self.SEAL, about)  # every shard is synced already


class Shards(Protocol):
    """What an engine does: write and check the shards of a store."""

    @property
    def request(self) -> dict[str, Any]:
        """The request of model and data as the engine reads them."""

    @property
    def alone(self) -> bool:
        """Whether only this process writes shards; else others may still write when it stops."""

    def write(self, store: StoreArtifact) -> None:
        """Write the missing shards of a store, and check the token ids of the others."""

    def check(self, signals: Signals) -> None:
        """Check the token ids of a finished store."""


def write_part(store: StoreArtifact, extraction: Encoding, number: int, progress: Progress) -> None:
    """Write a shard, or check the token ids of one that is whole already."""
    rows, shards = extraction.parts[number], store.shards(len(extraction.parts))
    path = shards.path(number)
    if shards.is_whole(number):
        extraction.check(Signals(extraction.request, [Shard(path)], str(store.place)), rows)
        progress.update(len(extraction.responses) * len(rows))
        return
    earlier = read_checksum(path)
    write_shard(path, *extraction.shard(rows, progress))
    if earlier not in (None, read_checksum(path)):
        say(f"warning: {path} differs from the shard that it replaces: other versions or hardware wrote that")


def finish(store: StoreArtifact) -> None:
    """Write the manifest over all shards; if no pair is left in any of them, remove them and say why."""
    team = processes()
    team.wait_for_everyone()
    paths = store.shards(len(parts_of(store.request))).paths
    try:
        manifest, reading = finished_manifest(store.request, open_shards(paths))
    except UserError:
        team.wait_for_everyone()
        if team.is_main_process:
            shutil.rmtree(store.place)
        raise
    if team.is_main_process:
        if not reading.complete:
            say(f"signals: {reading}")
        store.seal(manifest)
    team.wait_for_everyone()
