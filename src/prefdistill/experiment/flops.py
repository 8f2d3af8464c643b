"""The floating-point operations of passes over rows, from the shapes of models alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefdistill.experiment.dimensions import head_dim, head_rows, hidden_size, matrices, text_config
from prefdistill.experiment.memory import adapter_bytes
from prefdistill.models.logprobs import STORED_ELEMENTS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from prefdistill.training.options import Training


@dataclass(frozen=True)
class Text:
    """The mean row of a data set: tokens of the prompt, of a response, and the number of responses.

    Args:
        shared: whether the responses share one copy of the prompt in a pass.
        scored: states of each response whose logits are computed; None: all.
    """

    prompt: float
    response: float
    responses: int = 1
    shared: bool = True
    scored: float | None = None

    @property
    def tokens(self) -> float:
        return self.prompt * (1 if self.shared else self.responses) + self.response * self.responses

    @property
    def attended(self) -> float:
        """Pairs of tokens of which one attends to the other, from the first to the last."""
        prompts = self.prompt**2 / 2 * (1 if self.shared else self.responses)
        return prompts + self.responses * (self.response * self.prompt + self.response**2 / 2)


@dataclass(frozen=True)
class Lengths:
    """How long a data set is.

    Args:
        rows: of it.
        tokens: of its responses together.
        prompt_tokens: of its prompts.
        exact: False for data that a step has yet to make: these are upper bounds.
        responses: in each row.
        longest: the most tokens of a row; None if unknown.
        longest_text: the most tokens of a prompt with one response; None if unknown.
    """

    rows: int
    tokens: int
    prompt_tokens: int = 0
    exact: bool = True
    responses: int = 2
    longest: int | None = None
    longest_text: int | None = None

    def text(self, responses: int, *, shared: bool = True, scored: float | None = None) -> Text:
        """Return the mean row, as a step reads it with some of the responses."""
        rows = max(1, self.rows)
        response = self.tokens / rows / self.responses
        return Text(self.prompt_tokens / rows, response, responses, shared, scored)


def forward_flops(model: PreTrainedModel, text: Text) -> tuple[float, float]:
    r"""Return the operations of a forward pass over a mean row, of the layers and of the head.

    .. math:: 2 N t + 4 L d a \quad\text{and}\quad 2 V h s

    with N weights of the layers that a token is multiplied by, t tokens, L layers, d the width of all heads together, a
    pairs of tokens that attend, V rows of the head, h the hidden size and s states whose logits are computed. A window
    of attention is not counted as such.
    """
    config = text_config(model)
    weights = sum(p.numel() * _share(config, p) for p in matrices(model))
    layers = 2 * weights * text.tokens + attention_flops(model, text)
    states = text.responses * (text.response if text.scored is None else text.scored)
    return layers, 2.0 * head_rows(model) * hidden_size(model) * states


def attention_flops(model: PreTrainedModel, text: Text) -> float:
    """Return the operations of a forward pass in which tokens attend to each other, 4 L d a."""
    config = text_config(model)
    inner = config.num_attention_heads * head_dim(model)
    return 4.0 * config.num_hidden_layers * inner * text.attended


def training_flops(model: PreTrainedModel, training: Training, text: Text) -> float:
    """Return the operations of a training step over a mean row.

    Forward, and twice that backward; with LoRA once, but twice in its own weights and in attention, which has none.
    Checkpointing runs the layers once more, and tiles that are not stored run the head once more.
    """
    layers, head = forward_flops(model, text)
    backward = 1 if training.lora else 2
    states = training.micro_batch_size * text.responses * text.response
    recomputed = max(0.0, 1 - STORED_ELEMENTS / max(1.0, states * head_rows(model)))
    more = 6 * text.tokens * adapter_bytes(model, training) / 4 + attention_flops(model, text) if training.lora else 0
    return layers * (1 + backward + training.gradient_checkpointing) + head * (1 + backward + recomputed) + more


def _share(config: Any, weight: torch.Tensor) -> float:
    """The share of a weight that a token is multiplied by: of stacked experts, those that it is sent to."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, 0))), 0)
    stacked = weight.dim() > 2 and weight.shape[0] == experts
    return getattr(config, "num_experts_per_tok", experts) / experts if stacked else 1.0
