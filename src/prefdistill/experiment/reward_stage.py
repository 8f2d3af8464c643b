"""The judge of a run: a reward model, named or trained on prompts that neither teacher nor student sees."""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json, write_json
from prefdistill.data.encode import drop_refused
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.messages import prompt_text
from prefdistill.evaluation.measure import Measured
from prefdistill.evaluation.reward_model import RewardModel, check_judged
from prefdistill.training.trl import train_reward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from prefdistill.evaluation.options import RewardModelOptions
    from prefdistill.experiment.pipeline import SeedRun

STAGE, WORTH = "reward-model", "judge"


def split_prompts(pairs: "Dataset", share: float, seed: int) -> tuple["Dataset", "Dataset"]:
    """Pairs for the students and, of a share of the prompts drawn by chance, for the judge; no prompt is in both.

    Raises:
        UserError: if there are too few prompts for two parts.
    """
    texts = [prompt_text(prompt) for prompt in pairs["prompt"][:]]
    prompts = list(dict.fromkeys(texts))
    count = round(share * len(prompts))
    if not 0 < count < len(prompts):
        raise UserError(
            f"reward_model.share={share} of {len(prompts)} training prompts leaves none for one side; change it, or "
            "turn the judge off with reward_model=null"
        )
    judged = set(random.Random(f"reward model {seed}").sample(prompts, count))
    rows: tuple[list[int], list[int]] = ([], [])
    for row, text in enumerate(texts):
        rows[text in judged].append(row)
    return pairs.select(rows[0]), pairs.select(rows[1])


def without_prompts(rows: "Dataset", others: "Dataset") -> "Dataset":
    """The rows whose prompt is not among those of the others."""
    taken = {prompt_text(prompt) for prompt in others["prompt"][:]}
    return rows.select([row for row, prompt in enumerate(rows["prompt"][:]) if prompt_text(prompt) not in taken])


@dataclass
class Judge:
    """The reward model of one seed's run."""

    run: "SeedRun"
    options: "RewardModelOptions"

    @property
    def name(self) -> str:
        return self.options.name or str(self.run.root / STAGE)

    @property
    def label(self) -> str:
        return self.options.name or f"trained on {len(self.run.judge_pairs)} pairs that no other model has seen"

    def check(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        """Whether one that is named can read the answers that it is to score, by models with this tokenizer."""
        run, recipe = self.run, self.run.recipe
        assert self.options.name is not None
        assert run.test is not None
        check_judged(
            self.options.name,
            run.test,
            str(recipe.data.test),
            tokenizer,
            limit=recipe.evaluate.prompts,
            trust_remote_code=recipe.model.trust_remote_code,
        )

    def prepare(self) -> None:
        """Train it, unless it is named, and see what it is worth on the held-out pairs."""
        run, training = self.run, self.options.training
        if self.options.name:
            run.name_model(STAGE, self.options.name)
        else:
            run.keys["judge-pairs"] = data_fingerprint(run.judge_pairs)
            request = {"shape": self.options.model, "training": training.cache_key(), "tokens": run.tokens}
            run.stage(STAGE, request, self._train, "judge-pairs", kind="reward_model")
        run.stage(WORTH, {}, self._look, STAGE, "test", kind="evaluate_reward_model")

    def _train(self, out: Path) -> None:
        assert self.options.model is not None
        train_reward(
            self.options.model,
            self.run.judge_pairs,
            self.run.tokenizer,
            self.options.training,
            out,
            seed=self.run.seed,
            what=STAGE,
        )

    def _look(self, out: Path) -> None:
        assert self.run.test is not None
        judge = self.load()
        pairs = drop_refused(self.run.test, judge.tokenizer, WORTH)
        write_json(out / "worth.json", judge.judge_pairs(pairs).__dict__)

    @cached_property
    def worth(self) -> Measured:
        return Measured(**read_json(self.run.root / WORTH / "worth.json"))

    def load(self) -> RewardModel:
        return RewardModel(self.name, trust_remote_code=self.run.recipe.model.trust_remote_code)
