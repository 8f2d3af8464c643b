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
        sync(made)
        write_json(made / WHOLE, {"step": state.global_step})
        sync(directory, below=False)
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint)
        for path in sorted(directory.glob("checkpoint-*"), key=_step)[: -self.kept]:
            if path != best:
                shutil.rmtree(path)
