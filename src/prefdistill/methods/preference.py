"""Methods on log-probabilities of whole responses: SFT, SeqKD, DPO and daDPO."""

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
