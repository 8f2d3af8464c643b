"""What a model answers, beside what it should have answered and what another model did."""

import reprlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.data.columns import tokens_column
from prefdistill.data.messages import prompt_text
from prefdistill.evaluation.measure import Measured, numbered
from prefdistill.evaluation.pairs import pair_wins
from prefdistill.sampling.sampler import Response

if TYPE_CHECKING:
    from datasets import Dataset

    from prefdistill.evaluation.reward_model import RewardModel

RESPONSE = "response"  # the column of our own generations
REFERENCES = ("chosen", "completion")  # what a response is compared with: the first of these that the data have


@dataclass(frozen=True)
class Generations:
    """Responses to prompts, and what is known of each; one row per response.

    Args:
        prompts: as they were asked, messages or text.
        responses: the text of each.
        tokens: how many tokens each took, where the file says so.
        references: the text that each is compared with, where there is one.
    """

    prompts: list[Any]
    responses: list[str]
    tokens: list[int] | None = None
    references: list[str] | None = None

    @classmethod
    def read(cls, rows: "Dataset", column: str = RESPONSE, references: dict[str, str] | None = None) -> "Generations":
        """From a data set with prompts and a column of responses.

        Raises:
            UserError: if there is no such column, or a prompt that `references` lacks.
        """
        if column not in rows.column_names:
            raise UserError(
                f"the generations have no column {column!r}; they have {', '.join(rows.column_names)}. Name it with "
                "--column"
            )
        prompts = rows["prompt"][:]
        for row, response in enumerate(rows[column][:]):
            if not isinstance(response, str) and not _are_messages(response):
                raise UserError(
                    f"row {row} of the generations has no response: {column!r} must be text or a list of messages, not "
                    f"{reprlib.repr(response)}"
                )
        found = None
        if references:
            texts = [prompt_text(prompt) for prompt in prompts]
            if lacking := [text for text in texts if text not in references]:
                raise UserError(f"{len(lacking)} prompts of the generations are not in the data, e.g. {lacking[0]:.80}")
            found = [references[text] for text in texts]
        counted = tokens_column(column)
        return cls(
            prompts,
            [text_of(response) for response in rows[column][:]],
            rows[counted][:] if counted in rows.column_names else None,
            found,
        )

    @property
    def groups(self) -> list[int]:
        return numbered([prompt_text(prompt) for prompt in self.prompts])


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)


def text_of(response: Any) -> str:
    """A response as text; the messages of one that has several, line by line."""
    return response if isinstance(response, str) else "\n".join(message["content"] for message in response)


def first_rows(prompts: list[Any], limit: int | None = None) -> list[int]:
    """The first row of each of the first `limit` prompts."""
    seen: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        seen.setdefault(prompt_text(prompt), row)
    return list(seen.values())[:limit]


def unique_prompts(rows: "Dataset", limit: int | None = None) -> "Dataset":
    """The rows of `first_rows`."""
    return rows.select(first_rows(rows["prompt"][:], limit))


def references_of(rows: "Dataset") -> dict[str, str]:
    """By prompt, the response in the data that others are compared with: its first chosen, or first completion."""
    column = next((name for name in REFERENCES if name in rows.column_names), None)
    found: dict[str, str] = {}
    if column is not None:
        for prompt, response in zip(rows["prompt"][:], rows[column][:], strict=True):
            found.setdefault(prompt_text(prompt), text_of(response))
    return found


def words(text: str) -> int:
    return len(text.split())


def rouge_l(responses: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L (F1, stemmed) of each response, by the rouge-score package.

    Example:
        >>> rouge_l(["the cat sat"], ["the cats sat down"])
        [0.8571428571428571]
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    both = zip(references, responses, strict=True)
    return [scorer.score(reference, response)["rougeL"].fmeasure for reference, response in both]


def measure_texts(measured: Measured, generations: Generations) -> None:
    """Add length and, where there are references, ROUGE-L, exact match and "reference_words"."""
    groups = generations.groups
    if generations.references is not None:
        both = list(zip(generations.responses, generations.references, strict=True))
        measured.add("rouge_l", rouge_l(generations.responses, generations.references), groups)
        measured.add("exact_match", [ours.strip() == theirs.strip() for ours, theirs in both], groups)
        measured.add("reference_words", [words(reference) for reference in generations.references], groups)
    measured.add("response_words", [words(response) for response in generations.responses], groups)
    if generations.tokens is not None:
        measured.add("response_tokens", generations.tokens, groups)


def measure_scores(
    measured: Measured,
    generations: Generations,
    judge: "RewardModel",
    others: "dict[str, list[float]] | None" = None,
) -> None:
    r"""Add the reward model's score and, where there is something to compare with, the win rate.

    .. math:: \frac1B \sum_i \frac1{|A_i|} \sum_{a \in A_i} [S(y_i) > a] + \tfrac12 [S(y_i) = a]

    Args:
        others: the scores A_i of other responses to the same prompt, see `by_prompt`.

    Raises:
        UserError: if `others` lacks a prompt.
    """
    scores = judge.score(generations.prompts, generations.responses)
    measured.add("judge_score", scores, generations.groups)
    if others is None:
        return
    wins = []
    for prompt, score in zip(generations.prompts, scores, strict=True):
        against = others.get(prompt_text(prompt))
        if not against:
            raise UserError(f"what to compare with has no response to the prompt {prompt_text(prompt):.80}")
        wins.append(float(np.mean(pair_wins(np.full(len(against), score), against))))
    measured.add("judge_win_rate", wins, generations.groups)


def by_prompt(prompts: list[Any], scores: Any) -> dict[str, list[float]]:
    """The scores of the responses to each prompt."""
    found: dict[str, list[float]] = defaultdict(list)
    for prompt, score in zip(prompts, scores, strict=True):
        found[prompt_text(prompt)].append(float(score))
    return found


def measure_answers(
    measured: Measured, rows: "Dataset", data: "Dataset", judge: "RewardModel | None", *, prompts: int, samples: int
) -> None:
    """Add all that is measured of sampled responses, and the first of them for the report.

    Args:
        rows: prompts with a column `RESPONSE`.
        data: where the references come from.
        judge: None: no scores.
        prompts: measure this many of the responses.
        samples: keep this many.
    """
    answers = Generations.read(rows, RESPONSE, references_of(data))
    scored = Generations(*(part and part[:prompts] for part in astuple(answers)))
    if prompts:
        measure_texts(measured, scored)
    if prompts and judge is not None:
        measure_scores(measured, scored, judge)
    scores = measured.items.get("judge_score", [])
    measured.samples = [
        {"prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"], "response": response}
        | ({"score": scores[place]} if place < len(scores) else {})
        for place, (prompt, response) in enumerate(zip(answers.prompts, answers.responses, strict=True))
    ][:samples]


def measure_rewards(
    measured: Measured,
    prompts: list[str],
    answer: Callable[[float, str], list[Response]],
    reward: Callable[[str, str, bool], float],
    *,
    samples: int,
) -> None:
    """Add the known reward of responses at temperature 1 and of the greedy ones, and the length of the former.

    Args:
        answer: from a temperature and a name for the progress bar to a response to each prompt.
        reward: of a prompt, a response, and whether that has ended.
        samples: keep this many.
    """
    for metric, temperature in (("reward", 1.0), ("reward_greedy", 0.0)):
        found = answer(temperature, metric)
        both = list(zip(prompts, found, strict=True))
        measured.add(metric, [reward(prompt, response.text, response.ended) for prompt, response in both])
        if metric == "reward":
            measured.add("response_tokens", [response.tokens for response in found])
            measured.samples = [
                {"prompt": prompt, "response": response.text, "score": score}
                for (prompt, response), score in zip(both, measured.items[metric], strict=True)
            ][:samples]
