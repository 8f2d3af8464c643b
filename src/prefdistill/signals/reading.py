"""What a model says about encoded pairs: one pass over length-sorted batches, a few numbers kept of each state."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.batches import Document, Layout, layout_for, make_batch
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import highest_token_id
from prefdistill.losses.value import soft_value
from prefdistill.models.logprobs import (
    emittable_ids,
    likeliest,
    reduce_logits,
    token_logps,
    topk_logps,
    vocabulary_rows,
)
from prefdistill.models.vocabulary import check_ids
from prefdistill.signals.gauge import DIRECTIONS, gauge_shifts
from prefdistill.signals.packing import id_bits
from prefdistill.signals.store import KINDS, Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALUES = ("values", "logprob_values")


@dataclass(frozen=True)
class TopKRequest:
    """Which tokens of each state a "topk" signal keeps.

    Args:
        k: how many, the likeliest ones; "vocab" is all of them.
        p: keep fewer where fewer hold this share of the probability.
        ids_from: read at the ids of this store instead, so that the two can be compared token by token.
        coding: "packed" (2.5 bytes an id, see packing.py) or "float32" (exact, 8 bytes). Default: exact for the whole
            vocabulary, as `ids_from` was, or else packed.
    """

    k: int | Literal["vocab"] = 50
    p: float | None = None
    ids_from: Signals | None = None
    coding: Literal["packed", "float32"] | None = None

    def __post_init__(self) -> None:
        if self.k != "vocab" and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise UserError(f"k must be 1 or more, or the word vocab, got {self.k!r}")
        if self.p is not None and not 0 < self.p <= 1:
            raise UserError(f"p is a share of the probability and must lie in 0..1, got {self.p}")
        if self.coding not in (None, "packed", "float32"):
            raise UserError(f"the coding of distributions is packed or float32, got {self.coding!r}")

    @property
    def packed(self) -> bool:
        if self.coding is not None:
            return self.coding == "packed"
        return self.k != "vocab" if self.ids_from is None else self.ids_from.manifest["topk"]["coding"] == "packed"

    def manifest(self, vocabulary: int, head_rows: int) -> dict[str, Any]:
        """What a store says of itself; `vocabulary` is how many tokens there can be, below `head_rows`."""
        kept: dict[str, Any] = {"ids_from": self.ids_from.digest} if self.ids_from else {"k": self.k, "p": self.p}
        coding = {"coding": "packed", "id_bits": id_bits(head_rows)} if self.packed else {"coding": "float32"}
        return kept | {"vocabulary": vocabulary} | coding

    def most(self, vocabulary: int) -> int:
        """The most tokens of a state that are kept."""
        k = self.ids_from.manifest["topk"]["k"] if self.ids_from else self.k
        return vocabulary if k == "vocab" else min(k, vocabulary)


def emittable_count(emittable: Tensor | None, head_rows: int) -> int:
    """How many tokens can be, of `emittable_ids`."""
    return head_rows if emittable is None else int(emittable.sum())


@torch.no_grad()
def score_pairs(
    model: "PreTrainedModel",
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    kinds: Iterable[str] = ("values", "logps"),
    *,
    responses: tuple[str, ...] = SIDES,
    positions: Literal["all", "endpoints"] = "all",
    value_temperature: float = 1.0,
    topk: TopKRequest | None = None,
    bf16: bool = False,
    batch_tokens: int = 16_384,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Any]]:
    """Signals of encoded pairs (`encode_pairs`), in memory: `{"chosen_values": [array [T+1], ...], ...}`.

    All responses of a row start in the same state s_0, and get the very same number for V(s_0). With
    `positions="endpoints"` values are of s_0 and of the last state before the end token (s_T where there is none), [2],
    and nothing but these two is read. `layout` is by default what `layout_for` finds for texts of any length.

    Raises:
        UserError: if a model's logits are not finite, naming the rows, or it has no embedding for a token.
    """
    check_ids(highest_token_id(rows), model, tokenizer)
    reading = _Reading(
        tuple(kind for kind in KINDS if kind in set(kinds)),
        positions,
        value_temperature,
        topk or TopKRequest(),
        emittable_ids(tokenizer, vocabulary_rows(model)),
        vocabulary_rows(model),
    )
    found: dict[str, list[Any]] = {
        f"{response}_{column}": [None] * len(rows) for response in responses for column in reading.columns
    }
    numbers = rows["row"][:]
    rows_ended = {name: rows[f"{name}_ended"][:] for name in responses}
    layout = layout or layout_for(model)
    for documents, places in _batches(rows, responses, layout, batch_tokens):
        ended = [rows_ended[name][i] for i, name in places]
        read = functools.partial(reading.states, ended)
        batch = make_batch(layout.rows(documents), tokenizer.pad_token_id, states=read, packed=layout.kind == "packed")
        batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        given = reading.given_ids([(numbers[i], name) for i, name in places])
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            scored = reading.read(model, batch, ended, given)
        for n, (i, name) in enumerate(places):
            for column in reading.columns:
                found[f"{name}_{column}"][i] = scored[column][n]
        if progress is not None:
            progress.update(len(places))
    for column in set(VALUES).intersection(reading.columns):
        for first, *others in zip(*(found[f"{name}_{column}"] for name in responses), strict=True):
            for other in others:
                other[0] = first[0]
    _check_finite(found, numbers)
    return found


def _batches(
    rows: "Dataset", responses: tuple[str, ...], layout: Layout, batch_tokens: int
) -> Iterator[tuple[list[Document], list[tuple[int, str]]]]:
    """Documents of like length, longest first, at most `batch_tokens` padded tokens together; and where in the data
    their responses come from, as (row, response)."""
    prompts = rows["prompt_ids"][:]
    answers = [rows[f"{name}_ids"][:] for name in responses]
    documents = [
        (part, i)
        for i, (prompt, *ids) in enumerate(zip(prompts, *answers, strict=True))
        for part in layout.documents(Document(prompt, list(enumerate(ids))))
    ]
    documents.sort(key=lambda found: -found[0].width)
    batch: list[Document] = []
    places: list[tuple[int, str]] = []
    for document, i in documents:
        if batch and (len(batch) + 1) * batch[0].width > batch_tokens:
            yield batch, places
            batch, places = [], []
        batch.append(
            Document(document.prompt, [(len(places) + n, ids) for n, (_, ids) in enumerate(document.responses)])
        )
        places += [(i, responses[which]) for which, _ in document.responses]
    if batch:
        yield batch, places


class _Reading:
    """What is taken from the logits of each state, and how it becomes columns of the store."""

    def __init__(
        self,
        kinds: tuple[str, ...],
        positions: Literal["all", "endpoints"],
        value_temperature: float,
        topk: TopKRequest,
        emittable: Tensor | None,
        vocabulary: int,
    ) -> None:
        self.kinds, self.value_temperature, self.topk, self.emittable = kinds, value_temperature, topk, emittable
        self.endpoints = positions == "endpoints"
        self.k = topk.most(emittable_count(emittable, vocabulary))
        self.final = not set(VALUES).isdisjoint(kinds) and not self.endpoints  # whether s_T is always read as well
        self.gauge = "values" in kinds and not self.endpoints
        self.columns = [kind for kind in kinds if kind != "topk"]
        if self.gauge:
            self.columns.append("gauge")
        if "topk" in kinds:
            own = ["topk_ids"] if topk.ids_from is None else []
            self.columns += ["topk_counts", *own, "topk_logps", "topk_rest"]

    def states(self, ended: list[bool], place: int, tokens: int) -> np.ndarray:
        """Which of the states s_0 .. s_T of the response at a place are read."""
        if self.endpoints:
            return np.array([0, tokens - ended[place]])
        return np.arange(tokens + self.final)

    def given_ids(self, places: list[tuple[int, str]]) -> Tensor | None:
        """The ids to read at, for each state of the responses in `places`; None: the most likely ones."""
        if self.topk.ids_from is None or "topk" not in self.kinds:
            return None
        parts = [self.topk.ids_from.topk(name, np.array([row])).ids for row, name in places]
        width = max(part.shape[1] for part in parts)
        after = int(self.final)  # s_T has none
        return torch.from_numpy(
            np.concatenate([np.pad(x, ((0, after), (0, width - x.shape[1])), constant_values=-1) for x in parts])
        )

    def reduce(self, logits: Tensor, tokens: Tensor, last: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for kind in self.kinds:
            if kind == "values":
                found.append(soft_value(logits, self.value_temperature))
                if self.gauge:
                    shifts = logits.new_zeros(len(logits), DIRECTIONS)
                    shifts[last] = gauge_shifts(logits[last])
                    found.append(shifts)
            elif kind == "logprob_values":
                found.append(soft_value(logits.log_softmax(-1), self.value_temperature))
            elif kind == "logps":
                found += token_logps(logits, tokens)
            elif kind == "q":
                found.append(logits.gather(-1, tokens[:, None])[:, 0])
            elif kind == "topk" and given is None:
                found += likeliest(logits, self.k, self.topk.p)
            elif kind == "topk":
                assert given is not None
                found += [given, *topk_logps(logits, given)[:2]]
        return tuple(found)

    def read(
        self, model: "PreTrainedModel", batch: dict[str, Any], ended: list[bool], given: Tensor | None
    ) -> dict[str, list[Any]]:
        """Columns of the store for each response of a batch."""
        lengths, sizes = batch["lengths"].tolist(), batch["sizes"]
        device = batch["input_ids"].device
        last = torch.zeros(sum(sizes), dtype=torch.bool)
        if self.gauge:
            last[np.cumsum(sizes) - 1 - np.array(ended)] = True
        at = [] if given is None else [given.to(device)]
        out = iter(
            reduce_logits(model, batch, self.reduce, batch["tokens"], last.to(device), *at, emittable=self.emittable)
        )

        def per_response(read: Tensor) -> list[np.ndarray]:
            return [part.numpy().copy() for part in read.cpu().split(sizes)]

        found: dict[str, list[Any]] = {}
        for kind in self.kinds:
            if kind in VALUES:
                found[kind] = per_response(next(out))
                if kind == "values" and self.gauge:
                    found["gauge"] = list(next(out).cpu()[last].numpy())
            elif kind in ("logps", "q"):
                parts = zip(per_response(next(out)), lengths, strict=True)
                found[kind] = [np.float32(part[:n].sum(dtype=np.float64)) for part, n in parts]  # as it is stored
            else:
                ids_of, logps, rest = (per_response(next(out)) for _ in range(3))
                found |= self._topk(ids_of, logps, rest, lengths)
        return found

    @staticmethod
    def _topk(
        ids: list[np.ndarray], logps: list[np.ndarray], rest: list[np.ndarray], lengths: list[int]
    ) -> dict[str, list[np.ndarray]]:
        there = [part[:n] >= 0 for part, n in zip(ids, lengths, strict=True)]
        return {
            "topk_counts": [mask.sum(1, dtype=np.int32) for mask in there],
            "topk_ids": [part[:n][mask] for part, n, mask in zip(ids, lengths, there, strict=True)],
            "topk_logps": [part[:n][mask] for part, n, mask in zip(logps, lengths, there, strict=True)],
            "topk_rest": [part[:n] for part, n in zip(rest, lengths, strict=True)],
        }


def _check_finite(found: dict[str, list[Any]], rows: list[int]) -> None:
    """-inf is a fair answer for the mass of no other token, and for nothing else."""
    bad: set[int] = set()
    for name, column in found.items():
        refused = np.isnan if name.endswith("_topk_rest") else lambda x: ~np.isfinite(x)
        bad |= {rows[i] for i, x in enumerate(column) if np.any(refused(x))}
    if bad:
        raise UserError(
            f"the model's logits are not finite in {len(bad)} pairs, the first is row {min(bad)} of the data; "
            "its weights may be damaged, or its dtype too narrow: try --dtype float32"
        )
