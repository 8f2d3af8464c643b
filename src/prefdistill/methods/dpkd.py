"""DPKD: the teacher's output is preferred to the student's, with the teacher as the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat

from prefdistill import losses
from prefdistill.methods.base import BatchSignals, Method, Metrics, Student
from prefdistill.methods.preference import reward_metrics
from prefdistill.signals.needs import Need

if TYPE_CHECKING:
    from torch import Tensor

    from prefdistill.signals.store import SignalSet


@dataclass(frozen=True, kw_only=True)
class DPKD(Method):
    """Direct preference knowledge distillation (arXiv 2406.19774).

    Args:
        beta: strength of the pull towards the teacher, per nat.
        level: "sequence" (the paper): a response of the teacher against one of the student. "token" (the authors'
            code): at every state of the teacher's response its most likely token against the student's.
        lm_weight: weight of the language-modelling term on the teacher's response. The authors' code gives both terms
            one half each, which is 1 here.
    """

    beta: PositiveFloat = 0.1
    level: Literal["sequence", "token"] = "sequence"
    lm_weight: NonNegativeFloat = 0.0

    @property
    def responses(self) -> tuple[str, ...]:
        return ("teacher_response", "student_response") if self.level == "sequence" else ("teacher_response",)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("teacher", "logps" if self.level == "sequence" else "topk", self.responses),)

    @property
    def reads_likeliest(self) -> bool:
        return self.level == "token"

    def row_signals(self, signals: SignalSet) -> dict[str, np.ndarray]:
        if self.level == "token":
            store = signals.store("teacher", "topk", "teacher_response")
            return {"vocabulary": np.full(len(signals.rows), store.manifest["topk"]["vocabulary"])}
        return {f"teacher_{response}": signals.scalar("teacher", "logps", response) for response in self.responses}

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        sft = losses.sft_loss(student.logps["teacher_response"], student.tokens["teacher_response"])
        loss, metrics = self._tokens(student, signals) if self.level == "token" else self._sequences(student, signals)
        return (loss + self.lm_weight * sft).mean(), {**metrics, "sft": sft.detach().mean()}

    def _sequences(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        own = [student.logps[response] for response in self.responses]
        teachers = [signals[f"teacher_{response}"] for response in self.responses]
        return losses.dpkd_loss(*own, *teachers, beta=self.beta), reward_metrics(*own, *teachers, beta=self.beta)

    def _tokens(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        ids, teacher = signals["teacher_response_ids"], signals["teacher_teacher_response_topk"]
        student_best, student_best_logp = student.likeliest["teacher_response"]
        # the teacher's most likely token comes first; where the student's is not among the k, the teacher gives it an
        # equal share of the mass outside the k
        among = ids == student_best[:, None]
        outside = signals["vocabulary"][0] - (ids >= 0).sum(1)
        share = signals["teacher_teacher_response_rest"] - outside.clamp(min=1).log()
        teacher_at_student_best = teacher.masked_fill(~among, float("-inf")).amax(1).where(among.any(1), share)
        preferred = student.topk["teacher_response"][:, 0]
        per_state = losses.dpkd_loss(
            preferred, student_best_logp, teacher[:, 0], teacher_at_student_best, beta=self.beta
        )
        agree = (ids[:, 0] == student_best).float()
        return student.mean_over_tokens("teacher_response", per_state), {
            "agreement": student.mean_over_tokens("teacher_response", agree).mean()
        }
