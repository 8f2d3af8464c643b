"""A training to its end: gone on with from its last checkpoint, stopped by Ctrl-C, saved when it is done."""

import json
import shutil
import signal
import threading
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefdistill.core.errors import UserError
from prefdistill.core.files import write_jsonl
from prefdistill.core.processes import processes
from prefdistill.core.progress import Progress, say
from prefdistill.data.encode import highest_token_id
from prefdistill.models.vocabulary import check_ids
from prefdistill.training.checkpoints import SealCheckpoints, last_checkpoint
from prefdistill.training.nan_guard import check_weights

ARGUMENTS = "training_args.bin"  # a pickle, which the Trainer leaves beside a model; what is in it is in our own files


def fit(trainer: Trainer, out: Path, what: str) -> None:
    """Train to the end, from the last whole checkpoint if there is one, and save model and tokenizer into `out`.

    Works for any Trainer whose output_dir is `out/checkpoints`. Ctrl-C finishes the step, writes a checkpoint and
    stops; the same call later goes on from it. An adapter is saved into `out/adapter`, and merged into its base in
    `out`: what is trained on top of it needs no other directory.

    Raises:
        KeyboardInterrupt: after the checkpoint of an interrupted run is written.
        UserError: if the loss or the weights are not finite, or the checkpoint holds more than numbers.
    """
    from transformers import PrinterCallback

    check_ids(highest_token_id(trainer.train_dataset), trainer.model, trainer.processing_class)
    last = last_checkpoint(Path(str(trainer.args.output_dir)))
    if last is not None:
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            say(f"{what}: trained, only to be saved")
            if trainer.is_world_process_zero():  # its last line may be torn
                write_jsonl(out / "metrics.jsonl", [_kept(logs) for logs in state.log_history])
            _load_weights(trainer.model, last)
            _save(trainer, out)
            return
        say(f"{what}: going on from step {state.global_step}")
    stop = StopOnInterrupt()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogCallback(what, out / "metrics.jsonl"))
    trainer.add_callback(SealCheckpoints())
    trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except UnpicklingError as error:  # weights only: nothing in it has been run
        raise UserError(
            f"{last} is damaged, or holds more than the state of a training; delete it to train without it"
        ) from error
    finally:
        stop.restore()
    if stop.asked:
        raise KeyboardInterrupt
    _save(trainer, out)


def _load_weights(model: Any, checkpoint: Path) -> None:
    if hasattr(model, "peft_config"):
        model.load_adapter(str(checkpoint), adapter_name="default")
    else:
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())


def _save(trainer: Trainer, out: Path) -> None:
    logs = Path(str(trainer.args.output_dir)) / "runs"  # TensorBoard's, beside the checkpoints, which go
    if logs.is_dir() and trainer.is_world_process_zero():
        shutil.copytree(logs, out / "runs", dirs_exist_ok=True)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    check_weights(model)
    if not hasattr(model, "peft_config"):
        trainer.save_model(str(out))
        (out / ARGUMENTS).unlink(missing_ok=True)
        return
    trainer.save_model(str(out / "adapter"))
    (out / "adapter" / ARGUMENTS).unlink(missing_ok=True)
    if trainer.is_world_process_zero():
        merged = model.merge_and_unload()
        merged.save_pretrained(out)
        trainer.processing_class.save_pretrained(out)  # type: ignore[union-attr]


def _kept(logs: dict[str, Any]) -> dict[str, Any]:
    """A log entry without what the Trainer and TRL count from where a process began: it tells of interruptions."""
    return {name: value for name, value in logs.items() if name not in ("num_tokens", "train_loss")}


class StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C into: finish this step, save, stop. The second one is immediate."""

    def __init__(self) -> None:
        self.asked = False
        self.previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        say("interrupted: saving a checkpoint after this step (again to stop at once)")
        self.restore()

    def restore(self) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        team = processes()
        if team.num_processes > 1:  # all stop at the same step, whichever of them heard it
            self.asked = bool(reduce(torch.tensor(float(self.asked), device=team.device), reduction="sum") > 0)
        if self.asked:
            control.should_save = control.should_training_stop = True


class LogCallback(TrainerCallback):
    """Shows the steps on stderr and appends every log entry to a file."""

    def __init__(self, what: str, path: Path) -> None:
        self.what, self.path = what, path
        self.progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            # what was logged after the checkpoint that training goes on from will be logged again
            write_jsonl(self.path, [_kept(logs) for logs in state.log_history])
            self.progress = Progress(self.what, state.max_steps, "step", done=state.global_step).__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.progress is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**_kept(logs or {}), "step": state.global_step}) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.progress is not None:
            self.progress.__exit__(None, None, None)
