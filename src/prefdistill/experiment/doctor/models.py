"""The tokenizers and the shapes of the models of a run, as far as they can be loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefdistill.core.differences import differences
from prefdistill.core.errors import UserError
from prefdistill.data import synthetic
from prefdistill.data.messages import pair_texts
from prefdistill.experiment.doctor import template
from prefdistill.experiment.doctor.findings import Finding, recipe_errors
from prefdistill.experiment.user_data import named_teacher_tokenizer
from prefdistill.models.classifiers import empty_classifier
from prefdistill.models.form import apply_form
from prefdistill.models.identity import tokenizer_identity
from prefdistill.models.load import check_model, check_reward_model, empty_model, load_tokenizer, tokenizer_file
from prefdistill.models.options import Form
from prefdistill.models.pruned import pruned
from prefdistill.models.scratch import random_model, train_tokenizer
from prefdistill.models.vocabulary import token_conflicts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefdistill.evaluation.options import RewardModelOptions
    from prefdistill.experiment.doctor.pairs import PairSet
    from prefdistill.experiment.recipe import Recipe
    from prefdistill.models.options import Models


@dataclass
class LoadedModels:
    """Tokenizers and empty models by role, with what was found while they were loaded.

    Args:
        names: of the models.
        tokenizers: the models' own.
        tokenizer_files: tokenizer.json, where there is one.
        shapes: the models without weights.
        whole: the model that a student of fewer layers is made from.
        tokenizer: encodes the pairs: the student's, or the teacher's.
        teacher_tokenizer: encodes them for the teacher; None where that is the same.
    """

    names: Models
    findings: list[Finding] = field(default_factory=list)
    tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    tokenizer_files: dict[str, Path] = field(default_factory=dict)
    shapes: dict[str, PreTrainedModel] = field(default_factory=dict)
    whole: PreTrainedModel | None = None
    reward_model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def of(cls, names: Models, recipe: Recipe | None, train: PairSet | None, *, conversational: bool) -> LoadedModels:
        """Load what can be loaded.

        Args:
            names: of the models.
            recipe: that they are of, if any.
            train: the pairs that a tokenizer may be trained on.
            conversational: whether a chat template is needed.
        """
        models = cls(names)
        for role, name in (("student", names.name_of("student")), ("teacher", names.teacher)):
            if name is not None:
                models._load(role, name)
        if names.student_layers is not None and "student" in models.shapes:
            models.whole = models.shapes["student"]
            with recipe_errors(models.findings, "model.student: "):
                models.shapes["student"] = pruned(models.whole, names.student_layers)
        models.tokenizer = models.tokenizers.get("student") or models.tokenizers.get("teacher")
        if models.tokenizer is None and recipe and names.scratch:
            if recipe.data.synthetic:
                models.tokenizer = synthetic.build_tokenizer()
            elif train and train.pairs:
                texts = pair_texts(pair.columns for pair in train.pairs)
                models.tokenizer = train_tokenizer(texts, names.scratch.vocab_size)
        if conversational:
            models._borrow_template()
        models._read_teacher_tokenizer(recipe)
        if names.scratch:
            models._add_models_from_scratch(names.scratch.student, names.scratch.teacher)
        if names.teacher_reference:
            models._check_weights("teacher reference", names.teacher_reference)
        if recipe and recipe.reward_model:
            models._add_reward_model(recipe.reward_model)
        return models

    def _add_models_from_scratch(self, student: dict[str, Any], teacher: dict[str, Any]) -> None:
        of_teacher = self.teacher_tokenizer or self.tokenizer
        for role, shape, tokenizer in (("student", student, self.tokenizer), ("teacher", teacher, of_teacher)):
            if tokenizer is not None and self.names.name_of(role) is None:
                self.tokenizers[role] = tokenizer
                if model := self._from_scratch(f"model.scratch.{role}", tokenizer, shape):
                    self.shapes[role] = model

    def _add_reward_model(self, options: RewardModelOptions) -> None:
        trust = self.names.trust_remote_code
        if options.name is not None or options.start:
            try:
                if options.start:
                    self.reward_model = empty_classifier(options.start, trust_remote_code=trust)
                else:
                    check_reward_model(str(options.name), trust_remote_code=trust)
                    self.reward_model = empty_model(str(options.name), reward=True, trust_remote_code=trust)
            except UserError as error:
                self._report("shape", "reward model", error)
        elif self.tokenizer is not None:
            self.reward_model = self._from_scratch("reward_model.model", self.tokenizer, options.shape, reward=True)

    def _from_scratch(
        self, where: str, tokenizer: PreTrainedTokenizerBase, shape: dict[str, Any], reward: bool = False
    ) -> PreTrainedModel | None:
        with recipe_errors(self.findings, f"{where}: "), torch.device("meta"):
            return random_model(tokenizer, shape, seed=0, reward=reward)
        return None

    def _borrow_template(self) -> None:
        """Use the chat template of a teacher with the same tokens if the student has none, as a recipe does."""
        if self.tokenizer is None or self.tokenizer.chat_template:
            return
        teacher = self.tokenizers.get("teacher")
        if teacher is None or token_conflicts(self.tokenizer, teacher):
            teacher = None
        self.findings += template.missing(teacher)
        self.tokenizer.chat_template = teacher.chat_template if teacher else None

    def _read_teacher_tokenizer(self, recipe: Recipe | None) -> None:
        """Set the teacher's tokenizer, in its form, as a run does."""
        names, task = self.names, recipe.data.synthetic if recipe else None
        if task and task.teacher_tokenizer == "other":
            self.teacher_tokenizer = synthetic.build_other_tokenizer()
        elif self.tokenizer and (names.teacher_tokenizer or names.teacher_form or len(self.tokenizers) == 2):
            try:
                tokenizer = named_teacher_tokenizer(names, self.tokenizer)
            except UserError as error:
                fix = "Name another tokenizer or form for the teacher, or leave it out (model.teacher_...)."
                self.findings.append(Finding("model.tokenizer", "error", f"teacher: {error}", fix))
                self.tokenizers.pop("teacher", None)  # how it will read is not known, so nothing is compared
                return
            if recipe is None and names.student is None:
                self.tokenizer = tokenizer
            elif differences(tokenizer_identity(tokenizer), tokenizer_identity(self.tokenizer)):
                self.teacher_tokenizer = tokenizer

    def _load(self, role: str, name: str) -> None:
        trust = self.names.trust_remote_code
        try:
            self.shapes[role] = empty_model(name, trust_remote_code=trust)
            self._check_weights(role, name)
        except UserError as error:
            self._report("shape", role, error)
            if not Path(name).exists():  # the Hub has no tokenizer of this name either
                return
        try:
            form = Form(chat_template=self.names.chat_template)
            self.tokenizers[role] = apply_form(load_tokenizer(name, trust_remote_code=trust), form)
            if (file := tokenizer_file(name)) is not None:
                self.tokenizer_files[role] = file
        except UserError as error:
            self._report("tokenizer", role, error)

    def _check_weights(self, role: str, name: str) -> None:
        try:
            check_model(name, trust_remote_code=self.names.trust_remote_code, fetch=False)
        except UserError as error:
            self._report("weights", role, error)

    def _report(self, what: str, role: str, error: UserError) -> None:
        fix = f"Give the {role} by its directory or its Hub name."
        if what == "weights":
            fix = f"Download or save the {role} again, or give another."
        self.findings.append(Finding(f"model.{what}", "error", f"{role}: {error}", fix))
