"""Steps that make teacher and student: random weights, SFT and DPO."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prefdistill.core.files import value_digest
from prefdistill.core.progress import say
from prefdistill.data.columns import SIDES
from prefdistill.data.messages import pair_texts
from prefdistill.experiment.step import Model, ModelRole, Rows, Step, Tokenizer, Trained
from prefdistill.experiment.steps.synthetic import Language
from prefdistill.models.load import load_tokenizer
from prefdistill.models.options import Scratch
from prefdistill.models.pruned import save_pruned
from prefdistill.models.scratch import random_model, train_tokenizer
from prefdistill.training.options import Training
from prefdistill.training.trl import train_with_trl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(eq=False, kw_only=True)
class Init(Step):
    """Make the models that the recipe does not name from random weights, and a tokenizer where none is named."""

    kind: ClassVar[str] = "init"
    roles: tuple[ModelRole, ...]  # of the models to make
    shapes: Scratch
    source: Tokenizer | Language | Rows  # of the tokenizer: that of a named model, or data

    @property
    def options(self) -> dict[str, Any]:
        return {"scratch": self.scratch, "roles": list(self.roles)}

    @property
    def scratch(self) -> dict[str, Any]:
        return self.shapes.model_dump()

    def build_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Return the tokens of a model that is named, or a tokenizer for the data."""
        if isinstance(self.source, Tokenizer):
            return self.source.tokenizer
        if isinstance(self.source, Language):
            return load_tokenizer(str(self.source.tokenizer_directory))
        return train_tokenizer(pair_texts(self.source.rows), self.scratch["vocab_size"])

    def make(self, out: Path) -> None:
        tokenizer = self.build_tokenizer()
        tokenizer.save_pretrained(out / "tokenizer")
        for role in self.roles:
            model = random_model(tokenizer, self.scratch[role], seed=self.context.seed)
            model.save_pretrained(out / role)
            tokenizer.save_pretrained(out / role)
            say(f"init: {role} of {model.num_parameters():,} parameters, {len(tokenizer)} tokens")

    def model(self, role: ModelRole) -> Model:
        """Return one of the models. Its key does not depend on the shape of the other."""
        shape = {key: value for key, value in self.scratch.items() if key == role or key not in ("teacher", "student")}
        return Model(
            name=f"{role}-base",
            compute_key=lambda: self._part_key({"role": role, "shape": shape}),
            made_by=self,
            role=role,
            place=str(self.directory / role),
        )

    def tokenizer_key(self) -> str:
        return self._part_key({"vocab_size": self.scratch["vocab_size"]})

    def _part_key(self, options: dict[str, Any]) -> str:
        return value_digest({**options, "seed": self.context.seed, "sources": [self.source.key]})


@dataclass(eq=False, kw_only=True)
class Prune(Step):
    """Make the student of some of the decoder layers of a named model."""

    kind: ClassVar[str] = "prune"
    draws: ClassVar[bool] = False
    whole: Model
    layers: int | list[int]
    tokenizer: Tokenizer

    @property
    def options(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def make(self, out: Path) -> None:
        trust = self.context.recipe.model.trust_remote_code
        save_pruned(self.whole.place, self.layers, self.tokenizer.tokenizer, out, trust_remote_code=trust)

    @functools.cached_property
    def output(self) -> Model:
        return Model(
            name=self.name, compute_key=lambda: self.key, made_by=self, role="student", place=str(self.directory)
        )


@dataclass(eq=False, kw_only=True)
class Sft(Trained):
    """Supervised fine-tuning through TRL."""

    kind: ClassVar[str] = "sft"
    start: Model
    rows: Rows
    training: Training

    @property
    def options(self) -> dict[str, Any]:
        truncation = self.context.truncation
        return {
            "training": self.training.cache_key(),
            "truncation": [truncation.max_length, truncation.max_prompt_length],
            "dtype": self.context.recipe.model.dtype,
        }

    def read(self) -> dict[str, Any]:
        return self.noted(self.rows.name, SIDES if isinstance(self, Dpo) else ("completion",))

    def make(self, out: Path) -> None:
        names = self.context.recipe.model
        train_with_trl(
            self.start.place,
            self.rows.rows,
            self.reads_with.tokenizer,
            self.training,
            out,
            truncation=self.context.truncation,
            dtype=names.dtype,
            trust_remote_code=names.trust_remote_code,
            seed=self.context.seed,
            what=self.name,
        )


@dataclass(eq=False, kw_only=True)
class Dpo(Sft):
    """DPO through TRL, with the model it starts from as the reference."""

    kind: ClassVar[str] = "dpo"
