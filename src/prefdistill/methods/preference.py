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
class DPO(Method):
    """Direct preference optimisation (arXiv 2305.18290).

    Args:
        beta: strength of the pull towards the reference, per nat.
    """

    beta: PositiveFloat = 0.1

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("reference", "logps"),)

    @property
    def margin_scale(self) -> float:
        return self.beta

    def row_signals(self, signals: SignalSet) -> dict[str, np.ndarray]:
        return {f"ref_{side}": signals.scalar("reference", "logps", side) for side in SIDES}

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        logps = (student.logps["chosen"], student.logps["rejected"], signals["ref_chosen"], signals["ref_rejected"])
        return losses.dpo_loss(*logps, beta=self.beta).mean(), reward_metrics(*logps, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class DaDPO(DPO):
    """Distribution-aware DPO (arXiv 2506.15717): the student is held by its reference and by the teacher.

    Args:
        beta: strength of the pull towards the reference, per nat; 0 leaves it to the teacher.
        teacher_beta: strength of the pull towards the teacher, per nat; 0 is DPO.
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
        loss = losses.dadpo_loss(*logps, *teacher, beta=self.beta, teacher_beta=self.teacher_beta)
        return loss.mean(), reward_metrics(*logps, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class WPO(DPO):
    """WPO (arXiv 2406.11827): DPO whose pairs count by how likely the student finds them.

    Args:
        beta: strength of the pull towards the reference, per nat.
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
        loss = weight * losses.dpo_loss(*logps, beta=self.beta)
        return loss.mean(), {**reward_metrics(*logps, beta=self.beta), "weights": weight.mean()}


@dataclass(frozen=True, kw_only=True)
class SimPO(Method):
    """SimPO (arXiv 2405.14734): log-probabilities per token as the reward, a target margin, no reference.

    Args:
        beta: scale of the reward.
        gamma: the margin that the chosen response shall have, in units of the scaled reward.
    """

    beta: PositiveFloat = 2.0
    gamma: float = 1.0

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        logps, tokens = ([part[side] for side in SIDES] for part in (student.logps, student.tokens))
        loss = losses.simpo_loss(*logps, *tokens, beta=self.beta, gamma=self.gamma)
        chosen, rejected = (logp / count.clamp(min=1) for logp, count in zip(logps, tokens, strict=True))
        zero = loss.new_zeros(len(loss))
        return loss.mean(), reward_metrics(chosen, rejected, zero, zero, beta=self.beta)


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
