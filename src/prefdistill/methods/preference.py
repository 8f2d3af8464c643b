"""Methods on log-probabilities of whole responses: SFT, SeqKD, DPO, daDPO, WPO and SimPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat

from prefdistill import losses
from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES
from prefdistill.methods.base import BatchSignals, Method, Metrics, Student
from prefdistill.signals.needs import Need

if TYPE_CHECKING:
    from torch import Tensor

    from prefdistill.signals.store import SignalSet


@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """Supervised fine-tuning on the chosen responses: the baseline that ignores the rejected ones."""

    @property
    def responses(self) -> tuple[str, ...]:
        return ("chosen",)

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        (response,) = self.responses
        loss = losses.sft_loss(student.logps[response], student.tokens[response])
        return loss.mean(), {f"logps/{response}": student.logps[response].detach().mean()}


@dataclass(frozen=True, kw_only=True)
class SeqKD(SFT):
    """Sequence-level distillation (arXiv 1606.07947): supervised fine-tuning on the teacher's own responses."""

    @property
    def responses(self) -> tuple[str, ...]:
        return ("teacher_response",)


@dataclass(frozen=True, kw_only=True)
class PairMethod(Method):
    """Base of the losses -log sigmoid(h - m) of a pair, whose rows may have a weight and a margin m.

    Args:
        weight: the column of the data with each row's weight, 0 or more, which multiplies its loss; none by default.
        margin: the column of the data with each row's margin, in units of h; none by default.
    """

    weight: str | None = None
    margin: str | None = None

    @property
    def needs(self) -> tuple[Need, ...]:
        return tuple(Need("data", column, ()) for column in dict.fromkeys((self.weight, self.margin)) if column)

    def row_signals(self, signals: SignalSet) -> dict[str, np.ndarray]:
        for column in self.columns:
            self.check_column(column, signals.column(column))
        options = {"weight": self.weight, "margin": self.margin}
        return {option: signals.column(column) for option, column in options.items() if column}

    def check_column(self, name: str, numbers: np.ndarray) -> None:
        if name == self.weight and not (numbers.min() >= 0 < numbers.max()):
            raise UserError(f"weights must be 0 or more, not all 0; the least in column {name!r} is {numbers.min():g}")

    def mean(self, loss: Tensor, signals: BatchSignals) -> Tensor:
        """Return the sum of the weighted losses of the rows, divided by the number of rows."""
        return (loss * signals["weight"] if self.weight else loss).mean()


@dataclass(frozen=True, kw_only=True)
class DPO(PairMethod):
    """Direct preference optimisation (arXiv 2305.18290), with an offset ODPO (arXiv 2402.10571).

    Args:
        beta: strength of the pull towards the reference, per nat.
        weight, margin: see `PairMethod`.
    """

    beta: PositiveFloat = 0.1

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("reference", "logps"), *super().needs)

    @property
    def margin_scale(self) -> float:
        return self.beta

    def row_signals(self, signals: SignalSet) -> dict[str, np.ndarray]:
        reference = {f"ref_{side}": signals.scalar("reference", "logps", side) for side in SIDES}
        return {**super().row_signals(signals), **reference}

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        logps = (student.logps["chosen"], student.logps["rejected"], signals["ref_chosen"], signals["ref_rejected"])
        loss = losses.dpo_loss(*logps, beta=self.beta, margin=signals.get("margin", 0.0))
        return self.mean(loss, signals), reward_metrics(*logps, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class DaDPO(DPO):
    """Distribution-aware DPO (arXiv 2506.15717): the student is held by its reference and by the teacher.

    Args:
        beta: strength of the pull towards the reference, per nat; 0 leaves it to the teacher.
        teacher_beta: strength of the pull towards the teacher, per nat; 0 is DPO.
        weight, margin: see `PairMethod`.
    """

    display_name: ClassVar[str] = "daDPO"
    beta: NonNegativeFloat = 0.1
    teacher_beta: NonNegativeFloat = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta + self.teacher_beta == 0:
            raise UserError("beta and teacher_beta are both 0: there is nothing to learn from")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (*super().needs, Need("teacher", "logps"))

    def row_signals(self, signals: SignalSet) -> dict[str, np.ndarray]:
        teacher = {f"teacher_{side}": signals.scalar("teacher", "logps", side) for side in SIDES}
        return {**super().row_signals(signals), **teacher}

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        logps = (student.logps["chosen"], student.logps["rejected"], signals["ref_chosen"], signals["ref_rejected"])
        teacher = (signals["teacher_chosen"], signals["teacher_rejected"])
        margin = signals.get("margin", 0.0)
        loss = losses.dadpo_loss(*logps, *teacher, beta=self.beta, teacher_beta=self.teacher_beta, margin=margin)
        return self.mean(loss, signals), reward_metrics(*logps, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class WPO(DPO):
    """WPO (arXiv 2406.11827): DPO whose pairs count by how likely the student finds them.

    Args:
        beta: strength of the pull towards the reference, per nat.
        weight, margin: see `PairMethod`.
    """

    scores_reference: ClassVar[bool] = True

    @property
    def reads_token_logps(self) -> bool:
        return True

    @property
    def reads_log_sum_squares(self) -> bool:
        return True

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        logps = (student.logps["chosen"], student.logps["rejected"], signals["ref_chosen"], signals["ref_rejected"])
        chosen, rejected = (
            student.mean_over_tokens(side, student.token_logps[side].detach() - student.log_sum_squares[side]).exp()
            for side in SIDES
        )
        weight = chosen * rejected
        loss = weight * losses.dpo_loss(*logps, beta=self.beta, margin=signals.get("margin", 0.0))
        return self.mean(loss, signals), {**reward_metrics(*logps, beta=self.beta), "weights": weight.mean()}


@dataclass(frozen=True, kw_only=True)
class SimPO(PairMethod):
    """SimPO (arXiv 2405.14734): log-probabilities per token as the reward, a target margin, no reference.

    Args:
        beta: scale of the reward.
        gamma: the margin that the chosen response shall have, in units of the scaled reward.
        weight, margin: see `PairMethod`.
    """

    beta: PositiveFloat = 2.0
    gamma: float = 1.0

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        logps, tokens = ([part[side] for side in SIDES] for part in (student.logps, student.tokens))
        loss = losses.simpo_loss(*logps, *tokens, beta=self.beta, gamma=self.gamma, margin=signals.get("margin", 0.0))
        chosen, rejected = (logp / count.clamp(min=1) for logp, count in zip(logps, tokens, strict=True))
        zero = loss.new_zeros(len(loss))
        return self.mean(loss, signals), reward_metrics(chosen, rejected, zero, zero, beta=self.beta)


def reward_metrics(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> Metrics:
    """Return what DPO trainers log: the implicit rewards, in units of the loss."""
    reward_chosen = beta * (chosen.detach() - ref_chosen)
    reward_rejected = beta * (rejected.detach() - ref_rejected)
    margin = reward_chosen - reward_rejected
    return {
        "rewards/chosen": reward_chosen.mean(),
        "rewards/rejected": reward_rejected.mean(),
        "rewards/margins": margin.mean(),
        "rewards/margins_abs": margin.abs().mean(),
        "rewards/accuracies": (reward_chosen > reward_rejected).float().mean(),
        "logps/chosen": chosen.detach().mean(),
        "logps/rejected": rejected.detach().mean(),
    }
