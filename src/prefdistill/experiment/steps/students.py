"""Steps of the students: train one with a method, and evaluate a model."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json, write_json
from prefdistill.core.progress import say_once
from prefdistill.data import synthetic
from prefdistill.data.encoder import accepts_prompt
from prefdistill.data.numbers import columns_digest
from prefdistill.data.prompts import prompt_columns, prompts_of
from prefdistill.evaluation.measure import Measured
from prefdistill.evaluation.metric_inputs import RESPONSE, first_rows
from prefdistill.evaluation.metrics import METRICS
from prefdistill.evaluation.pairs import implicit_rewards
from prefdistill.evaluation.responses import log_ratios, measure_responses, measure_rewards
from prefdistill.experiment.step import Model, Rows, Step, Trained
from prefdistill.experiment.steps.reward_model import load_reward_model
from prefdistill.experiment.steps.signals import ReadSignals, Sample
from prefdistill.experiment.steps.synthetic import Language, load_student, respond
from prefdistill.methods import Method
from prefdistill.models.load import load_model
from prefdistill.sampling.files import sample_responses
from prefdistill.sampling.sampler import Response
from prefdistill.training.factory import make_trainer
from prefdistill.training.loop import fit

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


@dataclass(eq=False, kw_only=True)
class Distill(Trained):
    """Train a student with one method and one order of the data."""

    kind: ClassVar[str] = "distill"
    method: str
    order: int
    algorithm: Method
    train: Rows
    start: Model
    samples: tuple[Sample, ...]
    signals: tuple[ReadSignals, ...]

    @property
    def options(self) -> dict[str, Any]:
        run, truncation = self.context.recipe.methods[self.method], self.context.truncation
        return {
            "method": run.method,
            "options": run.options,
            "order": self.order,
            "training": run.training.cache_key(),
            "truncation": [truncation.max_length, truncation.max_prompt_length],
            "dtype": self.context.recipe.model.dtype,
            **({"columns": columns_digest(self.train.rows, columns)} if (columns := self.algorithm.columns) else {}),
        }

    def read(self) -> dict[str, Any]:
        data = [self.train.name, *(sample.name for sample in self.samples)]
        return self.noted(" and ".join(data), self.algorithm.responses)

    def make(self, out: Path) -> None:
        names, seed = self.context.recipe.model, self.context.seed
        load = functools.partial(
            load_model, self.start.place, dtype=names.dtype, trust_remote_code=names.trust_remote_code
        )
        trainer = make_trainer(
            self.algorithm,
            load,
            side_by_side([sample.rows for sample in self.samples]) if self.samples else self.train.rows,
            self.reads_with.tokenizer,
            self.context.recipe.methods[self.method].training,
            out,
            signals=[step.store for step in self.signals],
            truncation=self.context.truncation,
            seed=seed,
            data_seed=seed * 1_000 + self.order,
        )
        fit(trainer, out, self.name, verify=self.context.recipe.methods[self.method].training.verify)


def side_by_side(samples: "Sequence[Dataset]") -> "Dataset":
    """Return samples of the same prompts as one data set with a column for each."""
    first, *others = samples
    for other in others:
        if first["prompt"][:] != other["prompt"][:]:
            raise RuntimeError("teacher and student were sampled at different prompts")
        for column in set(other.column_names) - set(first.column_names):
            first = first.add_column(column, other[column][:], feature=other.features[column])
    return first


@dataclass(eq=False, kw_only=True)
class Evaluate(Step):
    """Evaluate one model: its responses to the test prompts and, of a student, how it orders the held-out pairs."""

    kind: ClassVar[str] = "evaluate"
    model: Model
    start: Model | None  # of a student, to measure its KL divergence from
    language: Language | None  # of the built-in task, whose reward is known
    reference: ReadSignals | None  # of the start on the test pairs, to compare a student with
    test: Rows | None
    reward_model: Model | None

    @property
    def options(self) -> dict[str, Any]:
        section = self.context.recipe.evaluate.model_dump(exclude={"length_ranges"})
        options = self._loading | section | {"metrics": list(METRICS)}  # a new metric makes the evaluation stale
        responds = self.language is None and self.test is not None  # to prompts of the user's data
        if self.context.two_tokenizers and responds and self._prompts[1]:
            options["prompts_refused"] = self._prompts[1]
        return options

    @property
    def _loading(self) -> dict[str, Any]:
        # the pairs of the built-in task are responses of the teacher in the dtype of training
        return self.context.load_options("student" if self.language else self.model.role, self.model)

    def make(self, out: Path) -> None:
        measured, section = Measured(), self.context.recipe.evaluate
        student = functools.cache(lambda: load_student(self.context, self.model))
        if self.language is not None:
            prompts = self.language.prompts()["test"]

            def answer(temperature: float, what: str) -> list[Response]:
                return respond(self, student(), prompts, temperature, self.context.seed, what)

            measure_rewards(measured, prompts, answer, synthetic.reward, samples=section.samples)
        elif self.test is not None and max(section.prompts, section.samples):
            responses = self._sample(self.test, out)
            scored = responses.select(range(min(section.prompts, len(responses))))
            ratios = self._log_ratios(student(), self.start, scored) if self.start and len(scored) else None
            reward_model = load_reward_model(self.context, self.reward_model) if self.reward_model else None
            measure_responses(
                measured,
                responses,
                self.test.rows,
                reward_model,
                prompts=section.prompts,
                samples=section.samples,
                log_ratios=ratios,
            )
        if self.reference is not None and self.test is not None:
            tokenizer = self.reads_with.tokenizer
            rewards = implicit_rewards(student(), self.test.rows, tokenizer, self.reference.store)
            measured.add_metrics("pairs", rewards)
        write_json(out / "evaluation.json", measured.__dict__)

    def _log_ratios(self, student: Any, start: Model, responses: "Dataset") -> "np.ndarray | None":
        bf16 = self.reference is not None and self.reference.bf16
        return log_ratios(student, load_student(self.context, start), responses, self.reads_with.tokenizer, bf16=bf16)

    @functools.cached_property
    def _prompts(self) -> tuple[list[int], list[int]]:
        """The rows of the test prompts that get a response, and of those before them that do not.

        Where teacher and student have chat templates of their own, a prompt counts that both accept: all models are
        compared on the same prompts.
        """
        assert self.test is not None
        section, prompts = self.context.recipe.evaluate, prompts_of(self.test.rows)
        wanted, rows = max(section.prompts, section.samples), first_rows(prompts)
        if not self.context.two_tokenizers:
            return rows[:wanted], []
        kept: list[int] = []
        refused: list[int] = []
        for row in rows:
            if len(kept) < wanted:
                accepted = all(accepts_prompt(one, prompts[row]) for one in self.context.chat_templates)
                (kept if accepted else refused).append(row)
        return kept, refused

    def _sample(self, test: Rows, out: Path) -> "Dataset":
        section = self.context.recipe.evaluate
        kept, refused = self._prompts
        if refused:
            say_once(f"evaluate: no response to {len(refused)} test prompts, which a chat template refuses")
        if not kept:
            raise UserError("there is no test prompt that the chat templates of teacher and student both accept")
        return sample_responses(
            self.model.place,
            test.rows.select(kept).select_columns(prompt_columns(test.rows.column_names)),
            self.reads_with.tokenizer,
            out / "responses.jsonl",
            column=RESPONSE,
            max_new_tokens=section.max_new_tokens,
            batch_size=section.batch_size,
            seed=self.context.seed,
            trust_remote_code=self.context.recipe.model.trust_remote_code,
            **self.context.placement(self.model.role),
            **self._loading,
        )

    def measured(self) -> Measured:
        return Measured(**read_json(self.directory / "evaluation.json"))
