"""Responses of a model: their text, length, references and scores, and everything measured from them."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.progress import Progress, say
from prefdistill.data.encode import encode_pairs
from prefdistill.data.prompts import prompt_text, prompts_of
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.measure import Measured
from prefdistill.sampling.sampler import Response
from prefdistill.signals.scoring import score_pairs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def log_ratios(
    student: "PreTrainedModel",
    start: "PreTrainedModel",
    responses: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    bf16: bool = False,
) -> np.ndarray | None:
    r"""Return how much likelier each response is under the student than under its start, in nats, [B].

    .. math:: \log\pi_\theta(y|x) - \log\pi_{start}(y|x)

    The mean over responses that the student sampled at temperature 1 is an unbiased estimate of the KL divergence of
    the student from its start, per response of at most as many tokens as were sampled.

    Args:
        responses: prompts with the column `RESPONSE`, and its ids as sampled.
        bf16: bfloat16 autocast.

    Returns:
        None, with a note, where the tokenizer cannot read some of the responses.
    """
    encoded, dropped = encode_pairs(responses, tokenizer, Truncation(None), responses=(RESPONSE,))
    if dropped:
        say(f"KL from the start: left out; {dropped}")
        return None
    sums = []
    for model, name in ((student, "student"), (start, "start")):
        with Progress(f"log-probs of responses, {name}", len(encoded), "response") as progress:
            options: dict[str, Any] = {"responses": (RESPONSE,), "bf16": bf16, "progress": progress}
            sums.append(score_pairs(model, encoded, tokenizer, ("logps",), **options)[f"{RESPONSE}_logps"])
    return np.subtract(*np.array(sums, dtype=np.float64))


def measure_responses(
    measured: Measured,
    rows: "Dataset",
    data: "Dataset",
    reward_model: "RewardModel | None",
    *,
    prompts: int,
    samples: int,
    log_ratios: np.ndarray | None = None,
) -> None:
    """Add every metric of sampled responses, and the first of them for the report.

    Args:
        rows: prompts with a column `RESPONSE`.
        data: with the reference responses.
        reward_model: None: no scores.
        log_ratios: see `Responses`, [rows]; None: unknown.
        prompts: measure this many of the responses.
        samples: keep this many.
    """
    responses = replace(Responses.read(rows, RESPONSE, references_of(data)), log_ratios=log_ratios)
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
