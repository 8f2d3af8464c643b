"""Run a Trainer to completion: resume from the last checkpoint, stop on Ctrl-C, save the model."""

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
from prefdistill.core.files import read_json, write_json, write_jsonl
from prefdistill.core.processes import processes
from prefdistill.core.progress import Progress, say
from prefdistill.core.stages import READING
from prefdistill.data.encode import highest_token_id
from prefdistill.data.truncation import Reading
from prefdistill.models.vocabulary import check_ids
from prefdistill.training.checkpoints import SealCheckpoints, check_engine_of, last_checkpoint, processes_of
from prefdistill.training.engines import engine_of
from prefdistill.training.gather import load_weights
from prefdistill.training.nan_guard import check_weights
from prefdistill.training.saved import save
from prefdistill.training.universal import load_universal


def fit(trainer: Trainer, out: Path, what: str, *, verify: bool = True, reading: Reading | None = None) -> None:
    """Run a Trainer to completion, resuming from the last complete checkpoint, and save model and tokenizer in `out`.

    Works for any Trainer whose output_dir is `out/checkpoints`. Ctrl-C finishes the step, writes a checkpoint and
    stops; the same call later resumes from it. An adapter is saved in `out/adapter`, and merged into its base in
    `out`, so that training on top of it needs no other directory. What was saved is loaded again and its logits are
    compared with the trained model's, unless `verify` is False. `reading`, how the rows were read, goes to
    `out/reading.json`; default: that of the trainer.

    Raises:
        KeyboardInterrupt: after the checkpoint of an interrupted run is written.
        UserError: if the loss or the weights are not finite, the checkpoint holds code or is of other token ids, or the
            saved model differs from the trained one.
    """
    from transformers import PrinterCallback

    check_ids(highest_token_id(trainer.train_dataset), trainer.model, trainer.processing_class)
    reading = reading or getattr(trainer, "reading", None)
    last, engine = last_checkpoint(Path(str(trainer.args.output_dir))), engine_of(trainer)
    if reading is not None:
        _note_reading(reading, out, trainer, last)
    if last is not None:
        check_engine_of(last, engine)
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            if trainer.is_world_process_zero():  # its last line may be incomplete
                say(f"{what}: already trained, only saving")
                write_jsonl(out / "metrics.jsonl", [_resumable_logs(logs) for logs in state.log_history])
            load_weights(trainer.model, last, engine)
            _save(trainer, out, verify)
            return
        if trainer.is_world_process_zero():
            say(f"{what}: resuming from step {state.global_step}")
        written = processes_of(last)
        if trainer.is_deepspeed_enabled and written != processes().num_processes:
            load_universal(trainer, last, written)
    stop = StopOnInterrupt()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogCallback(what, out / "metrics.jsonl"))
    trainer.add_callback(SealCheckpoints(engine))
    trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except UnpicklingError as error:  # loaded with weights_only: no code in it has run
        raise UserError(
            f"{last} is damaged, or holds more than the state of a training; delete it to train without it"
        ) from error
    finally:
        stop.restore()
    if stop.requested:
        processes().wait_for_everyone()  # the launcher ends the others when one has ended, and one seals the checkpoint
        raise KeyboardInterrupt
    _save(trainer, out, verify)


def _note_reading(reading: Reading, out: Path, trainer: Trainer, last: Path | None) -> None:
    """Write how the rows were read; refuse to resume if they were encoded otherwise before the interruption."""
    file = out / READING
    before = read_json(file) if last is not None and file.is_file() else {}
    if before.get("ids", reading.ids) != reading.ids:
        raise UserError(
            f"{last} is of a training on other token ids than the data have now: the chat template prints the date, or "
            f"transformers has changed; delete {trainer.args.output_dir} to train again from the start"
        )
    if trainer.is_world_process_zero():
        write_json(file, reading.to_json())


def _save(trainer: Trainer, out: Path, verify: bool) -> None:
    logs = Path(str(trainer.args.output_dir)) / "runs"  # TensorBoard's, beside the checkpoints, which are deleted
    if logs.is_dir() and trainer.is_world_process_zero():
        shutil.copytree(logs, out / "runs", dirs_exist_ok=True)
    check_weights(trainer.accelerator.unwrap_model(trainer.model))
    save(trainer, out, verify=verify)


def _resumable_logs(logs: dict[str, Any]) -> dict[str, Any]:
    """Return a log entry without the totals that start anew when a training is resumed."""
    return {name: value for name, value in logs.items() if name not in ("num_tokens", "train_loss")}


class StopOnInterrupt(TrainerCallback):
    """On the first Ctrl-C, finish the step, save a checkpoint and stop; the second one stops immediately."""

    def __init__(self) -> None:
        self.requested = False
        self.previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._request_stop)

    def _request_stop(self, *_: Any) -> None:
        self.requested = True
        say("interrupted: saving a checkpoint after this step (Ctrl-C again to stop now)")
        self.restore()

    def restore(self) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        team = processes()
        if team.num_processes > 1:  # all stop at the same step, whichever got the signal
            self.requested = bool(reduce(torch.tensor(float(self.requested), device=team.device), reduction="sum") > 0)
        if self.requested:
            control.should_save = control.should_training_stop = True


class LogCallback(TrainerCallback):
    """Show a progress bar on stderr and append every log entry to a file."""

    def __init__(self, what: str, path: Path) -> None:
        self.what, self.path = what, path
        self.progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            # the steps after the checkpoint will be logged again
            write_jsonl(self.path, [_resumable_logs(logs) for logs in state.log_history])
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
                file.write(json.dumps({**_resumable_logs(logs or {}), "step": state.global_step}) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.progress is not None:
            self.progress.__exit__(None, None, None)
