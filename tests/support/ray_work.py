"""Work for the workers of a Ray cluster: it dies when a test says so."""

import os
import signal
import uuid
from pathlib import Path
from typing import Any

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
