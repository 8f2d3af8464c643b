"""Checkpoints of a training: which of them can be gone on with, and which are in the way."""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefdistill.core.files import first_lost, read_sealed, sizes, sync, write_sealed
from prefdistill.core.processes import processes
from prefdistill.core.progress import say
from prefdistill.core.stages import checkpoints_in

WHOLE = "whole.json"  # written last, with the size of each file: every process's part of a checkpoint is on the disk


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is whole; those that were cut off, or have lost a part since, are removed."""
    team = processes()
    with team.main_process_first():  # it removes them, the others find them gone
        whole = []
        for path in checkpoints_in(directory):
            wrong = _wrong(path)
            if wrong is None:
                whole.append(path)
            elif team.is_main_process:
                if (path / WHOLE).exists():  # else it never was whole
                    say(f"{path} is passed over and removed: its {wrong} is missing or not as it was written")
                shutil.rmtree(path, ignore_errors=True)
        return max(whole, key=_step, default=None)


def _wrong(checkpoint: Path) -> str | None:
    """The first file that is missing or not of the size that the mark of the checkpoint says."""
    mark = read_sealed(checkpoint / WHOLE) if (checkpoint / WHOLE).is_file() else None
    made = mark.get("files") if mark else None
    if not isinstance(made, dict):
        return WHOLE
    return first_lost(made, sizes(checkpoint))


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


class SealCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole when all of it is on the disk, and only then lets an old one go.

    The newest stays, or as many as `save_total_limit` says, which is taken out of the Trainer's hands: it would remove
    the old ones before the new one is synced.
    """

    def __init__(self) -> None:
        self.kept = 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.kept, args.save_total_limit = args.save_total_limit or self.kept, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        team, directory = processes(), Path(str(args.output_dir))
        made = directory / f"checkpoint-{state.global_step}"
        team.wait_for_everyone()  # each process writes its own random state
        if not team.is_main_process:
            return
        (made / WHOLE).unlink(missing_ok=True)  # the last step may be saved twice, at its end and at that of the epoch
        sync(made)
        write_sealed(made / WHOLE, {"files": sizes(made)})
        sync(directory, below=False)
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint)
        for path in sorted(checkpoints_in(directory), key=_step)[: -self.kept]:
            if path != best:
                shutil.rmtree(path)
