"""The interface of a method: hyper-parameters, the signals it needs, and a loss of the student's outputs and these."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prefdistill import losses
from prefdistill.core.errors import UserError
from prefdistill.data.columns import SCORES, SIDES
from prefdistill.signals.needs import Need

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from prefdistill.signals.store import SignalSet

BatchSignals: TypeAlias = "dict[str, Tensor]"
Metrics: TypeAlias = "dict[str, Tensor]"
# The margin of log-ratios, in nats, that a training may reach: of a response of 100 tokens, each 0.05 nats likelier.
# DPO of SmolLM2 on 400 pairs reached as much (docs/real-models.md).
LOG_RATIO = 5.0
MAX_RATIO = 3.0  # spread of what a method adds to the margin over that of the margin, above which it is warned of
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
BOUNDS = {"greater than 0": "positive", "greater than or equal to 0": "0 or more"}  # instead of pydantic's words


@dataclass(frozen=True)
class Student:
    """The student's outputs for a batch of B rows, by response ("chosen", "rejected", ...), in nats.

    Per row: `logps` of the whole response and its `tokens`, [B] each. Per state s_0 .. s_{T-1}, the rows' states one
    after another: `topk`, the student's log-probabilities at the ids of the teacher's "topk" signal [states, k], and
    `rest`, the log of its mass elsewhere [states]; `likeliest`, its own most likely token and that one's
    log-probability, [states] each, for methods that set `reads_likeliest`; `token_logps`, the log-probability of each
    realised token [states], for methods that set `reads_token_logps`; `log_sum_squares`, the log of the sum of the
    squared probabilities of all tokens [states], without gradient, for methods that set `reads_log_sum_squares`.
    `balance`: the load-balancing loss of a mixture of experts, which the trainer adds to the method's loss.
    """

    logps: dict[str, Tensor]
    tokens: dict[str, Tensor]
    topk: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    likeliest: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    token_logps: dict[str, Tensor] = field(default_factory=dict)
    log_sum_squares: dict[str, Tensor] = field(default_factory=dict)
    balance: Tensor | None = None

    def mean_over_tokens(self, response: str, per_state: Tensor, among: Tensor | None = None) -> Tensor:
        """Return the mean of a quantity over the states of each response: [states] -> [B]; 0 without states.

        Args:
            response: of which response.
            per_state: the quantity.
            among: which states count, bool [states]; the quantity must be 0 in the others. Default: all.
        """
        from prefdistill.models.logprobs import sum_by_response

        tokens = self.tokens[response]
        states = tokens if among is None else sum_by_response(among.to(tokens.dtype), tokens)
        return sum_by_response(per_state, tokens) / states.clamp(min=1)


class Method:
    """Base of all methods: a frozen dataclass of hyper-parameters with what it reads and how that becomes a loss."""

    display_name: ClassVar[str]  # in tables and plots; by default the name of the class
    scores_reference: ClassVar[bool] = False  # without reference signals, the trainer computes them from the start

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "display_name" not in vars(cls):
            cls.display_name = cls.__name__

    def __post_init__(self) -> None:
        """Check that every hyper-parameter is of its declared type, such as pydantic's PositiveFloat."""
        types = get_type_hints(type(self), include_extras=True)
        wrong = []
        for option in fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            try:
                TypeAdapter(types[option.name], config=STRICT).validate_python(value)
            except ValidationError as error:
                wanted = error.errors()[0]["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
                wrong.append(f"{option.name} must be {BOUNDS.get(wanted, wanted)}, got {value!r}")
        if wrong:
            raise UserError(*wrong)

    @property
    def responses(self) -> tuple[str, ...]:
        """The responses the student reads."""
        return SIDES

    @property
    def needs(self) -> tuple[Need, ...]:
        """The signals it needs, with the settings they must have been extracted with.

        A kind with a number per token, such as "token_logps", puts `ROLE_RESPONSE_KIND` [states] among the signals of a
        batch. "topk" puts `ROLE_RESPONSE_topk` [states, k], `ROLE_RESPONSE_rest` [states] and `RESPONSE_ids` there, and
        has the student read at those ids.
        """
        return ()

    @property
    def reads_likeliest(self) -> bool:
        """Whether it needs the student's own most likely token of each state."""
        return False

    @property
    def reads_token_logps(self) -> bool:
        """Whether it needs the student's log-probability of each realised token."""
        return False

    @property
    def reads_log_sum_squares(self) -> bool:
        """Whether it needs the log of the sum of the student's squared probabilities of each state."""
        return False

    @property
    def weakness(self) -> str:
        """What in its options leaves next to nothing to learn; empty if nothing does."""
        return ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The numeric columns of the data that it reads, besides the scores."""
        return tuple(need.kind for need in self.needs if need.role == "data" and need.kind not in SCORES)

    def check_column(self, name: str, numbers: np.ndarray) -> None:
        """Raise a UserError if the numbers of a column, [rows], are not what the method reads there."""

    def row_signals(self, signals: SignalSet) -> dict[str, np.ndarray]:
        """Return the numbers per row that `loss` reads, computed once before training: name -> [rows]."""
        return {}

    def loss(self, student: Student, signals: BatchSignals) -> tuple[Tensor, Metrics]:
        """Return the mean loss of a batch, and detached scalars to log.

        Args:
            student: the student's outputs.
            signals: the batch's part of `row_signals` [B], and the signals of its states (see `needs`).
        """
        raise NotImplementedError

    @property
    def margin_scale(self) -> float:
        """What the loss multiplies the policy's log-ratio margin by: the beta of DPO."""
        return 1.0

    def margin_offset(self, row_signals: dict[str, np.ndarray]) -> np.ndarray | None:
        """Return the term that the loss adds to the scaled margin of each pair, [rows]; None for a method without.

        Args:
            row_signals: what the method of that name returns.
        """
        return None

    def disproportion(self, row_signals: dict[str, np.ndarray] | None = None) -> str:
        """Return by how much `margin_offset` exceeds what training can do about it, and the fix; empty if it does not.

        Args:
            row_signals: of the training rows; None: before a named teacher is read, by the scale that is usual.
        """
        return ""


def sampled(method: Method) -> tuple[str, ...]:
    """Return the responses of a method that preference data does not have: they are sampled from a model first."""
    return tuple(response for response in method.responses if response not in SIDES)


def taught(signals: BatchSignals, response: str) -> Tensor:
    """Return in which states the teacher's "topk" signal has tokens, bool [states]: all, with the same tokenizer."""
    return (signals[f"{response}_ids"] >= 0).any(1)


def mean_kl(student: Student, signals: BatchSignals, response: str) -> Tensor:
    """Return the forward divergence of the teacher to the student, averaged over a response's taught states, [B]."""
    per_state = losses.topk_kl(
        signals[f"teacher_{response}_topk"],
        student.topk[response],
        signals[f"teacher_{response}_rest"],
        student.rest[response],
    )
    return student.mean_over_tokens(response, per_state, taught(signals, response))
