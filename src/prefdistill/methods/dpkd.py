"""DPKD: the teacher's output is preferred to the student's, with the teacher as the reference."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from prefdistill.losses import dpkd_loss, sft_loss
from prefdistill.methods.base import Features, Method, Metrics, Student
from prefdistill.methods.preference import reward_metrics
from prefdistill.signals.store import Need, SignalSet


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

    def features(self, signals: SignalSet) -> dict[str, np.ndarray]:
        if self.level == "token":
            store = signals.store("teacher", "topk", "teacher_response")
            return {"vocabulary": np.full(len(signals.rows), store.manifest["topk"]["vocabulary"])}
        return {f"teacher_{response}": signals.scalar("teacher", "logps", response) for response in self.responses}

    def loss(self, student: Student, signals: Features) -> tuple[Tensor, Metrics]:
        sft = sft_loss(student.logps["teacher_response"], student.tokens["teacher_response"])
        loss, metrics = self._tokens(student, signals) if self.level == "token" else self._sequences(student, signals)
        return (loss + self.lm_weight * sft).mean(), {**metrics, "sft": sft.detach().mean()}

    def _sequences(self, student: Student, signals: Features) -> tuple[Tensor, Metrics]:
        ours = [student.logps[response] for response in self.responses]
        teachers = [signals[f"teacher_{response}"] for response in self.responses]
        return dpkd_loss(*ours, *teachers, beta=self.beta), reward_metrics(*ours, *teachers, beta=self.beta)

    def _tokens(self, student: Student, signals: Features) -> tuple[Tensor, Metrics]:
        ids, teacher = signals["teacher_response_ids"], signals["teacher_teacher_response_topk"]
        theirs, theirs_logp = student.likeliest["teacher_response"]
        # the teacher's likeliest token comes first; where the student's is not among the k, the teacher gives it an
        # equal share of the mass that the k leave
        among = ids == theirs[:, None]
        outside = signals["vocabulary"][0] - (ids >= 0).sum(1)
        share = signals["teacher_teacher_response_rest"] - outside.clamp(min=1).log()
        teacher_of_theirs = torch.where(among.any(1), teacher.masked_fill(~among, -torch.inf).amax(1), share)
        preferred = student.topk["teacher_response"][:, 0]
        per_state = dpkd_loss(preferred, theirs_logp, teacher[:, 0], teacher_of_theirs, beta=self.beta)
        agree = (ids[:, 0] == theirs).float()
        return student.mean_over_tokens("teacher_response", per_state), {"agreement": agree.mean()}
