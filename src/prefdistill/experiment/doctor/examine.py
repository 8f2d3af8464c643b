"""Run all checks, as far as data and models can be read, and collect the findings and facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.options import validate
from prefdistill.core.progress import Progress
from prefdistill.data.options import Columns
from prefdistill.data.prompts import prompt_of
from prefdistill.data.truncation import Truncation
from prefdistill.experiment.check import check_plan, check_trainings, seen_by_the_start
from prefdistill.experiment.cost import WHOLE, Shapes
from prefdistill.experiment.doctor import across, machine, template, vocabulary
from prefdistill.experiment.doctor.data import DATA_CHECKS, leak
from prefdistill.experiment.doctor.findings import SEVERITIES, Finding, recipe_errors
from prefdistill.experiment.doctor.models import LoadedModels
from prefdistill.experiment.doctor.pairs import COLUMNS, PairSet, check_demonstrations, loader_refusal, read_pairs
from prefdistill.experiment.doctor.tokens import TOKEN_CHECKS, Encoding, quantiles, token_facts, tokenise
from prefdistill.experiment.doctor.unread import UNREAD_CHECKS
from prefdistill.experiment.needs import columns_of, learns_from_pairs
from prefdistill.experiment.plan import build_plan
from prefdistill.methods import make_method
from prefdistill.models.options import Form, Models
from prefdistill.signals.overlap import Overlap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefdistill.experiment.recipe import Recipe
    from prefdistill.methods import Method

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
    student: str | Mapping[str, Any] | None = None,
    truncation: Truncation | None = None,
    recipe: Recipe | None = None,
    *,
    out: str | Path = ".",
    trust_remote_code: bool = False,
    columns: Columns | None = None,
    teacher_tokenizer: str | None = None,
    teacher_form: Form | None = None,
) -> Checkup:
    """Check data, tokenizers, shapes of models, and the machine. No weights are loaded, nothing is written.

    Args:
        data, test: preference pairs to train and to test on, as for `load_pairs`.
        teacher, student: Hub names or directories; a student may be `{from: NAME, layers: 24}`. Pairs are encoded with
            the student's tokenizer, and for a teacher with other tokens with its own too; without a student with the
            teacher's.
        truncation: as for `encode_pairs`.
        recipe: replaces all of these; its plan is checked too.
        out: where the run will write; its disk space is checked.
        trust_remote_code: let a model's repository run its own code.
        columns: how the columns of the data are read.
        teacher_tokenizer, teacher_form: the tokenizer of the teacher, where that is another than its own, and its chat
            template, system prompt and template variables.

    Raises:
        UserError: if there is nothing to check.

    Example:
        >>> examine("pairs.jsonl", student="my/student").ok                         # doctest: +SKIP
        True
    """
    limits: dict[str, int | None] = {"train": None, "test": None}
    if recipe is not None:
        data, test, names = recipe.data.train, recipe.data.test, recipe.model
        teacher, student = names.teacher, names.name_of("student")
        truncation = Truncation(recipe.data.max_length, recipe.data.max_prompt_length)
        limits = {"train": recipe.data.max_train, "test": recipe.data.max_test}
    else:
        options = {"teacher": teacher, "student": student, "teacher_tokenizer": teacher_tokenizer}
        form = {f"teacher_{name}": value for name, value in teacher_form or Form()}
        names = validate(Models, {**options, **form, "trust_remote_code": trust_remote_code}, "doctor")
    if not (data or test or teacher or student or recipe):
        raise UserError("there is nothing to check: give --data, --teacher, --student or --recipe")
    truncation = truncation or Truncation()
    read_as = recipe.data.read_as if recipe else (columns or Columns()).part(Columns)
    checkup = Checkup()
    sets = {}
    reads, methods = set[str](), None
    with suppress(UserError):  # of a method's options, which the plan reports
        if recipe is not None:
            methods = {name: make_method(run.method, run.options) for name, run in recipe.methods.items()}
            reads = columns_of(methods.values())
    for name, source in (("train", data), ("test", test)):
        if source is not None:
            sets[name], findings = read_pairs(source, name, limits[name], read_as, reads)
            checkup.findings += findings
    if recipe is not None and recipe.data.sft:
        checkup.findings += check_demonstrations(recipe.data.sft, recipe.data.sft_read_as)
    conversational = not sets or any(data.conversational for data in sets.values())
    models = LoadedModels.of(names, recipe, sets.get("train"), conversational=conversational)
    checkup.findings += models.findings
    _check_data(checkup, sets, models.tokenizer, truncation)
    _check_models(checkup, sets, models)
    if models.teacher_tokenizer is not None:
        _check_teacher(checkup, sets, models, truncation, methods)
    unwritable = [*machine.place(Path(out))]
    checkup.findings += unwritable
    with recipe_errors(checkup.findings):
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
            if warning := seen_by_the_start(plan):
                checkup.findings.append(Finding("recipe.start", "warning", warning, "Set data.sft."))
    checkup.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return checkup


def _check_data(
    checkup: Checkup, sets: dict[str, PairSet], tokenizer: PreTrainedTokenizerBase | None, truncation: Truncation
) -> None:
    for name, data in sets.items():
        if not data.pairs:
            continue
        encoding, unusable = _encode(data, tokenizer, truncation)
        checkup.findings += unusable
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
    data: PairSet, tokenizer: PreTrainedTokenizerBase | None, truncation: Truncation
) -> tuple[Encoding | None, list[Finding]]:
    """Encode every pair, if there is a tokenizer that can; return how, and findings if it cannot."""
    if tokenizer is None or (data.conversational and (not tokenizer.chat_template or template.refuses(tokenizer))):
        return None, []  # reported by the template checks
    with Progress(f"tokenising {data.name}", len(data.pairs), "pair") as progress:
        unusable = list(tokenise(data, tokenizer, progress))
    return None if unusable else Encoding.of(tokenizer, truncation), unusable


def _check_models(checkup: Checkup, sets: dict[str, PairSet], models: LoadedModels) -> None:
    tokenizers = models.tokenizers
    tokenizer, pairs = models.tokenizer, [pair for data in sets.values() for pair in data.pairs]
    if tokenizer is not None:
        checkup.findings += _template_findings(tokenizer, sets)
        checkup.findings += template.padding(tokenizer)
    if len(tokenizers) == 2 and models.teacher_tokenizer is None and tokenizers["student"] is not tokenizers["teacher"]:
        checkup.findings += vocabulary.extra_tokens(tokenizers["student"], tokenizers["teacher"])
        checkup.findings += vocabulary.special_tokens(tokenizers["student"], tokenizers["teacher"])
        for data in sets.values():
            checkup.findings += vocabulary.same_tokenization(
                tokenizers["student"], tokenizers["teacher"], data.pairs, data.name
            )
    for role, model in models.shapes.items():
        if role in tokenizers:
            texts = [pair.texts[column] for pair in pairs[: vocabulary.SAMPLE] for column in COLUMNS]
            file = models.tokenizer_files.get(role)
            checkup.findings += vocabulary.same_as_file(role, tokenizers[role], file, texts)
            checkup.findings += vocabulary.embedding_rows(role, model, tokenizers[role])
        if role == "student" or models.teacher_tokenizer is None:
            longest = _longest(checkup.facts.get(name, {}) for name in sets)  # none of data without a row
            checkup.findings += vocabulary.positions(role, model, longest)
        checkup.facts.setdefault("models", {})[role] = {"parameters": model.num_parameters()}


def _template_findings(tokenizer: PreTrainedTokenizerBase, sets: dict[str, PairSet]) -> Iterator[Finding]:
    pairs = [pair for data in sets.values() for pair in data.pairs]
    if not pairs or isinstance(pairs[0].columns["prompt"], list):
        system = any(message["role"] == "system" for pair in pairs for message in pair.messages)
        yield from template.generation_prompt(tokenizer)
        yield from template.end_token(tokenizer)
        yield from template.system_message(tokenizer, system)
        yield from template.clock(tokenizer, [prompt_of(pair.columns) for pair in pairs[:PROMPTS_RENDERED]])


def _longest(facts: Iterable[dict[str, Any]]) -> int:
    """Return the number of tokens of the longest text after truncation."""
    return max((about.get("kept", {}).get("longest", 0) for about in facts), default=0)


def _check_teacher(
    checkup: Checkup,
    sets: dict[str, PairSet],
    models: LoadedModels,
    truncation: Truncation,
    methods: Mapping[str, Method] | None,
) -> None:
    """Check what a teacher reads with its own tokenizer or template, and how its tokens meet the student's."""
    student, teacher = models.tokenizer, models.teacher_tokenizer
    assert student is not None
    assert teacher is not None
    checkup.findings += across.other_tokens(student, teacher, methods)
    findings = [*_template_findings(teacher, sets)]
    if any(data.conversational for data in sets.values()) and not teacher.chat_template:
        findings += across.no_template()
    facts: dict[str, dict[str, Any]] = {}
    for name, data in sets.items():
        read = data.unread()
        encoding, unusable = _encode(read, teacher, truncation) if read.pairs else (None, [])
        findings += unusable
        if encoding is None:
            continue
        for check in (*TOKEN_CHECKS, *UNREAD_CHECKS):
            findings += check(read, encoding)
        facts[name] = checkup.facts[name]["teacher"] = token_facts(read, encoding)
        aligns = methods is None or any(map(learns_from_pairs, methods.values()))
        if aligns and "read" in checkup.facts[name]:
            with suppress(UserError):  # the loader refuses the data, or no row is left; reported already
                overlap = Overlap.of(data.dataset, student, teacher, truncation)
                facts[name]["aligned"] = across.facts(overlap)
                checkup.findings += across.unserved(data, overlap)
    if "teacher" in models.shapes:
        findings += vocabulary.positions("teacher", models.shapes["teacher"], _longest(facts.values()))
    checkup.findings += across.of_teacher(findings)


def _check_machine(checkup: Checkup, recipe: Recipe | None, models: LoadedModels, out: Path | None) -> None:
    """Compare memory and disk with what the run needs; `out` is None if it is not writable."""
    if not models.shapes:
        return
    lengths: dict[str, machine.Lengths] = {}
    teacher_lengths: dict[str, machine.Lengths] = {}
    for name in ("train", "test"):
        facts = checkup.facts.get(name, {})
        for of_reader, read in ((lengths, facts), (teacher_lengths, facts.get("teacher", facts))):
            if kept := read.get("kept"):
                of_reader[name] = machine.Lengths(kept["pairs"], kept["response_tokens"])
    optional = {"reward_model": models.reward_model, WHOLE: models.whole}
    shapes: Shapes = {**models.shapes, **{role: model for role, model in optional.items() if model is not None}}
    needs = machine.needs_of(recipe, shapes, lengths, teacher_lengths)
    device, free, total = machine.available_memory()
    checkup.facts |= {"memory": needs.memory, "disk": needs.disk}
    checkup.facts["machine"] = {"device": device, "memory_free": free, "memory_total": total}
    checkup.findings += machine.memory(needs, device, free, total)
    if out is not None:
        space = checkup.facts["machine"]["disk_free"] = machine.free_disk(out)
        checkup.findings += machine.disk(needs, out, space)
