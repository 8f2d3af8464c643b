"""Resume a training under DeepSpeed on another number of processes than the one that wrote the checkpoint.

A checkpoint of DeepSpeed has a file for each process. DeepSpeed converts it to its universal form, which has a file for
each weight and moment, and each process reads its part of these.
"""

import shutil
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefdistill.core.processes import processes
from prefdistill.core.progress import say

UNIVERSAL = "universal"  # a folder of the checkpoint, while a training resumes from it
LATEST = "latest_universal"  # DeepSpeed's note of that folder, which it writes when all is converted


def load_universal(trainer: Trainer, checkpoint: Path) -> None:
    """Have a Trainer load a checkpoint of DeepSpeed in its universal form; it is removed when it is loaded."""
    team = processes()
    with team.main_process_first():
        if team.is_main_process:
            _convert(checkpoint)
    state: Any = trainer.accelerator.state
    options = state.deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})
    options["load_universal"] = True
    trainer.add_callback(_Loaded(checkpoint, options))


def _convert(checkpoint: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    _remove(checkpoint)  # of a start that was killed
    say(
        f"another number of processes wrote {checkpoint}: it is converted to the universal form of DeepSpeed, in its "
        f"folder {UNIVERSAL}, which is removed when it is loaded"
    )
    with redirect_stdout(sys.stderr):
        main(
            Namespace(
                input_folder=str(checkpoint / (checkpoint / "latest").read_text().strip()),
                output_folder=str(checkpoint / UNIVERSAL),
                num_extract_workers=1,  # in this process
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # ZeRO-2 saves no note of tensor parallelism, of which there is none
            )
        )


def _remove(checkpoint: Path) -> None:
    (checkpoint / LATEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)


class _Loaded(TrainerCallback):
    """Remove the universal form of a checkpoint when all processes have loaded it."""

    def __init__(self, checkpoint: Path, options: dict[str, Any]) -> None:
        self.checkpoint, self.options = checkpoint, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.options["load_universal"] = False
        team = processes()
        team.wait_for_everyone()
        if team.is_main_process:
            _remove(self.checkpoint)
