"""The student's trainer: a transformers.Trainer whose loss is a method's."""

import json
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefdistill.data import data_fingerprint
from prefdistill.encode import PairCollator, Truncation, encode_pairs
from prefdistill.errors import UserError
from prefdistill.files import write_jsonl
from prefdistill.logprobs import emittable_ids, sequence_logps, vocabulary_rows
from prefdistill.methods import Method, Student
from prefdistill.models import load_model
from prefdistill.progress import Progress, say
from prefdistill.signals.store import Signals, SignalSet
from prefdistill.stages import processes

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Nats per token between the student and its reference before the first step that rounding does not explain.
REFERENCE_GAP = 0.05


class PrefDistillTrainer(Trainer):
    """Trains a student on preference pairs with any method of `METHODS`. Only the student is in memory.

    Args:
        model: the student, or the Hub name or directory to load it from (in float32: the small steps of preference
            training are lost in 16-bit weights; `bf16=True` in `args` makes the products 16-bit, not the weights).
        method: e.g. `METHODS["tvkd"](alpha=0.7, beta=0.1)`.
        args: any `transformers.TrainingArguments`.
        train_dataset: preference pairs in TRL's format.
        signals: the stores the method needs, each for the rows of `train_dataset`.
        processing_class: the student's tokenizer.
        eval_dataset, eval_signals: held-out pairs and their stores.
        peft_config: train an adapter of this kind instead of the weights.
        truncation: for methods without signals; those with signals truncate as their signals did.
        kwargs: passed on to `transformers.Trainer`.

    Raises:
        UserError: if a signal the method needs is missing, or was made from other data, tokens or truncation.

    Example:
        >>> trainer = PrefDistillTrainer(                                    # doctest: +SKIP
        ...     model="my/student", method=METHODS["tvkd"](), args=TrainingArguments("out"),
        ...     train_dataset=pairs, signals=[teacher, reference], processing_class=tokenizer)
        >>> trainer.train()                                                  # doctest: +SKIP
    """

    # The loss of a micro-batch is a mean: the Trainer divides it by the accumulation steps. Read by transformers 5.19
    # and later; before that it goes by `model_accepts_loss_kwargs`.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: "PreTrainedModel | str",
        method: Method,
        args: TrainingArguments,
        train_dataset: "Dataset",
        signals: Sequence[Signals] = (),
        processing_class: "PreTrainedTokenizerBase | None" = None,
        *,
        eval_dataset: "Dataset | None" = None,
        eval_signals: Sequence[Signals] = (),
        peft_config: "PeftConfig | None" = None,
        truncation: Truncation | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise UserError("PrefDistillTrainer needs the student's tokenizer: pass processing_class=tokenizer")
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs are visible to one process: start one for each with `accelerate launch`, or show "
                "it one with CUDA_VISIBLE_DEVICES=0"
            )
        student: nn.Module = load_model(model, dtype="float32") if isinstance(model, str) else model
        disable_dropout(student)
        if peft_config is not None:
            from peft import get_peft_model

            student = get_peft_model(student, peft_config)
        self.method = method
        train_rows = _prepare(train_dataset, method, signals, processing_class, truncation)
        eval_rows = _prepare(eval_dataset, method, eval_signals, processing_class, truncation) if eval_dataset else None
        args.remove_unused_columns = False  # our columns are not the model's arguments
        super().__init__(
            model=student,
            args=args,
            data_collator=PairCollator(
                processing_class.pad_token_id,
                responses=method.responses,
                features=("row", *(name for name in train_rows.column_names if name.startswith("feature_"))),
            ),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self._emittable = emittable_ids(processing_class, vocabulary_rows(student))
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._reference_checked = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        features = inputs.pop("features")
        rows = features.pop("row")
        # accelerate's autocast sits on the model's forward, which `reduce_logits` goes around
        with self.accelerator.autocast():
            logps = sequence_logps(model, inputs, emittable=self._emittable)
        sides = self.method.responses
        student = Student(
            logps=dict(zip(sides, logps.chunk(len(sides)), strict=True)),
            tokens=dict(zip(sides, inputs["lengths"].chunk(len(sides)), strict=True)),
        )
        features = {
            name.removeprefix("feature_"): torch.tensor(values, dtype=torch.float32, device=logps.device)
            for name, values in features.items()
        }
        loss, metrics = self.method.loss(student, features)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, rows {rows} of the data: "
                "try a lower learning rate, max_grad_norm=1, or bf16=false"
            )
        if model.training:
            self._check_reference(student, features)
            for name, value in metrics.items():
                self._sums[name].append(value)
        return (loss, metrics) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, values in self._sums.items():
                mean = torch.stack(values).float().mean()
                logs[name] = self.accelerator.reduce(mean, reduction="mean").item()
            self._sums.clear()
        super().log(logs, start_time)

    def _check_reference(self, student: Student, features: dict[str, Tensor]) -> None:
        """Before the first step the student is its own reference; say so if the numbers disagree."""
        if self._reference_checked or "ref_chosen" not in features or self.state.global_step > 0:
            return
        self._reference_checked = True
        gap = (student.logps["chosen"].detach() - features["ref_chosen"]).abs().sum() / student.tokens["chosen"].sum()
        if gap > REFERENCE_GAP:
            say(
                f"warning: before training, the student and its reference signals differ by {gap:.3f} nats per token; "
                "they are meant to be the same model (in the same precision)"
            )


def _prepare(
    dataset: "Dataset",
    method: Method,
    signals: Sequence[Signals],
    tokenizer: "PreTrainedTokenizerBase",
    truncation: Truncation | None,
) -> "Dataset":
    """Encoded pairs with the method's features as columns `feature_*`."""
    available = SignalSet.of(list(signals), dataset, data_fingerprint(dataset) if signals else "")
    if missing := available.missing(method.needs):
        raise UserError(f"{type(method).__name__} lacks {', '.join(missing)}. {_how_to_make(missing[0])}")
    for store in signals:
        store.check_tokenizer(tokenizer)
        made_with = Truncation(**store.manifest["truncation"])
        if truncation is not None and truncation != made_with:
            raise UserError(f"the {store.role} signals were made with {made_with}, training asks for {truncation}")
        truncation = made_with
    encoded, dropped = encode_pairs(dataset, tokenizer, truncation or Truncation())
    if dropped:
        say(f"training: {dropped}")
    features = method.features(available.at(np.asarray(encoded["row"][:])))
    columns = ["row", "prompt_ids", *(f"{side}_ids" for side in method.responses)]
    encoded = encoded.select_columns(columns)
    for name, values in features.items():
        encoded = encoded.add_column(f"feature_{name}", values.astype(np.float32))
    return encoded


def _how_to_make(need: str) -> str:
    role, _, kind = need.partition(".")
    if role == "data":
        return f"The data has no column {kind!r}; give every pair its score there"
    whose = {"teacher": "TEACHER", "teacher_reference": "TEACHER_SFT_MODEL", "reference": "STUDENT"}[role]
    return f"Make it with `prefdistill signals --role {role} --kind {kind} --model {whose} --data DATA --out DIR`"


def disable_dropout(model: nn.Module) -> None:
    """Dropout off for good: the student is compared with a reference that was read without."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # some families keep the rate as a number of their own
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def fit(trainer: Trainer, out: Path, what: str) -> None:
    """Train to the end, from the last whole checkpoint if there is one, and save model and tokenizer into `out`.

    Works for any Trainer whose output_dir is `out/checkpoints`. Ctrl-C finishes the step, writes a checkpoint and
    stops; the same call later goes on from it. An adapter is saved into `out/adapter`, and merged into its base in
    `out`: what is trained on top of it needs no other directory.

    Raises:
        KeyboardInterrupt: after the checkpoint of an interrupted run is written.
    """
    from transformers import PrinterCallback

    last = _last_checkpoint(Path(str(trainer.args.output_dir)))
    if last is not None:
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            say(f"{what}: trained, only to be saved")
            _load_weights(trainer.model, last)
            _save(trainer, out)
            return
        say(f"{what}: going on from step {state.global_step}")
    stop = StopOnInterrupt()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogCallback(what, out / "metrics.jsonl"))
    trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    finally:
        stop.restore()
    if stop.asked:
        raise KeyboardInterrupt
    _save(trainer, out)


def _last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is whole. The Trainer writes trainer_state.json last; what lacks it was cut off."""
    found = [path for path in directory.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


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
    if not hasattr(model, "peft_config"):
        trainer.save_model(str(out))
        return
    trainer.save_model(str(out / "adapter"))
    if trainer.is_world_process_zero():
        merged = model.merge_and_unload()
        merged.save_pretrained(out)
        trainer.processing_class.save_pretrained(out)  # type: ignore[union-attr]


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
            write_jsonl(self.path, state.log_history)
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
                file.write(json.dumps({**(logs or {}), "step": state.global_step}) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.progress is not None:
            self.progress.__exit__(None, None, None)
