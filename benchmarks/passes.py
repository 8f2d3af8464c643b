"""Passes of a teacher over preference pairs: ours, a bare forward, the plain way, and the backbone alone.

Each is a variant's function (see harness.py): it prepares model and tokens, and its `run` goes over all pairs once.
"""

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import Numbers, Prepared
from benchmarks.inputs import make_pairs, make_tokenizer
from benchmarks.shapes import forward_flops, make_model
from torch import Tensor

from prefdistill.data.columns import SIDES


class Pass:
    """A model, and encoded pairs for it."""

    def __init__(
        self,
        shape: dict[str, Any],
        pairs: int,
        source: str | None,
        max_length: int,
        dtype: str,
        batch: int,
        budget: int,
    ) -> None:
        from datasets import Dataset

        from prefdistill.data.encode import encode_pairs
        from prefdistill.data.truncation import Truncation

        self.shape, self.batch, self.budget = shape, batch, budget
        self.tokenizer = make_tokenizer(shape["vocab_size"])
        rows = make_pairs(pairs, shape["vocab_size"], source=source)
        self.data = Dataset.from_list(rows).select_columns(["prompt", *SIDES])
        self.truncation = Truncation(max_length)
        self.rows, _ = encode_pairs(self.data, self.tokenizer, self.truncation)
        self.model = make_model(shape, self.tokenizer, 0, getattr(torch, dtype)).eval()

    @property
    def facts(self) -> Numbers:
        prompts, *answers = ([len(ids) for ids in self.rows[f"{name}_ids"]] for name in ("prompt", *SIDES))
        texts = [p + n for lengths in answers for p, n in zip(prompts, lengths, strict=True)]
        return {
            "response_tokens": sum(map(sum, answers)),
            "tokens": sum(texts),
            "flops": forward_flops(self.shape, texts, sum(map(sum, answers))),
            "bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
        }

    def padded(self) -> Iterator[dict[str, Any]]:
        """Batches as most scripts make them: pairs in the order of the data, padded to the longest of the batch."""
        from prefdistill.data.batches import PairCollator

        collate = PairCollator(self.tokenizer.pad_token_id)
        for start in range(0, len(self.rows), self.batch // 2):
            yield self.on_device(
                collate(list(self.rows.select(range(start, min(start + self.batch // 2, len(self.rows))))))
            )

    def grouped(self, *, layout: Any) -> Iterator[dict[str, Any]]:
        """Batches as ours: documents of like length, so many tokens together."""
        from prefdistill.data.batches import make_batch
        from prefdistill.signals.reading import _batches

        for documents, _ in _batches(self.rows, SIDES, layout, self.budget):
            yield self.on_device(make_batch(layout.rows(documents), self.tokenizer.pad_token_id))

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: x.to(self.model.device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def ours(kinds: list[str], positions: str = "all", **given: Any) -> Prepared:
    """Signals in memory: everything but tokenising and writing."""
    from prefdistill.data.batches import layout_for
    from prefdistill.signals.reading import score_pairs

    made = Pass(**given)
    layout = layout_for(made.model, made.truncation.max_length)
    options = {"positions": positions, "batch_tokens": made.budget, "layout": layout}

    def run() -> Numbers:
        score_pairs(made.model, made.rows, made.tokenizer, tuple(kinds), **options)  # type: ignore[arg-type]
        return {}

    return run, made.facts


def stored(kinds: list[str], positions: str = "all", shard_rows: int = 1_024, **given: Any) -> Prepared:
    """Signals on the disk, from the text on: everything that `prefdistill signals` does but loading."""
    from prefdistill.signals import extract_signals

    made = Pass(**given)

    def run() -> Numbers:
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "store"
            extract_signals(
                made.model, made.data, made.tokenizer, tuple(kinds), store, truncation=made.truncation,
                positions=positions, batch_tokens=made.budget, shard_rows=shard_rows,  # type: ignore[arg-type]
            )  # fmt: skip
            return {"disk": sum(path.stat().st_size for path in (store / "shards").iterdir())}

    return run, made.facts


@torch.no_grad()
def _forward(made: Pass, batches: Any) -> Numbers:
    from prefdistill.models.backbone import model_inputs

    for batch in batches():
        made.model(**model_inputs(batch, made.model), use_cache=False)
    return {}


def bare(grouped: bool, **given: Any) -> Prepared:
    """The model's forward with all its logits, and nothing made of them."""
    from prefdistill.data.batches import PADDED

    made = Pass(**given)
    batches = partial(made.grouped, layout=PADDED) if grouped else made.padded
    return partial(_forward, made, batches), made.facts


def backbone(head: bool, **given: Any) -> Prepared:
    """The limit: the model without its head, over our batches; or with the head's product at the states asked for."""
    from prefdistill.data.batches import layout_for
    from prefdistill.models.backbone import backbone_of, model_inputs

    made = Pass(**given)
    layout = layout_for(made.model, made.truncation.max_length)

    @torch.no_grad()
    def run() -> Numbers:
        for batch in made.grouped(layout=layout):
            hidden = backbone_of(made.model)(**model_inputs(batch, made.model), use_cache=False).last_hidden_state
            if head:
                states = hidden.flatten(0, 1)[batch["states"]]
                for part in states.split(256):
                    made.model.lm_head(part)
        return {}

    return run, made.facts


def naive(k: int, **given: Any) -> Prepared:
    """The plain way: full logits, the k likeliest tokens of each state and the rest, as lines of JSON."""
    made = Pass(**given)

    @torch.no_grad()
    def run() -> Numbers:
        with tempfile.NamedTemporaryFile("w") as file:
            for batch in made.padded():
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                logps = made.model(**inputs, use_cache=False).logits.float().log_softmax(-1)
                top, ids = logps.topk(k, dim=-1)
                rest = (1 - top.exp().sum(-1)).clamp(min=1e-9).log()
                flat = [x.flatten(0, 1)[batch["states"]].split(batch["sizes"]) for x in (ids, top, rest)]
                for one_ids, one_top, one_rest in zip(*flat, strict=True):
                    line = {"ids": one_ids.tolist(), "logps": one_top.tolist(), "rest": one_rest.tolist()}
                    file.write(json.dumps(line) + "\n")
            file.flush()
            return {"disk": Path(file.name).stat().st_size}

    return run, made.facts
