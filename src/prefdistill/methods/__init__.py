"""The methods by name. A method holds its hyper-parameters, declares the signals it needs, turns them into a few
numbers per row once before training, and computes the loss from the student's outputs. To add one: its loss under
`losses/`, a dataclass here, and its line in `METHODS`; from another package, `METHODS.register`, an entry point of the
group `prefdistill.methods`, or its dotted name wherever a method is named.
"""

from dataclasses import fields, is_dataclass
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.core.options import suggestion
from prefdistill.core.registry import Registry
from prefdistill.methods.base import BatchSignals, Method, Metrics, Student, sampled

__all__ = ["METHODS", "BatchSignals", "Method", "Metrics", "Student", "make_method", "sampled"]

METHODS = Registry(
    "method",
    "methods",
    {
        "sft": "prefdistill.methods.preference:SFT",
        "dpo": "prefdistill.methods.preference:DPO",
        "tvkd": "prefdistill.methods.tvkd:TVKD",
        "vanillakd": "prefdistill.methods.distribution:VanillaKD",
        "seqkd": "prefdistill.methods.preference:SeqKD",
        "dckd": "prefdistill.methods.distribution:DCKD",
        "adpa": "prefdistill.methods.distribution:ADPA",
        "dpkd": "prefdistill.methods.dpkd:DPKD",
        "simpo": "prefdistill.methods.preference:SimPO",
        "wpo": "prefdistill.methods.preference:WPO",
        "dadpo": "prefdistill.methods.preference:DaDPO",
        "distillm2": "prefdistill.methods.distribution:DistiLLM2",
    },
)


def method_options(name: str) -> tuple[str, ...]:
    """Return the names of a method's hyper-parameters.

    Raises:
        UserError: on an unknown method, or a dotted name that is no method.
    """
    method = METHODS.find(name)
    if not (isinstance(method, type) and issubclass(method, Method) and is_dataclass(method)):
        raise UserError(f"{name} is no method: it must be a dataclass derived from prefdistill.methods.Method")
    return tuple(field.name for field in fields(method))


def make_method(name: str, options: dict[str, Any]) -> Method:
    """Return a method from its name, in any case, and its hyper-parameters.

    Raises:
        UserError: on an unknown method or option, naming the closest or the known ones, or a value of the wrong type.
    """
    known = method_options(name)
    if unknown := [key for key in options if key not in known]:
        raise UserError(
            *(f"{name} has no option {key!r}; {suggestion(key, sorted(known), 'its options')}" for key in unknown)
        )
    try:
        return METHODS.find(name)(**options)
    except UserError as error:
        raise UserError(*(f"{name}: {message}" for message in error.messages)) from error
