"""How far numbers of a device are from those of the CPU in float32: signals of a teacher, and a training step of TVKD.

The models are small and random, with weights large enough that distributions are far from uniform.
"""

import copy
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Numbers
from benchmarks.inputs import make_pairs, make_tokenizer
from benchmarks.shapes import make_model
from prefdistill.data.batches import Layout, layout_for
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.methods import METHODS
from prefdistill.signals.live import LiveTeacher, bind_live
from prefdistill.signals.scoring import score_pairs
from prefdistill.training.rows import feature_tensors, prepare_rows
from prefdistill.training.student import read_student

KINDS = ("values", "token_logps")
Step = tuple[float, dict[str, Tensor]]


class Parity:
    """A student and a teacher on the CPU in float32, pairs for them, and what other devices compute from the same.

    Args:
        shape: of both models, see `shapes.SHAPES`.
        pairs: of random words.
        max_length: tokens of prompt and response.
    """

    def __init__(self, shape: dict[str, Any], pairs: int = 4, max_length: int = 512) -> None:
        from datasets import Dataset

        self.tokenizer = make_tokenizer(shape["vocab_size"])
        self.truncation = Truncation(max_length)
        self.data = Dataset.from_list(make_pairs(pairs, shape["vocab_size"])).select_columns(["prompt", *SIDES])
        self.rows, _ = encode_pairs(self.data, self.tokenizer, self.truncation)
        self.student, self.teacher = (_spread(make_model(shape, self.tokenizer, seed).cpu(), seed) for seed in (0, 1))
        self.method = METHODS["tvkd"]()

    def on(self, device: str, model: Any, dtype: str = "float32", kernel: str = "sdpa") -> Any:
        """Return a copy of a model on a device.

        Raises:
            ImportError: if the attention kernel is not installed.
        """
        copied = copy.deepcopy(model).to(device, getattr(torch, dtype))
        copied.set_attn_implementation(kernel)
        return copied

    def signals(self, model: Any, layout: Layout | None = None) -> dict[str, np.ndarray]:
        """Return the signals of all pairs by kind: numbers of the states of all responses, one after another."""
        layout = layout or layout_for(model, self.truncation.max_length)
        columns = score_pairs(model, self.rows, self.tokenizer, KINDS, layout=layout)
        return {kind: np.concatenate([part for side in SIDES for part in columns[f"{side}_{kind}"]]) for kind in KINDS}

    def step(self, model: Any, *, bf16: bool = False, tile: int | None = None) -> Step:
        """Return the loss of a training step over all pairs, and its gradient by parameter, on the CPU in float32."""
        collate = self._training[1].with_layout(layout_for(model, self.truncation.max_length))
        batch = collate(list(self._training[0]))
        features = feature_tensors(batch.pop("features"), model.device)
        batch = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            student = read_student(model.train(), batch, self.method, features, tile=tile)
        loss, _ = self.method.loss(student, features)
        loss.backward()
        gradient = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return float(loss.detach()), gradient

    @cached_property
    def _training(self) -> Any:
        """The rows of the training, and their collator; signals are computed on the CPU."""
        live = [LiveTeacher(self.teacher, "teacher"), LiveTeacher(self.student, "reference")]
        signals = bind_live(live, self.data, self.tokenizer, self.truncation, self.method.needs)
        return prepare_rows(self.data, self.method, signals, self.tokenizer, self.truncation)[:2]

    @cached_property
    def expected_signals(self) -> dict[str, np.ndarray]:
        """Those of the teacher on the CPU in float32."""
        return self.signals(self.teacher)

    @cached_property
    def expected_step(self) -> Step:
        """That of the student on the CPU in float32."""
        return self.step(self.student)

    def signal_gaps(self, signals: dict[str, np.ndarray]) -> Numbers:
        """Return the mean and the largest difference from the expected ones, in nats, by kind."""
        gaps = {kind: np.abs(signals[kind] - expected) for kind, expected in self.expected_signals.items()}
        return {kind: {"mean": float(gap.mean()), "max": float(gap.max())} for kind, gap in gaps.items()}

    def step_gaps(self, step: Step) -> Numbers:
        """Return the difference of the loss from the expected one, and the norm of the gradient's, relative to it."""
        loss, gradient = step
        expected_loss, expected = self.expected_step
        assert gradient.keys() == expected.keys()
        squares = sum(float((gradient[name] - x).square().sum()) for name, x in expected.items())
        norm = sum(float(x.square().sum()) for x in expected.values())
        return {"loss": abs(loss - expected_loss), "gradient": (squares / norm) ** 0.5}


@torch.no_grad()
def _spread(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return model.eval()
