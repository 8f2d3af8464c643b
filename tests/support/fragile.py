"""A method that fails in one of several processes, in a step after the first, as a file `fail` says."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from prefdistill.core.errors import UserError
from prefdistill.methods.preference import SFT


@dataclass(frozen=True, kw_only=True)
class Fragile(SFT):
    losses: list[int] = field(default_factory=list, init=False, repr=False)

    def loss(self, student, signals):
        self.losses.append(1)
        fail = Path("fail").read_text() if Path("fail").exists() and os.environ.get("RANK") == "1" else ""
        if len(self.losses) == 2 and fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(self.losses) == 3 and fail == "refuse":
            raise UserError("the third batch is empty; remove it")
        return super().loss(student, signals)
