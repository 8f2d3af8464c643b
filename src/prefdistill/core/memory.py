"""The most memory that a piece of work has held, and the bytes that a directory takes on disk."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

from prefdistill.core.files import sizes

LOOK_EVERY_SECONDS = 0.05


class PeakMemory:
    """Most memory held while the block runs, in `bytes`.

    On a CUDA device, what torch's allocator has handed out at most. Elsewhere the resident size of this process, looked
    at twenty times a second: libraries and what earlier work has left behind are part of it, and a shorter peak may be
    missed.

    Example:
        >>> with PeakMemory() as peak:
        ...     _ = bytearray(1_000)
        >>> peak.bytes > 0
        True
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._cuda = torch.cuda.is_available()
        self._process = psutil.Process()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._done.wait(LOOK_EVERY_SECONDS):
            self._look()

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._look()
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated()
            return
        self._done.set()
        self._watcher.join()
        self._look()


def bytes_on_disk(directory: Path) -> int:
    """Sizes of all the files below a directory, added up."""
    return sum(sizes(directory).values())
