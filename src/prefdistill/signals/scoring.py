"""Score encoded pairs: one pass over length-sorted batches, reduced to a few numbers per state."""

import functools
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prefdistill.core.progress import Progress
from prefdistill.data.batches import Document, Layout, layout_for, make_batch
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import highest_token_id, longest_text
from prefdistill.models.logprobs import emittable_ids, reduce_logits, vocabulary_rows
from prefdistill.models.placement import input_device
from prefdistill.models.positions import check_positions
from prefdistill.models.vocabulary import check_ids
from prefdistill.signals.kinds import Kind, Settings, Tile, check_finite, make_kinds
from prefdistill.signals.topk import TopKRequest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def emittable_count(emittable: Tensor | None, head_rows: int) -> int:
    """Return how many tokens the tokenizer can emit, of `emittable_ids`."""
    return head_rows if emittable is None else int(emittable.sum())


def topk_manifest(
    request: TopKRequest, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Return the `topk` part of a manifest for a model."""
    head_rows = vocabulary_rows(model)
    return request.manifest(emittable_count(emittable_ids(tokenizer, head_rows), head_rows), head_rows)


@torch.no_grad()
def score_pairs(
    model: "PreTrainedModel",
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    kinds: Collection[str] = ("values", "logps"),
    *,
    responses: tuple[str, ...] = SIDES,
    settings: Settings | None = None,
    bf16: bool = False,
    batch_tokens: int = 16_384,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Any]]:
    """Return the signals of encoded pairs (`encode_pairs`): `{"chosen_values": [array [T+1], ...], ...}`, unpacked.

    All responses of a row start in the same state s_0, and get the very same number for V(s_0). With
    `positions="endpoints"` only s_0 and the last state before the end token (s_T where there is none) are read.
    `layout` is by default what `layout_for` returns for texts of any length.

    Raises:
        UserError: if a model's logits are not finite, naming the rows, or it has no embedding for a token, or no
            position for one.
    """
    check_ids(highest_token_id(rows), model, tokenizer)
    check_positions(longest_text(rows.select_columns(["prompt_ids", *(f"{name}_ids" for name in responses)])), model)
    settings = settings or Settings()
    if "topk" in kinds and not settings.topk:
        settings = replace(settings, topk=topk_manifest(TopKRequest(), model, tokenizer))
    scorer = _Scorer(model, tokenizer, make_kinds(kinds, settings), settings.endpoints, bf16)
    columns: dict[str, list[Any]] = {
        f"{response}_{name}": [None] * len(rows)
        for response in responses
        for kind in scorer.kinds
        for name in kind.collected
    }
    row_numbers = rows["row"][:]
    rows_ended = {name: rows[f"{name}_ended"][:] for name in responses}
    layout = layout or layout_for(model)
    for documents, places in document_batches(rows, responses, layout, batch_tokens):
        ended = [rows_ended[name][i] for i, name in places]
        states = functools.partial(scorer.states, ended)
        packed = layout.kind == "packed"
        batch = make_batch(layout.rows(documents), tokenizer.pad_token_id, states=states, packed=packed)
        scores = scorer.score(batch, ended, [(row_numbers[i], name) for i, name in places])
        for (i, response), collected in zip(places, scores, strict=True):
            for name, value in collected.items():
                columns[f"{response}_{name}"][i] = value
        if progress is not None:
            progress.update(len(places))
    for name in (kind.name for kind in scorer.kinds if kind.shares_start and not settings.endpoints):
        for first, *others in zip(*(columns[f"{response}_{name}"] for response in responses), strict=True):
            for other in others:
                other[0] = first[0]
    check_finite(scorer.kinds, columns, row_numbers)
    return columns


def document_batches(
    rows: "Dataset", responses: tuple[str, ...], layout: Layout, batch_tokens: int
) -> Iterator[tuple[list[Document], list[tuple[int, str]]]]:
    """Yield documents of similar length, longest first, at most `batch_tokens` padded tokens together, and the places
    of their responses in the data, as (row, response)."""
    prompts = rows["prompt_ids"][:]
    ids_by_response = [rows[f"{name}_ids"][:] for name in responses]
    documents = [
        (part, i)
        for i, (prompt, *ids) in enumerate(zip(prompts, *ids_by_response, strict=True))
        for part in layout.documents(Document(prompt, list(enumerate(ids))))
    ]
    documents.sort(key=lambda item: -item[0].width)
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


class _Scorer:
    """Score batches with a model: read the states that the kinds need, and collect the kinds' columns."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        kinds: list[Kind],
        endpoints: bool,
        bf16: bool,
    ) -> None:
        self.model, self.kinds, self.endpoints, self.bf16 = model, kinds, endpoints, bf16
        self.emittable = emittable_ids(tokenizer, vocabulary_rows(model))
        self.has_final_state = any(kind.has_final_state for kind in kinds)

    def states(self, ended: list[bool], place: int, tokens: int) -> np.ndarray:
        """Return which of the states s_0 .. s_T of the response at a place are read."""
        if self.endpoints:
            return np.array([0, tokens - ended[place]])
        return np.arange(tokens + self.has_final_state)

    def score(
        self, batch: dict[str, Any], ended: list[bool], places: list[tuple[int, str]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the collected columns of each response of a batch; `places` are their rows and names."""
        lengths, sizes, device = batch["lengths"].tolist(), batch["sizes"], input_device(self.model)
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        last = torch.zeros(sum(sizes), dtype=torch.bool)
        if self.has_final_state:
            last[np.cumsum(sizes) - 1 - np.array(ended)] = True
        inputs = {kind.name: kind.state_inputs(places, self.has_final_state) for kind in self.kinds}
        state_inputs = {name: x.to(device) for name, x in inputs.items() if x is not None}
        counts: list[int] = []  # tensors of each kind

        def reduce(logits: Tensor, tokens: Tensor, last: Tensor, *of_kinds: Tensor) -> tuple[Tensor, ...]:
            tile = Tile(logits, tokens, last, dict(zip(state_inputs, of_kinds, strict=True)))
            reduced = [kind.reduce(tile) for kind in self.kinds]
            counts[:] = [len(parts) for parts in reduced]
            return tuple(part for parts in reduced for part in parts)

        per_state = (batch["tokens"], last.to(device), *state_inputs.values())
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            reduced = reduce_logits(self.model, batch, reduce, *per_state, emittable=self.emittable)
        split = iter([[part.numpy().copy() for part in x.cpu().split(sizes)] for x in reduced])
        by_kind = [[next(split) for _ in range(count)] for count in counts]
        for n, tokens in enumerate(lengths):
            collected: dict[str, Any] = {}
            for kind, parts in zip(self.kinds, by_kind, strict=True):
                end = None if self.endpoints or kind.has_final_state else tokens
                collected |= kind.collect([part[n][:end] for part in parts], ended[n])
            yield collected
