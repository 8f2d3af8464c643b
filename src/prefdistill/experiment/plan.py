"""The plan of a run: every step that a recipe needs, known before anything runs.

    plan = build_plan(load_recipe("recipe.yaml"), Path("runs/x"), seed=0)
    [(step.name, step.kind) for step in plan.steps]

`run.py` executes the plan, `show_plan.py` and the doctor price it, and studies compare the keys of its steps. Building
it reads neither data nor models; the keys of its steps do, when they are first asked for.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prefdistill.core.errors import UserError
from prefdistill.data import synthetic
from prefdistill.data.columns import SIDES
from prefdistill.experiment.inputs import Sources
from prefdistill.experiment.needs import (
    STUDENT_RESPONSE,
    TRAIN,
    columns_of,
    held_out,
    reference_bf16,
    source,
    split_needs,
    union,
)
from prefdistill.experiment.recipe import MethodRun, Recipe
from prefdistill.experiment.roles import START, TEACHER
from prefdistill.experiment.step import Context, Model, ModelRole, Rows, Step, Tokenizer
from prefdistill.experiment.steps.models import Dpo, Init, Prune, Sft
from prefdistill.experiment.steps.reward_model import EvaluateRewardModel, TrainRewardModel
from prefdistill.experiment.steps.signals import ReadSignals, Sample
from prefdistill.experiment.steps.students import Distill, Evaluate
from prefdistill.experiment.steps.synthetic import Language, Pairs
from prefdistill.experiment.user_data import UserData, UserModels, tokenizer_input, user_rows
from prefdistill.methods import Method, make_method, sampled
from prefdistill.models.load import load_tokenizer
from prefdistill.signals import Need
from prefdistill.training.options import Training

AnyStep = TypeVar("AnyStep", bound=Step)


@dataclass(frozen=True, eq=False)
class Start:
    """A model that students start from, and the steps that depend on it alone."""

    name: str  # part of the names of these steps
    model: Model
    users: frozenset[str]  # the methods that start from it
    round: int = 1


@dataclass
class Plan:
    """The steps of one seed in the order in which they run. Each stands behind the steps that it reads."""

    context: Context
    methods: dict[str, Method]  # by the name of the run
    user_data: UserData | None  # None for the built-in task
    train: Rows = field(init=False)
    test: Rows | None = None
    steps: list[Step] = field(default_factory=list)
    evaluations: dict[str, list[Evaluate]] = field(default_factory=dict)  # by model or method, one per data order
    test_signals: list[ReadSignals] = field(default_factory=list)
    reward_model: EvaluateRewardModel | None = None

    def add(self, step: AnyStep) -> AnyStep:
        if any(other.name == step.name for other in self.steps):
            raise UserError(f"two steps of this run would be named {step.name}; rename a method")
        self.steps.append(step)
        return step


def build_plan(recipe: Recipe, out: Path, seed: int, sources: Sources | None = None) -> Plan:
    """Return the plan of one seed of a recipe; its steps write into `OUT/seed-N`.

    Args:
        recipe: what to run.
        out: the run directory.
        seed: one of the recipe's seeds.
        sources: the user's data and models, to share between plans what is read of them.
    """
    return _Builder(Context(recipe, seed, out / f"seed-{seed}"), sources or Sources()).build()


def build_plans(recipe: Recipe, out: Path, sources: Sources | None = None) -> list[Plan]:
    """Return the plan of every seed of a recipe."""
    sources = sources or Sources()
    return [build_plan(recipe, out, seed, sources) for seed in range(recipe.seed, recipe.seed + recipe.seeds)]


class _Builder:
    def __init__(self, context: Context, sources: Sources) -> None:
        self.context, self.recipe, self.sources = context, context.recipe, sources
        self.user_models = UserModels(self.recipe, sources)
        self.methods = {name: make_method(run.method, run.options) for name, run in self.recipe.methods.items()}
        self.sources.reads |= columns_of(self.methods.values())
        self.users = {
            name: frozenset(other for other, run in self.recipe.methods.items() if run.start == name)
            for name in (None, *self.recipe.methods)
        }
        self.inits: dict[ModelRole, Init] = {}
        self.samples: dict[tuple[Model, str], Sample] = {}
        self.signals: dict[tuple[Model, Rows | Sample, str, tuple[str, ...]], ReadSignals] = {}
        self.roles: dict[str, Model] = {}
        self.starts: dict[tuple[str, int] | None, Start] = {}  # by method and order; None: the student's start

    def build(self) -> Plan:
        recipe = self.recipe
        user_data = None if recipe.data.synthetic else UserData(recipe, self.context.seed, self.sources)
        task = recipe.data.synthetic
        self.plan = Plan(self.context, self.methods, user_data)
        language = self._add(Language, "data", task=task) if task else None
        if user_data is not None:
            self.plan.train = user_rows(TRAIN, lambda: user_data.train)
        self._add_tokenizers_and_init(language)
        teacher, start = self._base("teacher"), self._base("student")
        if language is not None:
            demonstrations = language.demonstrations()
        elif user_data is not None:
            demonstrations = Rows(
                name="demonstrations",
                compute_key=user_data.demonstrations_key,
                read=lambda: user_data.demonstrations,
            )
        if recipe.teacher.sft:
            teacher = self._add_training(Sft, "teacher", teacher, demonstrations, recipe.teacher.sft)
        reference = teacher if recipe.teacher.dpo else None
        if recipe.teacher.dpo is None and recipe.model.teacher_reference:
            reference = self.user_models.model(
                "teacher-reference",
                recipe.model.teacher_reference,
                "teacher_reference",
                self.context.tokenizer_of("teacher_reference"),
            )
        teacher_pairs, test = self._pairs(language, reference or teacher)
        if recipe.teacher.dpo:
            teacher = self._add_training(Dpo, "teacher", teacher, teacher_pairs, recipe.teacher.dpo)
        if recipe.student.sft:
            start = self._add_training(Sft, "student", start, demonstrations, recipe.student.sft)
        self.roles = {"teacher": teacher, "teacher_reference": reference or teacher}
        self.starts[None] = Start("start", start, self.users[None])
        self.plan.test = test
        if test is not None:
            self._test_signals(test, reference is not None)
        self._evaluations(language, teacher, start, self._reward_model(test))
        return self.plan

    def _add(self, kind: type[AnyStep], name: str, **fields: Any) -> AnyStep:
        return self.plan.add(kind(context=self.context, name=name, **fields))

    # -- data and models ----------------------------------------------------------------------------------------------

    def _add_tokenizers_and_init(self, language: Language | None) -> None:
        """Set the tokenizers, and add the step that makes the models that are not named, or one for each tokenizer."""
        names, teacher_tokenizer = self.recipe.model, self._own_teacher_tokenizer()
        unnamed: list[ModelRole] = [role for role in ("teacher", "student") if getattr(names, role) is None]
        source = self.user_models.tokenizer if len(unnamed) < 2 else language or self.plan.train
        self.context.tokenizer = self.user_models.tokenizer
        if teacher_tokenizer and "teacher" in unnamed:
            self._add_init("init-teacher", ["teacher"], teacher_tokenizer)
            unnamed.remove("teacher")
        if unnamed:
            init = self._add_init("init", unnamed, source)
            if not isinstance(source, Tokenizer):
                self.context.tokenizer = Tokenizer(
                    name="tokenizer",
                    compute_key=init.tokenizer_key,
                    made_by=init,
                    read=lambda: load_tokenizer(str(init.directory / "tokenizer")),
                )
        self.context.teacher_tokenizer = teacher_tokenizer or self.context.tokenizer

    def _own_teacher_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the teacher; None where it shares the student's by design."""
        task, names = self.recipe.data.synthetic, self.recipe.model
        if task and task.teacher_tokenizer == "other":
            return tokenizer_input("teacher-tokenizer", synthetic.build_other_tokenizer)
        named = names.teacher_tokenizer or (names.teacher and names.student) or names.teacher_form
        return self.user_models.teacher_tokenizer if named else None

    def _add_init(self, name: str, roles: list[ModelRole], source: Tokenizer | Language | Rows) -> Init:
        assert self.recipe.model.scratch is not None
        init = self._add(Init, name, roles=tuple(roles), shapes=self.recipe.model.scratch, source=source)
        self.inits |= dict.fromkeys(roles, init)
        return init

    def _base(self, role: ModelRole) -> Model:
        names, tokenizer = self.recipe.model, self.context.tokenizer_of(role)
        name = names.name_of(role)
        if name is None:
            return self.inits[role].model(role)
        if role != "student" or names.student_layers is None:
            return self.user_models.model(f"{role}-base", name, role, tokenizer)
        whole = self.user_models.model("student-whole", name, role, tokenizer)
        prune = self._add(
            Prune, "student-base", role=role, whole=whole, layers=names.student_layers, tokenizer=tokenizer
        )
        return prune.output

    def _add_training(self, kind: type[Sft], role: ModelRole, start: Model, rows: Rows, training: Training) -> Model:
        name = f"{role}-{kind.kind}"
        return self._add(kind, name, role=role, output_role=role, start=start, rows=rows, training=training).output

    def _pairs(self, language: Language | None, sampled_from: Model) -> tuple[Rows, Rows | None]:
        """Set `train`; return the pairs of the teacher's DPO and the test pairs."""
        if language is not None:
            pairs = self._add(Pairs, "pairs", language=language, model=sampled_from)
            self.plan.train = pairs.part(TRAIN, TRAIN, limit=language.task.pairs)
            return pairs.part("teacher_pairs", TRAIN, label_noise=language.task.teacher_label_noise), pairs.part(
                "test", "test"
            )
        user_data = self.plan.user_data
        if user_data is None or self.recipe.data.test is None:
            return self.plan.train, None
        return self.plan.train, user_rows("test", lambda: user_data.test)

    def _reward_model(self, test: Rows | None) -> Model | None:
        section, user_data = self.recipe.reward_model, self.plan.user_data
        if section is None or test is None or user_data is None:
            return None
        if section.name:
            model = self.user_models.model("reward-model", section.name, "reward_model", self.context.tokenizer)
        else:
            pairs = user_rows("reward-model-pairs", lambda: user_data.reward_pairs)
            tokenizer, start = self.context.tokenizer, None
            if section.source:
                start = self.user_models.model("reward-model-base", section.source, "reward_model", tokenizer)
            model = self._add(
                TrainRewardModel, "reward-model", pairs=pairs, tokenizer=tokenizer, start=start, section=section
            ).output
        self.plan.reward_model = self._add(EvaluateRewardModel, "evaluate-reward-model", model=model, test=test)
        return model

    # -- samples and signals ------------------------------------------------------------------------------------------

    def _test_signals(self, test: Rows, teacher_reference: bool) -> None:
        """Read the held-out pairs: the terms that the methods use, and those that they are compared with."""
        wanted = held_out(self.methods.values(), teacher_reference)
        for role, kinds in sorted(wanted.items()):
            self.plan.test_signals.append(self._add_store(role, kinds, SIDES, test, self.starts[None]))

    def _add_sample(self, column: str, start: Start) -> Sample:
        own = column == STUDENT_RESPONSE
        model = start.model if own else self.roles["teacher"]
        if (model, column) not in self.samples:
            self.samples[model, column] = self._add(
                Sample,
                f"sample-{start.name}" if own else "sample-teacher",
                role="student" if own else "teacher",
                round=start.round if own else None,
                model=model,
                data=self.plan.train,
                column=column,
            )
        return self.samples[model, column]

    def _add_signals(self, need: Need, start: Start) -> ReadSignals:
        """Add the store of a need, with all else that the run needs of the same model and the same responses."""
        depends_on_start = source(need) == STUDENT_RESPONSE or need.role == "reference"  # read of this start alone
        related_needs = [
            other
            for name, method in self.methods.items()
            if name in start.users or not depends_on_start
            for other in split_needs(method.needs)
            if other.role == need.role and source(other) == source(need)
        ]
        responses_by_kind = {
            kind: union(n.responses for n in related_needs if n.kind == kind)
            for kind in {n.kind for n in related_needs}
        }
        responses = responses_by_kind[need.kind]
        kinds = {kind for kind, of in responses_by_kind.items() if of == responses}
        data = self.plan.train if source(need) == TRAIN else self._add_sample(source(need), start)
        return self._add_store(need.role, kinds, responses, data, start)

    def _add_store(
        self, role: str, kinds: set[str], responses: tuple[str, ...], data: Rows | Sample, start: Start
    ) -> ReadSignals:
        model = start.model if role == "reference" else self.roles[role]
        if (model, data, role, responses) in self.signals:
            return self.signals[model, data, role, responses]
        sample = data if isinstance(data, Sample) else None
        name = f"signals-{role}-{sample.column if sample else data.name}"
        if (sample and sample.column == STUDENT_RESPONSE) or (role == "reference" and start is not self.starts[None]):
            name += f"-{start.name}"
        if set(responses) < set(SIDES):
            name += f"-{responses[0]}"
        ids_from = None
        if "topk" in kinds and role != "teacher":
            ids_from = self._add_signals(Need("teacher", "topk", responses), start)
        step = self._add(
            ReadSignals,
            name,
            role=role,
            model=model,
            data=data,
            kinds=tuple(sorted(kinds)),
            responses=responses,
            ids_from=ids_from,
            bf16=role == "reference" and True in reference_bf16(self.recipe, self.methods),
            held_out=data is self.plan.test,
        )
        self.signals[model, data, role, responses] = step
        return step

    # -- students -----------------------------------------------------------------------------------------------------

    def _evaluations(self, language: Language | None, teacher: Model, start: Model, reward_model: Model | None) -> None:
        """Evaluate teacher and start by their responses, then train and evaluate the students."""
        recipe, test = self.recipe, self.plan.test
        samples = test is not None and max(recipe.evaluate.prompts, recipe.evaluate.samples) > 0
        common: dict[str, Any] = {"language": language, "reward_model": reward_model}
        if language is not None or samples:
            common |= {"test": None if language else test, "start": None, "reference": None}
            for name, model in ((TEACHER, teacher), (START, start)):
                step = self._add(Evaluate, f"evaluate-{name}", role=name, model=model, **common)
                self.plan.evaluations[name] = [step]
        common["reference"] = next((step for step in self.plan.test_signals if step.role == "reference"), None)
        common["start"] = start if samples and language is None else None
        for name, run in recipe.methods.items():
            self.plan.evaluations[name] = []
            for order in range(run.first_order, run.first_order + recipe.orders):
                step = self._add(
                    Evaluate,
                    f"evaluate-{name}-{order}",
                    role="student",
                    method=name,
                    order=order,
                    model=self._add_distill(name, run, order),
                    **common | {"test": test},
                )
                self.plan.evaluations[name].append(step)

    def _add_distill(self, name: str, run: MethodRun, order: int) -> Model:
        """Add the steps that train the student with one method and one order of the data, round by round."""
        start = self.starts[(run.start, order) if run.start else None]
        method = self.methods[name]
        for number in range(1, run.rounds + 1):
            trained = f"{name}-{order}" + (f"-round-{number}" if number < run.rounds else "")
            samples = [self._add_sample(response, start) for response in sampled(method)]
            stores = list(dict.fromkeys(self._add_signals(need, start) for need in split_needs(method.needs)))
            step = self._add(
                Distill,
                f"distill-{trained}",
                role="student",
                method=name,
                order=order,
                round=number,
                algorithm=method,
                start=start.model,
                train=self.plan.train,
                samples=tuple(samples),
                signals=tuple(stores),
            )
            start = Start(trained, step.output, frozenset({name}), number + 1)
        self.starts[name, order] = Start(start.name, start.model, self.users[name])
        return start.model
