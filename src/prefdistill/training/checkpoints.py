"""Checkpoints of a training: mark complete ones, discard incomplete ones, find the one to resume from."""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefdistill.core.errors import UserError
from prefdistill.core.files import first_lost, read_sealed, sizes, sync, write_sealed
from prefdistill.core.processes import processes
from prefdistill.core.progress import say
from prefdistill.core.stages import checkpoints_in
from prefdistill.training.engines import DDP

WHOLE = "whole.json"  # written last, with the size of each file: all parts of the checkpoint are on disk


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint; remove those that are incomplete or have lost a file since."""
    team = processes()
    with team.main_process_first():  # it removes the incomplete ones before the others look
        complete = []
        for path in checkpoints_in(directory):
            damaged = _first_damaged_file(path)
            if damaged is None:
                complete.append(path)
            elif team.is_main_process:
                if (path / WHOLE).exists():  # otherwise it was never complete
                    say(f"{path} is removed: its {damaged} is missing or has changed size")
                shutil.rmtree(path, ignore_errors=True)
        return max(complete, key=_step, default=None)


def _first_damaged_file(checkpoint: Path) -> str | None:
    """Return the first file that is missing or has another size than when the checkpoint was marked; None if none."""
    mark = read_sealed(checkpoint / WHOLE) if (checkpoint / WHOLE).is_file() else None
    written_sizes = mark.get("files") if mark else None
    if not isinstance(written_sizes, dict):
        return WHOLE
    return first_lost(written_sizes, sizes(checkpoint))


def check_engine_of(checkpoint: Path, engine: str) -> None:
    """Check that a checkpoint was written by the engine that is to resume from it.

    Raises:
        UserError: if it was another one.
    """
    written = (read_sealed(checkpoint / WHOLE) or {}).get("engine", DDP)
    if written != engine:
        raise UserError(
            f"{checkpoint} is of a training under {written}, this one is under {engine}; change it, or delete it to "
            "train anew"
        )


def processes_of(checkpoint: Path) -> int:
    """Return the number of processes that wrote a checkpoint."""
    mark = read_sealed(checkpoint / WHOLE) or {}
    return int(mark.get("processes", processes().num_processes))


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


class SealCheckpoints(TrainerCallback):
    """Mark a checkpoint as complete when all of it is on disk, and only then remove old ones.

    Keeps the newest one, or `save_total_limit` of them. That option is taken from the Trainer, which would remove old
    checkpoints before the new one is synced. The mark names the engine and the number of processes that wrote it.
    """

    def __init__(self, engine: str = DDP) -> None:
        self.limit, self.engine = 1, engine

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.limit, args.save_total_limit = args.save_total_limit or self.limit, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        team, directory = processes(), Path(str(args.output_dir))
        checkpoint = directory / f"checkpoint-{state.global_step}"
        team.wait_for_everyone()  # each process writes its own random state
        if not team.is_main_process:
            return
        (checkpoint / WHOLE).unlink(missing_ok=True)  # the last step of an epoch may be saved twice
        sync(checkpoint)
        mark = {"files": sizes(checkpoint), "engine": self.engine, "processes": team.num_processes}
        write_sealed(checkpoint / WHOLE, mark)
        sync(directory, below=False)
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint)
        for path in sorted(checkpoints_in(directory), key=_step)[: -self.limit]:
            if path != best:
                shutil.rmtree(path)
