"""The student's trainer: a transformers.Trainer whose loss is a method's, or TRL's for the methods that TRL has."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from prefdistill.core.artifact import CHECKPOINTS
from prefdistill.core.errors import UserError
from prefdistill.core.files import differences
from prefdistill.core.processes import processes
from prefdistill.core.progress import say
from prefdistill.data.batches import Layout, PairCollator, layout_for
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import Truncation, encode_pairs
from prefdistill.methods import Method, Student, TRLMethod
from prefdistill.models.identity import computing_config, fits_in, weights_digest
from prefdistill.models.load import load_model
from prefdistill.models.logprobs import (
    emittable_ids,
    reduce_logits,
    sum_by_response,
    token_and_topk_logps,
    token_logps,
    vocabulary_rows,
)
from prefdistill.signals.store import Need, Signals, SignalSet, TopK
from prefdistill.training.nan_guard import check_loss, watched

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefdistill.training.options import Training

# Nats per token between the student and its reference before the first step that rounding does not explain.
REFERENCE_GAP = 0.05


class PrefDistillTrainer(Trainer):
    """Trains a student on preference pairs with any method of `METHODS`. Only the student is in memory.

    Args:
        model: the student, or the Hub name or directory to load it from (in float32: the small steps of preference
            training are lost in 16-bit weights; `bf16=True` in `args` makes the products 16-bit, not the weights).
        method: e.g. `METHODS["tvkd"](alpha=0.7, beta=0.1)`.
        args: any `transformers.TrainingArguments`.
        train_dataset: preference pairs in TRL's format, with the sampled responses that the method reads, if any.
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
        if isinstance(method, TRLMethod):
            raise UserError(f"{type(method).__name__} is trained by TRL: use prefdistill.training.student.make_trainer")
        if processing_class is None:
            raise UserError("PrefDistillTrainer needs the student's tokenizer: pass processing_class=tokenizer")
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs are visible to one process: start one for each with `accelerate launch`, or show "
                "it one with CUDA_VISIBLE_DEVICES=0"
            )
        student: nn.Module = load_model(model, dtype="float32") if isinstance(model, str) else model
        disable_dropout(student)
        self.method = method
        train_rows, collate, truncated = _prepare(train_dataset, method, signals, processing_class, truncation)
        eval_rows: Dataset | None = None
        collate_eval: _Collator | None = None
        if eval_dataset:
            eval_rows, collate_eval, _ = _prepare(eval_dataset, method, eval_signals, processing_class, truncation)
        _check_starting_point(student, [*signals, *eval_signals], bf16=bool(args.bf16))
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # the Trainer does so only when the adapter has its weights
            student = get_peft_model(student, peft_config)
        args.remove_unused_columns = False  # our columns are not the model's arguments
        super().__init__(
            model=student,
            args=args,
            data_collator=collate,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        layout = layout_for(self.model, truncated.max_length)
        self.data_collator = collate.laid_out(layout)
        self._collate_eval = collate_eval and collate_eval.laid_out(layout)
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
        read = inputs.pop("features")
        features = _tensors(read, self.args.device)
        # accelerate's autocast sits on the model's forward, which `reduce_logits` goes around
        with self.accelerator.autocast():
            student = read_student(model, inputs, self.method, features, emittable=self._emittable)
        loss, metrics = self.method.loss(student, features)
        check_loss(loss, self.state.global_step + 1, f"rows {read['row']} of the data")
        if model.training:
            self._check_reference(student, features)
            for name, value in metrics.items():
                self._sums[name].append(value)
        return (loss, metrics) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """With the signals of the rows that are asked for: the held-out ones, or the training rows."""
        collate = self.data_collator
        if eval_dataset is None or eval_dataset is self.eval_dataset:
            self.data_collator = self._collate_eval or collate
        elif eval_dataset is not self.train_dataset:
            raise UserError("these rows have no signals: pass them as eval_dataset, with eval_signals, when it is made")
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collate

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


def read_student(
    model: nn.Module,
    batch: dict[str, Tensor],
    method: Method,
    signals: dict[str, Tensor],
    *,
    emittable: Tensor | None = None,
    tile: int | None = None,
) -> Student:
    """What a method asks of the student about a batch, in one forward pass and without full logits.

    Args:
        model: the student, possibly wrapped.
        batch: of a `PairCollator` with the method's responses, on the model's device.
        method: says which responses it reads, and whether it needs the student's likeliest tokens.
        signals: the batch's features; `RESPONSE_ids` [states, k] are the ids to read a response at.
        emittable, tile: see `logprobs.reduce_logits`.
    """
    ids, lengths = batch["input_ids"], batch["lengths"]
    responses = method.responses
    rows = len(lengths) // len(responses)
    sizes = [sum(batch["sizes"][start : start + rows]) for start in range(0, len(lengths), rows)]
    asked = [signals.get(f"{response}_ids") for response in responses]
    given = []
    if any(part is not None for part in asked):
        width = max(part.shape[1] for part in asked if part is not None)
        parts = [ids.new_full((n, 0), -1) if part is None else part for part, n in zip(asked, sizes, strict=True)]
        given = [torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in parts])]

    def reduce(logits: Tensor, tokens: Tensor, *at: Tensor) -> tuple[Tensor, ...]:
        found = [*token_and_topk_logps(logits, tokens, *at)] if at else [*token_logps(logits, tokens)]
        if method.reads_likeliest:
            best = logits.argmax(-1)
            found += [best, *token_logps(logits, best)]
        return tuple(found)

    found = iter(reduce_logits(model, batch, reduce, batch["tokens"], *given, emittable=emittable, tile=tile))

    def by_response(per_state: Tensor) -> dict[str, Tensor]:
        return dict(zip(responses, per_state.split(sizes), strict=True))

    logps = sum_by_response(next(found), lengths).chunk(len(responses))
    topk: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    likeliest: dict[str, tuple[Tensor, Tensor]] = {}
    if given:
        at_ids, others = by_response(next(found)), by_response(next(found))
        for response, part in zip(responses, asked, strict=True):
            if part is not None:
                topk[response], rest[response] = at_ids[response][:, : part.shape[1]], others[response]
    if method.reads_likeliest:
        best, best_logps = by_response(next(found)), by_response(next(found))
        likeliest = {response: (best[response], best_logps[response]) for response in responses}
    tokens = dict(zip(responses, lengths.chunk(len(responses)), strict=True))
    return Student(dict(zip(responses, logps, strict=True)), tokens, topk, rest, likeliest)


@dataclass(frozen=True)
class _Collator:
    """Rows of the training set as a batch, with the token distributions of their states from the signal stores."""

    pairs: PairCollator
    signals: SignalSet
    topk: tuple[tuple[str, str], ...]  # (role, response)

    def laid_out(self, layout: Layout) -> "_Collator":
        return replace(self, pairs=replace(self.pairs, layout=layout))

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.pairs(rows)
        signals = self.signals.at(np.array(batch["features"]["row"]))
        batch["features"]["topk"] = {key: signals.topk(*key) for key in self.topk}
        return batch


def _tensors(features: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The signals of a batch, in float32 on the device. They come as lists and arrays, which nothing has cast."""
    found = {
        name.removeprefix("feature_"): torch.tensor(values, dtype=torch.float32, device=device)
        for name, values in features.items()
        if name.startswith("feature_")
    }
    topk: dict[tuple[str, str], TopK] = features["topk"]
    for (role, response), states in topk.items():
        found[f"{response}_ids"] = torch.as_tensor(states.ids, device=device)
        found[f"{role}_{response}_topk"] = torch.tensor(states.logps, device=device)
        found[f"{role}_{response}_rest"] = torch.tensor(states.rest, device=device)
    return found


def _prepare(
    dataset: "Dataset",
    method: Method,
    signals: Sequence[Signals],
    tokenizer: "PreTrainedTokenizerBase",
    truncation: Truncation | None,
) -> "tuple[Dataset, _Collator, Truncation]":
    """Encoded rows with the method's features as columns `feature_*`, what makes batches of them, and their limits."""
    available = SignalSet.of(signals, dataset)
    if missing := available.missing(method.needs):
        raise UserError(f"{type(method).__name__} lacks {'; '.join(map(str, missing))}. {_how_to_make(missing[0])}")
    for store in signals:
        store.check_tokenizer(tokenizer)
        made_with = Truncation(**store.manifest["truncation"])
        if truncation is not None and truncation != made_with:
            raise UserError(f"the {store.role} signals were made with {made_with}, training asks for {truncation}")
        truncation = made_with
    truncation = truncation or Truncation()
    encoded, dropped = encode_pairs(dataset, tokenizer, truncation, responses=method.responses)
    if dropped:
        say(f"training: {dropped}")
    rows = np.asarray(encoded["row"][:])
    shared = np.isin(rows, available.rows)
    if not shared.any():
        raise UserError("no row of the data has all the signals that the method needs")
    if not shared.all():
        say(f"training: {(~shared).sum()} more rows have no signals, because another response of theirs was dropped")
        encoded, rows = encoded.select(np.flatnonzero(shared)), rows[shared]
    available = available.at(rows)
    features = method.features(available)
    encoded = encoded.select_columns(["row", "prompt_ids", *(f"{name}_ids" for name in method.responses)])
    for name, values in features.items():
        encoded = encoded.add_column(f"feature_{name}", values.astype(np.float32))
    collate = PairCollator(
        tokenizer.pad_token_id,
        responses=method.responses,
        features=("row", *(name for name in encoded.column_names if name.startswith("feature_"))),
    )
    topk = tuple((need.role, r) for need in method.needs if need.kind == "topk" for r in need.responses)
    return encoded, _Collator(collate, available, topk), truncation


def _check_starting_point(student: Any, signals: Sequence[Signals], *, bf16: bool) -> None:
    """The reference of a student is what it starts from. A wrapped adapter hides its base: its numbers alone tell."""
    references = [store.manifest["model"] for store in signals if store.role == "reference"]
    if not references or not processes().is_main_process or hasattr(student, "peft_config"):
        return
    if any(made["bf16"] != bf16 for made in references):
        say(
            f"note: the student is trained with bf16={bf16} and its reference signals were read with bf16={not bf16}: "
            "rounding alone sets their log-probabilities apart; `prefdistill signals --bf16` reads as bf16=true trains"
        )
    dtypes = {made["dtype"] for made in references}
    weights = {dtype: weights_digest(student, dtype) for dtype in dtypes}
    lossy = {dtype for dtype in dtypes if not fits_in(student, dtype)}
    config = computing_config(student)
    for made in references:
        if changed := differences(made["config"], config):
            say(f"warning: the reference signals were made from another configuration ({'; '.join(changed)})")
        if weights[made["dtype"]] == made["weights_sha256"] and made["dtype"] not in lossy:
            continue
        dtype = str(student.dtype).removeprefix("torch.")
        name = student.name_or_path or "the student"
        raise UserError(
            f"the reference signals were made from another model ({made['name'] or 'one in memory'}, in "
            f"{made['dtype']}) than the student starts from ({name}, in {dtype}): their weights differ; make them "
            f"again with `prefdistill signals --role reference --dtype {dtype}` and the student"
        )


def _how_to_make(need: Need) -> str:
    if need.role == "data":
        return f"The data has no column {need.kind!r}; give every pair its score there"
    whose = {"teacher": "TEACHER", "teacher_reference": "TEACHER_SFT_MODEL", "reference": "STUDENT"}[need.role]
    options = "" if need.responses == SIDES else f" --responses {','.join(need.responses)}"
    if need.kind == "topk" and need.role != "teacher":
        options += " --ids-from DIR_OF_THE_TEACHERS"
    if need.kind == "logprob_values":
        options += " --value-temperature B"
    return (
        f"Make it with `prefdistill signals --role {need.role} --kind {need.kind}{options} --model {whose} --data DATA "
        "--out DIR`"
    )


def arguments_kind(method: Method) -> type[TrainingArguments]:
    """The training arguments that the method's trainer takes."""
    return method.classes()[0] if isinstance(method, TRLMethod) else TrainingArguments


def make_trainer(
    method: Method,
    load: Callable[[], "PreTrainedModel"],
    pairs: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    training: "Training",
    out: Path,
    *,
    signals: Sequence[Signals] = (),
    truncation: Truncation | None = None,
    seed: int = 0,
    data_seed: int | None = None,
) -> Trainer:
    """The trainer of any method, with its checkpoints under `out`: ours, or TRL's for a method that TRL has.

    Args:
        method: of `METHODS`.
        load: loads the student's start; TRL's trainers may hold it twice.
        pairs, tokenizer, signals, truncation: as for `PrefDistillTrainer`.
        training: steps, sizes, adapters.
        out: directory of the model to come.
        seed, data_seed: of everything random, and of the order of the rows (default: `seed`).

    Raises:
        UserError: as `PrefDistillTrainer` does.
    """
    data_seed = seed if data_seed is None else data_seed
    if not isinstance(method, TRLMethod):
        with making_trainer():
            return PrefDistillTrainer(
                model=load(),
                method=method,
                args=training.to_arguments(out / CHECKPOINTS, seed=seed, data_seed=data_seed),
                train_dataset=pairs,
                signals=signals,
                processing_class=tokenizer,
                peft_config=training.peft_config(),
                truncation=truncation,
            )
    if training.arguments.get("precompute_ref_log_probs"):
        raise UserError("precompute_ref_log_probs is not supported here: TRL reads its reference as it goes")
    if signals:
        raise UserError(f"{type(method).__name__} is trained by TRL on the pairs alone; leave the signals out")
    encoded, dropped = encode_pairs(pairs, tokenizer, truncation or Truncation())
    if dropped:
        say(f"training: {dropped}")
    config, kind = method.classes()
    args = training.to_arguments(
        out / CHECKPOINTS,
        seed=seed,
        data_seed=data_seed,
        kind=config,
        max_length=sys.maxsize,  # the rows come cut
        **method.arguments(),
    )
    with making_trainer():
        trainer = watched(kind)(
            **method.models(load, adapter=training.lora is not None),
            args=args,
            train_dataset=pairs.select(encoded["row"][:1]).select_columns(["prompt", *SIDES]),
            processing_class=tokenizer,
            peft_config=training.peft_config(),
        )
    # What TRL makes of a row goes on behind the end token, with what the template writes there or an EOS of its own.
    trainer.train_dataset = method.rows(encoded)
    return trainer


@contextmanager
def making_trainer() -> Iterator[None]:
    """What a trainer refuses when it is made, such as an adapter for unknown layers, is the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the trainer cannot be made: {' '.join(str(error).split())}") from error


def disable_dropout(model: nn.Module) -> None:
    """Dropout off for good: the student is compared with a reference that was read without."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # some families keep the rate as a number of their own
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
