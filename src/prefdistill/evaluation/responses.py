"""Responses of a model: their text, length, references and scores, and everything measured from them."""

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prefdistill.data.prompts import prompt_text, prompts_of
from prefdistill.evaluation.measure import Measured
from prefdistill.sampling.sampler import Response

if TYPE_CHECKING:
    from datasets import Dataset

    from prefdistill.evaluation.reward_model import RewardModel

from prefdistill.evaluation.metric_inputs import RESPONSE, Responses, Scores, first_rows, text_of, word_count

REFERENCES = ("chosen", "completion")  # columns of reference responses: the first of these that the data have


def unique_prompts(rows: "Dataset", limit: int | None = None) -> "Dataset":
    """Return the rows of `first_rows`."""
    return rows.select(first_rows(prompts_of(rows), limit))


def references_of(rows: "Dataset") -> dict[str, str]:
    """Return the reference response of each prompt: its first chosen response, or first completion."""
    column = next((name for name in REFERENCES if name in rows.column_names), None)
    references: dict[str, str] = {}
    if column is not None:
        for prompt, response in zip(prompts_of(rows), rows[column][:], strict=True):
            references.setdefault(prompt_text(prompt), text_of(response))
    return references


def scores_by_prompt(prompts: list[Any], scores: Any) -> Scores:
    """Return the scores of the responses to each prompt."""
    by_prompt: Scores = defaultdict(list)
    for prompt, score in zip(prompts, scores, strict=True):
        by_prompt[prompt_text(prompt)].append(float(score))
    return by_prompt


def measure_texts(measured: Measured, responses: Responses) -> None:
    """Add every metric of responses and, where there are references, "reference_words", the length to group by."""
    measured.add_metrics("responses", responses)
    if responses.references is not None:
        words = [word_count(reference) for reference in responses.references]
        measured.add("reference_words", words, responses.groups)


def measure_responses(
    measured: Measured,
    rows: "Dataset",
    data: "Dataset",
    reward_model: "RewardModel | None",
    *,
    prompts: int,
    samples: int,
) -> None:
    """Add every metric of sampled responses, and the first of them for the report.

    Args:
        rows: prompts with a column `RESPONSE`.
        data: with the reference responses.
        reward_model: None: no scores.
        prompts: measure this many of the responses.
        samples: keep this many.
    """
    responses = Responses.read(rows, RESPONSE, references_of(data))
    if prompts:
        counted = responses.first(prompts)
        measure_texts(measured, reward_model.scored(counted) if reward_model else counted)
    scores = measured.items.get("reward_model_score", [])
    measured.samples = [
        {"prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"], "response": text}
        | ({"score": scores[row]} if row < len(scores) else {})
        for row, (prompt, text) in enumerate(zip(responses.prompts, responses.texts, strict=True))
    ][:samples]


def measure_rewards(
    measured: Measured,
    prompts: list[str],
    respond: Callable[[float, str], list[Response]],
    reward: Callable[[str, str, bool], float],
    *,
    samples: int,
) -> None:
    """Add every metric of responses with a known reward: at temperature 1, and greedy.

    Args:
        respond: from a temperature and a name for the progress bar to a response to each prompt.
        reward: of a prompt, a response, and whether that has ended.
        samples: keep this many.
    """
    for source, name, temperature in (("responses", "reward", 1.0), ("greedy", "reward_greedy", 0.0)):
        sampled = respond(temperature, name)
        responses = Responses(
            prompts,
            [response.text for response in sampled],
            [response.tokens for response in sampled],
            rewards=[reward(p, response.text, response.ended) for p, response in zip(prompts, sampled, strict=True)],
        )
        measured.add_metrics(source, responses)
        if source == "responses":
            rows = zip(prompts, responses.texts, responses.rewards or [], strict=True)
            measured.samples = [{"prompt": p, "response": text, "score": score} for p, text, score in rows][:samples]
