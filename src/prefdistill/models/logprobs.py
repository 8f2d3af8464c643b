"""What a causal language model says at the states of its responses; the only place that gathers from logits and masks.

Where the states are is `batches.py`'s word. Logits are made for the states asked for and no others, a tile at a time,
and each tile is reduced to a few numbers per state before the next is made.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from prefdistill.models.backbone import backbone_of, causal_lm, model_inputs

# Logits alive at once, as float32 numbers. On a CPU about as many as its caches hold (8 MiB: the fastest of 2..128 MiB
# where it was measured), elsewhere enough rows to keep the matrix product at full speed (256 MiB). In training every
# tile adds a gradient as large as the head, so there are fewer of them (128 MiB), and the first ones stay for backward
# (256 MiB): making them again is a third of their matrix products.
TILE_ELEMENTS = {"cpu": 2**21, "other": 2**26}
TRAINING_TILE_ELEMENTS = 2**25
KEPT_ELEMENTS = 2**26

Reduce = Callable[..., tuple[Tensor, ...]]


def token_logps(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
    """Log-probability of each state's token: logits [n, vocab], tokens [n] -> [n]."""
    return (_TokenLogps.apply(logits, tokens),)


class _TokenLogps(torch.autograd.Function):
    """z_a - logsumexp(z), whose gradient, 1[a] - softmax(z), is made in one [n, vocab] tensor and not three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        total = torch.logsumexp(logits, dim=-1)
        ctx.save_for_backward(logits, tokens, total)
        return logits.gather(-1, tokens[:, None])[:, 0] - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, tokens, total = ctx.saved_tensors
        back = (logits - total[:, None]).exp_().mul_(-gradient[:, None])
        return back.scatter_add_(-1, tokens[:, None], gradient[:, None]), None


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
    at_ids, rest, total, _ = _TopkLogps.apply(logits, ids, None)
    return at_ids, rest, total


def token_and_topk_logps(logits: Tensor, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`token_logps` [n], and of `topk_logps` what stands at the ids [n, k] and the rest [n], in one go."""
    at_ids, rest, _, of_token = _TopkLogps.apply(logits, ids, tokens)
    return of_token, at_ids, rest


class _TopkLogps(torch.autograd.Function):
    """log p_i = z_i - L at the ids, log r = O - L of the others, L; the gradient in one [n, vocab] tensor.

    d log p_i / dz_a = [a = i] - p_a, d log r / dz_a = [a other] e^(z_a - O) - p_a, dL / dz_a = p_a.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        at_ids, rest, total = _topk_logps_in_one_pass(logits, ids)
        ctx.save_for_backward(logits, ids, rest, total, tokens)
        of_token = None if tokens is None else logits.gather(-1, tokens[:, None])[:, 0] - total
        return at_ids, rest, total, of_token

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_ids: Tensor, of_rest: Tensor, of_total: Tensor, of_token: Tensor | None
    ) -> tuple[Tensor, None, None]:
        logits, ids, rest, total, tokens = ctx.saved_tensors
        given = ids >= 0
        of_ids = of_ids.masked_fill(~given, 0.0)
        of_rest = of_rest.masked_fill(~given.any(-1) | (rest == float("-inf")), 0.0)
        of_all = of_total - of_ids.sum(-1) - of_rest
        if of_token is not None:
            of_all = of_all - of_token
        # e^(z - O) is e^(z - L) / r, but where r is next to nothing
        faint = rest < FAINT
        of_others = of_all + torch.where(faint, 0.0, of_rest * (-rest.clamp(min=FAINT)).exp())
        back = (logits - total[:, None]).exp_()
        last = ids.argmax(-1, keepdim=True)  # an empty place does what another place of its row does
        at = torch.where(given, ids, ids.gather(-1, last).clamp(min=0))
        named = back.gather(-1, at) * of_all[:, None] + of_ids
        named = torch.where(given, named, named.gather(-1, last))
        back.mul_(of_others[:, None]).scatter_(-1, at, named)
        if bool(faint.any()):
            others = logits[faint].scatter(-1, at[faint], float("-inf"))
            back[faint] += (
                of_rest[faint, None] * (others - torch.logsumexp(others, -1, keepdim=True)).exp().nan_to_num()
            )
        if of_token is not None:
            back.scatter_add_(-1, tokens[:, None], of_token[:, None])
        return back, None, None


FAINT = -60.0  # log-mass of the rest below which its gradient is made by itself


def _topk_logps_in_one_pass(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The others are summed without the ids: their mass is exact where it is small, as far as float32 goes."""
    given, at = ids >= 0, ids.clamp(min=0)
    peak = logits.amax(dim=-1, keepdim=True)
    powers = (logits - peak).exp_()
    named = powers.gather(-1, at).masked_fill(~given, 0.0)
    others = powers.scatter_add_(-1, at, -named).sum(-1)
    total = (named.sum(-1) + others).log() + peak[:, 0]
    at_ids = (logits.gather(-1, at) - total[:, None]).masked_fill(~given, float("-inf"))
    rest = others.log() + peak[:, 0] - total
    if bool((unclear := others <= 0).any()):
        rest[unclear] = _rest(logits[unclear], ids[unclear])
    return at_ids, rest, total


def _rest(logits: Tensor, ids: Tensor) -> Tensor:
    """The log of the mass besides the ids, from the others' own logsumexp."""
    given = ids >= 0
    # what fills up a row repeats one of its ids, or stands for none
    at = torch.where(given, ids, ids.amax(dim=-1, keepdim=True).clamp(min=0))
    others = torch.logsumexp(logits.scatter(-1, at, float("-inf")), dim=-1)
    return (others - torch.logsumexp(logits, dim=-1)).masked_fill(~given.any(dim=-1), 0.0)


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


def sum_by_response(per_state: Tensor, sizes: Tensor) -> Tensor:
    """Sum of a quantity over the states of each response: [states], states of each response [M] -> [M].

    Example:
        >>> import torch
        >>> sum_by_response(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 1]))
        tensor([3., 0., 3.])
    """
    owners = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=len(per_state))
    return per_state.new_zeros(len(sizes)).index_add(0, owners, per_state)


def vocabulary_rows(model: nn.Module) -> int:
    """Rows of a model's head, padding of the vocabulary included."""
    return causal_lm(model).get_output_embeddings().weight.shape[0]


def reduce_logits(
    model: nn.Module,
    batch: dict[str, Any],
    reduce: Reduce,
    *per_state: Tensor,
    emittable: Tensor | None = None,
    tile: int | None = None,
) -> tuple[Tensor, ...]:
    """Reduce a model's final logits at some states, without the [batch, tokens, vocabulary] tensor.

    The model is called as a whole, so wrappers (data parallel, PEFT) do their work; only its forward is replaced for
    the call. The new forward runs the backbone, then the model's *own* code from the last hidden state to the logits
    (soft-capping and scaling included) tile by tile. With gradients on, the first tiles stay and the logits of the
    others are made again in backward.

    Args:
        model: a causal language model of transformers, possibly wrapped.
        batch: of `batches.make_batch`, on the model's device; `batch["states"]` says where to look.
        reduce: called as `reduce(logits, *slices)` with float32 logits [n, vocab] of a tile; returns tensors [n, ...].
        per_state: tensors [number of states, ...] that are cut into tiles along with the states.
        emittable: bool [vocab rows]; rows the tokenizer cannot emit get -inf, or are cut off where they are the last
            ones. None: all can.
        tile: states per tile; default: as many as fit `TILE_ELEMENTS`.

    Returns:
        What `reduce` returns, over all states: tensors [number of states, ...].
    """
    lm = causal_lm(model)
    own_forward = type(lm).forward
    backbone = backbone_of(lm)
    known = vocabulary_rows(lm) if emittable is None else int(emittable.sum())
    gaps = emittable is not None and not bool(emittable[:known].all())

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
            logits = own_forward(lm, input_ids=ids, use_cache=False).logits.squeeze(0).float()
        if not asked:  # then those logits are not of these hidden states
            raise TypeError(f"{type(lm).__name__} does not run the backbone that it names")
        if emittable is not None and gaps:
            return logits.masked_fill(~emittable[: logits.shape[-1]].to(logits.device), float("-inf"))
        return logits[:, :known]

    def forward(**kwargs: Any) -> tuple[Tensor, ...]:
        outputs = backbone(**kwargs, use_cache=False)
        last = outputs.last_hidden_state.flatten(0, 1)
        hidden = last[batch["states"].to(last.device)]
        slim = type(outputs)(**{k: v for k, v in outputs.items() if k != "past_key_values"})

        def reduced(hidden: Tensor, *slices: Tensor) -> tuple[Tensor, ...]:
            return reduce(logits_of(hidden, slim), *slices)

        training = torch.is_grad_enabled()
        elements = TRAINING_TILE_ELEMENTS if training else TILE_ELEMENTS.get(hidden.device.type, TILE_ELEMENTS["other"])
        size = tile or max(1, elements // vocabulary_rows(lm))
        kept = KEPT_ELEMENTS // (size * vocabulary_rows(lm)) if training else len(hidden)
        again = functools.partial(checkpoint, reduced, use_reentrant=False)
        tiles = zip(*(x.split(size) for x in (hidden, *per_state)), strict=True)
        found = [(reduced if i < kept else again)(*slices) for i, slices in enumerate(tiles)]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    with _forward(lm, forward):
        return model(**model_inputs(batch, model))


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
