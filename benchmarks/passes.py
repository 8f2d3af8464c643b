"""Forward passes over preference pairs: signal extraction, a bare forward, a naive one, the backbone alone.

Each function is a variant (see harness.py): it prepares model and tokens, and its `run` goes over all pairs once.
"""

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Numbers, Prepared
from benchmarks.inputs import make_pairs, make_tokenizer
from benchmarks.shapes import compile_layers, forward_flops, make_model
from prefdistill.data.columns import SIDES


class Pass:
    """A model, and pairs encoded for it."""

    def __init__(
        self,
        shape: dict[str, Any],
        pairs: int,
        source: str | None,
        max_length: int,
        dtype: str,
        batch: int,
        budget: int,
        kernel: str = "sdpa",
        compiled: str | None = None,
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
        self.model.set_attn_implementation(kernel)
        if compiled:
            compile_layers(self.model, compiled)

    @property
    def facts(self) -> Numbers:
        prompts, *responses = ([len(ids) for ids in self.rows[f"{name}_ids"]] for name in ("prompt", *SIDES))
        texts = [p + n for lengths in responses for p, n in zip(prompts, lengths, strict=True)]
        return {
            "response_tokens": sum(map(sum, responses)),
            "tokens": sum(texts),
            "flops": forward_flops(self.shape, texts, sum(map(sum, responses))),
            "bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
        }

    def padded(self) -> Iterator[dict[str, Any]]:
        """Yield batches as most scripts do: pairs in the order of the data, padded to the longest of the batch."""
        from prefdistill.data.batches import PairCollator

        collate = PairCollator(self.tokenizer.pad_token_id)
        for start in range(0, len(self.rows), self.batch // 2):
            yield self.on_device(
                collate(list(self.rows.select(range(start, min(start + self.batch // 2, len(self.rows))))))
            )

    def grouped(self, *, layout: Any) -> Iterator[dict[str, Any]]:
        """Yield batches as extraction does: texts of similar length, up to a number of tokens."""
        from prefdistill.data.batches import make_batch
        from prefdistill.signals.scoring import document_batches

        for documents, _ in document_batches(self.rows, SIDES, layout, self.budget):
            yield self.on_device(make_batch(layout.rows(documents), self.tokenizer.pad_token_id))

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: x.to(self.model.device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def in_memory(kinds: list[str], positions: str = "all", padded: bool = False, **common: Any) -> Prepared:
    """Extract signals in memory: everything but tokenizing and writing."""
    from prefdistill.data.batches import PADDED, layout_for
    from prefdistill.signals.kinds import Settings
    from prefdistill.signals.scoring import score_pairs

    task = Pass(**common)
    layout = PADDED if padded else layout_for(task.model, task.truncation.max_length)
    options = {"settings": Settings(positions=positions), "batch_tokens": task.budget, "layout": layout}

    def run() -> Numbers:
        score_pairs(task.model, task.rows, task.tokenizer, tuple(kinds), **options)  # type: ignore[arg-type]
        return {}

    return run, task.facts


def stored(kinds: list[str], positions: str = "all", shard_rows: int = 1_024, **common: Any) -> Prepared:
    """Extract signals from text to files: everything that `prefdistill signals` does except loading the model."""
    from prefdistill.signals import extract_signals

    task = Pass(**common)

    def run() -> Numbers:
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "store"
            extract_signals(
                task.model, task.data, task.tokenizer, tuple(kinds), store, truncation=task.truncation,
                positions=positions, batch_tokens=task.budget, shard_rows=shard_rows,  # type: ignore[arg-type]
            )  # fmt: skip
            return {"disk": sum(path.stat().st_size for path in (store / "shards").iterdir())}

    return run, task.facts


@torch.no_grad()
def _forward(task: Pass, batches: Any) -> Numbers:
    from prefdistill.models.backbone import model_inputs

    for batch in batches():
        task.model(**model_inputs(batch, task.model), use_cache=False)
    return {}


def bare(grouped: bool, **common: Any) -> Prepared:
    """Compute all logits of the model and discard them."""
    from prefdistill.data.batches import PADDED

    task = Pass(**common)
    batches = partial(task.grouped, layout=PADDED) if grouped else task.padded
    return partial(_forward, task, batches), task.facts


def backbone(head: bool, **common: Any) -> Prepared:
    """Run the model without its head, the upper limit of speed; or with the head at the requested states."""
    from prefdistill.data.batches import layout_for
    from prefdistill.models.backbone import backbone_of, model_inputs

    task = Pass(**common)
    layout = layout_for(task.model, task.truncation.max_length)

    @torch.no_grad()
    def run() -> Numbers:
        for batch in task.grouped(layout=layout):
            hidden = backbone_of(task.model)(**model_inputs(batch, task.model), use_cache=False).last_hidden_state
            if head:
                states = hidden.flatten(0, 1)[batch["states"]]
                for part in states.split(256):
                    task.model.lm_head(part)
        return {}

    return run, task.facts


def naive(k: int, **common: Any) -> Prepared:
    """Compute full logits and write the top-k tokens and the rest of each state as JSON lines."""
    task = Pass(**common)

    @torch.no_grad()
    def run() -> Numbers:
        with tempfile.NamedTemporaryFile("w") as file:
            for batch in task.padded():
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                logps = task.model(**inputs, use_cache=False).logits.float().log_softmax(-1)
                top, ids = logps.topk(k, dim=-1)
                rest = (1 - top.exp().sum(-1)).clamp(min=1e-9).log()
                flat = [x.flatten(0, 1)[batch["states"]].split(batch["sizes"]) for x in (ids, top, rest)]
                for one_ids, one_top, one_rest in zip(*flat, strict=True):
                    line = {"ids": one_ids.tolist(), "logps": one_top.tolist(), "rest": one_rest.tolist()}
                    file.write(json.dumps(line) + "\n")
            file.flush()
            return {"disk": Path(file.name).stat().st_size}

    return run, task.facts
