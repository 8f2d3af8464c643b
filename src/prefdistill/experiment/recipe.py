"""Recipes: what a run is made of, checked before anything starts. Unknown keys and wrong types are errors."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from prefdistill.core.errors import UserError

if TYPE_CHECKING:
    pass

from prefdistill.core.options import Options, Override, Section, applied, as_mapping, merged, validate
from prefdistill.core.yaml import _Dumper, read_yaml
from prefdistill.data.options import Data
from prefdistill.evaluation.options import Evaluation, RewardModelOptions
from prefdistill.experiment.roles import START, TEACHER, Control, Headline, check_roles, refuse_flag
from prefdistill.models.options import Models
from prefdistill.sampling.options import Sampling
from prefdistill.signals.options import SignalOptions
from prefdistill.training.options import DPOTraining, Training

DIRECTORY_NAME = re.compile(r"\w[\w.+-]*")


class Teacher(Section):
    """What is done to the teacher before it is asked; null skips a stage (the model named has been through it)."""

    sft: Training | None = None
    dpo: DPOTraining | None = None


class StudentStart(Section):
    sft: Training | None = None


class MethodRun(Section):
    """A method with its hyper-parameters, under the name it has in the results."""

    method: str
    options: Options = Field(default_factory=dict)
    label: str = ""
    display_name: str = ""  # in sentences; default: the method's own where the run is named after it, else the name
    control: Annotated[Control | None, BeforeValidator(refuse_flag)] = None  # not a method: what it is a control of
    on_request: bool = False  # runs only where it is asked for, by name or as one of all
    start: str | None = None  # the method whose student this one starts from; default: the student's start
    rounds: PositiveInt = 1  # of sampling, signals and training; each starts from the student of the one before
    first_order: NonNegativeInt = 0
    training: Training


class Recipe(Section):
    name: str
    task: str = ""
    seed: int = Field(0, ge=0, lt=2**32)  # what numpy takes
    seeds: PositiveInt = 1  # the whole pipeline, from models to evaluation, with seed, seed + 1, ...
    orders: PositiveInt = 1  # trainings of each method per seed, on the same pairs in other orders
    threads: int | None = Field(default=None, gt=0, le=1024)  # of the CPU; the smallest models are fastest on one
    baseline: str = "dpo"
    headline: Headline = Headline()
    data: Data
    model: Models = Models()
    teacher: Teacher = Teacher()
    student: StudentStart = StudentStart()
    signals: SignalOptions = SignalOptions()
    sampling: Sampling = Sampling()
    training: Options = Field(default_factory=dict)  # defaults of every training below
    reward_model: RewardModelOptions | None = None
    methods: dict[str, MethodRun]
    evaluate: Evaluation = Evaluation()
    fast: dict[str, Any] = Field(default_factory=dict)  # overrides for a quick run, by dotted key

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """Training defaults into every training; a method's own options out of its flat section."""
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
            judge = dict(as_mapping(raw["reward_model"], "reward_model"))
            own = as_mapping(judge.get("training"), "reward_model.training")
            judge["training"] = merged({**defaults, "lora": None}, own)
            raw["reward_model"] = judge
        methods = {}
        for name, section in as_mapping(raw.get("methods"), "methods").items():
            section = dict(as_mapping(section, f"methods.{name}"))
            known = {key: section.pop(key) for key in list(section) if key in MethodRun.model_fields}
            known.setdefault("method", name)
            known["options"] = {**as_mapping(known.get("options"), f"methods.{name}.options"), **section}
            known["training"] = merged(defaults, as_mapping(known.get("training"), f"methods.{name}.training"))
            methods[name] = known
        raw["methods"] = methods
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
                raise ValueError(f"methods.{name}.start: {run.start!r} must be a method that stands above it")
            if run.start is not None and self.methods[run.start].first_order != run.first_order:
                raise ValueError(f"methods.{name}.first_order differs from that of {run.start}, which it starts from")
            seen.append(name)
        check_roles(self)
        if (self.data.train is None) == (self.data.synthetic is None):
            raise ValueError("data needs either `train` (pairs) or `synthetic`; give data.train=FILE_OR_HUB_NAME")
        if self.data.synthetic:
            for key in ("test", "sft", "max_train", "max_test"):
                if getattr(self.data, key) is not None:
                    raise ValueError(f"data.{key} has no part in a synthetic task; leave it out")
            if self.reward_model or self.evaluate.prompts:
                raise ValueError(
                    "a synthetic task knows its reward and its prompts; leave reward_model and evaluate.prompts out"
                )
        elif self.reward_model and not self.evaluate.prompts:
            raise ValueError("reward_model has nothing to judge: give evaluate.prompts, or set reward_model=null")
        if self.model.teacher_reference and (self.teacher.dpo or self.model.teacher is None):
            raise ValueError(
                "model.teacher_reference is for a named teacher that has had its DPO: with teacher.dpo, the reference "
                "is what that starts from; leave one of the two out"
            )
        if (self.model.teacher is None or self.model.student is None) and self.model.scratch is None:
            raise ValueError("model.teacher and model.student must be named, or model.scratch say how to make them")
        return self

    def as_yaml(self) -> str:
        return str(yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True))

    def save(self, path: Path) -> None:
        from prefdistill.core.files import write_text

        write_text(path, self.as_yaml())


def load_recipe(
    path: str | Path,
    overrides: Sequence["str | Override"] = (),
    *,
    fast: bool = False,
    only: list[str] | None = None,
) -> Recipe:
    """Read a recipe, apply its `fast` profile if asked, then the overrides, and check the result.

    Args:
        path: a YAML file.
        overrides: "key=value" each, e.g. "methods.tvkd.alpha=1.0", or `Override`s; they win over the file.
        fast: the recipe's quick profile.
        only: keep these of its methods (and its baseline, and those they start from or are controls of); ["all"]
            keeps all, also those that run on request only.

    Raises:
        UserError: on a missing file, broken YAML, an unknown key, a wrong type, or a method that does not exist.
    """
    path = Path(path)
    raw = _read(path)
    try:
        profile = as_mapping(raw.get("fast"), "fast") if fast else {}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    refuse_trust([raw, applied(profile)], str(path))
    changes = [Override(key, value) for key, value in profile.items()]
    changes += [Override.parse(change) if isinstance(change, str) else change for change in overrides]
    for change in changes:
        change.apply(raw)
    if isinstance(raw.get("training"), dict):  # on its own first: it is part of every training below
        validate(Training, raw["training"], f"{path}: training")
    recipe = validate(Recipe, raw, str(path))
    recipe = _keep(recipe, only, str(path))
    from prefdistill.methods import make_method

    for name, run in recipe.methods.items():
        try:
            make_method(run.method, run.options)
        except UserError as error:
            raise UserError(f"{path}: methods.{name}: {error}") from error
    return recipe


def refuse_trust(files: Iterable[dict[str, Any]], where: str) -> None:
    """A file may come from anyone: that a model's repository runs its code is for the command line to say.

    Raises:
        UserError: if what was read from a file asks for it.
    """
    for raw in files:
        if isinstance(raw.get("model"), dict) and raw["model"].get("trust_remote_code"):
            raise UserError(
                f"{where} asks to run code from the models' repositories: if you trust them, leave it out there and "
                "add model.trust_remote_code=true to the command"
            )


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, laid over the one it `extends`, a file named relative to it."""
    raw = read_yaml(path, "recipe", "the shipped ones are under recipes/", "data, model, methods")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"{path}: extends must name another recipe file, got {base!r}")
    files, below = (*above, path), path.parent / base
    if below.resolve() in {file.resolve() for file in files}:
        circle = " -> ".join(map(str, (*files, below)))
        raise UserError(f"{path}: extends goes in a circle ({circle}); take it out of one of these")
    return merged(_read(below, files), raw)


def _keep(recipe: Recipe, only: list[str] | None, where: str) -> Recipe:
    """Return the recipe with the methods in `only`, its baseline, and those they start from or are controls of."""
    if only == ["all"]:
        return recipe
    if only is None:
        only = [name for name, run in recipe.methods.items() if not run.on_request]
    if unknown := [name for name in only if name not in recipe.methods]:
        raise UserError(f"{where} has no method {unknown[0]!r}; it has {', '.join(recipe.methods)} (or all)")
    kept = {*only, recipe.baseline}
    kept |= {control.of for name in kept if (control := recipe.methods[name].control)}
    for name in reversed(recipe.methods):  # what a method starts from stands above it
        start = recipe.methods[name].start
        if name in kept and start is not None:
            kept.add(start)
    headline = recipe.headline
    if headline.method not in kept:
        headline = headline.model_copy(update={"method": None})
    methods = {name: run for name, run in recipe.methods.items() if name in kept}
    return recipe.model_copy(update={"methods": methods, "headline": headline})
