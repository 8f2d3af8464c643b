"""Prepare the training rows of a method: encode pairs, join the signals, collate batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say
from prefdistill.data.batches import Layout, PairCollator
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import reading_of
from prefdistill.data.truncation import Dropped, Reading, Truncation
from prefdistill.methods import Method
from prefdistill.signals.ids import Ids, rows_digest
from prefdistill.signals.join import join
from prefdistill.signals.kinds import KINDS
from prefdistill.signals.needs import Need
from prefdistill.signals.options import SignalOptions
from prefdistill.signals.store import Signals, SignalSet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SignalCollator:
    """Make a batch of training rows, with the stored signals of their states."""

    pairs: PairCollator
    signals: SignalSet
    per_state: tuple[tuple[str, str, str], ...]  # (role, kind, response)

    def with_layout(self, layout: Layout) -> "SignalCollator":
        return replace(self, pairs=replace(self.pairs, layout=layout))

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.pairs(rows)
        signals = self.signals.at(np.array(batch["features"]["row"]))
        states: dict[str, np.ndarray] = {}
        for role, kind, response in self.per_state:
            states |= signals.batch(role, kind, response)
        batch["features"]["states"] = states
        return batch


def feature_tensors(features: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return the signals of a batch as float32 tensors on the device.

    They arrive as lists and arrays, so that nothing before has cast them to 16 bits.
    """
    tensors = {
        name.removeprefix("feature_"): torch.tensor(values, dtype=torch.float32, device=device)
        for name, values in features.items()
        if name.startswith("feature_")
    }
    return tensors | {name: torch.tensor(values, device=device) for name, values in features["states"].items()}


def prepare_rows(
    dataset: "Dataset",
    method: Method,
    signals: Sequence[Signals],
    tokenizer: "PreTrainedTokenizerBase",
    truncation: Truncation | None,
) -> "tuple[Dataset, SignalCollator, Truncation, Reading]":
    """Return encoded rows with the method's features as columns `feature_*`, their collator, their truncation, and how
    the data were read.

    Raises:
        UserError: if a signal is missing, or was computed from other data, tokens or truncation.
    """
    joined = join(signals, dataset, tokenizer, truncation, responses=method.responses, needs=method.needs)
    available, encoded, truncation = joined.signals, joined.encoded, joined.truncation
    if missing := available.missing(method.needs):
        raise UserError(f"{type(method).__name__} lacks {'; '.join(map(str, missing))}. {_how_to_extract(missing[0])}")
    available.check_settings(method.needs)
    reading = replace(reading_with_ids(encoded, joined.dropped, method.responses), across=joined.across)
    if not reading.complete:
        say(f"training: {reading}")
    features = method.row_signals(available)
    if warning := method.disproportion(features):
        reading = replace(reading, warnings=(warning,))
    encoded = encoded.select_columns(["row", "prompt_ids", *(f"{name}_ids" for name in method.responses)])
    for name, values in features.items():
        encoded = encoded.add_column(f"feature_{name}", values.astype(np.float32))
    collate = PairCollator(
        tokenizer.pad_token_id,
        responses=method.responses,
        features=("row", *(name for name in encoded.column_names if name.startswith("feature_"))),
    )
    per_state = tuple(
        (need.role, need.kind, response)
        for need in method.needs
        if need.role != "data" and KINDS[need.kind].in_batch
        for response in need.responses
    )
    return encoded, SignalCollator(collate, available, per_state), truncation, reading


def reading_with_ids(encoded: "Dataset", dropped: Dropped, responses: Sequence[str]) -> Reading:
    """Return how a data set was read, with the digest of its token ids."""
    ids = Ids.of(encoded, responses)
    return replace(reading_of(encoded, dropped), ids=rows_digest(ids.rows, ids.checks))


def _how_to_extract(need: Need) -> str:
    if need.role == "data":
        return f"The data has no column {need.kind!r}; give every pair a number there"
    model = {"teacher": "TEACHER", "teacher_reference": "TEACHER_SFT_MODEL", "reference": "STUDENT"}[need.role]
    options = "" if need.responses == SIDES else f" --responses {','.join(need.responses)}"
    if need.kind == "topk" and need.role != "teacher":
        options += " --ids-from DIR_OF_THE_TEACHERS"
    for name, value in need.settings.items():
        options += "" if value == SignalOptions.model_fields[name].default else f" --{name.replace('_', '-')} {value}"
    return (
        f"Make it with `prefdistill signals --role {need.role} --kind {need.kind}{options} --model {model} --data DATA "
        "--out DIR`"
    )
