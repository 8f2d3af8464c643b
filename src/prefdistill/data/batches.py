"""Make batches of encoded pairs: row layout, state indices, and attention mask.

A response of T tokens after a prompt has states s_0 .. s_T, where s_0 is the prompt's last token; token a_t = y_{t+1}
is chosen in s_t. A document is a prompt followed by one or more responses. A batch has one of three layouts, and holds
the indices of the states in each:

    padded   one document of one response per row, padded on the right
    masked   documents share rows, and responses share their prompt; the attention mask hides each from the others
    packed   documents of one response end to end in a single row, separated by their positions: for attention kernels
             of variable length
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prefdistill.data.columns import SIDES
from prefdistill.models.backbone import DOCUMENT, attention_of, backbone_of, causal_lm, model_inputs
from prefdistill.models.placement import input_device

PADDING = -1
# Cost of a floating-point operation of masked attention, relative to one of the rest of a model. 1.5 was measured on a
# CPU; on a GPU, whose kernels do not skip what a mask hides, it is an estimate on the safe side.
MASKED_ATTENTION = {"cpu": 1.5, "other": 4.0}
# Relative difference between two layouts of one model that rounding can cause.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
ROUNDING_16_BIT = 0.05


@dataclass(frozen=True)
class Document:
    """A prompt and responses to it, each with its index among the responses of the batch."""

    prompt: Sequence[int]
    responses: Sequence[tuple[int, Sequence[int]]]

    @property
    def width(self) -> int:
        """Number of tokens."""
        return len(self.prompt) + sum(len(ids) for _, ids in self.responses)

    def split(self) -> "list[Document]":
        """Return one document for each response, with its own copy of the prompt."""
        return [Document(self.prompt, [response]) for response in self.responses]


@dataclass(frozen=True)
class Layout:
    """The layout of a model's batches, and when responses share a prompt.

    Args:
        kind: see the docstring of this module.
        attention_cost: cost of attention for a pair of tokens in a row, relative to a token in the rest of the model.
    """

    kind: Literal["padded", "masked", "packed"] = "padded"
    attention_cost: float = 0.0

    def cost(self, widths: Iterable[int]) -> float:
        """Return the cost of rows of these widths, in tokens."""
        return sum(width + self.attention_cost * width**2 for width in widths)

    def documents(self, document: Document) -> list[Document]:
        """Return one document with a shared prompt, or one for each response, whichever costs less as a row.

        Example:
            >>> both = Document([1] * 100, [(0, [2] * 50), (1, [3] * 50)])
            >>> len(Layout("masked", 1e-3).documents(both)), len(Layout().documents(both))
            (1, 2)
        """
        separate = document.split()
        cheaper = self.cost([document.width]) < self.cost(part.width for part in separate)
        return [document] if self.kind == "masked" and cheaper else separate

    def rows(self, documents: Sequence[Document]) -> list[list[Document]]:
        """Pack documents into rows greedily, none longer than the longest document."""
        if self.kind == "padded":
            return [[document] for document in documents]
        if self.kind == "packed":
            return [list(documents)]
        longest = max(document.width for document in documents)
        rows: list[list[Document]] = []
        room: list[int] = []
        for document in sorted(documents, key=lambda document: -document.width):
            fits = next((n for n, left in enumerate(room) if left >= document.width), None)
            if fits is None:
                rows.append([])
                room.append(longest)
                fits = len(rows) - 1
            rows[fits].append(document)
            room[fits] -= document.width
        return rows

    def plan(self, documents: Sequence[Document]) -> list[list[Document]]:
        """Return rows for the documents of one batch: all share prompts or none do, whichever costs less.

        A row is as long as the longest document, so sharing in some would lengthen the rows of all.
        """
        plans = [self.rows([part for document in documents for part in document.split()])]
        if self.kind == "masked":
            plans.append(self.rows(documents))
        widths = [[max(width_of(row) for row in rows)] * len(rows) for rows in plans]
        return min(zip(plans, widths, strict=True), key=lambda plan: self.cost(plan[1]))[0]


def width_of(row: Iterable[Document]) -> int:
    """Return the number of tokens of a row."""
    return sum(document.width for document in row)


PADDED = Layout()


def every_token(place: int, tokens: int) -> np.ndarray:
    """Return the states in which a token of the response is chosen: s_0 .. s_{T-1}."""
    return np.arange(tokens)


def make_batch(
    rows: Sequence[Sequence[Document]],
    pad_token_id: int,
    *,
    states: Callable[[int, int], np.ndarray] = every_token,
    packed: bool = False,
) -> dict[str, Any]:
    """Return tensors of N rows, padded on the right to the longest, L.

    Args:
        rows: the documents of each row; together they hold responses 0 .. M-1.
        pad_token_id: fills the padding.
        states: `states(index, T)` returns which of s_0 .. s_T to use for the response with this index.
        packed: the rows are for kernels that separate documents by their positions.

    Returns:
        - `input_ids` [N, L], and what a model needs besides: `attention_mask` [N, L]; or `position_ids` and `segments`
          [N, L] where a row holds more than one response; or `position_ids` alone if packed;
        - `occurrences` [N, L], beside `segments`: the documents of one response that a token stands for, 0 for padding;
        - `states` [S]: indices of the states in the flattened batch, of response 0 in order, then of response 1, ..;
        - `tokens` [S]: the token chosen in each state (in s_T, the padding token);
        - `lengths` [M]: tokens of each response; `sizes`, a list of M: its number of `states`.
    """
    shape = (len(rows), max(width_of(row) for row in rows))
    ids = np.full(shape, pad_token_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, PADDING, dtype=np.int64)
    occurrences = np.zeros(shape, dtype=np.int64)
    count = sum(len(document.responses) for row in rows for document in row)
    where, tokens = [np.empty(0, np.int64)] * count, [np.empty(0, np.int64)] * count
    lengths = np.zeros(count, dtype=np.int64)
    for n, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row):
            before, segment = len(document.prompt), number * DOCUMENT
            last = at + before - 1  # of the prompt: s_0
            ids[n, at : last + 1], positions[n, at : last + 1] = document.prompt, np.arange(before)
            segments[n, at : last + 1], occurrences[n, at : last + 1] = segment, len(document.responses)
            at = last + 1
            for place, response in document.responses:
                end, segment = at + len(response), segment + 1
                ids[n, at:end], positions[n, at:end] = response, before + np.arange(len(response))
                segments[n, at:end], occurrences[n, at:end] = segment, 1
                used = states(place, len(response))
                where[place] = n * shape[1] + np.where(used == 0, last, at + used - 1)
                tokens[place] = np.array([*response, pad_token_id])[used]
                lengths[place] = len(response)
                at = end
    batch: dict[str, Any] = {"input_ids": torch.from_numpy(ids)}
    if packed:
        batch["position_ids"] = torch.from_numpy(positions)
    elif count > len(rows):
        batch |= {"position_ids": torch.from_numpy(positions), "segments": torch.from_numpy(segments)}
        batch["occurrences"] = torch.from_numpy(occurrences)
    else:
        batch["attention_mask"] = torch.from_numpy((segments != PADDING).astype(np.int64))
    return batch | {
        "states": torch.from_numpy(np.concatenate(where)),
        "tokens": torch.from_numpy(np.concatenate(tokens)),
        "lengths": torch.from_numpy(lengths),
        "sizes": [len(used) for used in where],
    }


@torch.no_grad()
def layout_for(model: Any, longest: int | None = None) -> Layout:
    """Return the cheapest layout in which this model's outputs equal those in the padded layout.

    A model may ignore a mask (state-space models), count positions its own way, or have a sliding window. So another
    layout is first tried on a short example; if the outputs differ, the padded one is used.

    Args:
        model: a causal language model, possibly wrapped, on its device.
        longest: the most tokens of a prompt and a response together; None if unknown.
    """
    lm = causal_lm(model)
    config, kernel = lm.config.get_text_config(), attention_of(lm)
    backbone = backbone_of(lm)
    if "position_ids" not in inspect.signature(type(backbone).forward).parameters:
        return PADDED
    others = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
    }
    kind: Literal["masked", "packed"] = "packed" if "flash" in kernel else "masked"
    # an explicit mask replaces that of the window
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    cut = any(window is not None and (longest is None or longest > window) for window in windows)
    if others or (kind == "masked" and (cut or kernel not in ("sdpa", "eager"))) or not _agrees(lm, kind):
        return PADDED
    if kind == "packed":
        return Layout("packed")
    heads = config.num_attention_heads
    inner = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    body = sum(p.numel() for name, p in lm.named_parameters() if p.dim() > 1) - _embeddings(lm)
    ratio = MASKED_ATTENTION.get(input_device(lm).type, MASKED_ATTENTION["other"])
    return Layout("masked", ratio * 2 * config.num_hidden_layers * inner / max(1, body))


def _embeddings(lm: Any) -> int:
    tables = {id(table.weight): table.weight for table in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    return sum(weight.numel() for weight in tables.values())


def _agrees(lm: Any, kind: Literal["masked", "packed"]) -> bool:
    """Return whether the model's hidden states in this layout equal those of one response at a time."""
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    ids = [(7 * i + 3) % vocabulary for i in range(80)]
    pair, other = Document(ids[:9], [(0, ids[9:40]), (1, ids[40:60])]), Document(ids[60:65], [(2, ids[65:80])])
    separate = [[document] for document in (*pair.split(), other)]
    together = [[pair, other]] if kind == "masked" else [[*pair.split(), other]]

    def hidden(rows: list[list[Document]], packed: bool) -> Tensor:
        batch = make_batch(rows, pad_token_id=0, packed=packed)
        batch = {name: x.to(input_device(lm)) if isinstance(x, Tensor) else x for name, x in batch.items()}
        states = backbone_of(lm)(**model_inputs(batch, lm), use_cache=False).last_hidden_state
        return states.flatten(0, 1)[batch["states"]].float()

    training = lm.training
    lm.eval()
    try:
        expected, actual = hidden(separate, False), hidden(together, kind == "packed")
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the model refuses such inputs, with any error
        return False
    finally:
        lm.train(training)
    error = (actual - expected).norm() / expected.norm()
    return bool(error < ROUNDING.get(lm.dtype, ROUNDING_16_BIT))


# ---- Collating ----------------------------------------


@dataclass(frozen=True)
class PairCollator:
    """Collate rows of `encode_pairs` into a batch.

    With B rows of data and R responses it has M = R*B responses, all of the first, then all of the second; see
    `make_batch`. `features` are named numbers of the rows, name -> list of B. They are not tensors, so that casting a
    batch to 16 bits, as DeepSpeed does, cannot round log-probs.
    """

    pad_token_id: int
    responses: tuple[str, ...] = SIDES
    features: tuple[str, ...] = ()
    layout: Layout = PADDED

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        documents = [
            Document(row["prompt_ids"], [(n * len(rows) + i, row[f"{r}_ids"]) for n, r in enumerate(self.responses)])
            for i, row in enumerate(rows)
        ]
        batch = make_batch(self.layout.plan(documents), self.pad_token_id, packed=self.layout.kind == "packed")
        return {**batch, "features": {name: [row[name] for row in rows] for name in self.features}}
