"""What the methods of a run learn from: responses sampled from teacher and student, and signals, made once each."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.progress import say
from prefdistill.data.columns import SCORES, SIDES, ended_column
from prefdistill.data.load import load_pairs
from prefdistill.methods import Method, sampled
from prefdistill.models.device import default_dtype
from prefdistill.sampling.files import sample_responses
from prefdistill.signals import Need, Signals, extract_signals
from prefdistill.signals.reading import VALUES
from prefdistill.signals.repair import set_aside
from prefdistill.signals.store import DamagedSignals

if TYPE_CHECKING:
    from datasets import Dataset

    from prefdistill.experiment.pipeline import SeedRun

STUDENT = "student_response"
SAMPLING_SEED = 7_001  # of the student's first round; further ones are multiples of it


@dataclass(frozen=True)
class Start:
    """A model that a student starts from, and the stage that made it."""

    name: str  # for directories: "start", or the method and order it comes from
    model: str
    stage: str
    users: frozenset[str]  # the methods of the recipe that start from it
    round: int = 1


@dataclass
class Supply:
    """The rows and stores of each method of one seed's run."""

    run: "SeedRun"
    stores: dict[str, Signals] = field(default_factory=dict)  # by stage
    samples: dict[str, "Dataset"] = field(default_factory=dict)

    def of(self, method: Method, start: Start) -> tuple["Dataset", list[Signals], list[str]]:
        """The rows a method is trained on from `start`, its stores, and the stages that made them."""
        drawn = [self._sample(response, start) for response in sampled(method)]
        read = list(dict.fromkeys(self._extract(need, start) for need in split(method.needs)))
        rows = _side_by_side([self.samples[stage] for stage in drawn]) if drawn else self.run.train
        return rows, [self.stores[stage] for stage in read], drawn + read

    # -- responses ----------------------------------------------------------------------------------------------------

    def _sample(self, response: str, start: Start) -> str:
        run, recipe = self.run, self.run.recipe
        own = response == STUDENT
        model, stage = (start.model, start.stage) if own else (run.teacher, run.teacher_stage)
        name = f"sample-{start.name}" if own else "sample-teacher"
        if name in self.samples:
            return name
        seed = run.seed + SAMPLING_SEED * (start.round if own else 0)
        options = recipe.sampling.model_dump()
        dtype = recipe.model.dtype if own else recipe.signals.dtype or default_dtype("teacher")
        quantization = None if own else recipe.signals.quantization
        request = {
            "truncation": str(run.truncation),
            "sampling": options,
            "seed": seed,
            "dtype": dtype,
            "quantization": quantization,
        }

        def make(out: Path) -> None:
            columns = ("prompt", *SIDES, *SCORES, *(ended_column(side) for side in SIDES))
            sample_responses(
                model,
                run.train.select_columns([name for name in columns if name in run.train.column_names]),
                run.tokenizer,
                out / "responses.jsonl",
                column=response,
                truncation=run.truncation,
                seed=seed,
                dtype=dtype,
                quantization=quantization,
                trust_remote_code=recipe.model.trust_remote_code,
                **options,
            )

        run.stage(name, request, make, "train", stage, kind="sample", role="student" if own else "teacher")
        self.samples[name] = load_pairs(str(run.root / name / "responses.jsonl"), responses=(response,))
        return name

    # -- signals ------------------------------------------------------------------------------------------------------

    def test(self) -> list[Signals]:
        """What is read of the held-out pairs: the terms the methods use, and those to see them beside."""
        run = self.run
        if run.test is None:
            return []
        wanted = held_out(run.methods.values(), run.teacher_reference != run.teacher)
        first = run.starts["start"]
        return [self.stores[self._read(role, kinds, SIDES, "test", first)] for role, kinds in sorted(wanted.items())]

    def _extract(self, need: Need, start: Start) -> str:
        """The store of a need, and of all else that the run wants of the same model and the same responses."""
        own = source(need) == STUDENT or need.role == "reference"  # then it is this start's, and no other's
        alike = [
            other
            for name, method in self.run.methods.items()
            if name in start.users or not own
            for other in split(method.needs)
            if other.role == need.role and source(other) == source(need)
        ]
        reach = {kind: _union(n.responses for n in alike if n.kind == kind) for kind in {n.kind for n in alike}}
        responses = reach[need.kind]
        kinds = {kind for kind, of in reach.items() if of == responses}
        return self._read(need.role, kinds, responses, source(need), start)

    def _read(self, role: str, kinds: set[str], responses: tuple[str, ...], where: str, start: Start) -> str:
        run = self.run
        model, made_by = {
            "teacher": (run.teacher, run.teacher_stage),
            "teacher_reference": (run.teacher_reference, run.teacher_reference_stage),
            "reference": (start.model, start.stage),
        }[role]
        name = f"signals-{role}-{where}"
        if where == STUDENT or (role == "reference" and start.name != "start"):
            name += f"-{start.name}"
        if set(responses) < set(SIDES):
            name += f"-{responses[0]}"
        if name in self.stores:
            return name
        if where in ("train", "test"):
            data_stage, data = where, getattr(run, where)
        else:
            data_stage = self._sample(where, start)
            data = self.samples[data_stage]
        ids_from = None
        after = [data_stage, made_by]
        if "topk" in kinds and role != "teacher":
            teacher = self._extract(Need("teacher", "topk", responses), start)
            ids_from = self.stores[teacher]
            after.append(teacher)
        asked = run.recipe.signals
        endpoints = asked.positions == "endpoints" and kinds == {"values"} and where != "test"
        unused = {"positions"} if not endpoints else set()
        unused |= {"value_dtype"} if endpoints or not kinds.intersection(VALUES) else set()
        unused |= set() if "topk" in kinds and ids_from is None else {"k", "p", "topk_coding"}
        options: dict[str, Any] = asked.model_dump(exclude=unused)
        # the reference is read as the student is trained: same weights, same precision
        if role == "reference":
            options |= {"dtype": run.recipe.model.dtype, "quantization": None, "bf16": True in run.reference_bf16()}
        else:
            options |= {"dtype": asked.dtype or default_dtype(role), "bf16": False}
        request = {
            "kinds": sorted(kinds),
            "responses": list(responses),
            "truncation": str(run.truncation),
            **options,
        }

        def make(out: Path) -> None:
            extract_signals(
                model,
                data,
                run.tokenizer,
                kinds=tuple(sorted(kinds)),
                out=out / "store",
                role=role,
                responses=responses,
                truncation=run.truncation,
                ids_from=ids_from,
                trust_remote_code=run.recipe.model.trust_remote_code,
                **options,
            )

        run.stage(name, request, make, *after, kind="signals", role=role)
        store = run.root / name / "store"
        try:
            if not (store / "manifest.json").is_file():
                make(run.root / name)  # again: it was damaged, and that was cut off
            self.stores[name] = Signals.open(store)
        except DamagedSignals as error:
            say(f"{name}: {str(error).split(';')[0]}; it is made again")
            set_aside(store)
            make(run.root / name)
            self.stores[name] = Signals.open(store)
        return name


def held_out(methods: Iterable[Method], teacher_reference: bool) -> dict[str, set[str]]:
    """The kinds of signals that are read of the held-out pairs, by role, with or without a teacher's reference."""
    needs = [need for method in methods for need in method.needs]
    kinds = {n.kind for n in needs if n.role == "teacher" and set(n.responses) <= set(SIDES)} - {"topk"}
    wanted = {"reference": {"logps"}}  # every student is compared with its start
    if any(n.role == "teacher" for n in needs):
        wanted["teacher"] = kinds | {"values", "logps", "q"}
        if teacher_reference:
            wanted["teacher_reference"] = {"logps"}
    return wanted


def split(needs: Iterable[Need]) -> list[Need]:
    """Signals by where the responses come from: the pairs, the teacher's samples, the student's."""
    return [
        Need(need.role, need.kind, part)
        for need in needs
        if need.role != "data"
        for part in (tuple(r for r in need.responses if r in SIDES), *((r,) for r in need.responses if r not in SIDES))
        if part
    ]


def source(need: Need) -> str:
    return "train" if need.responses[0] in SIDES else need.responses[0]


def _union(several: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(sorted({response for responses in several for response in responses}))


def _side_by_side(samples: "list[Dataset]") -> "Dataset":
    """Samples of the same prompts, in one row each."""
    first, *others = samples
    for other in others:
        if first["prompt"][:] != other["prompt"][:]:
            raise RuntimeError("the teacher and the student have answered different prompts")
        for column in set(other.column_names) - set(first.column_names):
            first = first.add_column(column, other[column][:], feature=other.features[column])
    return first
