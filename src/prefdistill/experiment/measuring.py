"""What is measured of the models of a run: a stage for each, and what the teacher's terms say of the held-out pairs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.files import read_json, write_json
from prefdistill.data import synthetic
from prefdistill.evaluation.generations import RESPONSE, measure_answers, measure_rewards, unique_prompts
from prefdistill.evaluation.measure import Measured, measure_pairs, numbered
from prefdistill.evaluation.pairs import gauge_flips, pair_terms, prompts_of
from prefdistill.evaluation.shaping import shaping_of
from prefdistill.experiment.reward_stage import STAGE as JUDGE
from prefdistill.models.device import default_dtype
from prefdistill.models.load import ready
from prefdistill.sampling.files import sample_responses
from prefdistill.sampling.sampler import Response
from prefdistill.signals import SignalSet

if TYPE_CHECKING:
    from datasets import Dataset

    from prefdistill.experiment.pipeline import SeedRun


@dataclass
class Measuring:
    """The evaluation of one seed's run."""

    run: "SeedRun"

    def evaluate(self, name: str, model: str, method: str | None = None, order: int | None = None) -> Measured:
        """Measure one model on the held-out pairs and, where the reward is known, by its own responses."""

        def make(out: Path) -> None:
            measured = self._measure(model, out)
            write_json(out / "evaluation.json", measured.__dict__)

        made_by = {self.run.teacher: self.run.teacher_stage, self.run.start: self.run.start_stage}
        read = (made_by.get(model, f"distill-{name}"), "data", "signals-reference-test", "test", JUDGE)
        before = [key for key in read if key in self.run.keys]
        request = self._weights_of(model) | self.run.recipe.evaluate.model_dump(exclude={"length_ranges"})
        labels = {"role": "student" if method else name, "method": method, "order": order}
        self.run.stage(f"evaluate-{name}", request, make, *before, kind="evaluate", **labels)
        return Measured(**read_json(self.run.root / f"evaluate-{name}" / "evaluation.json"))

    @property
    def answers(self) -> int:
        """How many prompts of the test pairs are answered."""
        return max(self.run.recipe.evaluate.prompts, self.run.recipe.evaluate.samples)

    def _measure(self, name: str, out: Path) -> Measured:
        measured, options = Measured(), self.run.recipe.evaluate
        if self.run.recipe.data.synthetic:
            prompts = read_json(self.run.root / "data" / "prompts.json")["test"]
            model, asked = ready(self.run.load(name)), as_messages(prompts)

            def answer(temperature: float, what: str) -> list[Response]:
                return self.run.sample(model, asked, temperature=temperature, seed=self.run.seed, what=what)

            measure_rewards(measured, prompts, answer, synthetic.reward, samples=options.samples)
        elif self.run.test is not None and self.answers:
            rows = self._answer(name, out)
            judge = self.run.judge.load() if self.run.judge else None
            measure_answers(measured, rows, self.run.test, judge, prompts=options.prompts, samples=options.samples)
        reference = next((store for store in self.run.test_stores if store.role == "reference"), None)
        if reference is not None and self.run.test is not None and name not in (self.run.start, self.run.teacher):
            measure_pairs(measured, ready(self.run.load(name)), self.run.test, self.run.tokenizer, reference)
        return measured

    def _answer(self, name: str, out: Path) -> "Dataset":
        """One response of a model to each of the first test prompts, stored."""
        assert self.run.test is not None
        recipe = self.run.recipe
        return sample_responses(
            name,
            unique_prompts(self.run.test, self.answers).select_columns("prompt"),
            self.run.tokenizer,
            out / "responses.jsonl",
            column=RESPONSE,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            batch_size=recipe.evaluate.batch_size,
            seed=self.run.seed,
            learnt_from=False,
            **self._weights_of(name),
            trust_remote_code=recipe.model.trust_remote_code,
        )

    def _weights_of(self, name: str) -> dict[str, Any]:
        """What a model answers in: the teacher as it is read, the others as they are trained."""
        recipe = self.run.recipe
        if name == self.run.teacher and not recipe.data.synthetic:
            dtype = recipe.signals.dtype or default_dtype("teacher")
            return {"dtype": dtype, "quantization": recipe.signals.quantization}
        return {"dtype": recipe.model.dtype, "quantization": None}

    @cached_property
    def _test_signals(self) -> SignalSet | None:
        if self.run.test is None or not any(store.role == "teacher" for store in self.run.test_stores):
            return None
        return SignalSet.of(self.run.test_stores, self.run.test)

    def margin_terms(self) -> dict[str, np.ndarray]:
        """Per test pair, whether each term of the teacher orders it right."""
        signals = self._test_signals
        return pair_terms(signals) if signals else {}

    def margin_groups(self) -> list[int]:
        """The number of the prompt of each pair of `margin_terms`."""
        signals = self._test_signals
        return numbered(prompts_of(signals.data, signals.rows)) if signals else []

    def gauge_flips(self) -> dict[str, Any]:
        """How far the order of the held-out pairs by the teacher's value depends on its gauge."""
        return next((gauge_flips(store) for store in self.run.test_stores if "values" in store.kinds), {})

    def shaping(self, measured: dict[str, list[Measured]]) -> dict[str, Any]:
        """The offset of each method that has one, on the test pairs, beside the margin its DPO part has learnt."""
        signals = self._test_signals
        if signals is None:
            return {}
        found, warnings = shaping_of(self.run.methods, signals, measured)
        self.run.warnings += warnings
        return found


def as_messages(prompts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]
