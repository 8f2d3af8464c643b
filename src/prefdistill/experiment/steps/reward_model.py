"""Steps of the reward model: train it on prompts of its own, and measure its accuracy on the held-out pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from prefdistill.core.files import read_json, write_json
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import drop_refused
from prefdistill.evaluation.measure import Measured
from prefdistill.evaluation.options import RewardModelOptions
from prefdistill.evaluation.reward_model import RewardModel
from prefdistill.experiment.step import Context, Model, ModelRole, Rows, Step, Tokenizer, Trained
from prefdistill.models.classifiers import new_classifier
from prefdistill.models.load import load_tokenizer
from prefdistill.models.scratch import random_model
from prefdistill.training.trl import train_reward


@dataclass(eq=False, kw_only=True)
class TrainRewardModel(Trained):
    """Train a reward model from a pretrained model, or from random weights."""

    kind: ClassVar[str] = "reward_model"
    output_role: ModelRole = "reward_model"
    pairs: Rows
    tokenizer: Tokenizer  # of a model from random weights; a pretrained one has its own
    start: Model | None
    section: RewardModelOptions

    @property
    def options(self) -> dict[str, Any]:
        source, dtype = self.section.start, self.context.recipe.model.dtype
        shape = {**source.cache_key(), "dtype": dtype} if source else self.section.shape
        return {"shape": shape, "training": self.section.training.cache_key()}

    def read(self) -> dict[str, Any]:
        return self.noted(self.pairs.name, SIDES)

    def make(self, out: Path) -> None:
        source, names, seed = self.section.start, self.context.recipe.model, self.context.seed
        make_model: Callable[[], Any]
        if source:
            trust = names.trust_remote_code
            tokenizer = load_tokenizer(source.source, trust_remote_code=trust)
            make_model = partial(new_classifier, source, dtype=names.dtype, seed=seed, trust_remote_code=trust)
        else:
            tokenizer = self.tokenizer.tokenizer
            make_model = partial(random_model, tokenizer, self.section.shape, seed, reward=True)
        train_reward(
            make_model,
            self.pairs.rows,
            tokenizer,
            self.section.training,
            out,
            seed=seed,
            what=self.name,
        )


@dataclass(eq=False, kw_only=True)
class EvaluateRewardModel(Step):
    """Measure the accuracy of the reward model on the held-out pairs."""

    kind: ClassVar[str] = "evaluate_reward_model"
    draws: ClassVar[bool] = False
    model: Model
    test: Rows

    def make(self, out: Path) -> None:
        reward_model = load_reward_model(self.context, self.model)
        pairs, _ = drop_refused(self.test.rows, reward_model.tokenizer, self.name)
        write_json(out / "evaluation.json", reward_model.score_pairs(pairs).__dict__)

    def measured(self) -> Measured:
        return Measured(**read_json(self.directory / "evaluation.json"))


def load_reward_model(context: Context, model: Model) -> RewardModel:
    return RewardModel(model.place, trust_remote_code=context.recipe.model.trust_remote_code)
