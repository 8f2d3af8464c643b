"""A reward model as the judge: the score of each response, and what that judge is worth on held-out pairs."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress, say
from prefdistill.data.columns import SIDES
from prefdistill.data.encoder import accepts_prompt, reward_model_ids
from prefdistill.evaluation.generations import first_rows
from prefdistill.evaluation.measure import Measured, mean_of, numbered
from prefdistill.evaluation.pairs import pair_wins, prompts_of
from prefdistill.models.load import load_reward_model, load_tokenizer, ready

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class RewardModel:
    """Any sequence classifier with one label, by Hub name or directory, with its own tokenizer and chat template.

    A text of more tokens than the model has positions is cut at its end.

    Args:
        name: Hub name or directory.
        dtype: of the weights: "auto" is as stored.
        batch_tokens: padded tokens per forward pass.
        trust_remote_code: let the model's repository run its own code.

    Raises:
        UserError: see `load_reward_model`.

    Example:
        >>> RewardModel("my/reward-model").score(["Hello!"], ["Hi, how can I help?"])   # doctest: +SKIP
    """

    def __init__(
        self, name: str, *, dtype: str = "auto", batch_tokens: int = 16_384, trust_remote_code: bool = False
    ) -> None:
        model, self.tokenizer = load_reward_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model, self.batch_tokens = ready(model), batch_tokens
        config = model.config.get_text_config()
        self.pad, self.positions = config.pad_token_id, getattr(config, "max_position_embeddings", None)

    def score(self, prompts: list[Any], responses: list[Any], *, what: str = "judging") -> np.ndarray:
        """The score of each response to its prompt, [B]; texts of like length are read together."""
        ids = [reward_model_ids(self.tokenizer, *both) for both in zip(prompts, responses, strict=True)]
        if self.positions and (long := sum(len(text) > self.positions for text in ids)):
            say(f"{what}: {long} of {len(ids)} texts are cut at the {self.positions} tokens the reward model can read")
        ids = [text[: self.positions] for text in ids]
        scores = np.empty(len(ids))
        with Progress(what, len(ids), "response") as progress:
            for places in self._batches([len(text) for text in ids]):
                scores[places] = self._read([ids[place] for place in places])
                progress.update(len(places))
        return scores

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):  # the longest first
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > self.batch_tokens:
                batches.append([])
            batches[-1].append(place)
        return batches

    @torch.no_grad()
    def _read(self, ids: list[list[int]]) -> np.ndarray:
        width = max(map(len, ids))
        padded = torch.tensor([text + [self.pad] * (width - len(text)) for text in ids])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in ids])
        device = self.model.device
        logits = self.model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
        return logits[:, 0].double().cpu().numpy()

    def judge_pairs(self, pairs: "Dataset") -> Measured:
        """How it orders pairs ("accuracy"), and how length in its tokens does ("longer_is_better"), pair by pair.

        Beside them "chosen_score", its scores of the chosen responses.
        """
        prompts = pairs["prompt"][:]
        sides = {side: pairs[side][:] for side in SIDES}
        scores = {side: self.score(prompts, responses, what="judging pairs") for side, responses in sides.items()}
        lengths = [
            [len(reward_model_ids(self.tokenizer, *both)) for both in zip(prompts, responses, strict=True)]
            for responses in sides.values()
        ]
        groups = numbered(prompts_of(pairs, range(len(pairs))))
        measured = Measured()
        measured.add("accuracy", pair_wins(scores["chosen"], scores["rejected"]), groups)
        measured.add("longer_is_better", pair_wins(*lengths), groups)
        measured.add("chosen_score", scores["chosen"], groups)
        return measured


def check_judged(
    name: str,
    rows: "Dataset",
    where: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Whether a reward model's chat template takes an answer to each prompt: before any of them is answered.

    Args:
        name: of the reward model.
        rows: with the prompts, of which the first `limit` different ones are answered.
        where: they are from.
        tokenizer: of who answers; what its template refuses is not answered. None: it refuses none.

    Raises:
        UserError: if it refuses one, or there is no template for messages.
    """
    judge, prompts = load_tokenizer(name, trust_remote_code=trust_remote_code), rows["prompt"][:]
    for row in first_rows(prompts, limit):
        try:
            reward_model_ids(judge, prompts[row], "an answer")
        except UserError as error:
            if tokenizer is None or accepts_prompt(tokenizer, prompts[row]):
                raise UserError(f"{where}, row {row}: {error}") from error


def judge_of(name: str, worth: list[Measured]) -> dict[str, Any]:
    """`judge` of the results: what a reward model is worth on held-out pairs, one entry of `worth` per seed."""
    by_seed = [[one] for one in worth]
    return {
        "kind": "reward_model",
        "name": name,
        "accuracy": mean_of(by_seed, "accuracy"),
        "pairs": len(worth[0].items["accuracy"]),
        "longer_is_better": mean_of(by_seed, "longer_is_better"),
    }
