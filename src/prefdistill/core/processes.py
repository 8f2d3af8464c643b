"""The processes of a run."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from prefdistill.core.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

WAIT = timedelta(hours=3)  # for each other: one process may save, merge and verify a large model while the others wait


def processes() -> "PartialState":
    """Return the state of this run's processes: one, or those that accelerate or torchrun has started."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=WAIT)


def require_one_process(what: str, count: int | None = None) -> None:
    """Check that a run has one process.

    Args:
        what: the work, for the message: "`prefdistill run`".
        count: of processes; default: what the launcher says in the environment, which needs no import of torch.

    Raises:
        UserError: if it has several.
    """
    if (int(os.environ.get("WORLD_SIZE", "1")) if count is None else count) > 1:
        raise UserError(f"{what} runs in one process; launch sft, dpo, signals and distill on several")
