"""Methods on the teacher's token distributions: VanillaKD, DCKD, ADPA and DistiLLM-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from pydantic import NonNegativeFloat

from prefdistill import losses
from prefdistill.core.errors import UserError
from prefdistill.methods.base import BatchSignals, Method, Metrics, Student, mean_kl, taught
from prefdistill.signals.needs import Need

if TYPE_CHECKING:
    from torch import Tensor

Across: TypeAlias = Literal["first_token"] | None


def taught_shares(method: VanillaKD | DistiLLM2, signals: BatchSignals) -> Metrics:
    """Return the share of the states of each response that a teacher with other tokens teaches."""
    return {f"taught/{name}": taught(signals, name).float().mean() for name in method.responses if method.across}


@dataclass(frozen=True, kw_only=True)
class VanillaKD(Method):
    """Token-level distillation (arXiv 1503.02531): SFT, and the teacher's distributions, on the chosen responses.

    Args:
        alpha: weight of the divergence; 0 is SFT.
        across: "first_token" for a teacher with another tokenizer: the mass of each of its tokens goes to the student's
            token that its text begins with.
    """

    alpha: NonNegativeFloat = 1.0
    across: Across = None

    @property
    def responses(self) -> tuple[str, ...]:
        return ("chosen",)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("teacher", "topk", self.responses, across=self.across),)

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        sft = losses.sft_loss(student.logps["chosen"], student.tokens["chosen"])
        kl = mean_kl(student, signals, "chosen")
        loss = losses.vanillakd_loss(sft, kl, alpha=self.alpha)
        metrics = {"sft": sft.detach().mean(), "kl/chosen": kl.detach().mean()}
        return loss.mean(), metrics | taught_shares(self, signals)


@dataclass(frozen=True, kw_only=True)
class DCKD(VanillaKD):
    """Dual-constrained distillation (arXiv 2502.17927): the teacher's distributions on both responses of a pair.

    Args:
        alpha: weight of the divergences; 0 is SFT.
        across: as for VanillaKD.
    """

    @property
    def responses(self) -> tuple[str, ...]:
        return ("chosen", "rejected")

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        sft = losses.sft_loss(student.logps["chosen"], student.tokens["chosen"])
        kl = {side: mean_kl(student, signals, side) for side in self.responses}
        loss = losses.dckd_loss(sft, kl["chosen"], kl["rejected"], alpha=self.alpha)
        metrics = {"sft": sft.detach().mean(), **{f"kl/{s}": x.detach().mean() for s, x in kl.items()}}
        return loss.mean(), metrics | taught_shares(self, signals)


@dataclass(frozen=True, kw_only=True)
class ADPA(Method):
    """Advantage-guided distillation (arXiv 2502.17927): SFT on the chosen response, and the teacher's advantage over
    the model its DPO started from at the states of responses that the student itself has sampled.

    ADPA+ is this method started from a DCKD student, whose own samples then give the states.

    Args:
        gamma: weight of the advantage; 0 is SFT.
        advantage_reference: whom the teacher is compared with: "teacher_reference" (the paper) or "reference" (the
            student's start, as the authors' commands for ADPA+ do).
        teacher_beta: scale of the advantage; with the beta of the teacher's DPO it is in units of its reward.
    """

    gamma: NonNegativeFloat = 1.0
    advantage_reference: Literal["teacher_reference", "reference"] = "teacher_reference"
    teacher_beta: NonNegativeFloat = 1.0

    @property
    def responses(self) -> tuple[str, ...]:
        return ("chosen", "student_response")

    @property
    def needs(self) -> tuple[Need, ...]:
        return tuple(Need(role, "topk", ("student_response",)) for role in ("teacher", self.advantage_reference))

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        sft = losses.sft_loss(student.logps["chosen"], student.tokens["chosen"])
        teacher, reference = (
            losses.with_rest(signals[f"{role}_student_response_topk"], signals[f"{role}_student_response_rest"])
            for role in ("teacher", self.advantage_reference)
        )
        own = losses.with_rest(student.topk["student_response"], student.rest["student_response"])
        per_state = losses.advantage_score(own, self.teacher_beta * (teacher - reference))
        score = student.mean_over_tokens("student_response", per_state)
        loss = losses.adpa_loss(sft, score, gamma=self.gamma)
        return loss.mean(), {"sft": sft.detach().mean(), "advantage": score.detach().mean()}


@dataclass(frozen=True, kw_only=True)
class DistiLLM2(Method):
    """Contrastive distillation (arXiv 2503.07067): towards the teacher on its responses, away from the student's
    mistakes on its own.

    Args:
        skew: how much of the first distribution is mixed into the second, 0 (plain divergences) to below 1.
        across: as for VanillaKD; the skew must then be above 0.
    """

    display_name: ClassVar[str] = "DistiLLM-2"
    skew: float = 0.1
    across: Across = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.skew < 1:
            raise UserError(f"skew must lie in 0..1 (below 1, where the gradient is 0), got {self.skew}")
        if self.across and self.skew == 0:
            raise UserError("skew must be above 0 with across: tokens of the student may have no mass of the teacher's")

    @property
    def weakness(self) -> str:
        share = (1 - self.skew) ** 2
        if share >= 0.01:
            return ""
        return (
            f"skew={self.skew:g} leaves {share:.1g} of the gradient of the plain divergence where teacher and student "
            "are alike, so next to nothing is learnt; the paper uses 0.1"
        )

    @property
    def responses(self) -> tuple[str, ...]:
        return ("teacher_response", "student_response")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("teacher", "topk", self.responses, across=self.across),)

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        kl: dict[str, Tensor] = {}
        for response in self.responses:
            teacher = (signals[f"teacher_{response}_topk"], signals[f"teacher_{response}_rest"])
            own = (student.topk[response], student.rest[response])
            (p, p_rest), (q, q_rest) = (teacher, own) if response == "teacher_response" else (own, teacher)
            per_state = losses.skew_kl(p, q, skew=self.skew, p_rest=p_rest, q_rest=q_rest)
            kl[response] = student.mean_over_tokens(response, per_state, taught(signals, response))
        loss = losses.distillm2_loss(*kl.values())
        metrics = {f"kl/{response}": x.detach().mean() for response, x in kl.items()}
        return loss.mean(), metrics | taught_shares(self, signals)
