"""Work for the workers of a Ray cluster: it dies when a test says so."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from prefdistill.core.errors import UserError


class Work:
    """Notes that it was loaded, in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / f"loaded-{uuid.uuid4().hex}").touch()

    def double(self, number: int) -> int:
        """Return twice the number; the first one to get 3 is killed, and 5 is refused."""
        if number == 3 and not (self.directory / "killed").exists():
            (self.directory / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5:
            raise UserError("5 is refused", where="double")
        return 2 * number

    def die(self, _: Any) -> None:
        """Die, always."""
        os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> Work:
    raise UserError("no model here")


@contextmanager
def killing_a_worker(begun: Callable[[], bool]) -> Iterator[None]:
    """Kill a worker while it runs a task, once the work has begun; check that one was killed."""
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.005)
            running = [p for p in psutil.Process().children(recursive=True) if "_Worker.run" in "".join(p.cmdline())]
            if running and begun():
                os.kill(running[0].pid, signal.SIGKILL)
                killed.append(running[0].pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield
    killer.join(10)
    assert len(killed) == 1
