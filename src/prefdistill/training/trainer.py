"""The student's trainer: a transformers.Trainer whose loss is a method's."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say, say_once
from prefdistill.data.batches import layout_for
from prefdistill.data.encode import longest_text
from prefdistill.data.truncation import Truncation
from prefdistill.methods import Method, Student
from prefdistill.models.balance import balance_coefficient
from prefdistill.models.load import load_model
from prefdistill.models.logprobs import emittable_ids, vocabulary_rows
from prefdistill.models.positions import check_positions
from prefdistill.signals.live import LiveTeacher, bind_live
from prefdistill.signals.store import Signals
from prefdistill.training.engines import ShardingTrainer, check_engine
from prefdistill.training.gradient import LEAST, gradient_share
from prefdistill.training.nan_guard import check_loss
from prefdistill.training.rows import SignalCollator, feature_tensors, prepare_rows
from prefdistill.training.start import check_start
from prefdistill.training.student import read_student

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Nats per token between the student and its reference before the first step that rounding does not explain.
REFERENCE_GAP = 0.05


class PrefDistillTrainer(ShardingTrainer):
    """A `transformers.Trainer` for any method of `METHODS`. Only the student is in memory.

    Args:
        model: the student, or the Hub name or directory to load it from (in float32: 16-bit weights lose the
            small steps of preference training; `bf16=True` in `args` makes the products 16-bit, not the weights).
        method: e.g. `METHODS["tvkd"](alpha=0.7, beta=0.1)`.
        args: any `transformers.TrainingArguments`.
        train_dataset: preference pairs in TRL's format, with the sampled responses that the method needs, if any.
        signals: the stores the method needs, each for the rows of `train_dataset`; or a `LiveTeacher` in place of one.
        processing_class: the student's tokenizer.
        eval_dataset, eval_signals: held-out pairs and their stores.
        peft_config: train an adapter of this kind instead of the weights.
        truncation: for methods without signals; those with signals truncate as their signals did.
        router_aux_loss_coef: coefficient of a mixture of experts' load-balancing loss, in place of the model's own.
        kwargs: passed on to `transformers.Trainer`.

    Raises:
        UserError: if a signal the method needs is missing, or was computed from other data, tokens or truncation.

    Example:
        >>> trainer = PrefDistillTrainer(                                    # doctest: +SKIP
        ...     model="my/student", method=METHODS["tvkd"](), args=TrainingArguments("out"),
        ...     train_dataset=pairs, signals=[teacher, reference], processing_class=tokenizer)
        >>> trainer.train()                                                  # doctest: +SKIP
    """

    # The loss of a micro-batch has its share of the rows of the whole batch as weight: the Trainer must not divide it.
    # Used by transformers 5.19 and later; earlier versions use `model_accepts_loss_kwargs`.
    loss_is_scaled_for_ga = True

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
        router_aux_loss_coef: float | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise UserError("PrefDistillTrainer needs the student's tokenizer: pass processing_class=tokenizer")
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs are visible to one process: start one for each with `accelerate launch`, or show "
                "it one with CUDA_VISIBLE_DEVICES=0"
            )
        check_engine(args)
        student: nn.Module = load_model(model, dtype="float32") if isinstance(model, str) else model
        disable_dropout(student)
        self.method = method
        signals = self._signals(signals, student, args, train_dataset, processing_class, truncation)
        train_rows, collate, resolved, self.reading = prepare_rows(
            train_dataset, method, signals, processing_class, truncation
        )
        eval_rows: Dataset | None = None
        collate_eval: SignalCollator | None = None
        if eval_dataset:
            eval_signals = self._signals(eval_signals, student, args, eval_dataset, processing_class, truncation)
            eval_rows, collate_eval, _, _ = prepare_rows(
                eval_dataset, method, eval_signals, processing_class, truncation
            )
        for rows in (train_rows, eval_rows):
            if rows is not None:
                columns = ["prompt_ids", *(f"{name}_ids" for name in method.responses)]
                check_positions(longest_text(rows.select_columns(columns)), student)
        check_start(student, [*signals, *eval_signals], bf16=bool(args.bf16))
        self._balance = balance_coefficient(student, router_aux_loss_coef)
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # the Trainer does so only after the adapter has its weights
            student = get_peft_model(student, peft_config)
        args.remove_unused_columns = False  # the columns are not arguments of the model
        super().__init__(
            model=student,
            args=args,
            data_collator=collate,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        layout = layout_for(self.model, resolved.max_length)
        self.data_collator = collate.with_layout(layout)
        self._collate_eval = collate_eval and collate_eval.with_layout(layout)
        self._emittable = emittable_ids(processing_class, vocabulary_rows(student))
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._steps_since_log = 0
        self._start_checked = False
        for warning in filter(None, (method.weakness, *self.reading.warnings)):
            say_once(f"warning: {type(method).__name__}: {warning}")

    def _signals(
        self,
        signals: Sequence[Signals],
        student: nn.Module,
        args: TrainingArguments,
        dataset: "Dataset",
        tokenizer: "PreTrainedTokenizerBase",
        truncation: Truncation | None,
    ) -> list[Signals]:
        """Return the signals of a data set, those of loaded models computed."""
        roles = {store._role if isinstance(store, LiveTeacher) else store.role for store in signals}
        if self.method.scores_reference and "reference" not in roles:
            whole = ", which each process holds whole for that" if args.world_size > 1 else ""
            say(f"training: no reference signals are given; they are computed from the student's start{whole}")
            start: Any = student.to(args.device)
            signals = [*signals, LiveTeacher(start, "reference", bf16=bool(args.bf16))]
        return bind_live(signals, dataset, tokenizer, truncation, self.method.needs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        rows, inputs = counted_rows(inputs), dict(inputs)
        row_features = inputs.pop("features")
        features = feature_tensors(row_features, self.args.device)
        # accelerate's autocast is on the model's forward, which `reduce_logits` bypasses
        with self.accelerator.autocast():
            student = read_student(
                model, inputs, self.method, features, emittable=self._emittable, balance=self._balance != 0
            )
        loss, metrics = self.method.loss(student, features)
        if num_items_in_batch is not None and not self._start_checked:
            self._check_start(loss, student, features)
        if student.balance is not None:
            loss = loss + self._balance * student.balance
            metrics = {**metrics, "aux_loss": student.balance.detach()}
        check_loss(loss, self.state.global_step + 1, f"rows {row_features['row']} of the data")
        if num_items_in_batch is not None:
            weight = rows / num_items_in_batch * self.accelerator.num_processes  # every engine takes the mean
            loss = loss * weight
            for name, value in metrics.items():
                self._sums[name].append(value * weight)
        return (loss, metrics) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step, without repeated rows, and the rows of the whole batch."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches[-1:] = [self._without_repeats(batch, self.train_dataset, self.data_collator) for batch in batches[-1:]]
        self._steps_since_log += 1
        total = torch.tensor(float(sum(map(counted_rows, batches))), device=self.args.device)
        return batches, self.accelerator.reduce(total, reduction="sum").item()

    def _without_repeats(self, batch: dict[str, Any], dataset: Any, collate: Any) -> dict[str, Any]:
        """Return a batch without the rows that fill up the last batches of several processes.

        Where all its rows are repeated it stays, so that every process takes part in the step, and counts for nothing.
        """
        team, rows = self.accelerator, list(batch["features"]["row"])
        if team.num_processes == 1 or self.args.dataloader_drop_last or not team.gradient_state.end_of_dataloader:
            return batch
        last = len(dataset) % (len(rows) * team.num_processes)  # rows of the last batches of all processes together
        counted = min(len(rows), max(0, last - team.process_index * len(rows))) if last else len(rows)
        if 0 < counted < len(rows):
            index = {row: n for n, row in enumerate(dataset["row"][:])}
            batch = collate([dataset[index[row]] for row in rows[:counted]])
        return {**batch, "features": {**batch["features"], "counted": counted}}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the data loader of the held-out rows or of the training rows, with their signals."""
        collate = self.data_collator
        if eval_dataset is None or eval_dataset is self.eval_dataset:
            self.data_collator = self._collate_eval or collate
        elif eval_dataset is not self.train_dataset:
            raise UserError(
                "these rows have no signals: pass them to PrefDistillTrainer as eval_dataset, with eval_signals"
            )
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collate

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        loader: Any = self.callback_handler.eval_dataloader
        inputs = self._without_repeats(inputs, loader.dataset, loader.collate_fn)
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, values in self._sums.items():
                mean = torch.stack(values).float().sum() / max(1, self._steps_since_log)
                logs[name] = self.accelerator.reduce(mean, reduction="mean").item()
            self._sums.clear()
            self._steps_since_log = 0
        super().log(logs, start_time)

    def _check_start(self, loss: Tensor, student: Student, features: dict[str, Tensor]) -> None:
        """Warn if, before the first step, the loss has no gradient, or the student differs from its reference."""
        self._start_checked = True
        if self.state.global_step > 0:
            return
        if (share := gradient_share(loss, student)) < LEAST:
            say(
                f"warning: the gradient of the loss at the start is {share:.1g} of that of SFT on the same responses: "
                "next to nothing is learnt. Check the method's options, weights and margins, and that the signals are "
                "of another model than the student"
            )
        if "ref_chosen" not in features:
            return
        gap = (student.logps["chosen"].detach() - features["ref_chosen"]).abs().sum() / student.tokens["chosen"].sum()
        if gap > REFERENCE_GAP:
            say(
                f"warning: before training, the student and its reference signals differ by {gap:.3f} nats per token; "
                "they should be the same model (in the same precision)"
            )


def counted_rows(batch: dict[str, Any]) -> int:
    """Return the rows of a batch of this process that count in the means of its step."""
    features = batch["features"]
    return int(features.get("counted", len(features["row"])))


def disable_dropout(model: nn.Module) -> None:
    """Turn dropout off for good: the reference that the student is compared with was computed without."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # some families hold the rate as a plain number
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
