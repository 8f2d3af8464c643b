"""Steps of a plan, and the data and models that they read."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prefdistill.core.files import read_json
from prefdistill.core.progress import said_once
from prefdistill.core.stages import READING, stage_key
from prefdistill.data.truncation import Truncation
from prefdistill.experiment.launch.options import launcher_of
from prefdistill.experiment.launch.start import launch
from prefdistill.experiment.recipe import Recipe
from prefdistill.models.device import default_dtype
from prefdistill.models.hub import pinned_commits
from prefdistill.models.vocabulary import token_conflicts
from prefdistill.signals.needs import TEACHERS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ModelRole = Literal["teacher", "teacher_reference", "student", "reward_model"]
WORKER = "prefdistill.experiment.launch.worker"


@dataclass
class Context:
    """The recipe, the seed, the directory and the tokenizers that all steps of a plan share.

    Args:
        tokenizer: the student's. One that a step makes is known when that step is planned.
        teacher_tokenizer: that of the teacher and its reference; the same object where the two share one by design.
    """

    recipe: Recipe
    seed: int
    root: Path
    tokenizer: "Tokenizer" = field(init=False)
    teacher_tokenizer: "Tokenizer" = field(init=False)

    def tokenizer_of(self, role: ModelRole) -> "Tokenizer":
        """Return the tokenizer and chat template that a model of this role is read, sampled and trained with."""
        return self.teacher_tokenizer if role in TEACHERS else self.tokenizer

    @functools.cached_property
    def two_tokenizers(self) -> bool:
        """Whether the teacher has another tokenizer or chat template than the student."""
        return self.teacher_tokenizer is not self.tokenizer and self.teacher_tokenizer.key != self.tokenizer.key

    @property
    def chat_templates(self) -> "list[PreTrainedTokenizerBase]":
        """The tokenizers whose chat templates may refuse a prompt: not those that a step has yet to train."""
        named = (one for one in (self.tokenizer, self.teacher_tokenizer) if one.made_by is None)
        return [one.tokenizer for one in dict.fromkeys(named)]

    @functools.cached_property
    def two_vocabularies(self) -> bool:
        """Whether a token id stands for other tokens in the teacher than in the student."""
        if not self.two_tokenizers:
            return False
        # one that a step has yet to train on the data is like no other
        return self.tokenizer.made_by is not None or bool(
            token_conflicts(self.tokenizer.tokenizer, self.teacher_tokenizer.tokenizer)
        )

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.recipe.data.max_length, self.recipe.data.max_prompt_length)

    def load_options(self, role: ModelRole, model: "Model | None" = None) -> dict[str, Any]:
        """Return the dtype and quantization in which a model of this role is read: a teacher as the section `signals`
        says, a student as it is trained; one that was trained in 16 bits as it is saved, with what its adapter learnt.
        """
        if role == "student":
            dtype = self.recipe.model.dtype
            narrow = dtype in ("bfloat16", "float16")
            saved = narrow and model is not None and isinstance(model.made_by, Trained)
            return {"dtype": "auto" if saved else dtype, "quantization": None}
        signals = self.recipe.signals
        return {"dtype": signals.dtype or default_dtype(role), "quantization": signals.quantization}

    def placement(self, role: ModelRole) -> dict[str, Any]:
        """Return where the weights of a model of this role lie while it is read: a student's on one device."""
        return {} if role == "student" else self.recipe.signals.placement


@dataclass(eq=False, kw_only=True)
class Input:
    """Something that a step reads. It is one particular thing: two inputs from the same place are not the same input.

    `key` changes with the content. It is computed on first use and never needs a step to have run: where a step makes
    the input, it follows from the key of that step or from a part of its request.
    """

    name: str
    compute_key: Callable[[], str]
    made_by: "Step | None" = None
    named_models: frozenset[str] = frozenset()  # the user's models that this is read or made from

    @functools.cached_property
    def key(self) -> str:
        return self.compute_key()

    @property
    def models(self) -> frozenset[str]:
        return self.named_models | (self.made_by.models if self.made_by else frozenset())


@dataclass(eq=False, kw_only=True)
class Rows(Input):
    """A data set."""

    read: Callable[[], "Dataset"]

    @functools.cached_property
    def rows(self) -> "Dataset":
        return self.read()


@dataclass(eq=False, kw_only=True)
class Model(Input):
    """A model with the role that it has in this run; `place` is its directory or Hub name."""

    role: ModelRole
    place: str


@dataclass(eq=False, kw_only=True)
class Tokenizer(Input):
    """A tokenizer with its chat template."""

    read: Callable[[], "PreTrainedTokenizerBase"]

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.read()


@dataclass(eq=False, kw_only=True)
class Step:
    """One unit of work that ends in a directory. A step is identified by the object, not by its name or its place."""

    kind: ClassVar[str]
    draws: ClassVar[bool] = True  # whether the result depends on the seed, beside the inputs
    context: Context
    name: str  # of its directory, unique in a plan
    role: str | None = None  # teacher, teacher_reference, reference, start or student
    method: str | None = None  # the name of the run in the recipe
    order: int | None = None
    round: int | None = None

    @property
    def inputs(self) -> "tuple[Input | Step, ...]":
        """What the step reads: the inputs and steps among its fields."""
        values = [getattr(self, part.name) for part in fields(self)]
        several = [value if isinstance(value, tuple) else (value,) for value in values]
        return tuple(one for part in several for one in part if isinstance(one, Input | Step))

    @property
    def reads_with(self) -> Tokenizer:
        """The tokenizer of the model that it reads, samples or trains; without one, the student's."""
        roles = (one.role for one in self.inputs if isinstance(one, Model))
        return self.context.tokenizer_of(next(roles, "student"))

    @property
    def options(self) -> dict[str, Any]:
        """Return what the result depends on besides the inputs and the seed."""
        return {}

    def make(self, out: Path) -> None:
        """Do the work, or resume it, in the directory `out`."""
        raise NotImplementedError

    def work(self, out: Path) -> int | None:
        """Have the work of `make` done: here, or in the processes that the recipe names for this kind of step.

        Returns:
            The peak memory of these processes, in bytes, of the one with the most; None for work that was done here.
        """
        launcher = launcher_of(self.context.recipe.launch, self.kind)
        if launcher is None:
            self.make(out)
            return None
        request = {
            "recipe": self.context.recipe.model_dump(mode="json"),
            "out": str(self.context.root.parent),
            "seed": self.context.seed,
            "step": self.name,
            "rows": self.row_keys,
            "commits": pinned_commits(),
            "said": said_once(),
        }
        return max(process["peak_memory"] for process in launch(WORKER, request, launcher))

    @property
    def row_keys(self) -> dict[str, str]:
        """The keys of the user's data that the step reads, by name."""
        return {one.name: one.key for one in self.inputs if isinstance(one, Rows) and one.made_by is None}

    def read(self) -> dict[str, Any]:
        """Return how a finished step has read its rows, for results.json: `Reading.to_json`, with the name of the data
        and the responses; empty if it reads none, or was made by a version that did not note it."""
        return {}

    def repair(self) -> None:
        """Check the result of a finished step and rebuild damaged parts, where the step can tell."""

    def refresh(self) -> None:
        """Check that the result of a finished step still fits the data, and make it again if not."""

    @property
    def directory(self) -> Path:
        return self.context.root / self.name

    def describe(self) -> dict[str, Any]:
        """Return what results.json and the plan say about the step beside its name."""
        return {
            "seed": self.context.seed,
            "kind": self.kind,
            "role": self.role,
            "method": self.method,
            "order": self.order,
            "round": self.round,
            "directory": self.directory.relative_to(self.context.root.parent).as_posix(),
        }

    @functools.cached_property
    def request(self) -> dict[str, Any]:
        """Everything that the result depends on. Inputs are represented by their keys, so directories may be moved."""
        inputs = {one.name: one.key for one in self.inputs}
        return {**self.options, **({"seed": self.context.seed} if self.draws else {}), "inputs": inputs}

    @property
    def key(self) -> str:
        return stage_key(self.request)

    @functools.cached_property
    def models(self) -> frozenset[str]:
        """The user's models that the result is made from, directly or through other steps."""
        return frozenset().union(*(one.models for one in self.inputs))

    @property
    def after(self) -> "list[Step]":
        """The steps whose output this one reads, each once."""
        makers = (one if isinstance(one, Step) else one.made_by for one in self.inputs)
        return list(dict.fromkeys(filter(None, makers)))


@dataclass(eq=False, kw_only=True)
class Trained(Step):
    """A step whose output is a model."""

    output_role: ModelRole = "student"

    def noted(self, data: str, responses: Iterable[str]) -> dict[str, Any]:
        """Return what the training has noted about its rows, see `read`."""
        file = self.directory / READING
        return {"data": data, "responses": list(responses), **read_json(file)} if file.is_file() else {}

    @functools.cached_property
    def output(self) -> Model:
        return Model(
            name=self.name,
            compute_key=lambda: self.key,
            made_by=self,
            role=self.output_role,
            place=str(self.directory),
        )
