"""Parts of unfinished work: numbered files, and rows of a log. An interruption loses at most the one being written."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import file_digest, write_text
from prefdistill.core.processes import processes


@dataclass(frozen=True)
class Parts:
    """Numbered files, each whole or not there.

    Args:
        directory: of the files.
        count: how many there are in the end.
        suffix: of their names.
        checksums: whether each has a checksum beside it; without, a file that is there is whole.
    """

    directory: Path
    count: int
    suffix: str = ".json"
    checksums: bool = False

    def path(self, number: int) -> Path:
        return self.directory / f"{number:05d}{self.suffix}"

    @property
    def paths(self) -> list[Path]:
        return [self.path(number) for number in range(self.count)]

    def own(self) -> range:
        """Return the numbers of this process: by rank, so that any number of processes can resume the work."""
        team = processes()
        return range(team.process_index, self.count, team.num_processes)

    def missing(self) -> list[int]:
        """Return the numbers that this process has yet to do."""
        return [number for number in self.own() if not self.is_whole(number)]

    def is_whole(self, number: int) -> bool:
        """Return whether a part is there as it was written."""
        return is_whole(self.path(number)) if self.checksums else self.path(number).is_file()


# -- checksums: DIR/checksums/NAME.sha256 of DIR/PARTS/NAME.*, as sha256sum writes them --------------------------------


def checksum_file(part: Path) -> Path:
    """Return the path of a part's checksum."""
    return part.parent.parent / "checksums" / f"{part.stem}.sha256"


def write_checksum(part: Path, digest: str) -> None:
    """Write the checksum of a part: before the part gets its name, so that a part without one is not whole."""
    write_text(checksum_file(part), f"{digest}  {part.parent.name}/{part.name}\n")


def read_checksum(part: Path) -> str | None:
    """Return the checksum noted when a part was written; None if there is none that can be read."""
    try:
        line = checksum_file(part).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    digest = line.removesuffix(f"  {part.parent.name}/{part.name}\n")
    return digest if len(digest) == 64 and digest != line else None


def is_whole(part: Path, digest: str | None = None) -> bool:
    """Return whether a part has the checksum it should have: by default the one noted beside it."""
    digest = digest or read_checksum(part)
    return digest is not None and part.is_file() and file_digest(part) == digest


# -- logs --------------------------------------------------------------------------------------------------------------


class RowLog:
    """An append-only .jsonl file of rows with a "key"; the last row of a key counts.

    A torn last line, of an interrupted run, is cut off.

    Args:
        path: of the file; there need be none yet.

    Raises:
        UserError: if another line is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        content, start = self.path.read_bytes(), 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(row["key"], str):
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                if start + len(line) < len(content):
                    raise UserError(
                        f"{self.path}, line {number}: damaged (not a JSON object with a key); remove the line, or give "
                        "another --out"
                    ) from None
                with self.path.open("rb+") as file:
                    file.truncate(start)
                return
            self.rows[row["key"]] = row
            start += len(line)

    @contextmanager
    def appending(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Open the file; yield a function that adds a row and returns when it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:

            def append(row: dict[str, Any]) -> None:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                self.rows[row["key"]] = row

            yield append
