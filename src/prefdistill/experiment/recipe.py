"""Recipes: the options of a run, checked before anything starts and before torch is imported."""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from prefdistill.core.errors import UserError
from prefdistill.core.options import (
    NOT_IN_KEY,
    Options,
    Override,
    Section,
    Seeded,
    applied,
    as_mapping,
    leaves,
    merged,
    problems,
)
from prefdistill.core.progress import say_once
from prefdistill.core.yaml import as_yaml, read_yaml
from prefdistill.data.options import Data
from prefdistill.evaluation.options import Evaluation, RewardModelOptions
from prefdistill.experiment.launch.options import Launch
from prefdistill.experiment.roles import START, TEACHER, Control, Headline, check_roles, refuse_flag
from prefdistill.methods import METHODS, make_method
from prefdistill.models.options import Models
from prefdistill.sampling.options import Sampling
from prefdistill.signals.options import RecipeSignals
from prefdistill.training.options import DPOTraining, Training

# Settings that depend on the size of the models.
FITTED = (
    "data.max_length",
    "data.max_prompt_length",
    "training.",
    "teacher.",
    "student.",
    "signals.",
    "sampling.",
    "evaluate.max_new_tokens",
    "evaluate.batch_size",
)
DIRECTORY_NAME = re.compile(r"\w[\w.+-]*")


class Teacher(Section):
    """How the teacher is trained; null skips a stage, which a named teacher has been through."""

    sft: Training | None = Field(None, description="Supervised fine-tuning.")
    dpo: DPOTraining | None = Field(None, description="DPO, after sft.")


class StudentStart(Section):
    """How the student's start is trained."""

    sft: Training | None = Field(None, description="Supervised fine-tuning.")


class MethodRun(Section):
    """A method under the name it has in the results. Any other key is an option of the method."""

    method: str = Field(description="A method in any case, or the dotted name of one; default: the run's own name.")
    options: Options = Field(
        default_factory=dict, description="Options of the method; they may also be given as keys of the run."
    )
    label: str = Field("", description="Name in tables and plots.")
    display_name: str = Field(
        "", description="Name in sentences; default: the method's own if the run is named after it, else the name."
    )
    control: Annotated[Control | None, BeforeValidator(refuse_flag)] = Field(
        None, description="Makes this run a control, never part of the verdict."
    )
    on_request: bool = Field(False, description="Run only if --methods names it, or says all.")
    start: str | None = Field(
        None, description="The method, above this one, whose student it starts from; default: the student's start."
    )
    rounds: PositiveInt = Field(
        1, description="Rounds of sampling, signals and training; each starts from the student of the one before."
    )
    first_order: NonNegativeInt = Field(
        0, description="Index of its first order of the pairs; a repeat in other orders sets 100."
    )
    training: Training = Field(description="Its training, over the defaults of the recipe.")


class Recipe(Section):
    """What a run is made of."""

    name: Annotated[str, NOT_IN_KEY] = Field(description="Names the run directory.")
    task: Annotated[str, NOT_IN_KEY] = Field("", description="What the data is about, for the report.")
    seed: int = Seeded.redefault("seed", 0)
    seeds: Annotated[PositiveInt, NOT_IN_KEY] = Field(
        1, description="Runs of the whole pipeline, from models to evaluation, with seed, seed + 1, ..."
    )
    orders: PositiveInt = Field(
        1, description="Trainings of each method per seed, on the same pairs in different orders."
    )
    threads: int | None = Field(
        None, gt=0, le=1024, description="CPU threads; the smallest models are fastest with one."
    )
    baseline: str = Field("dpo", description="The method that others are compared with.")
    headline: Headline = Field(Headline(), description="The method and the metric that the verdict is about.")
    data: Data = Field(description="Pairs to train and test on.")
    model: Models = Field(Models(), description="Teacher and student.")
    teacher: Teacher = Field(Teacher(), description="How the teacher is trained.")
    student: StudentStart = Field(StudentStart(), description="How the student's start is trained.")
    signals: RecipeSignals = Field(RecipeSignals(), description="How signals are extracted.")
    sampling: Sampling = Field(Sampling(), description="How responses are sampled to learn from.")
    training: Options = Field(
        default_factory=dict, description="Defaults of every training: the options of `teacher.sft`."
    )
    reward_model: RewardModelOptions | None = Field(None, description="Scores the responses to held-out prompts.")
    methods: dict[str, MethodRun] = Field(description="The methods by name.")
    evaluate: Evaluation = Field(Evaluation(), description="What is measured besides pair accuracies.")
    launch: Annotated[Launch, NOT_IN_KEY] = Field(
        Launch(), description="Kinds of stages that run on several processes, and what starts these."
    )
    fast: Annotated[dict[str, Any], NOT_IN_KEY] = Field(
        default_factory=dict, description="Overrides of a quick run (--fast), by dotted key."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """Merge the training defaults into every training; collect each method's own options."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        defaults = as_mapping(raw.get("training"), "training")
        for part, stages in (("teacher", ("sft", "dpo")), ("student", ("sft",))):
            section = dict(as_mapping(raw.get(part), part))
            for stage in stages:
                if section.get(stage) is not None:
                    section[stage] = merged(defaults, as_mapping(section[stage], f"{part}.{stage}"))
            raw[part] = section
        if raw.get("reward_model") is not None:
            section = dict(as_mapping(raw["reward_model"], "reward_model"))
            own = as_mapping(section.get("training"), "reward_model.training")
            section["training"] = merged({**defaults, "lora": None}, own)
            raw["reward_model"] = section
        runs = as_mapping(raw.get("methods"), "methods").items()
        raw["methods"] = {name: _method_run(name, section, defaults) for name, section in runs}
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.seed + self.seeds > 2**32:
            raise ValueError(f"seed + seeds - 1 must be less than 2**32, got {self.seed} + {self.seeds} - 1")
        if not self.methods:
            raise ValueError("methods is empty; name at least one, e.g. `methods: {dpo: {}, tvkd: {}}`")
        for name in (self.name, *self.methods):
            if not DIRECTORY_NAME.fullmatch(name):
                raise ValueError(f"{name!r} names a directory: use letters, digits and . _ + - only")
        for name in (TEACHER, START):
            if name in self.methods:
                raise ValueError(f"methods.{name}: that name is taken in the results; call it something else")
        seen: list[str] = []
        for name, run in self.methods.items():
            if run.start is not None and run.start not in seen:
                raise ValueError(f"methods.{name}.start: {run.start!r} must be a method defined before it")
            if run.start is not None and self.methods[run.start].first_order != run.first_order:
                raise ValueError(f"methods.{name}.first_order differs from that of {run.start}, which it starts from")
            seen.append(name)
        controls = {name: run.control for name, run in self.methods.items()}
        check_roles(self.baseline, controls, self.headline.method)
        if (self.data.train is None) == (self.data.synthetic is None):
            raise ValueError("data needs either `train` (pairs) or `synthetic`; give data.train=FILE_OR_HUB_NAME")
        if self.data.synthetic:
            used = {"synthetic", "max_length", "max_prompt_length"}
            for key in self.data.model_dump(exclude_defaults=True, exclude=used):
                raise ValueError(f"data.{key} has no part in a synthetic task; leave it out")
            if self.reward_model or self.evaluate.prompts:
                raise ValueError(
                    "a synthetic task knows its reward and its prompts; leave reward_model and evaluate.prompts out"
                )
            if self.data.synthetic.teacher_tokenizer == "other" and (
                self.model.teacher or self.model.teacher_tokenizer
            ):
                raise ValueError(
                    "data.synthetic.teacher_tokenizer is for a teacher from scratch, without model.teacher_tokenizer: "
                    "leave one of them out"
                )
        elif self.reward_model and not self.evaluate.prompts:
            raise ValueError("reward_model has nothing to judge: give evaluate.prompts, or set reward_model=null")
        if self.model.teacher_reference and (self.teacher.dpo or self.model.teacher is None):
            raise ValueError(
                "model.teacher_reference needs a named teacher that is DPO-trained already; with teacher.dpo, the "
                "reference is the model that its DPO starts from: remove one of the two"
            )
        if (self.model.teacher is None or self.model.student is None) and self.model.scratch is None:
            raise ValueError("model.teacher and model.student must be named, or model.scratch say how to make them")
        return self

    def trainings(self) -> Iterator[tuple[str, str, Training]]:
        """Yield the key of every training, the model that is trained (teacher or student), and the training."""
        for role, stage in (("teacher", "sft"), ("teacher", "dpo"), ("student", "sft")):
            if (training := getattr(getattr(self, role), stage)) is not None:
                yield f"{role}.{stage}", role, training
        yield from ((f"methods.{name}.training", "student", run.training) for name, run in self.methods.items())

    def as_yaml(self) -> str:
        return as_yaml(self.model_dump())

    def save(self, path: Path) -> None:
        from prefdistill.core.files import write_text

        write_text(path, self.as_yaml())


def _method_run(name: str, section: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """The section of a method: its name, its own options gathered, its training over the defaults."""
    section = dict(as_mapping(section, f"methods.{name}"))
    run = {key: section.pop(key) for key in list(section) if key in MethodRun.model_fields}
    run.setdefault("method", name)
    if isinstance(run["method"], str):
        run["method"] = METHODS.canonical(run["method"])
    run["options"] = {**as_mapping(run.get("options"), f"methods.{name}.options"), **section}
    run["training"] = merged(defaults, as_mapping(run.get("training"), f"methods.{name}.training"))
    return run


def load_recipe(
    path: str | Path,
    overrides: Sequence["str | Override"] = (),
    *,
    fast: bool = False,
    only: list[str] | None = None,
) -> Recipe:
    """Read a recipe, apply its `fast` profile if requested, then the overrides, and check the result.

    Args:
        path: a YAML file.
        overrides: "key=value" each, e.g. "methods.tvkd.alpha=1.0", or `Override`s; they win over the file.
        fast: the recipe's quick profile.
        only: keep these of its methods (and its baseline, and those they start from or are controls of); ["all"]
            keeps all, also those that run on request only.

    Raises:
        UserError: on a missing file or broken YAML; naming every unknown key, wrong type and unknown method.
    """
    path = Path(path)
    layers = _layers(path)
    raw = functools.reduce(merged, layers.values())
    try:
        profile = as_mapping(raw.get("fast"), "fast") if fast else {}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    refuse_trust([raw, applied(profile)], str(path))
    scratch = _scratch_settings(layers, profile)
    changes = [Override(key, value) for key, value in profile.items()]
    changes += [Override.parse(change) if isinstance(change, str) else change for change in overrides]
    for change in changes:
        change.apply(raw)
    recipe, messages = _validated(raw)
    if recipe is not None:
        _note_scratch_settings(*scratch, raw, {change.key for change in changes[len(profile) :]})
        recipe = _keep(recipe, only, str(path))
        messages += _method_problems({name: (run.method, run.options) for name, run in recipe.methods.items()})
    if messages:
        raise UserError(*messages, where=str(path))
    assert recipe is not None
    return recipe


def _validated(raw: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe, or everything that is wrong with it."""
    messages: list[str] = []
    if isinstance(raw.get("training"), dict):  # alone first, because it is part of every training
        try:
            Training.model_validate(raw["training"])
        except ValidationError as error:
            messages = [f"training: {message}" for message in problems(Training, error)]
            raw = {**raw, "training": {}}
    try:
        recipe = Recipe.model_validate(raw)
        return (None, messages) if messages else (recipe, [])
    except ValidationError as error:
        messages += problems(Recipe, error)
    methods = {}
    for name, section in raw["methods"].items() if isinstance(raw.get("methods"), dict) else ():
        try:
            run = _method_run(name, section, {})
        except ValueError:  # among the messages already
            continue
        if isinstance(run["method"], str) and run.get("on_request") is not True:
            methods[name] = (run["method"], run["options"])
    return None, messages + _method_problems(methods)


def _method_problems(methods: dict[str, tuple[str, dict[str, Any]]]) -> list[str]:
    """What is wrong with the options of methods, given as name and options by the name of the run."""
    messages = []
    for name, (method, options) in methods.items():
        try:
            make_method(method, options)
        except UserError as error:
            messages += [" ".join(f"methods.{name}: {message}".split()) for message in error.messages]
    return messages


def refuse_trust(files: Iterable[dict[str, Any]], where: str) -> None:
    """Refuse files that ask to run code from models' repositories: a file may come from anyone.

    Raises:
        UserError: if one does; only the command line may.
    """
    for raw in files:
        if isinstance(raw.get("model"), dict) and raw["model"].get("trust_remote_code"):
            raise UserError(
                f"{where} asks to run code from the models' repositories: if you trust them, leave it out there and "
                "add model.trust_remote_code=true to the command"
            )


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, merged over the one it `extends`, a file named relative to it."""
    return functools.reduce(merged, _layers(path).values())


def _layers(path: Path, above: tuple[Path, ...] = ()) -> dict[Path, dict[str, Any]]:
    """The mappings in a recipe file and in those that it extends, by file, the one that extends no other first."""
    raw = read_yaml(path, "recipe", "the shipped ones are under recipes/", "data, model, methods")
    base = raw.pop("extends", None)
    if base is None:
        return {path: raw}
    if not isinstance(base, str):
        raise UserError(f"{path}: extends must name another recipe file, got {base!r}")
    files, below = (*above, path), path.parent / base
    if below.resolve() in {file.resolve() for file in files}:
        circle = " -> ".join(map(str, (*files, below)))
        raise UserError(f"{path}: extends goes in a circle ({circle}); take it out of one of these")
    return {**_layers(below, files), path: raw}


def _scratch_settings(layers: dict[Path, dict[str, Any]], profile: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The file that describes models from scratch, with its settings by dotted key; empty if there is none."""
    for path, layer in reversed(layers.items()):
        if isinstance(layer.get("model"), dict) and "scratch" in layer["model"]:
            return str(path), leaves(merged(layer, applied(profile)))
    return "", {}


def _note_scratch_settings(file: str, settings: dict[str, Any], recipe: dict[str, Any], changed: set[str]) -> None:
    """Say which of the settings for models from scratch apply to a recipe whose models are both named.

    Args:
        file, settings: as `_scratch_settings` returns them.
        recipe: with all overrides.
        changed: keys of the overrides.
    """
    models = as_mapping(recipe.get("model"), "model")
    if not (settings and models.get("scratch") and models.get("teacher") and models.get("student")):
        return
    from_scratch = [
        f"{key}={value}"
        for key, value in leaves(recipe).items()
        if key.startswith(FITTED) and key not in changed and settings.get(key) == value
    ]
    if as_mapping(recipe.get("reward_model"), "reward_model").get("model") and not recipe["reward_model"].get("name"):
        from_scratch.append("a reward model of random weights")
    if from_scratch:
        say_once(
            f"note: teacher and student are named, and these settings of {file} for models from scratch apply to them: "
            f"{', '.join(from_scratch)}; recipes/named-models.yaml has settings for named models"
        )


def _keep(recipe: Recipe, only: list[str] | None, where: str) -> Recipe:
    """Return the recipe with the methods in `only`, its baseline, and those they start from or are controls of."""
    if only == ["all"]:
        return recipe
    by_case = {name.lower(): name for name in recipe.methods}
    names = [name if name in recipe.methods else by_case.get(name.lower(), name) for name in only or ()]
    if only is None:
        names = [name for name, run in recipe.methods.items() if not run.on_request]
    if unknown := [name for name in names if name not in recipe.methods]:
        missing = ", ".join(repr(name) for name in unknown)
        raise UserError(f"{where} has no method {missing}; it has {', '.join(recipe.methods)} (or all)")
    selected = {*names, recipe.baseline}
    selected |= {control.of for name in selected if (control := recipe.methods[name].control)}
    for name in reversed(recipe.methods):  # a method starts from one defined before it
        start = recipe.methods[name].start
        if name in selected and start is not None:
            selected.add(start)
    headline = recipe.headline
    if headline.method not in selected:
        headline = headline.model_copy(update={"method": None})
    methods = {name: run for name, run in recipe.methods.items() if name in selected}
    return recipe.model_copy(update={"methods": methods, "headline": headline})
