"""What metrics are computed from: responses to prompts, and the implicit rewards of pairs."""

import dataclasses
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.data.columns import tokens_column
from prefdistill.data.prompts import prompt_text, prompts_of
from prefdistill.evaluation.stats import numbered, pair_wins

if TYPE_CHECKING:
    from datasets import Dataset


RESPONSE = "response"  # the column of sampled responses
Scores = dict[str, list[float]]  # of the responses to each prompt


@dataclass(frozen=True)
class PairRewards:
    """Log-ratios of a student to its reference on held-out pairs; metrics of pairs are computed from this.

    Args:
        chosen, rejected: log-ratio of each response, nats, [pairs].
        chosen_logp: the student's log-probability of the chosen response per token, [pairs].
        row: the row of each pair in the data, [pairs].
        groups: the number of each pair's prompt, over which error bars are computed.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_logp: np.ndarray
    row: np.ndarray
    groups: list[int]

    def wins(self) -> np.ndarray:
        """Return 1 where the chosen response has the higher reward, one half at a tie, [pairs]."""
        return pair_wins(self.chosen, self.rejected)


@dataclass(frozen=True)
class Responses:
    """Responses to prompts and what is known of each; one row per response. Metrics are computed from this.

    Args:
        prompts: messages or text.
        texts: the text of each response.
        tokens: the number of tokens of each; None where the file does not have it.
        references: the reference response of each prompt's text, where the data have one.
        rewards: the true reward of each, where it is known.
        scores: of each by a reward model.
        log_ratios: log pi(y|x) - log pi_start(y|x) of each response, in nats.
        opponents: scores by the same reward model of other responses to the same prompts: "chosen" (the data's), or
            "against" (a file's).
    """

    prompts: list[Any]
    texts: list[str]
    tokens: list[int] | None = None
    references: list[str] | None = None
    rewards: Sequence[float] | None = None
    scores: Sequence[float] | np.ndarray | None = None
    log_ratios: Sequence[float] | np.ndarray | None = None
    opponents: dict[str, Scores] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, rows: "Dataset", column: str = RESPONSE, references: dict[str, str] | None = None) -> "Responses":
        """Read a data set with prompts and a column of responses.

        Raises:
            UserError: if there is no such column, or `references` lacks a prompt.
        """
        if column not in rows.column_names:
            raise UserError(
                f"the responses have no column {column!r}; their columns: {', '.join(rows.column_names)}. Name the "
                "right one with --column"
            )
        prompts = prompts_of(rows)
        for row, response in enumerate(rows[column][:]):
            if not isinstance(response, str) and not (
                isinstance(response, list)
                and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in response)
            ):
                raise UserError(
                    f"row {row} of the responses has no response: {column!r} must be text or a list of messages, not "
                    f"{reprlib.repr(response)}"
                )
        reference_texts = None
        if references:
            texts = [prompt_text(prompt) for prompt in prompts]
            if missing := [text for text in texts if text not in references]:
                raise UserError(f"{len(missing)} prompts of the responses are not in the data, e.g. {missing[0]:.80}")
            reference_texts = [references[text] for text in texts]
        counts = tokens_column(column)
        return cls(
            prompts,
            [text_of(response) for response in rows[column][:]],
            rows[counts][:] if counts in rows.column_names else None,
            reference_texts,
        )

    @property
    def groups(self) -> list[int]:
        """The number of each response's prompt, over which error bars are computed."""
        return numbered([prompt_text(prompt) for prompt in self.prompts])

    def first(self, count: int) -> "Responses":
        """Return the first `count` responses."""
        columns = ("prompts", "texts", "tokens", "references", "rewards", "scores", "log_ratios")
        values: dict[str, Any] = {name: getattr(self, name) for name in columns}
        cut: dict[str, Any] = {name: None if value is None else value[:count] for name, value in values.items()}
        return replace(self, **cut)

    def word_counts(self) -> list[int]:
        return list(map(word_count, self.texts))

    def exact_matches(self) -> list[bool] | None:
        """Return whether each response is its reference, but for white space around; None without references."""
        pairs = zip(self.texts, self.references or [], strict=False)
        return [text.strip() == reference.strip() for text, reference in pairs] if self.references else None

    def rouge_l(self) -> list[float] | None:
        """Return ROUGE-L with each reference; None without references."""
        return rouge_l(self.texts, self.references) if self.references else None

    def win_rates(self, opponent: str) -> list[float] | None:
        r"""Return each response's share of wins against the opponent's responses A_i to its prompt, by score.

        .. math:: \frac1{|A_i|} \sum_{a \in A_i} [S(y_i) > a] + \tfrac12 [S(y_i) = a]

        None without scores or such an opponent.

        Raises:
            UserError: if the opponent lacks a prompt.
        """
        if self.scores is None or opponent not in self.opponents:
            return None
        wins = []
        for prompt, score in zip(self.prompts, self.scores, strict=True):
            others = self.opponents[opponent].get(prompt_text(prompt))
            if not others:
                raise UserError(f"no win rate: the responses to compare with lack the prompt {prompt_text(prompt):.80}")
            wins.append(float(np.mean(pair_wins(np.full(len(others), score), others))))
        return wins


def text_of(response: Any) -> str:
    """Return a response as text; several messages, line by line."""
    return response if isinstance(response, str) else "\n".join(message["content"] for message in response)


def word_count(text: str) -> int:
    """Return the number of words, split at white space."""
    return len(text.split())


def rouge_l(responses: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return ROUGE-L (F1, stemmed) of each response, by the rouge-score package.

    Example:
        >>> rouge_l(["the cat sat"], ["the cats sat down"])
        [0.8571428571428571]
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, responses, strict=True)
    return [scorer.score(reference, response)["rougeL"].fmeasure for reference, response in pairs]


def first_rows(prompts: list[Any], limit: int | None = None) -> list[int]:
    """Return the first row of each of the first `limit` different prompts."""
    rows: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt_text(prompt), row)
    return list(rows.values())[:limit]
