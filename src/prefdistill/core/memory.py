"""Peak memory of a block, and bytes of a directory on disk."""

import gc
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

from prefdistill.core.files import sizes

SAMPLING_SECONDS = 0.05


class PeakMemory:
    """Measures the peak memory of the block, in `bytes`.

    On a CUDA device, the peak of torch's allocator. Elsewhere the resident size of this process, sampled twenty times a
    second: it includes libraries and memory that earlier work did not free, and may miss a shorter peak.

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
        self._sampler = threading.Thread(target=self._sample_until_done, daemon=True)

    def _sample(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss)

    def _sample_until_done(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            self._sample()

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._sample()
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated()
            return
        self._done.set()
        self._sampler.join()
        self._sample()


def free_devices() -> None:
    """Give device memory that torch has cached after earlier work back, for other processes on the same devices."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def bytes_on_disk(directory: Path) -> int:
    """Return the total size of all files below a directory."""
    return sum(sizes(directory).values())
