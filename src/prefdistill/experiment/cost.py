"""What the steps of a plan cost: rows and tokens, memory, bytes on disk. From shapes of models; no weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from prefdistill.experiment.flops import Lengths, Text, forward_flops, training_flops
from prefdistill.experiment.memory import (
    Memory,
    adapter_bytes,
    cache_bytes,
    checkpoint_bytes,
    dtype_of,
    reading_memory,
    sampling_memory,
    training_memory,
    weight_bytes,
)
from prefdistill.experiment.plan import Plan
from prefdistill.experiment.step import Input, Model, ModelRole, Step
from prefdistill.experiment.steps.models import Dpo, Init, Prune, Sft
from prefdistill.experiment.steps.reward_model import EvaluateRewardModel, TrainRewardModel
from prefdistill.experiment.steps.signals import ReadSignals, Sample
from prefdistill.experiment.steps.students import Distill, Evaluate
from prefdistill.experiment.steps.synthetic import Pairs
from prefdistill.models.logprobs import vocabulary_rows
from prefdistill.sampling.options import Sampling
from prefdistill.signals.needs import TEACHERS
from prefdistill.signals.sizes import store_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefdistill.evaluation.options import Evaluation
    from prefdistill.training.options import Training

CHARACTERS = 5  # of a token, about

WHOLE = "whole"  # in place of a role: the model that a student of fewer layers is made from

Shapes = Mapping[str, "PreTrainedModel"]  # models without weights, on the meta device


@dataclass(frozen=True)
class Cost:
    """What a step costs, as far as it is known.

    Args:
        memory: bytes of weights, gradients and optimizer states; activations come on top.
        disk: bytes that the step leaves.
        checkpoints: bytes that it needs besides while it runs.
        rows, tokens: that it trains on, scores or generates; None if unknown.
        exact: False where rows, tokens and bytes on disk are upper bounds.
        held: bytes at the peak by part, activations included; None if they are unknown.
        flops: floating-point operations.
        moved: bytes of weights, keys and values that generation reads, a token at a time.
        kinds: bytes on disk of each kind of signals.
    """

    memory: int = 0
    disk: int = 0
    checkpoints: int = 0
    rows: int | None = None
    tokens: int | None = None
    exact: bool = True
    held: Memory | None = None
    flops: float = 0.0
    moved: float = 0.0
    kinds: Mapping[str, int] = field(default_factory=dict)


def costs(
    plan: Plan,
    shapes: Shapes,
    lengths: Mapping[Input, Lengths],
    teacher_lengths: Mapping[Input, Lengths] | None = None,
    *,
    steps: Sequence[Step] | None = None,
    peak: bool = False,
) -> dict[Step, Cost]:
    """Return the cost of every step of a plan, or of some.

    Args:
        plan: of one seed.
        shapes: the models by role, as far as they are known.
        lengths: of the data sets that the steps read. Those of the built-in task need not be among them.
        teacher_lengths: the same in the teacher's tokens, where it has another tokenizer.
        steps: of the plan; default: all.
        peak: also count what steps hold at their peak, and their floating-point operations (seconds).

    Raises:
        UserError: if training.lora does not fit its model.
    """
    known = {**_built_in(plan), **lengths}
    of_teachers = known if teacher_lengths is None else known | dict(teacher_lengths)
    pricing = _Pricing(plan, shapes, known, of_teachers, peak)
    return {step: pricing.cost(step) for step in steps or plan.steps}


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
            bounds[step.rows] = Lengths(task.demonstrations, task.demonstrations * longest, exact=False, responses=1)
    return bounds


@dataclass
class _Pricing:
    plan: Plan
    shapes: Shapes
    lengths: Mapping[Input, Lengths]
    teacher_lengths: Mapping[Input, Lengths]
    peak: bool = False

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
            return self._training(step.output, step.training, step.rows, 2, reference=True)
        if isinstance(step, Sft):
            return self._training(step.output, step.training, step.rows, 1)
        if isinstance(step, TrainRewardModel):
            dtype = None if step.start else "float32"
            return self._training(step.output, step.section.training, step.pairs, 2, dtype=dtype)
        if isinstance(step, Distill):
            training = recipe.methods[step.method].training
            data: Input | Sample = step.samples[0] if step.samples else step.train
            return self._training(step.output, training, data, len(step.algorithm.responses), shared=True)
        if isinstance(step, Pairs):
            responses = 2 * (step.language.task.teacher_pairs + step.language.task.test_prompts)
            return self._generation(step.model, "student", responses, recipe.evaluate)
        if isinstance(step, Sample):
            sampled, prompts = (self._of(rows, step.model.role) for rows in (step, step.data))
            count = sampled.rows if sampled else None
            return self._generation(step.model, step.model.role, count, recipe.sampling, prompts)
        if isinstance(step, ReadSignals):
            return self._signals(step)
        if isinstance(step, Evaluate):
            return self._evaluation(step)
        if isinstance(step, EvaluateRewardModel):
            return self._reading(step.model, "reward_model", self._of(step.test, "reward_model"), 2)
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
        tokens = rows * sampling.max_new_tokens
        return Lengths(rows, tokens, train.prompt_tokens * sampling.n, exact=False, responses=1)

    def _longest(self, length: Lengths, text: Text) -> int:
        """The most tokens of a row, or of a prompt with one response where they share none: what the data have, or else
        what truncation leaves."""
        limit = self.plan.context.recipe.data.max_length
        if text.shared:
            return length.longest or math.ceil(text.responses * limit if limit else text.tokens)
        return length.longest_text or math.ceil(limit or text.tokens / text.responses)

    def _training(
        self,
        output: Model,
        training: Training,
        data: Input | Sample,
        responses: int,
        *,
        shared: bool = False,
        reference: bool = False,
        dtype: str | None = None,
    ) -> Cost:
        """The cost of a training.

        Args:
            responses: that it reads of a row; `shared`: in one pass with one copy of the prompt.
            reference: whether it reads a frozen copy of the model too, which it holds besides unless it trains LoRA.
        """
        length = self._of(data, output.role)
        rows, tokens, exact = _seen(training, length)
        shape = self.shapes.get(output.role)
        if shape is None:
            return Cost(rows=rows, tokens=tokens, exact=exact)
        dtype = dtype or self.plan.context.recipe.model.dtype
        weights, adapter = weight_bytes(shape, dtype), adapter_bytes(shape, training)
        beside = reference and not adapter
        cost = Cost(
            memory=training_memory(shape, training, dtype, reference=beside).state,
            disk=weights + adapter,
            checkpoints=checkpoint_bytes(adapter or weights, training),
            rows=rows,
            tokens=tokens,
            exact=exact,
        )
        if not self.peak or length is None or rows is None:
            return cost
        text = length.text(responses, shared=shared)
        held = training_memory(
            shape,
            training,
            dtype,
            self._longest(length, text),
            scored=text.response * text.responses / max(1.0, text.tokens),
            sequences=1 if shared else responses,
            reference=beside,
        )
        per_row = training_flops(shape, training, text) + (sum(forward_flops(shape, text)) if reference else 0)
        return replace(cost, held=held, flops=rows * per_row)

    def _stored(self, role: str) -> int:
        """Bytes of a model as it is stored."""
        return weight_bytes(self.shapes[role], "auto") if role in self.shapes else 0

    def _weights(self, model: Model, role: ModelRole) -> int:
        """Bytes of a model that is read as one of this role."""
        shape = self.shapes.get(model.role)
        return 0 if shape is None else weight_bytes(shape, self._dtype(role), self._loading(role)["quantization"])

    def _loading(self, role: ModelRole) -> dict[str, Any]:
        """The dtype and quantization that a model is loaded in, read as one of this role."""
        if role == "reward_model":
            return {"dtype": "auto", "quantization": None}
        return self.plan.context.load_options(role)

    def _dtype(self, role: ModelRole) -> str:
        return cast(str, self._loading(role)["dtype"])

    def _reading(
        self,
        model: Model,
        role: ModelRole,
        length: Lengths | None,
        responses: int,
        *,
        scored: int | None = None,
        bf16: bool = False,
        k: int = 0,
    ) -> Cost:
        """The cost of a pass over rows with some of their responses.

        Args:
            scored: states of each response whose logits it needs; default: all.
            bf16: whether it is under autocast.
            k: tokens kept of each distribution.
        """
        weights, shape = self._weights(model, role), self.shapes.get(model.role)
        if length is None:
            return Cost(memory=weights)
        tokens = length.tokens * responses // length.responses + length.prompt_tokens
        cost = Cost(memory=weights, rows=length.rows, tokens=tokens, exact=length.exact)
        if not self.peak or shape is None:
            return cost
        text = length.text(responses, scored=scored)
        states = text.responses * (text.response if scored is None else scored)
        held = reading_memory(
            shape,
            weights,
            self.plan.context.recipe.signals.batch_tokens,
            self._longest(length, text),
            self._dtype(role),
            scored=min(1.0, states / max(1.0, text.tokens)),
            bf16=bf16,
            k=k,
        )
        flops = length.rows * sum(forward_flops(shape, text))
        return replace(cost, held=held, flops=flops)

    def _generation(
        self,
        model: Model,
        role: ModelRole,
        rows: int | None,
        options: Sampling | Evaluation,
        data: Lengths | None = None,
    ) -> Cost:
        """The cost of responses to the prompts of some data; without data, to prompts of no length."""
        weights, shape, longest = self._weights(model, role), self.shapes.get(model.role), options.max_new_tokens
        tokens = None if rows is None else rows * longest
        cost = Cost(memory=weights, disk=(tokens or 0) * CHARACTERS, rows=rows, tokens=tokens, exact=False)
        if not self.peak or shape is None or not rows:
            return cost
        batch = min(rows, options.batch_size)
        prompt = data.prompt_tokens / max(1, data.rows) if data else 0.0
        dtype, top_p = self._dtype(role), options.top_p if isinstance(options, Sampling) else 1.0
        held = sampling_memory(shape, weights, batch, math.ceil(prompt), longest, dtype, top_p=top_p)
        cached = batch * (prompt + longest / 2) * cache_bytes(shape, dtype_of(shape, dtype))
        flops = rows * sum(forward_flops(shape, Text(prompt, longest)))
        return replace(cost, held=held, flops=flops, moved=math.ceil(rows / batch) * longest * (weights + cached))

    def _signals(self, step: ReadSignals) -> Cost:
        length = self._of(step.data, step.model.role)
        role = "student" if step.role == "reference" else step.model.role
        positions = step.reading.get("positions", "all")
        section = self.plan.context.recipe.signals
        shape = self.shapes.get(step.model.role) or next(iter(self.shapes.values()), None)
        k = 0
        if "topk" in step.kinds and shape is not None:
            k = vocabulary_rows(shape) if section.k == "vocab" else section.k
        cost = self._reading(
            step.model,
            role,
            length,
            len(step.responses),
            scored=2 if positions == "endpoints" else None,
            bf16=step.bf16,
            k=k,
        )
        if length is None or shape is None:
            return cost
        responses = length.rows * len(step.responses)
        tokens = length.tokens * len(step.responses) // length.responses

        def stored(*kinds: str) -> int:
            return store_bytes(
                kinds,
                tokens,
                responses,
                vocabulary_rows(shape),
                positions=positions,
                value_dtype=section.value_dtype,
                k=section.k,
                packed=section.topk_coding != "float32" if section.topk_coding else section.k != "vocab",
                own_ids=step.ids_from is None,
            )

        return replace(cost, disk=stored(*step.kinds), kinds={kind: stored(kind) - stored() for kind in step.kinds})

    def _evaluation(self, step: Evaluate) -> Cost:
        recipe = self.plan.context.recipe
        role: ModelRole = "student" if step.language else step.model.role
        prompts = max(recipe.evaluate.prompts, recipe.evaluate.samples) if step.test is not None else 0
        if recipe.data.synthetic:
            prompts = 2 * recipe.data.synthetic.test_prompts  # sampled, and greedy
        pairs = self._of(step.test, role) if step.test else None
        generated = self._generation(step.model, role, prompts, recipe.evaluate, pairs)
        read = Cost()
        if step.reference and pairs:
            read = self._reading(step.model, role, pairs, 2, bf16=step.reference.bf16)
        # the sampler is freed first; then the student is beside its start, and after that beside the reward model
        scored = step.test is not None and recipe.evaluate.prompts > 0
        judge = self._weights(step.reward_model, "reward_model") if scored and step.reward_model else 0
        start = self._weights(step.start, "student") if scored and step.start else 0
        own = self._weights(step.model, role) if step.start or step.reference else 0
        held = max((one for one in (generated.held, read.held) if one), key=lambda one: one.total, default=None)
        if held is not None:
            held = replace(held, frozen=max(0, own + max(start, judge) - held.weights))
        return replace(
            generated,
            memory=max(generated.memory, own + max(start, judge)),
            disk=generated.disk if step.language is None else 0,
            rows=prompts + (read.rows or 0),
            tokens=(generated.tokens or 0) + (read.tokens or 0),
            exact=not prompts and read.exact,
            held=held,
            flops=generated.flops + read.flops,
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
