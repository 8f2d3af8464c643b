"""Reward models: scores of responses, and the reward model's own accuracy on held-out pairs."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress, say
from prefdistill.data.columns import SIDES
from prefdistill.data.encoder import accepts_prompt, reward_model_ids
from prefdistill.data.prompts import prompt_text, prompts_of
from prefdistill.evaluation.length import length_balanced
from prefdistill.evaluation.measure import Measured, complete, mean_of
from prefdistill.evaluation.metric_inputs import Responses, first_rows
from prefdistill.evaluation.stats import numbered, pair_wins
from prefdistill.models.load import load_reward_model, load_tokenizer, ready

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class RewardModel:
    """A sequence classifier with one label, by Hub name or directory, with its own tokenizer and chat template.

    Its weights keep the dtype that they are stored in. A text longer than the model's maximum length is truncated at
    its end.

    Args:
        name: Hub name or directory.
        batch_tokens: padded tokens per forward pass.
        trust_remote_code: let the model's repository run its own code.

    Raises:
        UserError: see `load_reward_model`.

    Example:
        >>> RewardModel("my/reward-model").score(["Hello!"], ["Hi, how can I help?"])   # doctest: +SKIP
    """

    def __init__(self, name: str, *, batch_tokens: int = 16_384, trust_remote_code: bool = False) -> None:
        model, self.tokenizer = load_reward_model(name, trust_remote_code=trust_remote_code)
        self.model, self.batch_tokens = ready(model), batch_tokens
        self.config = self.model.config.get_text_config()
        self.positions = getattr(self.config, "max_position_embeddings", None)

    def score(self, prompts: list[Any], responses: list[Any], *, what: str = "scoring") -> np.ndarray:
        """Return the score of each response to its prompt, [B]; texts of similar length share a batch."""
        ids = [reward_model_ids(self.tokenizer, *pair) for pair in zip(prompts, responses, strict=True)]
        if self.positions and (long := sum(len(text) > self.positions for text in ids)):
            say(f"{what}: {long} of {len(ids)} texts are truncated to the reward model's {self.positions} tokens")
        ids = [text[: self.positions] for text in ids]
        scores = np.empty(len(ids))
        with Progress(what, len(ids), "response") as progress:
            for rows in self._batches([len(text) for text in ids]):
                scores[rows] = self._forward([ids[row] for row in rows])
                progress.update(len(rows))
        return scores

    def scored(self, responses: Responses) -> Responses:
        """Return the responses with their scores."""
        return replace(responses, scores=self.score(responses.prompts, responses.texts))

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):  # the longest first
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > self.batch_tokens:
                batches.append([])
            batches[-1].append(row)
        return batches

    @torch.no_grad()
    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        width = max(map(len, ids))
        own_pad = self.config.pad_token_id
        pad = own_pad
        if own_pad is None and len(ids) > 1:
            pad = self._unused_id(ids)
            if pad is None:
                return np.concatenate([self._forward([text]) for text in ids])
        padded = torch.tensor([text + [pad] * (width - len(text)) for text in ids])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in ids])
        device = self.model.device
        self.config.pad_token_id = pad  # a classifier finds the last token of a text by it
        try:
            logits = self.model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
        finally:
            self.config.pad_token_id = own_pad
        return logits[:, 0].double().cpu().numpy()

    def _unused_id(self, ids: list[list[int]]) -> int | None:
        """Return a token id that no text has, if any: an end token as padding would hide the end of a text."""
        used = set().union(*ids)
        return next((token for token in range(self.config.vocab_size) if token not in used), None)

    def score_pairs(self, pairs: "Dataset") -> Measured:
        """Return, per pair, whether it orders the pair correctly ("accuracy"), whether length in its tokens does
        ("longer_is_better"), and its score of the chosen response ("chosen_score"); and, for the pairs of unequal
        length, its accuracy where length says nothing ("length_controlled", see `length_balanced`)."""
        prompts = prompts_of(pairs)
        sides = {side: pairs[side][:] for side in SIDES}
        scores = {side: self.score(prompts, responses, what="scoring pairs") for side, responses in sides.items()}
        lengths = [
            [len(reward_model_ids(self.tokenizer, *pair)) for pair in zip(prompts, responses, strict=True)]
            for responses in sides.values()
        ]
        groups = numbered([prompt_text(prompt) for prompt in prompts])
        measured = Measured()
        wins, extra = pair_wins(scores["chosen"], scores["rejected"]), np.array(lengths[0]) - np.array(lengths[1])
        measured.add("accuracy", wins, groups)
        if len(balanced := length_balanced(wins, extra)):
            measured.add("length_controlled", balanced, [groups[row] for row in np.flatnonzero(extra)])
        measured.add("longer_is_better", pair_wins(*lengths), groups)
        measured.add("chosen_score", scores["chosen"], groups)
        return measured


def check_prompts(
    name: str,
    rows: "Dataset",
    where: str,
    tokenizers: "Sequence[PreTrainedTokenizerBase]" = (),
    *,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Check, before any response is sampled, that a reward model's chat template accepts a response to each prompt.

    Args:
        name: the reward model.
        rows: with the prompts, of which the first `limit` different ones get a response.
        where: the source of the rows, for messages.
        tokenizers: of the models that respond; a prompt that the template of one refuses gets no response.

    Raises:
        UserError: if the template refuses one, or there is none for messages.
    """
    reward_tokenizer, prompts = load_tokenizer(name, trust_remote_code=trust_remote_code), prompts_of(rows)
    for row in first_rows(prompts, limit):
        try:
            reward_model_ids(reward_tokenizer, prompts[row], "a response")
        except UserError as error:
            if all(accepts_prompt(tokenizer, prompts[row]) for tokenizer in tokenizers):
                raise UserError(f"{where}, row {row}: {error}") from error


def accuracy_of(name: str, measured: list[Measured], *, same_items: bool = False) -> dict[str, Any]:
    """Return `reward_model` of the results: its accuracy on held-out pairs, from `score_pairs` of each seed."""
    by_seed = [[seed] for seed in measured]
    terms = [name for name in ("accuracy", "longer_is_better", "length_controlled") if complete(by_seed, name)]
    return {
        "name": name,
        "pairs": len(measured[0].items["accuracy"]),
        **{term: mean_of(by_seed, term, same_items=same_items) for term in terms},
    }
