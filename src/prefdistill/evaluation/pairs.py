"""Held-out preference pairs: the implicit reward of a student, and how well terms of the teacher order them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.data.prompts import prompt_text, prompts_of
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.measure import Measured, mean_of
from prefdistill.evaluation.stats import PROMPTS, estimate, mean_and_error, numbered, pair_wins
from prefdistill.signals.ids import check_ids
from prefdistill.signals.join import join
from prefdistill.signals.needs import Need
from prefdistill.signals.scoring import score_pairs
from prefdistill.signals.shaping import shaping_returns
from prefdistill.signals.store import Signals, SignalSet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefdistill.evaluation.metric_inputs import PairRewards

SHAPING_TERMS = ("shaping return", "value after the end token")  # of `pair_terms`; the others are for comparison
LENGTH_TERM = "longer is better"


def implicit_rewards(
    student: "PreTrainedModel", pairs: "Dataset", tokenizer: "PreTrainedTokenizerBase", reference: Signals
) -> PairRewards:
    r"""Return the implicit reward of DPO, in units of beta, of a student on held-out pairs.

    .. math:: r(y) = \log\pi_\theta(y|x) - \log\pi_{ref}(y|x)

    Args:
        student: in eval mode, on its device.
        pairs: the held-out pairs that `reference` was computed on.
        tokenizer: the student's.
        reference: "logps" of the student's start.
    """
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation(**reference.manifest["truncation"]))
    check_ids(reference, encoded, tokenizer)
    rows = np.asarray(encoded["row"][:])
    with Progress("held-out pairs", len(SIDES) * len(encoded), "response") as progress:
        scores = score_pairs(
            student,
            encoded,
            tokenizer,
            ("logps",),
            bf16=reference.manifest["model"]["bf16"],
            batch_tokens=reference.manifest["batch_tokens"],
            progress=progress,
        )
    logps = {side: np.array(scores[f"{side}_logps"], dtype=np.float64) for side in SIDES}
    ratios = {side: logps[side] - reference.scalar(f"{side}_logps", rows) for side in SIDES}
    per_token = logps["chosen"] / reference.scalar("chosen_tokens", rows)
    return PairRewards(**ratios, chosen_logp=per_token, row=rows, groups=numbered(prompt_texts(pairs, rows)))


def prompt_texts(pairs: "Dataset", rows: Sequence[int] | np.ndarray) -> list[str]:
    """Return the prompt of each of these rows as text; error bars are over prompts."""
    prompts = prompts_of(pairs)
    return [prompt_text(prompts[row]) for row in rows]


def signals_for(pairs: "Dataset", tokenizer: "PreTrainedTokenizerBase", stores: list[Signals]) -> SignalSet:
    """Return the stores as one set, checked against the pairs, the tokenizer and the token ids.

    Raises:
        UserError: if the signals were computed from other data or tokens, or lack the reference's logps.
    """
    signals = join(stores, pairs, tokenizer, responses=SIDES).signals
    if signals.missing([Need("reference", "logps")]):
        raise UserError("evaluation needs the reference's logps: `prefdistill signals --role reference --kind logps`")
    return signals


def evaluate_pairs(
    student: "PreTrainedModel", pairs: "Dataset", tokenizer: "PreTrainedTokenizerBase", stores: list[Signals]
) -> dict[str, Any]:
    """Return every metric of held-out pairs and the accuracy of the teacher's terms, where its signals are there.

    Args:
        student: in eval mode, on its device.
        pairs: held-out pairs.
        tokenizer: the student's.
        stores: signals for these pairs: "reference" with logps, and optionally "teacher" with values and logps.

    Returns:
        `{"metrics": {name: estimate}, "margin_accuracy": {term: estimate}, "pairs": k}`, errors over prompts.

    Raises:
        UserError: see `signals_for`; or if the teacher's signals lack values of all states or logps.
    """
    signals = signals_for(pairs, tokenizer, stores)
    reference = signals.store("reference", "logps", "chosen")
    measured = Measured()
    measured.add_metrics("pairs", implicit_rewards(student, pairs, tokenizer, reference))
    missing = signals.missing([Need("teacher", "values"), Need("teacher", "logps")])
    if missing and any(store.role == "teacher" for store in stores):
        raise UserError(
            f"the teacher's signals lack {', '.join(need.kind for need in missing)}, without which its terms cannot be "
            "compared; extract them with --kind values,logps, or leave the teacher's signals out"
        )
    if missing:
        terms = {LENGTH_TERM: pair_wins(*(reference.scalar(f"{side}_tokens", signals.rows) for side in SIDES))}
    else:
        terms = pair_terms(signals)
    terms["the start's log-prob"] = pair_wins(*(reference.scalar(f"{side}_logps", signals.rows) for side in SIDES))
    prompts = prompt_texts(pairs, signals.rows)
    return {
        "metrics": {name: mean_of([[measured]], name) for name in measured.metrics},
        "margin_accuracy": {name: estimate(wins, prompts) | {"over": PROMPTS} for name, wins in terms.items()},
        "pairs": len(measured.items["reward_accuracy"]),
    }


def pair_terms(signals: SignalSet, *, discount: float = 1.0, terminal: str = "last") -> dict[str, np.ndarray]:
    """Return per-pair wins of the shaping return and of simpler terms to compare it with, from the teacher's signals.

    Terms: "shaping return" (by default that of the formula: discount 1, terminal "last"), "value after the end token"
    (terminal "bootstrap"), the teacher's log-probability of the response, its Q (sum of the raw logits of the tokens)
    and its implicit reward where their signals are there, and length.
    """

    def scalar(role: str, kind: str, name: str | None = None) -> list[np.ndarray]:
        return [signals.scalar(role, kind, side, name) for side in SIDES]

    def returns(terminal: str) -> list[np.ndarray]:
        return [shaping_returns(signals, side, discount=discount, terminal=terminal) for side in SIDES]

    terms = {"shaping return": returns(terminal)}
    if terminal != "bootstrap":
        terms["value after the end token"] = returns("bootstrap")
    logps = scalar("teacher", "logps")
    terms["teacher log-prob"] = logps
    if not signals.missing([Need("teacher", "q")]):
        terms["teacher Q (raw logits)"] = scalar("teacher", "q")
    if not signals.missing([Need("teacher_reference", "logps")]):
        reference = scalar("teacher_reference", "logps")
        terms["teacher implicit reward"] = [t - r for t, r in zip(logps, reference, strict=True)]
    terms[LENGTH_TERM] = scalar("teacher", "logps", "tokens")
    return {name: pair_wins(*scores) for name, scores in terms.items()}


def gauge_flips(signals: Signals) -> dict[str, Any]:
    """Return the share of pairs whose order by the shaping return flips when u.h(s) is added to all logits of a state.

    The offset leaves the policy unchanged, see `prefdistill.signals.gauge`. The return has discount 1, terminal "last".

    Args:
        signals: a store with "values" of both responses of each pair.

    Returns:
        `{"mean", "se", "n"}` over random directions u as long as a row of the head; 0.5 means that the value carries no
        information about the policy.
    """
    rows = signals.rows
    values, shifts = [], []
    for side in SIDES:
        last = signals.scalar(f"{side}_tokens", rows) - signals.scalar(f"{side}_ended", rows).astype(np.int64)
        states = zip(signals.ragged(f"{side}_values", rows), last, strict=True)
        values.append(np.array([value[n] for value, n in states])[:, None])
        shifts.append(np.stack(signals.ragged(f"{side}_gauge", rows)))
    margin = values[0] - values[1]
    flipped = margin * (margin + shifts[0] - shifts[1]) < 0  # a tie cannot flip
    return mean_and_error(flipped.mean(axis=0))
