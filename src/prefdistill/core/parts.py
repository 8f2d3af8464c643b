"""Parts of unfinished work: numbered files, and rows of a log. An interruption loses at most the one being written."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import atomic_path, file_digest, write_text
from prefdistill.core.processes import processes


@dataclass(frozen=True)
class Parts:
    """Numbered files, each whole or not there.

    Args:
        directory: of the files.
        count: how many there are in the end.
        suffix: of their names.
        checksums: a directory for the checksum of each file, as sha256sum writes it; None: a file that is there is
            whole.
    """

    directory: Path
    count: int
    suffix: str = ".json"
    checksums: Path | None = None

    def path(self, number: int) -> Path:
        return self.directory / f"{number:05d}{self.suffix}"

    @property
    def paths(self) -> list[Path]:
        return [self.path(number) for number in range(self.count)]

    def shared(self) -> range:
        """Return the numbers that this process does: by rank, so that any number of processes can resume the work."""
        team = processes()
        return range(team.process_index, self.count, team.num_processes)

    def missing(self) -> list[int]:
        """Return the numbers that this process has yet to do."""
        return [number for number in self.shared() if not self.is_whole(number)]

    def is_whole(self, number: int) -> bool:
        """Return whether a part is there as it was written."""
        path = self.path(number)
        if not path.is_file():
            return False
        return self.checksums is None or self.checksum(number) == file_digest(path)

    def write(self, number: int, write: Callable[[Path], None]) -> None:
        """Write a part: `write` gets the path to write to. The checksum comes before the name."""
        with atomic_path(self.path(number)) as temporary:
            write(temporary)
            if self.checksums is not None:
                self.write_checksum(number, file_digest(temporary))

    def checksum(self, number: int) -> str | None:
        """Return the checksum noted when a part was written; None if it cannot be read."""
        assert self.checksums is not None
        try:
            line = self._checksum_file(number).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return None
        digest = line.removesuffix(self._checksum_line(number, ""))
        return digest if len(digest) == 64 and digest != line else None

    def write_checksum(self, number: int, digest: str) -> None:
        write_text(self._checksum_file(number), self._checksum_line(number, digest))

    def _checksum_file(self, number: int) -> Path:
        assert self.checksums is not None
        return self.checksums / f"{number:05d}.sha256"

    def _checksum_line(self, number: int, digest: str) -> str:
        return f"{digest}  {self.directory.name}/{self.path(number).name}\n"


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
