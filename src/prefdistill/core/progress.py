"""Progress on stderr: a bar in a terminal, a line per minute in a log."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from tqdm import tqdm

LINE_EVERY_SECONDS = 60.0
_SAID: set[str] = set()  # by `say_once`


class Progress:
    """Counts `total` units of `what`, with rate and remaining time; nothing is printed unless `shown`.

    Example:
        >>> with Progress("signals", total=3, unit="pair") as progress:
        ...     progress.update(3)
    """

    def __init__(self, what: str, total: int, unit: str = "it", done: int = 0, *, shown: bool = True) -> None:
        self.what, self.total, self.unit, self.initial, self.done = what, total, unit, done, done
        self.bar, self.shown = None, shown
        if shown and sys.stderr.isatty():
            self.bar = tqdm(desc=what, total=total, unit=unit, initial=done, dynamic_ncols=True, leave=False)
        self.start = self.last = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif self.shown and time.monotonic() - self.last >= LINE_EVERY_SECONDS:
            self.last = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Return the progress as one line of text."""
        elapsed = time.monotonic() - self.start
        return tqdm.format_meter(
            self.done, self.total, elapsed, prefix=self.what, unit=self.unit, initial=self.initial, ncols=0
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def say(message: str) -> None:
    """Print one line to stderr; stdout is for results."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def say_once(text: str) -> None:
    """Print a line on stderr, unless this process printed it before."""
    if text not in _SAID:
        _SAID.add(text)
        say(text)


def said_once() -> list[str]:
    """Return the lines that `say_once` has printed."""
    return sorted(_SAID)


def not_again(lines: Iterable[str]) -> None:
    """Keep `say_once` from printing these lines, which another process of the same run has printed."""
    _SAID.update(lines)


def quiet_libraries() -> None:
    """Silence warnings that libraries address to their own developers, and progress bars in a log file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that a CPU does not have
