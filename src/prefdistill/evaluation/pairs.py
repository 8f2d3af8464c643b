"""How well a number per response orders held-out preference pairs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.data.messages import prompt_text
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.stats import PROMPTS, estimate, mean_and_error
from prefdistill.signals.needs import Need
from prefdistill.signals.scoring import score_pairs
from prefdistill.signals.shaping import shaping_returns
from prefdistill.signals.store import Signals, SignalSet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pair_wins(chosen: Any, rejected: Any) -> np.ndarray:
    """1 where the chosen response scores higher, 0 where it scores lower, one half at a tie; [B]."""
    chosen, rejected = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def margin_accuracy(chosen: Any, rejected: Any) -> float:
    r"""Fraction of pairs that a score orders right, a tie counting one half.

    .. math:: \frac1B \sum_i [S(y_w^i) > S(y_l^i)] + \tfrac12 [S(y_w^i) = S(y_l^i)]

    Args:
        chosen, rejected: scores of the two responses, array-likes of shape [B].

    Example:
        >>> margin_accuracy([1.0, 2.0], [0.0, 2.0])
        0.75
    """
    return float(pair_wins(chosen, rejected).mean())


def implicit_rewards(
    student: "PreTrainedModel", pairs: "Dataset", tokenizer: "PreTrainedTokenizerBase", reference: Signals
) -> dict[str, np.ndarray]:
    r"""Log-ratios of a student to its reference on held-out pairs, the implicit reward of DPO in units of beta.

    .. math:: r(y) = \log\pi_\theta(y|x) - \log\pi_{ref}(y|x)

    Args:
        student: in eval mode, on its device.
        pairs: the held-out pairs that `reference` was made from.
        tokenizer: the student's.
        reference: "logps" of the student's starting point.

    Returns:
        Per kept pair: `chosen` and `rejected` log-ratios (nats), `chosen_logp`, the student's log-probability of the
        chosen response per token, and `row`, the pair's row in `pairs`.
    """
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation(**reference.manifest["truncation"]))
    rows = np.asarray(encoded["row"][:])
    with Progress("held-out pairs", len(SIDES) * len(encoded), "response") as progress:
        found = score_pairs(
            student,
            encoded,
            tokenizer,
            ("logps",),
            bf16=reference.manifest["model"]["bf16"],
            batch_tokens=reference.manifest["batch_tokens"],
            progress=progress,
        )
    logps = {side: np.array(found[f"{side}_logps"], dtype=np.float64) for side in SIDES}
    ratios = {side: logps[side] - reference.scalar(f"{side}_logps", rows) for side in SIDES}
    return {**ratios, "chosen_logp": logps["chosen"] / reference.scalar("chosen_tokens", rows), "row": rows}


def prompts_of(pairs: "Dataset", rows: Sequence[int] | np.ndarray) -> list[str]:
    """The prompt of each of these rows as text: what error bars are drawn over, for pairs of one prompt go together."""
    prompts = pairs["prompt"][:]
    return [prompt_text(prompts[row]) for row in rows]


def signals_for(pairs: "Dataset", tokenizer: "PreTrainedTokenizerBase", stores: list[Signals]) -> SignalSet:
    """The stores together.

    Raises:
        UserError: if the signals were made from other data or tokens, or lack the reference's logps.
    """
    signals = SignalSet.of(stores, pairs)
    if signals.missing([Need("reference", "logps")]):
        raise UserError("evaluation needs the reference's logps: `prefdistill signals --role reference --kind logps`")
    for store in stores:
        store.check_tokenizer(tokenizer)
    return signals


def evaluate_pairs(
    student: "PreTrainedModel", pairs: "Dataset", tokenizer: "PreTrainedTokenizerBase", stores: list[Signals]
) -> dict[str, Any]:
    """Accuracy of a student's implicit reward on held-out pairs, and of the teacher's terms where it is given.

    Args:
        student: in eval mode, on its device.
        pairs: held-out pairs.
        tokenizer: the student's.
        stores: signals for these pairs: "reference" with logps, and optionally "teacher" with values and logps.

    Returns:
        `{"metrics": {name: estimate}, "margin_accuracy": {term: estimate}, "pairs": k}`, the errors over the prompts.

    Raises:
        UserError: see `signals_for`.
    """
    signals = signals_for(pairs, tokenizer, stores)
    reference = signals.store("reference", "logps", "chosen")
    reward = implicit_rewards(student, pairs, tokenizer, reference)
    groups = prompts_of(pairs, reward["row"])
    metrics = {"reward_accuracy": pair_wins(reward["chosen"], reward["rejected"]), "chosen_logp": reward["chosen_logp"]}
    if signals.missing([Need("teacher", "values"), Need("teacher", "logps")]):
        terms = {"longer is better": pair_wins(*(reference.scalar(f"{side}_tokens", signals.rows) for side in SIDES))}
    else:
        terms = pair_terms(signals)
    terms["the start's log-prob"] = pair_wins(*(reference.scalar(f"{side}_logps", signals.rows) for side in SIDES))
    shared = prompts_of(pairs, signals.rows)
    return {
        "metrics": {name: estimate(values, groups) | {"over": PROMPTS} for name, values in metrics.items()},
        "margin_accuracy": {name: estimate(wins, shared) | {"over": PROMPTS} for name, wins in terms.items()},
        "pairs": len(groups),
    }


def pair_terms(signals: SignalSet, *, discount: float = 1.0, terminal: str = "last") -> dict[str, np.ndarray]:
    """Per-pair wins of the shaping return and of the baselines it must be seen beside, from the teacher's signals.

    Terms: "shaping return" (by default that of the formula: discount 1, terminal "last"), "value after the end token"
    (terminal "bootstrap"), the teacher's log-probability of the response, its Q (raw logits of the tokens, summed) and
    its implicit reward where the signals for them are there, and length.
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
    terms["longer is better"] = scalar("teacher", "logps", "tokens")
    return {name: pair_wins(*scores) for name, scores in terms.items()}


def gauge_flips(signals: Signals) -> dict[str, Any]:
    """Share of the pairs whose order by the shaping return turns when u.h(s) is added to all logits of a state.

    That changes no policy, see `prefdistill.signals.gauge`. The return is undiscounted, terminal "last".

    Args:
        signals: a store with "values" of both responses of each pair.

    Returns:
        `{"mean", "se", "n"}` over random directions u as long as a row of the head. Were the gauge all there is to the
        value, half of the pairs would turn.
    """
    rows = signals.rows
    values, shifts = [], []
    for side in SIDES:
        last = signals.scalar(f"{side}_tokens", rows) - signals.scalar(f"{side}_ended", rows).astype(np.int64)
        states = zip(signals.ragged(f"{side}_values", rows), last, strict=True)
        values.append(np.array([value[n] for value, n in states])[:, None])
        shifts.append(np.stack(signals.ragged(f"{side}_gauge", rows)))
    margin = values[0] - values[1]
    turned = margin * (margin + shifts[0] - shifts[1]) < 0  # a tie has no order that could turn
    return mean_and_error(turned.mean(axis=0))
