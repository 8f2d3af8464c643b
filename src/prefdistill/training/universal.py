"""Resume a training under DeepSpeed on another number of processes than the one that wrote the checkpoint.

A checkpoint of DeepSpeed has a file for each process. DeepSpeed converts it to its universal form, which has a file for
each weight and moment, and each process reads its part of these.
"""

import copy
import shutil
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefdistill.core.errors import UserError
from prefdistill.core.processes import processes
from prefdistill.core.progress import say

UNIVERSAL = "universal"  # a folder of the checkpoint, while a training resumes from it
LATEST = "latest_universal"  # DeepSpeed's note of that folder, which it writes when all is converted
ADAM = ("adamw_torch", "adamw_torch_fused")  # the universal form has Adam's two moments and nothing else


def load_universal(trainer: Trainer, checkpoint: Path, written: int) -> None:
    """Have a Trainer load a checkpoint of DeepSpeed in its universal form; it is removed when it is loaded.

    Args:
        trainer: before its training, which is to resume from the checkpoint.
        checkpoint: of another number of processes.
        written: that number.

    Raises:
        UserError: if the optimizer is not AdamW, or DeepSpeed cannot convert the checkpoint.
    """
    team, arguments = processes(), cast(Any, trainer.args)
    optimizer = arguments.optim.value
    what = f"{checkpoint} is of {written} processes under DeepSpeed, here are {team.num_processes}"
    remedy = f"launch {written}, or delete it to train anew"
    if optimizer not in ADAM:
        raise UserError(f"{what}; the state of {optimizer} cannot be converted for another number: {remedy}")
    with team.main_process_first():
        if team.is_main_process:
            say(f"{what}: converting it, in its folder {UNIVERSAL}, which is removed when it is loaded")
            try:
                _convert(checkpoint)
            except Exception as error:
                raise UserError(f"{what}, and DeepSpeed cannot convert it ({error!r}): {remedy}") from error
    state: Any = trainer.accelerator.state
    options = state.deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})
    options["load_universal"] = True
    groups = [group for group in trainer.create_optimizer().param_groups if group["params"]]  # as DeepSpeed
    trainer.add_callback(_Loaded(checkpoint, options, [group["weight_decay"] for group in groups]))


def _convert(checkpoint: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    _remove(checkpoint)  # of a start that was killed
    with redirect_stdout(sys.stderr):
        main(
            Namespace(
                input_folder=str(checkpoint / (checkpoint / "latest").read_text().strip()),
                output_folder=str(checkpoint / UNIVERSAL),
                num_extract_workers=1,  # in this process
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # ZeRO-2 saves no note of tensor parallelism where there is none
            )
        )


def _remove(checkpoint: Path) -> None:
    (checkpoint / LATEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)


class _Loaded(TrainerCallback):
    """When all processes have loaded the universal form, remove it, and set what ZeRO-3 has loaded wrongly.

    Its `load_hp_checkpoint_state_from_checkpoint_dir_stage3` gives all groups of weights the weight decay of the first,
    and all of them one tensor that counts the steps, which each group then counts on.
    """

    def __init__(self, checkpoint: Path, options: dict[str, Any], weight_decay: list[float]) -> None:
        self.checkpoint, self.options, self.weight_decay = checkpoint, options, weight_decay

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self.options["load_universal"] = False
        # an optimizer that DeepSpeed's own configuration names has one group
        for group, weight_decay in zip(optimizer.param_groups, self.weight_decay, strict=False):
            group["weight_decay"] = weight_decay
        for moments in optimizer.state.values():
            moments["step"] = copy.deepcopy(moments["step"])
        team = processes()
        team.wait_for_everyone()
        if team.is_main_process:
            _remove(self.checkpoint)
