"""What a method needs of the signals: which model they come from, which kind, of which responses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from prefdistill.data.columns import SIDES
from prefdistill.signals.options import Role

# The model a signal is computed from: the teacher; the SFT model that the teacher's DPO started from; the student's
# start, which is the reference of the DPO margin; or a trained student, to look at.
ROLES = get_args(Role)
# One is the start of the other's DPO, so they have the same tokens; the other roles are read as the student is trained.
TEACHERS = ("teacher", "teacher_reference")


@dataclass(frozen=True)
class Need:
    """A signal that a method needs: its kind, the role of its model and the responses; or a numeric column of the data.

    Args:
        role: one of `ROLES`, or "data".
        kind: a signal kind, or the name of the column.
        responses: the responses it is needed of.
        settings: settings the signals must have been extracted with, by their name in a store's manifest, in the
            recipe's `signals` section and in `extract_signals`: `{"value_temperature": 0.5}`.
        across: how distributions over another tokenizer's tokens become ones over the student's: "first_token", see
            `prefdistill.signals.projection`. None: they cannot serve. The stored signals are the same either way.

    Example:
        >>> str(Need("teacher", "topk", ("chosen",)))
        'teacher.topk of chosen'
    """

    role: str
    kind: str
    responses: tuple[str, ...] = SIDES
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    across: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.role}.{self.kind}" + (f" of {', '.join(self.responses)}" if self.role != "data" else "")
