"""Run all checks, as far as data and models can be read, and collect the findings and facts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data import synthetic
from prefdistill.data.messages import pair_texts
from prefdistill.data.options import Columns
from prefdistill.data.prompts import prompt_of
from prefdistill.data.truncation import Truncation
from prefdistill.experiment.check import check_plan, check_trainings
from prefdistill.experiment.cost import WHOLE, Shapes
from prefdistill.experiment.doctor import machine, template, vocabulary
from prefdistill.experiment.doctor.data import DATA_CHECKS, leak
from prefdistill.experiment.doctor.findings import SEVERITIES, Finding
from prefdistill.experiment.doctor.pairs import COLUMNS, PairSet, check_demonstrations, loader_refusal, read_pairs
from prefdistill.experiment.doctor.tokens import TOKEN_CHECKS, Encoding, quantiles, token_facts, tokenise
from prefdistill.experiment.doctor.unread import UNREAD_CHECKS
from prefdistill.experiment.needs import columns_of
from prefdistill.experiment.plan import build_plan
from prefdistill.models.classifiers import empty_classifier
from prefdistill.models.form import apply_form
from prefdistill.models.load import check_model, check_reward_model, empty_model, load_tokenizer, tokenizer_file
from prefdistill.models.options import Form
from prefdistill.models.pruned import pruned
from prefdistill.models.scratch import random_model, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefdistill.evaluation.options import RewardModelOptions
    from prefdistill.experiment.recipe import Recipe

PROMPTS_RENDERED = 20  # to see whether a template prints the date


@dataclass
class Checkup:
    """Findings, most severe first, and the numbers behind them."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"findings": [finding.to_json() for finding in self.findings], "ok": self.ok, "facts": self.facts}


def examine(
    data: str | None = None,
    test: str | None = None,
    teacher: str | None = None,
    student: str | None = None,
    truncation: Truncation | None = None,
    recipe: Recipe | None = None,
    *,
    out: str | Path = ".",
    trust_remote_code: bool = False,
    columns: Columns | None = None,
) -> Checkup:
    """Check data, tokenizers, shapes of models, and the machine. No weights are loaded, nothing is written.

    Args:
        data, test: preference pairs to train and to test on, as for `load_pairs`.
        teacher, student: Hub names or directories; pairs are encoded with the student's tokenizer, or the teacher's.
        truncation: as for `encode_pairs`.
        recipe: replaces all of these; its plan is checked too.
        out: where the run will write; its disk space is checked.
        trust_remote_code: let a model's repository run its own code.
        columns: how the columns of the data are read.

    Raises:
        UserError: if there is nothing to check.

    Example:
        >>> examine("pairs.jsonl", student="my/student").ok                         # doctest: +SKIP
        True
    """
    limits: dict[str, int | None] = {"train": None, "test": None}
    if recipe is not None:
        data, test = recipe.data.train, recipe.data.test
        teacher, student = recipe.model.teacher, recipe.model.name_of("student")
        truncation = Truncation(recipe.data.max_length, recipe.data.max_prompt_length)
        limits = {"train": recipe.data.max_train, "test": recipe.data.max_test}
        trust_remote_code = recipe.model.trust_remote_code
    if not (data or test or teacher or student or recipe):
        raise UserError("there is nothing to check: give --data, --teacher, --student or --recipe")
    truncation = truncation or Truncation()
    read_as = recipe.data.read_as if recipe else (columns or Columns()).part(Columns)
    checkup = Checkup()
    sets = {}
    reads = set[str]()
    with suppress(UserError):  # of a method's options, which the plan reports
        reads = columns_of(recipe) if recipe else reads
    for name, source in (("train", data), ("test", test)):
        if source is not None:
            sets[name], findings = read_pairs(source, name, limits[name], read_as, reads)
            checkup.findings += findings
    if recipe is not None and recipe.data.sft:
        checkup.findings += check_demonstrations(recipe.data.sft, recipe.data.sft_read_as)
    models = _Models(checkup, trust_remote_code, Form(chat_template=recipe.model.chat_template if recipe else None))
    models.read(recipe, teacher, student, sets.get("train"))
    if not sets or any(data.conversational for data in sets.values()):
        checkup.findings += models.borrow_template()
    _check_data(checkup, sets, models.tokenizer, truncation)
    _check_models(checkup, sets, models)
    unwritable = [*machine.place(Path(out))]
    checkup.findings += unwritable
    with _recipe_errors(checkup):
        plan = None
        if recipe is not None:
            plan = build_plan(recipe, Path(out), recipe.seed)
            check_trainings(plan)  # the costs depend on them
            checkup.findings += [
                Finding("recipe.method", "warning", f"methods.{name}: {problem}", "Change its options.")
                for name, method in plan.methods.items()
                for problem in (method.weakness, method.disproportion() if recipe.model.teacher else "")
                if problem
            ]
            for where, role, training in recipe.trainings():
                if role in models.shapes:
                    checkup.findings += vocabulary.adapted_head(where, training, models.shapes[role])
        _check_machine(checkup, recipe, models, None if unwritable else Path(out))
        if plan is not None and checkup.ok:
            check_plan(plan)
    checkup.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return checkup


@contextmanager
def _recipe_errors(checkup: Checkup, where: str = "") -> Iterator[None]:
    """Turn an error that a run would raise about the recipe into a finding, and continue."""
    try:
        yield
    except UserError as error:
        checkup.findings.append(Finding("recipe.check", "error", f"{where}{error}", "Change the recipe."))


@dataclass
class _Models:
    """Tokenizers and empty models by role, as far as they can be loaded."""

    checkup: Checkup
    trust_remote_code: bool
    form: Form
    tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    tokenizer_files: dict[str, Path] = field(default_factory=dict)  # tokenizer.json, where there is one
    shapes: dict[str, PreTrainedModel] = field(default_factory=dict)
    whole: PreTrainedModel | None = None  # that a student of fewer layers is made from
    reward_model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None  # encodes the pairs: the student's, or the teacher's

    def read(self, recipe: Recipe | None, teacher: str | None, student: str | None, train: PairSet | None) -> None:
        for role, name in (("student", student), ("teacher", teacher)):
            if name is not None:
                self._load(role, name)
        layers = recipe.model.student_layers if recipe else None
        if layers is not None and "student" in self.shapes:
            self.whole = self.shapes["student"]
            with _recipe_errors(self.checkup, "model.student: "):
                self.shapes["student"] = pruned(self.whole, layers)
        scratch = recipe.model.scratch if recipe else None
        if recipe and scratch and len(self.tokenizers) < 2:
            own = next(iter(self.tokenizers.values()), None)
            if own is None and recipe.data.synthetic:
                own = synthetic.build_tokenizer()
            elif own is None and train and train.pairs:
                own = train_tokenizer(pair_texts(pair.columns for pair in train.pairs), scratch.vocab_size)
            for role, name in (("student", student), ("teacher", teacher)):
                if own is not None and name is None:
                    self.tokenizers[role] = own
                    if model := self._from_scratch(f"model.scratch.{role}", own, getattr(scratch, role)):
                        self.shapes[role] = model
        self.tokenizer = self.tokenizers.get("student") or self.tokenizers.get("teacher")
        if recipe and recipe.model.teacher_reference:
            self._check_weights("teacher reference", recipe.model.teacher_reference)
        if recipe and recipe.reward_model:
            self._add_reward_model(recipe.reward_model)

    def _add_reward_model(self, options: RewardModelOptions) -> None:
        if options.name is not None:
            try:
                check_reward_model(options.name, trust_remote_code=self.trust_remote_code)
                self.reward_model = empty_model(options.name, reward=True, trust_remote_code=self.trust_remote_code)
            except UserError as error:
                self._report("shape", "reward model", error)
        elif options.start:
            try:
                self.reward_model = empty_classifier(options.start, trust_remote_code=self.trust_remote_code)
            except UserError as error:
                self._report("shape", "reward model", error)
        elif self.tokenizer is not None:
            self.reward_model = self._from_scratch("reward_model.model", self.tokenizer, options.shape, reward=True)

    def _from_scratch(
        self, where: str, tokenizer: PreTrainedTokenizerBase, shape: dict[str, Any], reward: bool = False
    ) -> PreTrainedModel | None:
        with _recipe_errors(self.checkup, f"{where}: "), torch.device("meta"):
            return random_model(tokenizer, shape, seed=0, reward=reward)
        return None

    def borrow_template(self) -> list[Finding]:
        """Use the teacher's chat template if the student has none, as a recipe does, and report it."""
        if self.tokenizer is None or self.tokenizer.chat_template:
            return []
        teacher = self.tokenizers.get("teacher")
        findings = [*template.missing(teacher)]
        self.tokenizer.chat_template = teacher.chat_template if teacher else None
        return findings

    def _load(self, role: str, name: str) -> None:
        trust = self.trust_remote_code
        try:
            self.shapes[role] = empty_model(name, trust_remote_code=trust)
            self._check_weights(role, name)
        except UserError as error:
            self._report("shape", role, error)
            if not Path(name).exists():  # the Hub has no tokenizer of this name either
                return
        try:
            self.tokenizers[role] = apply_form(load_tokenizer(name, trust_remote_code=trust), self.form)
            if (file := tokenizer_file(name)) is not None:
                self.tokenizer_files[role] = file
        except UserError as error:
            self._report("tokenizer", role, error)

    def _check_weights(self, role: str, name: str) -> None:
        try:
            check_model(name, trust_remote_code=self.trust_remote_code, fetch=False)
        except UserError as error:
            self._report("weights", role, error)

    def _report(self, what: str, role: str, error: UserError) -> None:
        fix = f"Give the {role} by its directory or its Hub name."
        if what == "weights":
            fix = f"Download or save the {role} again, or give another."
        self.checkup.findings.append(Finding(f"model.{what}", "error", f"{role}: {error}", fix))


def _check_data(
    checkup: Checkup, sets: dict[str, PairSet], tokenizer: PreTrainedTokenizerBase | None, truncation: Truncation
) -> None:
    for name, data in sets.items():
        if not data.pairs:
            continue
        encoding = _encode(checkup, data, tokenizer, truncation)
        for check in DATA_CHECKS:
            checkup.findings += check(data)
        if not any(finding.data == name and finding.severity == "error" for finding in checkup.findings):
            checkup.findings += loader_refusal(data)
        checkup.facts[name] = {
            "source": data.source,
            "rows": data.rows,
            "pairs": len(data.pairs),
            "prompts": len({pair.key("prompt") for pair in data.pairs}),
            "characters": {column: quantiles([len(pair.texts[column]) for pair in data.pairs]) for column in COLUMNS},
        }
        if encoding is not None:
            for check_tokens in (*TOKEN_CHECKS, *UNREAD_CHECKS):
                checkup.findings += check_tokens(data, encoding)
            checkup.facts[name] |= token_facts(data, encoding)
    if len(sets) == 2:
        checkup.findings += leak(sets["train"], sets["test"])


def _encode(
    checkup: Checkup, data: PairSet, tokenizer: PreTrainedTokenizerBase | None, truncation: Truncation
) -> Encoding | None:
    """Encode every pair, if there is a tokenizer that can."""
    if tokenizer is None or (data.conversational and (not tokenizer.chat_template or template.refuses(tokenizer))):
        return None  # reported by the template checks
    with Progress(f"tokenising {data.name}", len(data.pairs), "pair") as progress:
        unusable = list(tokenise(data, tokenizer, progress))
    checkup.findings += unusable
    return None if unusable else Encoding.of(tokenizer, truncation)


def _check_models(checkup: Checkup, sets: dict[str, PairSet], models: _Models) -> None:
    tokenizers = models.tokenizers
    tokenizer, pairs = models.tokenizer, [pair for data in sets.values() for pair in data.pairs]
    if tokenizer is not None and (not pairs or isinstance(pairs[0].columns["prompt"], list)):
        system = any(message["role"] == "system" for pair in pairs for message in pair.messages)
        checkup.findings += template.generation_prompt(tokenizer)
        checkup.findings += template.end_token(tokenizer)
        checkup.findings += template.system_message(tokenizer, system)
        checkup.findings += template.clock(tokenizer, [prompt_of(pair.columns) for pair in pairs[:PROMPTS_RENDERED]])
    if len(tokenizers) == 2 and tokenizers["student"] is not tokenizers["teacher"]:
        checkup.findings += vocabulary.same_ids(tokenizers["student"], tokenizers["teacher"])
        checkup.findings += vocabulary.special_tokens(tokenizers["student"], tokenizers["teacher"])
        for data in sets.values():
            checkup.findings += vocabulary.same_tokenization(
                tokenizers["student"], tokenizers["teacher"], data.pairs, data.name
            )
    if tokenizer is not None:
        checkup.findings += template.padding(tokenizer)
    longest = max((checkup.facts.get(name, {}).get("kept", {}).get("longest", 0) for name in sets), default=0)
    for role, model in models.shapes.items():
        if role in tokenizers:
            texts = [pair.texts[column] for pair in pairs[: vocabulary.SAMPLE] for column in COLUMNS]
            file = models.tokenizer_files.get(role)
            checkup.findings += vocabulary.same_as_file(role, tokenizers[role], file, texts)
            checkup.findings += vocabulary.embedding_rows(role, model, tokenizers[role])
        checkup.findings += vocabulary.positions(role, model, longest)
        checkup.facts.setdefault("models", {})[role] = {"parameters": model.num_parameters()}


def _check_machine(checkup: Checkup, recipe: Recipe | None, models: _Models, out: Path | None) -> None:
    """Compare memory and disk with what the run needs; `out` is None if it is not writable."""
    if not models.shapes:
        return
    lengths = {
        name: machine.Lengths(kept["pairs"], kept["response_tokens"])
        for name in ("train", "test")
        if (kept := checkup.facts.get(name, {}).get("kept"))
    }
    others = {"reward_model": models.reward_model, WHOLE: models.whole}
    shapes: Shapes = {**models.shapes, **{role: model for role, model in others.items() if model is not None}}
    needs = machine.needs_of(recipe, shapes, lengths.get("train"), lengths.get("test"))
    device, free, total = machine.available_memory()
    checkup.facts |= {"memory": needs.memory, "disk": needs.disk}
    checkup.facts["machine"] = {"device": device, "memory_free": free, "memory_total": total}
    checkup.findings += machine.memory(needs, device, free, total)
    if out is not None:
        space = checkup.facts["machine"]["disk_free"] = machine.free_disk(out)
        checkup.findings += machine.disk(needs, out, space)
