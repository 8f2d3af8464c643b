"""Checkpoints of a training: which of them can be gone on with, and which are in the way."""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefdistill.files import sync, write_json
from prefdistill.stages import processes

WHOLE = "whole.json"  # written last: every process's part of a checkpoint is on the disk


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is whole; the main process removes those that were cut off."""
    whole = []
    for path in directory.glob("checkpoint-*"):
        if (path / WHOLE).is_file():
            whole.append(path)
        elif processes().is_main_process:
            shutil.rmtree(path, ignore_errors=True)
    return max(whole, key=_step, default=None)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


class SealCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole when all of it is on the disk, and only then lets the one before it go.

    With a `save_total_limit` the Trainer removes old ones itself, before the new one is synced.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        team, directory = processes(), Path(str(args.output_dir))
        made = directory / f"checkpoint-{state.global_step}"
        team.wait_for_everyone()  # each process writes its own random state
        if not team.is_main_process:
            return
        sync(made)
        write_json(made / WHOLE, {"step": state.global_step})
        sync(directory, below=False)
        if args.save_total_limit is None:
            for path in directory.glob("checkpoint-*"):
                if _step(path) < state.global_step:
                    shutil.rmtree(path)
