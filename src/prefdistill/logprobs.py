"""What a causal language model says at the states of a response: the only place that shifts, gathers and masks.

A response of T tokens behind a prompt of P has states s_0 .. s_T. State s_t is the model's output at position P-1+t;
token a_t = y_{t+1} stands at position P+t. Logits are made for the states asked for and no others, a tile at a time,
and each tile is reduced to a few numbers per state before the next is made.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Logits alive at once: 2^25 float32 numbers are 128 MiB, enough rows to keep the matrix product at full speed.
TILE_ELEMENTS = 2**25

Reduce = Callable[..., tuple[Tensor, ...]]


def response_states(prompt_lengths: Tensor, lengths: Tensor, width: int, *, final: bool) -> Tensor:
    """Mask of the states of each response in a right-padded batch.

    Args:
        prompt_lengths: prompt tokens P, shape [N].
        lengths: response tokens T, shape [N].
        width: padded length of the batch.
        final: include `s_T`, the state after the last token (T + 1 states), or stop at `s_{T-1}` (T states, the ones
            in which a response token is chosen).

    Returns:
        bool [N, width]; reading a tensor through it gives the states of row 0 in order, then of row 1, and so on.
    """
    position = torch.arange(width, device=lengths.device)
    first = prompt_lengths[:, None] - 1
    return (position >= first) & (position < first + lengths[:, None] + int(final))


def next_tokens(input_ids: Tensor, states: Tensor) -> Tensor:
    """The token chosen in each state of `states`; shape [number of states]. The last position of a row wraps around:
    only states that have a next token give a meaningful answer."""
    return input_ids.roll(-1, dims=1)[states]


def token_logps(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
    """Log-probability of each state's token: logits [n, vocab], tokens [n] -> [n]."""
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    return (chosen - torch.logsumexp(logits, dim=-1),)


def topk_logps(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities at k ids, of all the mass besides, and the log-normaliser.

    The rest is summed from the logits of the other tokens, so it is exact where it is small; the normaliser from the
    two, so the vocabulary is gone through once.

    Args:
        logits: [n, vocab].
        ids: [n, k], distinct in each row; -1 fills up a row that has fewer.

    Returns:
        [n, k], -inf where the id is -1; [n], -inf where the ids are all tokens with a finite logit; [n].
    """
    given = ids >= 0
    # what fills up a row repeats one of its ids (or token 0 where it has none) and does not count
    counted = given.clone()
    counted[:, :1] |= ~given.any(dim=-1, keepdim=True)
    at = torch.where(given, ids, ids.amax(dim=-1, keepdim=True).clamp(min=0))
    chosen = logits.gather(-1, at)
    others = _logsumexp(logits.scatter(-1, at, float("-inf")))
    total = torch.logaddexp(torch.logsumexp(chosen.masked_fill(~counted, float("-inf")), dim=-1), others)
    at_ids = (chosen - total[:, None]).masked_fill(~given, float("-inf"))
    rest = (others - total).masked_fill(others == float("-inf"), float("-inf"))
    return at_ids, rest.masked_fill(~given.any(dim=-1), 0.0), total


def _logsumexp(x: Tensor) -> Tensor:
    """`torch.logsumexp` over the last dimension, with a gradient of 0, not NaN, where every number is -inf."""
    top = x.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
    total = (x - top).exp().sum(dim=-1)  # at least 1, or 0
    return (total.clamp(min=1.0).log() + top[..., 0]).masked_fill(total == 0, float("-inf"))


def likeliest(logits: Tensor, k: int, mass: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The most likely tokens of each state, likeliest first.

    Args:
        logits: [n, vocab]; -inf is a token that cannot be.
        k: how many at most; more than there are gives all.
        mass: keep no more of the k than make up this share of the probability (a nucleus; at least one token).

    Returns:
        ids [n, k] (int32, -1 where there is none), their log-probabilities [n, k] (-inf there), and the log of the
        mass of all others [n].
    """
    k = min(k, logits.shape[-1])
    top, ids = logits.topk(k, dim=-1)
    kept = torch.isfinite(top)
    if mass is not None:
        probabilities = (top - torch.logsumexp(logits, dim=-1, keepdim=True)).exp()
        kept &= probabilities.cumsum(-1) - probabilities < mass
    ids = ids.masked_fill(~kept, -1)
    at_ids, rest, _ = topk_logps(logits, ids)
    return ids.int(), at_ids, rest


def sum_by_row(per_state: Tensor, states: Tensor) -> Tensor:
    """Sum of a quantity over the states of each row: [number of states], bool [N, width] -> [N]."""
    rows = states.nonzero()[:, 0]
    return per_state.new_zeros(states.shape[0]).index_add(0, rows, per_state)


def causal_lm(model: Any) -> Any:
    """The transformers model inside whatever wraps it (data parallel, PEFT)."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def vocabulary_rows(model: nn.Module) -> int:
    """Rows of a model's head, padding of the vocabulary included."""
    return causal_lm(model).get_output_embeddings().weight.shape[0]


def reduce_logits(
    model: nn.Module,
    inputs: dict[str, Tensor],
    states: Tensor,
    reduce: Reduce,
    *per_state: Tensor,
    emittable: Tensor | None = None,
    tile: int | None = None,
) -> tuple[Tensor, ...]:
    """Reduce a model's final logits at some states, without the [batch, tokens, vocabulary] tensor.

    The model is called as a whole, so wrappers (data parallel, PEFT) do their work; only its forward is replaced for
    the call. The new forward runs the backbone, then the model's *own* code from the last hidden state to the logits
    (soft-capping and scaling included) tile by tile. With gradients on, a tile's logits are made again in backward.

    Args:
        model: a causal language model of transformers, possibly wrapped.
        inputs: keyword arguments of its forward (`input_ids`, `attention_mask`), [N, width] each.
        states: bool [N, width], where to look.
        reduce: called as `reduce(logits, *slices)` with float32 logits [n, vocab] of a tile; returns tensors [n, ...].
        per_state: tensors [number of states, ...] that are cut into tiles along with the states.
        emittable: bool [vocab rows]; rows the tokenizer cannot emit get -inf. None: all can.
        tile: states per tile; default: as many as fit `TILE_ELEMENTS`.

    Returns:
        What `reduce` returns, over all states: tensors [number of states, ...].
    """
    lm = causal_lm(model)
    own_forward = type(lm).forward
    backbone = lm.get_decoder()

    def logits_of(hidden: Tensor, outputs: Any) -> Tensor:
        """The model's own forward, started from the last hidden state: its backbone is replaced by a constant."""
        constant = type(outputs)(**{**outputs, "last_hidden_state": hidden[None]})
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        asked = False

        def answer(*_: Any, **__: Any) -> Any:
            nonlocal asked
            asked = True
            return constant

        with _forward(backbone, answer):
            logits = own_forward(lm, input_ids=ids, use_cache=False).logits[0].float()
        if not asked:  # then those logits are not of these hidden states
            raise TypeError(f"{type(lm).__name__} does not run the backbone that its get_decoder() names")
        if emittable is not None:
            logits = logits.masked_fill(~emittable[: logits.shape[-1]].to(logits.device), float("-inf"))
        return logits

    def forward(**kwargs: Any) -> tuple[Tensor, ...]:
        outputs = backbone(**kwargs, use_cache=False)
        hidden = outputs.last_hidden_state[states.to(outputs.last_hidden_state.device)]
        slim = type(outputs)(**{k: v for k, v in outputs.items() if k != "past_key_values"})

        def reduced(hidden: Tensor, *slices: Tensor) -> tuple[Tensor, ...]:
            return reduce(logits_of(hidden, slim), *slices)

        size = tile or max(1, TILE_ELEMENTS // lm.config.get_text_config().vocab_size)
        run = functools.partial(checkpoint, reduced, use_reentrant=False) if torch.is_grad_enabled() else reduced
        tiles = zip(*(x.split(size) for x in (hidden, *per_state)), strict=True)
        return tuple(torch.cat(parts) for parts in zip(*(run(*slices) for slices in tiles), strict=True))

    with _forward(lm, forward):
        return model(**inputs)


class _forward:
    """Replace a module's forward inside a `with` block."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward

    def __enter__(self) -> None:
        self.previous = self.module.__dict__.get("forward")
        self.module.forward = self.forward

    def __exit__(self, *_: object) -> None:
        if self.previous is None:
            del self.module.forward
        else:
            self.module.forward = self.previous


def emittable_ids(tokenizer: Any, rows: int) -> Tensor | None:
    """Which of a model's vocabulary rows its tokenizer can emit, bool [rows]; None when it can emit all of them."""
    ids: Sequence[int] = [i for i in tokenizer.get_vocab().values() if i < rows]
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.tensor(ids, dtype=torch.long)] = True
    return None if bool(mask.all()) else mask
