"""TVKD: DPO with the teacher's shaping return as offset, its ablations and its controls."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat

from prefdistill import losses
from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES
from prefdistill.methods.base import LOG_RATIO, MAX_RATIO, BatchSignals, Metrics, Student
from prefdistill.methods.preference import DPO, reward_metrics
from prefdistill.signals.needs import Need

if TYPE_CHECKING:
    from torch import Tensor

    from prefdistill.signals.store import SignalSet

# Standard deviation, in nats, of the difference of the returns of a pair: of the raw value, as measured with
# SmolLM2-135M-Instruct, a DPO-trained model; and of two independent returns that are standardized.
RAW_SPREAD, STANDARD_SPREAD = 7.0, 2**0.5
VALUES = {"logits": "values", "logprobs": "logprob_values"}  # `values_from`: the kind of signal


@dataclass(frozen=True, kw_only=True)
class TVKD(DPO):
    """Teacher value-based knowledge distillation (arXiv 2509.16965): DPO with the teacher's shaping return as offset.

    Args:
        beta: strength of the pull towards the reference, per nat.
        alpha: weight of the shaping margin. alpha / beta is the teacher's strength in nats of log-ratio.
        potential: what the potential of a state is. "value": the teacher's soft value, as in the paper.
            "implicit_reward": the teacher's DPO reward so far, whose return is that of the whole response. "reward":
            the data's score columns (with a true reward: the best any offset can do). "shuffled": the value of another
            row, a placebo.
        shaping: "state", the difference of potentials, as in the paper; or action-dependent terms in its place, which
            the paper compares with: "log_prob", the teacher's log-probability of each token, and "q", its raw logit.
        values_from: what the soft value is computed from: raw "logits", as in the paper, or "logprobs" (needs a value
            temperature other than 1), whose value does not change with an offset of the logits.
        discount: gamma of the shaping term; potentials "value" and "shuffled" only.
        terminal: the potential after the end token, see `losses.shaping_return`; "value" and "shuffled" only.
        value_temperature: b of the soft value; the signals must have the same.
        teacher_beta: scale of the implicit reward, per nat; "implicit_reward" only.
        noise: standard deviation of Gaussian noise added to each return, in units of the returns' own spread over all
            responses of the pairs at hand; the same row always gets the same noise. For studies of how good the
            teacher has to be.
        standardize: centre the returns and divide them by their spread over all responses of the pairs at hand: the
            scale of raw logits is arbitrary.
        clip: bound on the size of each return (after `standardize`); none by default.
        weight, margin: see `PairMethod`.
    """

    alpha: float = 0.7
    potential: Literal["value", "shuffled", "implicit_reward", "reward"] = "value"
    shaping: Literal["state", "log_prob", "q"] = "state"
    values_from: Literal["logits", "logprobs"] = "logits"
    discount: float = 1.0
    terminal: Literal["last", "bootstrap", "zero"] = "last"
    value_temperature: float = 1.0
    teacher_beta: float = 0.1
    noise: NonNegativeFloat = 0.0
    standardize: bool = False
    clip: PositiveFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.discount <= 1:
            raise UserError(f"discount must lie in 0..1, got {self.discount}")
        if self.shaping != "state" and self.potential != "value":
            raise UserError(f"shaping={self.shaping} replaces the potential; leave potential out")
        unused = {"teacher_beta"} if self.potential != "implicit_reward" else set()
        unused |= set() if self.uses_values else {"values_from", "discount", "terminal", "value_temperature"}
        for option in fields(self):
            if option.name in unused and getattr(self, option.name) != option.default:
                raise UserError(f"{option.name} has no effect on shaping from {self.source}; leave it out")
        if self.uses_values and self.values_from == "logprobs" and self.value_temperature == 1:
            raise UserError("values_from=logprobs needs a value_temperature other than 1, where every value is 0")

    @property
    def source(self) -> str:
        return self.potential if self.shaping == "state" else self.shaping

    @property
    def uses_values(self) -> bool:
        return self.shaping == "state" and self.potential in ("value", "shuffled")

    @property
    def needs(self) -> tuple[Need, ...]:
        source: tuple[Need, ...]
        if self.uses_values:
            source = (Need("teacher", VALUES[self.values_from], settings=self._value_settings),)
        elif self.shaping == "log_prob":
            source = (Need("teacher", "logps"),)
        elif self.shaping == "q":
            source = (Need("teacher", "q"),)
        elif self.potential == "implicit_reward":
            source = (Need("teacher", "logps"), Need("teacher_reference", "logps"))
        else:
            source = tuple(Need("data", f"score_{side}", ()) for side in SIDES)
        return super().needs + source

    @property
    def _value_settings(self) -> dict[str, Any]:
        all_states = self.discount != 1 or self.terminal == "bootstrap"
        return {"value_temperature": self.value_temperature} | ({"positions": "all"} if all_states else {})

    def row_signals(self, signals: SignalSet) -> dict[str, np.ndarray]:
        if self.uses_values and self.alpha != 0:
            self._check_values(signals)
        shaping = {side: self._return(signals, side) for side in SIDES}
        if self.potential == "shuffled":
            other = _other_rows(len(signals.rows))
            shaping = {side: psi[other] for side, psi in shaping.items()}
        margin = shaping["chosen"] - shaping["rejected"]
        constant = self.uses_values and self.terminal == "zero" and self.discount == 1
        if len(margin) > 1 and self.alpha != 0 and not constant and _same(margin, *shaping.values()):
            raise UserError(
                f"the shaping margin ({self.source}) is the same number, {margin[0]:.3g}, for all {len(margin)} "
                "pairs: it carries no information"
            )
        if self.noise:
            spread = float(np.concatenate(list(shaping.values())).std())
            noise = _noise_of_rows(signals.rows)
            shaping = {side: psi + self.noise * spread * noise[side] for side, psi in shaping.items()}
        if self.standardize:
            everything = np.concatenate(list(shaping.values()))
            spread = float(everything.std()) or 1.0
            shaping = {side: (psi - everything.mean()) / spread for side, psi in shaping.items()}
        if self.clip is not None:
            shaping = {side: psi.clip(-self.clip, self.clip) for side, psi in shaping.items()}
        return {**super().row_signals(signals), **{f"shaping_{side}": psi for side, psi in shaping.items()}}

    def margin_offset(self, row_signals: dict[str, np.ndarray]) -> np.ndarray:
        return self.alpha * (row_signals["shaping_chosen"] - row_signals["shaping_rejected"])

    def disproportion(self, row_signals: dict[str, np.ndarray] | None = None) -> str:
        usual = STANDARD_SPREAD if self.standardize else RAW_SPREAD if self.uses_values and not self.clip else 0.0
        spread = abs(self.alpha) * usual if row_signals is None else float(self.margin_offset(row_signals).std())
        if spread <= MAX_RATIO * self.beta * LOG_RATIO:
            return ""
        sign = math.copysign(1, self.alpha)
        fixes = [f"alpha={self.alpha * self.beta * LOG_RATIO / spread:.2g}"]
        if not self.standardize:
            alpha = sign * self.beta * LOG_RATIO / STANDARD_SPREAD
            fixes.append(f"standardize=true with alpha={alpha:.2g}, which then counts standard deviations")
        has, reach = "will have" if row_signals is None else "has", self.beta * LOG_RATIO
        return (
            f"the shaping margin of the pairs {has} a spread of about {spread:.2g} nats (alpha={self.alpha:g}), and "
            f"beta={self.beta:g} times the {LOG_RATIO:g} nats of log-ratio that a training may reach is {reach:.2g}: "
            "the teacher decides what is learnt, not the labels of the pairs. "
            f"Use {', or '.join(fixes)}, or a higher beta"
        )

    def _check_values(self, signals: SignalSet) -> None:
        """Refuse a value that is the same everywhere: its term depends on the lengths alone, or on nothing."""
        if len(signals.rows) < 2:
            return
        from prefdistill.signals.shaping import value_range

        extremes = np.array([value_range(signals, side, VALUES[self.values_from]) for side in SIDES])
        if _same(extremes, extremes):
            raise UserError(
                f"the teacher's value is the same number, {extremes[0, 0]:.3g}, in every state: it carries no "
                "information. Values of normalised log-probabilities at temperature 1 are 0; raw logits are needed"
            )

    def _return(self, signals: SignalSet, side: str) -> np.ndarray:
        if self.shaping == "log_prob":
            return signals.scalar("teacher", "logps", side)
        if self.shaping == "q":
            return signals.scalar("teacher", "q", side)
        if self.potential == "reward":
            return signals.column(f"score_{side}")
        if self.potential == "implicit_reward":
            teacher, reference = (signals.scalar(r, "logps", side) for r in ("teacher", "teacher_reference"))
            return self.teacher_beta * (teacher - reference)
        from prefdistill.signals.shaping import shaping_returns

        return shaping_returns(
            signals, side, discount=self.discount, terminal=self.terminal, kind=VALUES[self.values_from]
        )

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        logps = (student.logps["chosen"], student.logps["rejected"], signals["ref_chosen"], signals["ref_rejected"])
        shaping = (signals["shaping_chosen"], signals["shaping_rejected"])
        margin = self.alpha * (shaping[0] - shaping[1])
        offset = signals.get("margin", 0.0)
        loss = losses.tvkd_loss(*logps, *shaping, beta=self.beta, alpha=self.alpha, margin=offset)
        return self.mean(loss, signals), {
            **reward_metrics(*logps, beta=self.beta),
            "shaping/margins": margin.mean(),
            "shaping/margins_abs": margin.abs().mean(),
            "shaping/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        }


def _same(numbers: np.ndarray, *scale: np.ndarray) -> bool:
    """Return whether numbers differ by no more than float32 rounding of others, of which they are differences."""
    return bool(np.ptp(numbers) <= 1e-6 * max(1.0, *(np.abs(other).max() for other in scale)))


def _noise_of_rows(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return standard normal noise for both sides of each row, [rows] each; a row always gets the same noise."""
    noise = np.random.default_rng(0).standard_normal((int(rows.max(initial=-1)) + 1, len(SIDES)), dtype=np.float32)
    return {side: noise[rows, place] for place, side in enumerate(SIDES)}


def _other_rows(n: int) -> np.ndarray:
    """Return a fixed permutation of n rows that moves every row (for n > 1): a random cycle."""
    cycle = np.random.default_rng(0).permutation(n)
    other = np.empty(n, dtype=np.int64)
    other[cycle] = np.roll(cycle, 1)
    return other
