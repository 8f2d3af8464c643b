"""The methods by name. A method owns its hyper-parameters, says which signals it needs, turns them into a few numbers
per pair once before training, and maps what the student says to a loss. To add one: write its loss under `losses/`,
a dataclass here, and its line in `METHODS`.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from prefdistill.errors import UserError
from prefdistill.losses import TERMINALS, dpo_loss, sft_loss, shaping_return, tvkd_loss
from prefdistill.signals.store import SIDES, SignalSet

# What each potential is made from.
POTENTIALS = {
    "value": ("teacher.values",),
    "shuffled": ("teacher.values",),
    "implicit_reward": ("teacher.logps", "teacher_reference.logps"),
    "reward": ("data.score_chosen", "data.score_rejected"),
}
Features = dict[str, Tensor]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Student:
    """What the student says of a batch by response ("chosen", "rejected"): log-probs in nats and tokens, [B] each."""

    logps: dict[str, Tensor]
    tokens: dict[str, Tensor]


class Method(Protocol):
    responses: ClassVar[tuple[str, ...]]
    """The responses the student has to read: ("chosen",) or ("chosen", "rejected")."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Signals by "role.kind", and score columns of the data by "data.column"."""

    def features(self, signals: SignalSet) -> dict[str, np.ndarray]:
        """The numbers per pair that `loss` reads, made once before training: name -> [rows]."""

    def loss(self, student: Student, signals: Features) -> tuple[Tensor, Metrics]:
        """Mean loss of a batch, and detached scalars to log. `signals` holds `features` of the batch, [B] each."""


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Supervised fine-tuning on the chosen responses: the baseline that ignores the rejected ones."""

    responses: ClassVar[tuple[str, ...]] = ("chosen",)
    needs: ClassVar[tuple[str, ...]] = ()

    def features(self, signals: SignalSet) -> dict[str, np.ndarray]:
        return {}

    def loss(self, student: Student, signals: Features) -> tuple[Tensor, Metrics]:
        loss = sft_loss(student.logps["chosen"], student.tokens["chosen"])
        return loss.mean(), {"logps/chosen": student.logps["chosen"].detach().mean()}


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Direct preference optimisation (arXiv 2305.18290).

    Args:
        beta: strength of the pull towards the reference, per nat.
    """

    beta: float = 0.1

    responses: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"beta must be positive, got {self.beta}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference.logps",)

    def features(self, signals: SignalSet) -> dict[str, np.ndarray]:
        return {f"ref_{side}": signals.scalar("reference", "logps", side) for side in SIDES}

    def loss(self, student: Student, signals: Features) -> tuple[Tensor, Metrics]:
        logps = (student.logps["chosen"], student.logps["rejected"], signals["ref_chosen"], signals["ref_rejected"])
        return dpo_loss(*logps, beta=self.beta).mean(), self._reward_metrics(*logps)

    def _reward_metrics(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Metrics:
        reward_chosen = self.beta * (chosen.detach() - ref_chosen)
        reward_rejected = self.beta * (rejected.detach() - ref_rejected)
        return {
            "rewards/chosen": reward_chosen.mean(),
            "rewards/rejected": reward_rejected.mean(),
            "rewards/margins": (reward_chosen - reward_rejected).mean(),
            "rewards/accuracies": (reward_chosen > reward_rejected).float().mean(),
            "logps/chosen": chosen.detach().mean(),
            "logps/rejected": rejected.detach().mean(),
        }


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
        discount: gamma of the shaping term; "value" and "shuffled" only.
        terminal: the potential after the end token, see `losses.shaping_return`; "value" and "shuffled" only.
        value_temperature: b of the soft value the signals must have been made with.
        teacher_beta: scale of the implicit reward, per nat; "implicit_reward" only.
    """

    alpha: float = 0.7
    potential: str = "value"
    discount: float = 1.0
    terminal: str = "last"
    value_temperature: float = 1.0
    teacher_beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.potential not in POTENTIALS:
            raise UserError(f"unknown potential {self.potential!r}; known: {', '.join(POTENTIALS)}")
        if self.terminal not in TERMINALS:
            raise UserError(f"unknown terminal {self.terminal!r}; known: {', '.join(TERMINALS)}")
        if not 0 <= self.discount <= 1:
            raise UserError(f"discount must lie in 0..1, got {self.discount}")

    @property
    def needs(self) -> tuple[str, ...]:
        return super().needs + POTENTIALS[self.potential]

    def features(self, signals: SignalSet) -> dict[str, np.ndarray]:
        shaping = {f"shaping_{side}": self._shaping(signals, side) for side in SIDES}
        if self.potential == "shuffled":
            other = _other_rows(len(signals.rows))
            shaping = {name: psi[other] for name, psi in shaping.items()}
        margin = shaping["shaping_chosen"] - shaping["shaping_rejected"]
        constant = self.terminal == "zero" and self.discount == 1 and self.potential in ("value", "shuffled")
        if len(margin) > 1 and self.alpha != 0 and not constant and np.ptp(margin) < 1e-6:
            raise UserError(
                f"the shaping margin ({self.potential}) is the same number, {margin[0]:.3g}, for all {len(margin)} "
                "pairs: it tells nothing. Values of normalised log-probabilities at temperature 1 are 0; raw logits "
                "are needed"
            )
        return {**super().features(signals), **shaping}

    def _shaping(self, signals: SignalSet, side: str) -> np.ndarray:
        if self.potential == "reward":
            return signals.column(f"score_{side}")
        if self.potential == "implicit_reward":
            teacher, reference = (signals.scalar(r, "logps", side) for r in ("teacher", "teacher_reference"))
            return self.teacher_beta * (teacher - reference)
        made_with = signals.stores["teacher"].manifest["value_temperature"]
        if made_with != self.value_temperature:
            raise UserError(
                f"the teacher's values were made with value_temperature={made_with}, the method asks for "
                f"{self.value_temperature}; make the signals again with that temperature"
            )
        return shaping_returns(signals, side, discount=self.discount, terminal=self.terminal)

    def loss(self, student: Student, signals: Features) -> tuple[Tensor, Metrics]:
        logps = (student.logps["chosen"], student.logps["rejected"], signals["ref_chosen"], signals["ref_rejected"])
        shaping = (signals["shaping_chosen"], signals["shaping_rejected"])
        margin = self.alpha * (shaping[0] - shaping[1])
        return tvkd_loss(*logps, *shaping, beta=self.beta, alpha=self.alpha).mean(), {
            **self._reward_metrics(*logps),
            "shaping/margins": margin.mean(),
            "shaping/margins_abs": margin.abs().mean(),
            "shaping/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        }


def shaping_returns(signals: SignalSet, side: str, *, discount: float, terminal: str) -> np.ndarray:
    """`shaping_return` of the stored teacher values of one side, [rows]."""
    values = signals.ragged("teacher", "values", side)
    lengths = torch.from_numpy(signals.scalar("teacher", "tokens", side).astype(np.int64))
    ended = torch.from_numpy(signals.scalar("teacher", "ended", side).astype(bool))
    out = np.empty(len(values), dtype=np.float32)
    for start in range(0, len(values), 1024):
        part = slice(start, start + 1024)
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(v) for v in values[part]], batch_first=True)
        out[part] = shaping_return(padded, lengths[part], discount, terminal, ended[part]).numpy()
    return out


def _other_rows(n: int) -> np.ndarray:
    """A fixed permutation of n rows that leaves no row where it is (for n > 1): a random cycle."""
    cycle = np.random.default_rng(0).permutation(n)
    other = np.empty(n, dtype=np.int64)
    other[cycle] = np.roll(cycle, 1)
    return other


METHODS: dict[str, type[Any]] = {
    "sft": SFT,
    "dpo": DPO,
    "tvkd": TVKD,
}


def make_method(name: str, options: dict[str, Any]) -> Method:
    """A method from its name and hyper-parameters.

    Raises:
        UserError: on an unknown method or option, naming the known ones.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    known = {field.name: field for field in fields(METHODS[name])}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{name} has no option {key!r}; its options: {', '.join(sorted(known)) or 'none'}")
        wanted = type(known[key].default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise UserError(f"{name}: {key} must be a {'number' if wanted is float else 'word'}, got {value!r}")
        if isinstance(value, float) and not np.isfinite(value):
            raise UserError(f"{name}: {key} must be a finite number, got {value!r}")
    return METHODS[name](**options)
