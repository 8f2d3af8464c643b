"""Check the student's start against the reference signals computed from it."""

from collections.abc import Sequence
from typing import Any

from prefdistill.core.differences import differences
from prefdistill.core.errors import UserError
from prefdistill.core.processes import processes
from prefdistill.core.progress import say
from prefdistill.models.identity import computing_config, fits_in, weights_digest
from prefdistill.signals.store import Signals


def check_start(student: Any, signals: Sequence[Signals], *, bf16: bool) -> None:
    """Check that reference signals were computed from the model that the student starts from.

    A student that is wrapped in an adapter already is not checked: it hides its base.

    Raises:
        UserError: if the weights differ.
    """
    references = [store.manifest["model"] for store in signals if store.role == "reference"]
    if not references or not processes().is_main_process or hasattr(student, "peft_config"):
        return
    if any(stored["bf16"] != bf16 for stored in references):
        say(
            f"note: the student is trained with bf16={bf16} and its reference signals were computed with "
            f"bf16={not bf16}: their log-probs differ by rounding; "
            "`prefdistill signals --bf16` computes them as bf16=true trains"
        )
    dtypes = {stored["dtype"] for stored in references}
    weights = {dtype: weights_digest(student, dtype) for dtype in dtypes}
    lossy = {dtype for dtype in dtypes if not fits_in(student, dtype)}
    config = computing_config(student)
    for stored in references:
        if changed := differences(stored["config"], config):
            say(f"warning: the reference signals were computed with another configuration ({'; '.join(changed)})")
        if weights[stored["dtype"]] == stored["weights_sha256"] and stored["dtype"] not in lossy:
            continue
        dtype = str(student.dtype).removeprefix("torch.")
        name = student.name_or_path or "the student"
        raise UserError(
            f"the reference signals were made from another model ({stored['name'] or 'one in memory'}, in "
            f"{stored['dtype']}) than the student starts from ({name}, in {dtype}): their weights differ; compute "
            f"them again with `prefdistill signals --role reference --dtype {dtype}` and the student"
        )
