"""The methods by name. A method owns its hyper-parameters, says which signals it needs, turns them into a few numbers
per row once before training, and maps what the student says to a loss. To add one: its loss under `losses/`, a
dataclass here, and its line in `METHODS`.
"""

from dataclasses import fields
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.methods.base import Features, Method, Metrics, Student, sampled
from prefdistill.methods.distribution import ADPA, DCKD, DistiLLM2, VanillaKD
from prefdistill.methods.dpkd import DPKD
from prefdistill.methods.preference import DPO, SFT, DaDPO, SeqKD
from prefdistill.methods.trl import WPO, SimPO, TRLMethod
from prefdistill.methods.tvkd import TVKD, shaping_returns

__all__ = [
    "METHODS",
    "TVKD",
    "Features",
    "Method",
    "Metrics",
    "Student",
    "TRLMethod",
    "make_method",
    "sampled",
    "shaping_returns",
]

METHODS: dict[str, type[Any]] = {
    "sft": SFT,
    "dpo": DPO,
    "tvkd": TVKD,
    "vanillakd": VanillaKD,
    "seqkd": SeqKD,
    "dckd": DCKD,
    "adpa": ADPA,
    "dpkd": DPKD,
    "simpo": SimPO,
    "wpo": WPO,
    "dadpo": DaDPO,
    "distillm2": DistiLLM2,
}


def make_method(name: str, options: dict[str, Any]) -> Method:
    """A method from its name and hyper-parameters.

    Raises:
        UserError: on an unknown method or option, naming the known ones, or a value of the wrong kind.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    known = sorted(field.name for field in fields(METHODS[name]))
    if unknown := [key for key in options if key not in known]:
        raise UserError(f"{name} has no option {unknown[0]!r}; its options: {', '.join(known) or 'none'}")
    try:
        return METHODS[name](**options)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
