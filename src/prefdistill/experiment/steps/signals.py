"""Steps that make what methods learn from: sampled responses, and signals of teacher and reference."""

import functools
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import sidecar
from prefdistill.core.files import read_json, temporary_path
from prefdistill.core.progress import say
from prefdistill.data.columns import SCORES, SIDES, TEMPLATE_COLUMNS, ended_column
from prefdistill.data.encode import encode_pairs
from prefdistill.data.encoder import Encoder, prompt_tokens
from prefdistill.data.load import load_pairs
from prefdistill.data.prompts import prompts_of
from prefdistill.data.truncation import Dropped, Truncation
from prefdistill.experiment.step import Model, Rows, Step, Tokenizer
from prefdistill.models.device import default_dtype
from prefdistill.models.options import Placement
from prefdistill.sampling.files import OtherPrompts, check_prompts, sample_responses
from prefdistill.signals import Signals, extract_signals
from prefdistill.signals.ids import OtherIds, check_ids, reading_of_store
from prefdistill.signals.kinds import make_kinds
from prefdistill.signals.options import RecipeSignals, SignalOptions
from prefdistill.signals.repair import remove_damaged
from prefdistill.signals.store import DamagedSignals

if TYPE_CHECKING:
    from datasets import Dataset

RUN_ON = RecipeSignals.model_fields.keys() - SignalOptions.model_fields.keys()  # options of where signals are extracted
SAMPLING_SEED = 7_001  # of a student's first round; later rounds use multiples of it
_REFUSED: dict[tuple[str, str, Truncation], dict[int, str]] = {}  # what `refused_prompts` has returned


def refused_prompts(data: Rows, tokenizer: Tokenizer, truncation: Truncation) -> dict[int, str]:
    """Return the rows whose prompt gets no response with a tokenizer, with the reason; computed once in a process."""
    key = (data.key, tokenizer.key, truncation)
    if key not in _REFUSED:
        encoder = Encoder(tokenizer.tokenizer)
        reasons = (prompt_tokens(encoder, prompt, truncation)[1] for prompt in prompts_of(data.rows))
        _REFUSED[key] = {row: reason for row, reason in enumerate(reasons) if reason}
    return _REFUSED[key]


@dataclass(eq=False, kw_only=True)
class Sample(Step):
    """Sample responses of a model to the training prompts.

    Where teacher and student have tokenizers or chat templates of their own, both respond to the prompts that both
    accept: a method may compare their responses.
    """

    kind: ClassVar[str] = "sample"
    data: Rows
    model: Model
    column: str  # of the responses

    @property
    def _other(self) -> Tokenizer:
        """The tokenizer of the teacher if this samples the student, and the other way round."""
        context = self.context
        return context.teacher_tokenizer if self.reads_with is context.tokenizer else context.tokenizer

    @functools.cached_property
    def left_out(self) -> dict[int, str]:
        """The rows whose prompt the other model does not accept, with the reason."""
        if not self.context.two_tokenizers:
            return {}
        other = "student" if self._other is self.context.tokenizer else "teacher"
        refused = refused_prompts(self.data, self._other, self.context.truncation)
        return {row: f"{reason}, as the {other} reads it" for row, reason in refused.items()}

    @property
    def _seed(self) -> int:
        return self.context.seed + SAMPLING_SEED * (self.round or 0)

    @property
    def options(self) -> dict[str, Any]:
        options = {
            "truncation": str(self.context.truncation),
            "sampling": self.context.recipe.sampling.drawing,
            "sampling_seed": self._seed,
            **self.context.load_options(self.model.role, self.model),
        }
        if self.context.two_tokenizers and (self.data.made_by or self._other.made_by):
            options["prompts_accepted_by"] = self._other.key  # which they are is known when both are made
        elif self.left_out:
            options["prompts_refused"] = list(self.left_out)
        return options

    @property
    def sampling_options(self) -> dict[str, Any]:
        """The options of `sample_responses`."""
        sampling = self.context.recipe.sampling
        # vLLM places a model itself
        placement = {} if sampling.engine == "vllm" else self.context.placement(self.model.role)
        return {
            "column": self.column,
            "seed": self._seed,
            "trust_remote_code": self.context.recipe.model.trust_remote_code,
            **self.context.load_options(self.model.role, self.model),
            **placement,
            **sampling.model_dump(),
        }

    def make(self, out: Path) -> None:
        train = self.data.rows
        if self.left_out:
            dropped = Dropped({}, {}).with_rows(self.left_out)
            say(f"{self.name}: {dropped}")
            train = train.select([row for row in range(len(train)) if row not in self.left_out])
            if not len(train):
                raise UserError(f"No prompt is left: {dropped}. Change the data, the chat templates or the lengths.")
        columns = ("prompt", *TEMPLATE_COLUMNS, *SIDES, *SCORES, *(ended_column(side) for side in SIDES))
        sample_responses(
            self.model.place,
            train.select_columns([name for name in columns if name in train.column_names]),
            self.reads_with.tokenizer,
            out / "responses.jsonl",
            truncation=self.context.truncation,
            **self.sampling_options,
        )

    def refresh(self) -> None:
        try:
            check_prompts(self.directory / "responses.jsonl", self.rows, self.column, self.reads_with.tokenizer)
        except OtherPrompts as error:
            self._sample_again(error)

    def repair(self) -> None:
        file = self.directory / "responses.jsonl"
        if file.is_file() and sidecar(file).is_file():
            return
        file.unlink(missing_ok=True)
        try:
            self.work(self.directory)  # an earlier sampling again was interrupted
        except OtherPrompts as error:
            self._sample_again(error)

    def _sample_again(self, error: OtherPrompts) -> None:
        say(f"{self.name}: {str(error).rpartition(';')[0]}; sampling again")
        for path in self.directory.glob("responses.jsonl*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        vars(self).pop("rows", None)
        self.work(self.directory)

    def read(self) -> dict[str, Any]:
        about = read_json(sidecar(self.directory / "responses.jsonl"))
        prompts, dropped = about["prompts"], {**about["dropped"], **Counter(self.left_out.values())}
        counts = {"rows": prompts + sum(dropped.values()), "kept": prompts, "dropped": dropped}
        return {"data": self.data.name, "responses": [], **counts}

    @functools.cached_property
    def rows(self) -> "Dataset":
        return load_pairs(str(self.directory / "responses.jsonl"), responses=(self.column,))


@dataclass(eq=False, kw_only=True)
class ReadSignals(Step):
    """Score the responses of a data set with a model and store the signals."""

    kind: ClassVar[str] = "signals"
    draws: ClassVar[bool] = False
    data: Rows | Sample
    model: Model
    kinds: tuple[str, ...]
    responses: tuple[str, ...]
    ids_from: "ReadSignals | None"  # the store whose token ids a "topk" signal is read at
    bf16: bool = False  # autocast
    held_out: bool = False  # the test pairs

    @property
    def options(self) -> dict[str, Any]:
        return {
            "kinds": list(self.kinds),
            "responses": list(self.responses),
            "truncation": str(self.context.truncation),
            **self.reading,
        }

    @functools.cached_property
    def reading(self) -> dict[str, Any]:
        """The options of `extract_signals` that have an effect on these kinds."""
        section = self.context.recipe.signals
        kinds = set(self.kinds)
        # the terms of the held-out pairs are compared with each other, which takes the values of all states
        endpoints = section.positions == "endpoints" and kinds == {"values"} and not self.held_out
        unused = set() if endpoints else {"positions"}
        rounds_values = any("value_dtype" in kind.uses for kind in make_kinds(kinds))
        unused |= {"value_dtype"} if endpoints or not rounds_values else set()
        unused |= set() if "topk" in kinds and self.ids_from is None else {"k", "p", "topk_coding"}
        unused |= Placement.model_fields.keys() | RUN_ON
        options: dict[str, Any] = section.model_dump(exclude=unused)
        if self.role == "reference":  # read as the student is trained: same weights, same precision
            loading = self.context.load_options("student")
        else:
            loading = {"dtype": section.dtype or default_dtype(str(self.role))}
        return {**options, **loading, "bf16": self.bf16}

    def make(self, out: Path) -> None:
        extract_signals(
            self.model.place,
            self.data.rows,
            self.reads_with.tokenizer,
            kinds=self.kinds,
            out=out / "store",
            role=str(self.role),
            responses=self.responses,
            truncation=self.context.truncation,
            ids_from=self.ids_from.store if self.ids_from else None,
            trust_remote_code=self.context.recipe.model.trust_remote_code,
            **self.context.placement("student" if self.role == "reference" else self.model.role),
            **self.context.recipe.signals.model_dump(include=RUN_ON),
            **self.reading,
        )

    @functools.cached_property
    def store(self) -> Signals:
        store = Signals.open(self.directory / "store")
        store.tokenizer = self.reads_with.tokenizer  # which the store names by its place then
        return store

    def read(self) -> dict[str, Any]:
        name = self.data.column if isinstance(self.data, Sample) else self.data.name
        return {"data": name, "responses": list(self.responses), **reading_of_store(self.store)}

    def repair(self) -> None:
        store = self.directory / "store"
        try:
            if not (store / "manifest.json").is_file():
                self.work(self.directory)  # an earlier repair was interrupted
            try:
                _ = self.store
            except DamagedSignals as error:
                say(f"{self.name}: {str(error).split(';')[0]}; rebuilding it")
                remove_damaged(store)
                self.work(self.directory)
        except OtherIds as error:  # of the shards that are left
            self._extract_again(error)

    def refresh(self) -> None:
        tokenizer = self.reads_with.tokenizer
        encoded, _ = encode_pairs(self.data.rows, tokenizer, self.context.truncation, responses=self.responses)
        try:
            check_ids(self.store, encoded, tokenizer)
        except OtherIds as error:
            self._extract_again(error)

    def _extract_again(self, error: OtherIds) -> None:
        say(f"{self.name}: {str(error).rpartition(';')[0]}; extracting them again")
        store = self.directory / "store"
        old = store.rename(temporary_path(store))  # whole or not at all: shards that are left would be resumed
        shutil.rmtree(old)
        vars(self).pop("store", None)
        self.work(self.directory)
