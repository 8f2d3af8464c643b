"""Work that ends in a single file, see `prefdistill.core.artifact`."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

from prefdistill.core.artifact import Artifact, Inspection, State
from prefdistill.core.errors import UserError
from prefdistill.core.files import atomic_path, file_digest, read_json, sweep, write_json
from prefdistill.core.lock import LOCK, locked


class FileArtifact(Artifact):
    """A single file, OUT. Its seal, with the request and a checksum, is OUT.meta.json; request and parts of unfinished
    work are in OUT.parts.

    Args:
        verb: of `prefdistill`, that writes such files.
    """

    def __init__(self, name: str, place: Path, request: dict[str, Any], verb: str) -> None:
        super().__init__(name, place, request)
        self.verb, self.parts = verb, place.with_name(f"{place.name}.parts")
        self.note = self.parts / "request.json"

    def lock(self) -> Any:
        return locked(self.parts)

    def sweep(self) -> None:
        for file in (self.place, sidecar(self.place)):
            sweep(file.parent, file.name)

    def read_note(self) -> dict[str, Any] | None:
        return {"request": read_json(self.note)} if self.note.is_file() else None

    def write_note(self, note: dict[str, Any]) -> None:
        write_json(self.note, self.request)

    def read_seal(self) -> dict[str, Any] | None:
        return made_of(self.place) or None

    def has_work(self) -> bool:
        return self.place.exists() or any(path.name != LOCK for path in _listed(self.parts))

    def foreign(self) -> str | None:
        if self.place.exists() and self.read_seal() is None:
            return f"{self.place} is not as `prefdistill {self.verb}` wrote it; delete it or give another --out"
        if not self.place.exists() and self.has_work() and not self.note.is_file():
            return f"{self.parts} is not empty and was not made by `prefdistill {self.verb}`; give another --out"
        return None

    def seal(self, write: Callable[[Path], Any], about: dict[str, Any]) -> dict[str, Any]:
        """Finish the work.

        Args:
            write: writes the file to the path it gets.
            about: beside the request; written after the file, which gets its name last.

        Returns:
            The seal.
        """
        with atomic_path(self.place) as temporary:
            write(temporary)
            seal = {"request": self.request, **about, "sha256": file_digest(temporary)}
            write_json(sidecar(self.place), seal)
        return seal

    def withdraw(self) -> None:
        if {path.name for path in _listed(self.parts)} <= {LOCK, self.note.name}:
            self.note.unlink(missing_ok=True)

    def tidy(self) -> None:
        for path in _listed(self.parts):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def clear(self) -> None:
        raise AssertionError("a file of another request is refused, never replaced")


class RecordArtifact(Artifact):
    """A JSON file that is its own seal: a result with the key and the request it was made from.

    One of another request is replaced, and stays until the new one is whole.

    Args:
        verb: of `prefdistill`, that writes such files.
        mark: a key that all of them have.
    """

    ignored: ClassVar[Collection[str]] = ()

    def __init__(self, name: str, place: Path, request: dict[str, Any], verb: str, mark: str = "key") -> None:
        super().__init__(name, place, request, replace=True)
        self.verb, self.mark = verb, mark

    def lock(self) -> Any:
        return locked(self.place.parent)

    def sweep(self) -> None:
        sweep(self.place.parent, self.place.name)

    def read_note(self) -> dict[str, Any] | None:
        return None

    def write_note(self, note: dict[str, Any]) -> None:
        pass

    def read_seal(self) -> dict[str, Any] | None:
        record = read_json(self.place) if self.place.is_file() else None
        return record if isinstance(record, dict) and self.mark in record else None

    def inspect(self) -> Inspection:
        try:
            return super().inspect()
        except UserError:  # no JSON: torn
            return Inspection(State.DAMAGED, reason=str(self.place))

    def has_work(self) -> bool:
        return self.place.exists()

    def foreign(self) -> str | None:
        if self.place.exists() and self.read_seal() is None:
            return f"{self.place} was not made by `prefdistill {self.verb}`; give another --out"
        return None

    def clear(self) -> None:
        pass

    def seal(self, about: dict[str, Any]) -> dict[str, Any]:
        """Finish the work; returns what is written."""
        record = {**about, "key": self.key, "request": self.request}
        write_json(self.place, record)
        return record


def sidecar(out: Path) -> Path:
    """Return the path of the seal of a single file."""
    return out.with_name(f"{out.name}.meta.json")


def made_of(out: Path) -> dict[str, Any]:
    """Return what the sidecar of a file says; {} without one, or if the file has changed since."""
    try:
        seal = read_json(sidecar(out)) if out.is_file() and sidecar(out).is_file() else None
    except UserError:  # torn
        return {}
    return seal if isinstance(seal, dict) and seal.get("sha256") == file_digest(out) else {}


def _listed(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
