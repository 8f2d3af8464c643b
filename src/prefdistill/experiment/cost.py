"""What the steps of a plan cost: rows and tokens, memory, bytes on disk. From shapes of models; no weights are read."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from prefdistill.core.errors import UserError
from prefdistill.experiment.plan import Plan
from prefdistill.experiment.step import TEACHERS, Input, Model, ModelRole, Step
from prefdistill.experiment.steps.models import Dpo, Init, Prune, Sft
from prefdistill.experiment.steps.reward_model import EvaluateRewardModel, TrainRewardModel
from prefdistill.experiment.steps.signals import ReadSignals, Sample
from prefdistill.experiment.steps.students import Distill, Evaluate
from prefdistill.experiment.steps.synthetic import Pairs
from prefdistill.models.logprobs import vocabulary_rows
from prefdistill.signals.sizes import store_bytes
from prefdistill.training.arguments import adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefdistill.training.options import Training

ADAM = 2  # moments of each trained weight, of its dtype
CHARACTERS = 5  # of a token, about

WHOLE = "whole"  # in place of a role: the model that a student of fewer layers is made from

Shapes = Mapping[str, "PreTrainedModel"]  # models without weights, on the meta device


@dataclass(frozen=True)
class Lengths:
    """How long a data set is.

    Args:
        rows: of it.
        tokens: of its responses together.
        prompt_tokens: of its prompts.
        exact: False for data that a step has yet to make: these are upper bounds.
    """

    rows: int
    tokens: int
    prompt_tokens: int = 0
    exact: bool = True


@dataclass(frozen=True)
class Cost:
    """What a step costs, as far as it is known.

    Args:
        memory: bytes of weights, gradients and optimizer states; activations come on top.
        disk: bytes that the step leaves.
        checkpoints: bytes that it needs besides while it runs.
        rows, tokens: that it trains on, scores or generates; None if unknown.
        exact: False where rows, tokens and bytes on disk are upper bounds.
    """

    memory: int = 0
    disk: int = 0
    checkpoints: int = 0
    rows: int | None = None
    tokens: int | None = None
    exact: bool = True


def costs(
    plan: Plan,
    shapes: Shapes,
    lengths: Mapping[Input, Lengths],
    teacher_lengths: Mapping[Input, Lengths] | None = None,
) -> dict[Step, Cost]:
    """Return the cost of every step of a plan.

    Args:
        plan: of one seed.
        shapes: the models by role, as far as they are known.
        lengths: of the data sets that the steps read. Those of the built-in task need not be among them.
        teacher_lengths: the same in the teacher's tokens, where it has another tokenizer.

    Raises:
        UserError: if training.lora does not fit its model.
    """
    known = {**_built_in(plan), **lengths}
    pricing = _Pricing(plan, shapes, known, known if teacher_lengths is None else known | dict(teacher_lengths))
    return {step: pricing.cost(step) for step in plan.steps}


def _built_in(plan: Plan) -> dict[Input, Lengths]:
    """Upper bounds for the data of the built-in task, before they are sampled."""
    recipe = plan.context.recipe
    task = recipe.data.synthetic
    if task is None:
        return {}
    longest = recipe.evaluate.max_new_tokens

    def pairs(rows: int) -> Lengths:
        return Lengths(rows, 2 * rows * longest, exact=False)

    bounds: dict[Input, Lengths] = {plan.train: pairs(task.pairs)}
    if plan.test is not None:
        bounds[plan.test] = pairs(task.test_prompts)
    for step in plan.steps:
        if isinstance(step, Dpo):
            bounds[step.rows] = pairs(task.teacher_pairs)
        elif isinstance(step, Sft):
            bounds[step.rows] = Lengths(task.demonstrations, task.demonstrations * longest, exact=False)
    return bounds


@dataclass
class _Pricing:
    plan: Plan
    shapes: Shapes
    lengths: Mapping[Input, Lengths]
    teacher_lengths: Mapping[Input, Lengths]

    def cost(self, step: Step) -> Cost:
        recipe = self.plan.context.recipe
        if isinstance(step, Init):
            shapes = [self.shapes[role] for role in step.roles if role in self.shapes]
            size = sum(weight_bytes(shape, "float32") for shape in shapes)
            return Cost(memory=size, disk=size)
        if isinstance(step, Prune):
            whole, part = (self._stored(role) for role in (WHOLE, "student"))
            return Cost(memory=whole + 2 * part, disk=part)  # what is saved is loaded again and compared
        if isinstance(step, Dpo):
            reference = step.training.lora is None
            return self._training(step.output, step.training, step.rows, int(reference))
        if isinstance(step, Sft):
            return self._training(step.output, step.training, step.rows, 0)
        if isinstance(step, TrainRewardModel):
            return self._training(step.output, step.section.training, step.pairs, 0, None if step.start else "float32")
        if isinstance(step, Distill):
            training = recipe.methods[step.method].training
            data: Input | Sample = step.samples[0] if step.samples else step.train
            return self._training(step.output, training, data, 0)
        if isinstance(step, Pairs):
            responses = 2 * (step.language.task.teacher_pairs + step.language.task.test_prompts)
            return self._generation(step.model, "student", responses, recipe.evaluate.max_new_tokens)
        if isinstance(step, Sample):
            length = self._of(step, step.model.role)
            rows = length.rows if length else None
            return self._generation(step.model, step.model.role, rows, recipe.sampling.max_new_tokens)
        if isinstance(step, ReadSignals):
            return self._signals(step)
        if isinstance(step, Evaluate):
            return self._evaluation(step)
        if isinstance(step, EvaluateRewardModel):
            length = self._of(step.test, "reward_model")
            return self._reading(step.model, "reward_model", length)
        return Cost()

    def _of(self, data: Input | Sample, role: ModelRole) -> Lengths | None:
        """The lengths of a data set in the tokens of a role."""
        lengths = self.teacher_lengths if role in TEACHERS else self.lengths
        if not isinstance(data, Sample):
            return lengths.get(data)
        train, sampling = lengths.get(data.data), self.plan.context.recipe.sampling
        if train is None:
            return None
        rows = train.rows * sampling.n
        return Lengths(rows, rows * sampling.max_new_tokens, train.prompt_tokens * sampling.n, exact=False)

    def _training(
        self, output: Model, training: Training, data: Input | Sample, beside: int, dtype: str | None = None
    ) -> Cost:
        """The cost of a training. `beside` counts the copies of the model that it holds besides the trained one."""
        rows, tokens, exact = _seen(training, self._of(data, output.role))
        shape = self.shapes.get(output.role)
        if shape is None:
            return Cost(rows=rows, tokens=tokens, exact=exact)
        dtype = dtype or self.plan.context.recipe.model.dtype
        weights, adapter = weight_bytes(shape, dtype), adapter_bytes(shape, training)
        return Cost(
            memory=training_bytes(shape, training, dtype) + beside * weights,
            disk=weights + adapter,
            checkpoints=checkpoint_bytes(adapter or weights, training),
            rows=rows,
            tokens=tokens,
            exact=exact,
        )

    def _stored(self, role: str) -> int:
        """Bytes of a model as it is stored."""
        return weight_bytes(self.shapes[role], "auto") if role in self.shapes else 0

    def _weights(self, model: Model, role: ModelRole) -> int:
        """Bytes of a model that is read as one of this role."""
        shape = self.shapes.get(model.role)
        if shape is None:
            return 0
        loading = self.plan.context.load_options(role)
        if role == "reward_model":
            loading = {"dtype": "auto", "quantization": None}
        return weight_bytes(shape, loading["dtype"], loading["quantization"])

    def _reading(self, model: Model, role: ModelRole, length: Lengths | None) -> Cost:
        if length is None:
            return Cost(memory=self._weights(model, role))
        tokens = length.tokens + length.prompt_tokens
        return Cost(memory=self._weights(model, role), rows=length.rows, tokens=tokens, exact=length.exact)

    def _generation(self, model: Model, role: ModelRole, rows: int | None, longest: int) -> Cost:
        tokens = None if rows is None else rows * longest
        disk = (tokens or 0) * CHARACTERS
        return Cost(memory=self._weights(model, role), disk=disk, rows=rows, tokens=tokens, exact=False)

    def _signals(self, step: ReadSignals) -> Cost:
        length = self._of(step.data, step.model.role)
        cost = self._reading(step.model, "student" if step.role == "reference" else step.model.role, length)
        shape = self.shapes.get(step.model.role) or next(iter(self.shapes.values()), None)
        if length is None or shape is None:
            return cost
        section = self.plan.context.recipe.signals
        responses = length.rows * len(step.responses)
        tokens = length.tokens * len(step.responses) // (1 if isinstance(step.data, Sample) else 2)
        disk = store_bytes(
            step.kinds,
            tokens,
            responses,
            vocabulary_rows(shape),
            positions=step.reading.get("positions", "all"),
            value_dtype=section.value_dtype,
            k=section.k,
            packed=section.topk_coding != "float32" if section.topk_coding else section.k != "vocab",
            own_ids=step.ids_from is None,
        )
        return Cost(
            memory=cost.memory, disk=disk, rows=length.rows, tokens=tokens + length.prompt_tokens, exact=length.exact
        )

    def _evaluation(self, step: Evaluate) -> Cost:
        recipe = self.plan.context.recipe
        role: ModelRole = "student" if step.language else step.model.role
        prompts = max(recipe.evaluate.prompts, recipe.evaluate.samples) if step.test is not None else 0
        if recipe.data.synthetic:
            prompts = 2 * recipe.data.synthetic.test_prompts  # sampled, and greedy
        generated = self._generation(step.model, role, prompts, recipe.evaluate.max_new_tokens)
        pairs = self._of(step.test, role) if step.reference and step.test else None
        return Cost(
            memory=generated.memory,
            disk=generated.disk if step.language is None else 0,
            rows=prompts + (pairs.rows if pairs else 0),
            tokens=(generated.tokens or 0) + (pairs.tokens + pairs.prompt_tokens if pairs else 0),
            exact=not prompts and (pairs is None or pairs.exact),
        )


def _seen(training: Training, length: Lengths | None) -> tuple[int | None, int | None, bool]:
    """Return the rows and the tokens that a training reads over all steps, and whether they are exact."""
    if training.max_steps is not None:
        rows = training.max_steps * training.batch_size
    elif length is not None:
        rows = math.ceil(training.epochs * length.rows)
    else:
        return None, None, False
    if length is None or not length.rows:
        return rows, None, False
    return rows, (length.tokens + length.prompt_tokens) * rows // length.rows, length.exact


# -- bytes of models ---------------------------------------------------------------------------------------------------


def weight_bytes(model: PreTrainedModel, dtype: str, quantization: str | None = None) -> int:
    stored: Any = getattr(model.config, "quantization_config", None)
    if stored is not None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        bits = stored.get("bits") or (4 if stored.get("load_in_4bit") else 8)
    elif quantization is not None:
        bits = int(quantization.removesuffix("bit"))
    else:
        bits = 8 * _dtype(model, dtype).itemsize
    return model.num_parameters() * bits // 8


def _dtype(model: PreTrainedModel, dtype: str) -> torch.dtype:
    if dtype == "auto":
        return cast(torch.dtype, model.config.dtype or torch.float32)
    return cast(torch.dtype, getattr(torch, dtype))


def training_bytes(model: PreTrainedModel, training: Training, dtype: str) -> int:
    r"""Return the bytes of weights, gradients and Adam's moments; activations come on top.

    .. math:: 4 n b \quad\text{or, with adapters of } m \text{ weights,}\quad n b + 16 m
    """
    weights = weight_bytes(model, dtype)
    if training.lora is None:
        return weights * (2 + ADAM)
    return weights + adapter_bytes(model, training) * (2 + ADAM)


def adapter_bytes(model: PreTrainedModel, training: Training) -> int:
    """Return the bytes that LoRA adds to the weights, in float32; 0 without.

    Raises:
        UserError: if the model has no layers that the adapter names.
    """
    config = adapter_config(training)
    if config is None:
        return 0
    from peft import get_peft_model

    try:
        adapted = get_peft_model(copy.deepcopy(model), config)
    except ValueError as error:
        raise UserError(f"training.lora: {error}") from error
    return adapted.get_nb_trainable_parameters()[0] * 4


def checkpoint_bytes(trained: int, training: Training) -> int:
    """Return the bytes of the checkpoints that are kept, and one more: an old one is removed after the new one is
    whole. They hold weights and moments, no gradients."""
    limit = training.arguments.get("save_total_limit") or 1
    return (cast(int, limit) + 1) * trained * (1 + ADAM)
