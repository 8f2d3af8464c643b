"""What a method is: hyper-parameters, the signals it needs, and a loss of what the student says beside them."""

from dataclasses import dataclass, field, fields
from typing import get_type_hints

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES
from prefdistill.losses import topk_kl
from prefdistill.models.logprobs import sum_by_response
from prefdistill.signals.store import Need, SignalSet

Features = dict[str, Tensor]
Metrics = dict[str, Tensor]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
BOUNDS = {"greater than 0": "positive", "greater than or equal to 0": "0 or more"}  # pydantic's words, and ours


@dataclass(frozen=True)
class Student:
    """What the student says of a batch of B rows, by response ("chosen", "rejected", ...), in nats.

    Per row: `logps` of the whole response and its `tokens`, [B] each. Per state s_0 .. s_{T-1}, the rows' states one
    after another: `topk`, the student's log-probabilities at the ids of the teacher's "topk" signal [states, k], and
    `rest`, the log of its mass elsewhere [states]; `likeliest`, its own most likely token and that one's
    log-probability, [states] each, for methods that ask for it.
    """

    logps: dict[str, Tensor]
    tokens: dict[str, Tensor]
    topk: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    likeliest: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mean_over_tokens(self, response: str, per_state: Tensor) -> Tensor:
        """Mean of a quantity over the states of each response: [states] -> [B]. A response without tokens has 0."""
        tokens = self.tokens[response]
        return sum_by_response(per_state, tokens) / tokens.clamp(min=1)


class Method:
    """A method is a frozen dataclass of its hyper-parameters that says what it reads and how that becomes a loss."""

    def __post_init__(self) -> None:
        """Every hyper-parameter is of its declared type, such as pydantic's PositiveFloat."""
        kinds = get_type_hints(type(self), include_extras=True)
        for option in fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            try:
                TypeAdapter(kinds[option.name], config=STRICT).validate_python(value)
            except ValidationError as error:
                wanted = error.errors()[0]["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
                raise UserError(f"{option.name} must be {BOUNDS.get(wanted, wanted)}, got {value!r}") from error

    @property
    def responses(self) -> tuple[str, ...]:
        """The responses the student has to read."""
        return SIDES

    @property
    def needs(self) -> tuple[Need, ...]:
        """The signals it draws on. A "topk" need puts `ROLE_RESPONSE_topk` [states, k], `ROLE_RESPONSE_rest` [states]
        and `RESPONSE_ids` among the signals of a batch, and has the student read at those ids."""
        return ()

    @property
    def reads_likeliest(self) -> bool:
        """Whether it asks for the student's own most likely token of each state."""
        return False

    def features(self, signals: SignalSet) -> dict[str, np.ndarray]:
        """The numbers per row that `loss` reads, made once before training: name -> [rows]."""
        return {}

    def loss(self, student: Student, signals: Features) -> tuple[Tensor, Metrics]:
        """Mean loss of a batch, and detached scalars to log. `signals` holds the batch's `features` [B], and "topk"."""
        raise NotImplementedError


def sampled(method: Method) -> tuple[str, ...]:
    """The responses of a method that are not in preference data and have to be sampled from a model first."""
    return tuple(response for response in method.responses if response not in SIDES)


def mean_kl(student: Student, signals: Features, response: str) -> Tensor:
    """Forward divergence of the teacher to the student, averaged over the tokens of a response, [B]."""
    per_state = topk_kl(
        signals[f"teacher_{response}_topk"],
        student.topk[response],
        signals[f"teacher_{response}_rest"],
        student.rest[response],
    )
    return student.mean_over_tokens(response, per_state)
