"""Reduce a causal language model's logits to a few numbers per state; the only place that gathers from logits.

`data/batches.py` says where the states are. Logits are computed for the requested states only, a tile at a time, and
each tile is reduced before the next one is computed.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from prefdistill.models.backbone import backbone_of, causal_lm, model_inputs
from prefdistill.models.sharded import gathers_its_weights, head_without_hooks, whole_shape

# Logits in memory at once, as float32 numbers. On a CPU about as many as its caches hold (8 MiB was the fastest of
# 2..128 MiB), elsewhere enough rows for the matrix product to run at full speed (256 MiB). In training every tile adds
# a gradient as large as the head, so there should be few (128 MiB each, on any device); the first ones stay in memory
# for backward (256 MiB): recomputing a tile costs a third of its matrix products.
TILE_ELEMENTS = {"cpu": 2**21, "other": 2**26}
TRAINING_TILE_ELEMENTS = 2**25
STORED_ELEMENTS = 2**26
# On a CPU the passes over a tile's columns take so many numbers at once: a second block of memory as large as the tile
# costs more in page faults than its numbers.
ROWS_ELEMENTS = 2**17
TOPK_BLOCK = 64  # columns of a block of `top_of_blocks`; of 16 .. 128 the fastest on a CPU

Reduce = Callable[..., tuple[Tensor, ...]]


def log_normaliser(logits: Tensor) -> Tensor:
    """Return the log of the sum of the exponentials of each state's logits, [n, vocab] -> [n].

    Example:
        >>> import torch
        >>> log_normaliser(torch.zeros(2, 4))
        tensor([1.3863, 1.3863])
    """
    return _by_rows(lambda rows: (torch.logsumexp(rows, dim=-1),), logits)[0]


def _by_rows(reduce: Reduce, logits: Tensor, *per_state: Tensor) -> tuple[Tensor, ...]:
    """Return what `reduce` returns; on a CPU it is called for a few rows at a time."""
    count = max(1, ROWS_ELEMENTS // logits.shape[-1])
    if logits.device.type != "cpu" or len(logits) <= count:
        return reduce(logits, *per_state)
    parts = zip(*(x.split(count) for x in (logits, *per_state)), strict=True)
    return tuple(torch.cat(columns) for columns in zip(*(reduce(*part) for part in parts), strict=True))


def token_logps(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
    """Return the log-probability of each state's token: logits [n, vocab], tokens [n] -> [n]."""
    return (_TokenLogps.apply(logits, tokens),)


@torch.no_grad()
def log_sum_squares(logits: Tensor) -> Tensor:
    """Return the log of the sum of the squared probabilities of each state, without gradient: [n, vocab] -> [n].

    Example:
        >>> import torch
        >>> log_sum_squares(torch.zeros(1, 4))                          # log(4 / 4^2)
        tensor([-1.3863])
    """
    return torch.logsumexp(2 * logits, dim=-1) - 2 * torch.logsumexp(logits, dim=-1)


class _TokenLogps(torch.autograd.Function):
    """z_a - logsumexp(z), whose gradient, 1[a] - softmax(z), takes one [n, vocab] tensor and not three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        total = log_normaliser(logits)
        ctx.save_for_backward(logits, tokens, total)
        return logits.gather(-1, tokens[:, None])[:, 0] - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, tokens, total = ctx.saved_tensors
        back = (logits - total[:, None]).exp_().mul_(-gradient[:, None])
        return back.scatter_add_(-1, tokens[:, None], gradient[:, None]), None


def topk_logps(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities at k ids, of the rest of the mass, and the log-normaliser.

    The rest is summed from the logits of the other tokens, so it is exact where it is small; the normaliser is the sum
    of the two, so the vocabulary is read once.

    Args:
        logits: [n, vocab].
        ids: [n, k], distinct in each row; -1 pads a row that has fewer.

    Returns:
        [n, k], -inf where the id is -1; [n], -inf where the ids are all tokens with a finite logit; [n].
    """
    at_ids, rest, total, _ = _TopkLogps.apply(logits, ids, None)
    return at_ids, rest, total


def token_and_topk_logps(logits: Tensor, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `token_logps` [n], and the log-probabilities at ids [n, k] and the rest [n] of `topk_logps`."""
    at_ids, rest, _, of_token = _TopkLogps.apply(logits, ids, tokens)
    return of_token, at_ids, rest


class _TopkLogps(torch.autograd.Function):
    """log p_i = z_i - L at the ids, log r = O - L of the others, L; the gradient takes one [n, vocab] tensor.

    d log p_i / dz_a = [a = i] - p_a, d log r / dz_a = [a other] e^(z_a - O) - p_a, dL / dz_a = p_a.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        at_ids, rest, total = _by_rows(_topk_logps_in_one_pass, logits, ids)
        ctx.save_for_backward(logits, ids, rest, total, tokens)
        of_token = None if tokens is None else logits.gather(-1, tokens[:, None])[:, 0] - total
        return at_ids, rest, total, of_token

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_ids: Tensor, of_rest: Tensor, of_total: Tensor, of_token: Tensor | None
    ) -> tuple[Tensor, None, None]:
        logits, ids, rest, total, tokens = ctx.saved_tensors
        is_id = ids >= 0
        of_ids = of_ids.masked_fill(~is_id, 0.0)
        of_rest = of_rest.masked_fill(~is_id.any(-1) | (rest == float("-inf")), 0.0)
        of_all = of_total - of_ids.sum(-1) - of_rest
        if of_token is not None:
            of_all = of_all - of_token
        # e^(z - O) is e^(z - L) / r, except where r is almost 0
        faint = rest < FAINT
        of_others = of_all + torch.where(faint, 0.0, of_rest * (-rest.clamp(min=FAINT)).exp())
        back = (logits - total[:, None]).exp_()
        last = ids.argmax(-1, keepdim=True)  # padding repeats another place of its row
        at = torch.where(is_id, ids, ids.gather(-1, last).clamp(min=0))
        named = back.gather(-1, at) * of_all[:, None] + of_ids
        named = torch.where(is_id, named, named.gather(-1, last))
        back.mul_(of_others[:, None]).scatter_(-1, at, named)
        if bool(faint.any()):
            others = logits[faint].scatter(-1, at[faint], float("-inf"))
            back[faint] += (
                of_rest[faint, None] * (others - torch.logsumexp(others, -1, keepdim=True)).exp().nan_to_num()
            )
        if of_token is not None:
            back.scatter_add_(-1, tokens[:, None], of_token[:, None])
        return back, None, None


FAINT = -60.0  # log-mass of the rest below which its gradient is computed separately


def _topk_logps_in_one_pass(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the others without the ids: their mass is exact where it is small, within float32."""
    is_id, at = ids >= 0, ids.clamp(min=0)
    peak = logits.amax(dim=-1, keepdim=True)
    powers = (logits - peak).exp_()
    named = powers.gather(-1, at).masked_fill(~is_id, 0.0)
    others = powers.scatter_add_(-1, at, -named).sum(-1)
    total = (named.sum(-1) + others).log() + peak[:, 0]
    at_ids = (logits.gather(-1, at) - total[:, None]).masked_fill(~is_id, float("-inf"))
    rest = others.log() + peak[:, 0] - total
    if bool((unclear := others <= 0).any()):
        rest[unclear] = _rest(logits[unclear], ids[unclear])
    return at_ids, rest, total


def _rest(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log of the mass outside the ids, from the logsumexp of the others."""
    is_id = ids >= 0
    # padding repeats one of the row's ids, or is ignored
    at = torch.where(is_id, ids, ids.amax(dim=-1, keepdim=True).clamp(min=0))
    others = torch.logsumexp(logits.scatter(-1, at, float("-inf")), dim=-1)
    return (others - torch.logsumexp(logits, dim=-1)).masked_fill(~is_id.any(dim=-1), 0.0)


def likeliest(logits: Tensor, k: int, mass: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most likely tokens of each state, most likely first.

    Args:
        logits: [n, vocab]; -inf for tokens that the tokenizer cannot emit.
        k: how many at most; capped at the vocabulary.
        mass: top-p cut-off within the k (at least one token).

    Returns:
        ids [n, k] (int32, -1 for padding), their log-probabilities [n, k] (-inf there), and the log of the mass of all
        others [n].
    """
    top, ids = top_of_blocks(logits, min(k, logits.shape[-1]))
    kept = torch.isfinite(top)
    if mass is not None:
        probabilities = (top - torch.logsumexp(logits, dim=-1, keepdim=True)).exp()
        kept &= probabilities.cumsum(-1) - probabilities < mass
    ids = ids.masked_fill(~kept, -1)
    at_ids, rest, _ = topk_logps(logits, ids)
    return ids.int(), at_ids, rest


def top_of_blocks(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what `logits.topk(k)` does: [n, vocab] -> the k largest, largest first, and their places, [n, k].

    The k largest are in the k blocks of `TOPK_BLOCK` columns with the largest maxima, or behind the last whole block.
    So only the maxima, and then those blocks, are sorted. Which of equal numbers are taken is left open, as in `topk`.

    Example:
        >>> import torch
        >>> top_of_blocks(torch.arange(1000.0)[None], 3)
        (tensor([[999., 998., 997.]]), tensor([[999, 998, 997]]))
    """
    n, blocks = len(logits), logits.shape[-1] // TOPK_BLOCK
    if 2 * k >= blocks:  # there is little to leave out
        return torch.topk(logits, k, dim=-1)
    whole = blocks * TOPK_BLOCK
    by_block = logits[:, :whole].unflatten(1, (blocks, TOPK_BLOCK))
    best = by_block.amax(-1).topk(k, dim=-1, sorted=False).indices
    columns = best[:, :, None] * TOPK_BLOCK + torch.arange(TOPK_BLOCK, device=logits.device)
    after = torch.arange(whole, logits.shape[-1], device=logits.device)
    columns = torch.cat([columns.flatten(1), after.expand(n, -1)], dim=-1)
    top, where = logits.gather(-1, columns).topk(k, dim=-1)
    return top, columns.gather(-1, where)


def topk_bytes(columns: int, k: int) -> int:
    """Return the bytes that `top_of_blocks` holds of a state with so many logits: places of 8 bytes, which are copied,
    of the columns that it sorts, or the k largest and their places."""
    return 2 * 8 * TOPK_BLOCK * k if 2 * k < columns // TOPK_BLOCK else 12 * k


def sum_by_response(per_state: Tensor, sizes: Tensor) -> Tensor:
    """Return the sum of a quantity over the states of each response: [states], states of each response [M] -> [M].

    Example:
        >>> import torch
        >>> sum_by_response(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 1]))
        tensor([3., 0., 3.])
    """
    owners = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=len(per_state))
    return per_state.new_zeros(len(sizes)).index_add(0, owners, per_state)


def vocabulary_rows(model: nn.Module) -> int:
    """Return the rows of a model's head, padding of the vocabulary included."""
    return whole_shape(causal_lm(model).get_output_embeddings().weight)[0]


def reduce_logits(
    model: nn.Module,
    batch: dict[str, Any],
    reduce: Reduce,
    *per_state: Tensor,
    emittable: Tensor | None = None,
    tile: int | None = None,
    balance: bool = False,
) -> tuple[Tensor, ...]:
    """Reduce a model's final logits at some states, without the [batch, tokens, vocabulary] tensor.

    The model is called as a whole, so wrappers (data parallel, PEFT) work; only its forward is replaced for the call.
    The new forward runs the backbone, then the model's *own* code from the last hidden state to the logits (with its
    soft-capping and scaling) tile by tile. With gradients, the first tiles stay in memory and the logits of the others
    are recomputed in backward. Where the weights are sharded, those of the head are gathered once for all tiles.

    Args:
        model: a causal language model of transformers, possibly wrapped.
        batch: of `batches.make_batch`, on the model's device; `batch["states"]` are the states to read.
        reduce: called as `reduce(logits, *slices)` with float32 logits [n, vocab] of a tile; returns tensors [n, ...].
        per_state: tensors [number of states, ...] that are cut into tiles along with the states.
        emittable: bool [vocab rows]; rows the tokenizer cannot emit get -inf, or are cut off if they are the last ones.
            None: all can be emitted.
        tile: states per tile; default: as many as fit `TILE_ELEMENTS`.
        balance: also return the model's own load-balancing loss, see `models.balance`.

    Returns:
        What `reduce` returns, over all states: tensors [number of states, ...]; then the load-balancing loss over all
        tokens of the documents, each with its own copy of its prompt, if `balance`.
    """
    lm = causal_lm(model)
    own_forward = type(lm).forward
    backbone, head = backbone_of(lm), lm.get_output_embeddings()
    gathers = gathers_its_weights(head)
    routed = {"output_router_logits": True} if balance else {}
    rows = vocabulary_rows(lm)
    columns = rows if emittable is None else int(emittable.sum())
    gaps: Tensor | None = None  # columns of tokens that cannot be emitted, unless they are the last ones
    if emittable is not None and not bool(emittable[:columns].all()):
        gaps = (~emittable).nonzero()[:, 0]

    def own_outputs(hidden: Tensor, outputs: Any, **inputs: Any) -> Any:
        """Run the model's own forward from the last hidden state: its backbone is replaced by a constant."""
        constant = type(outputs)(**{**outputs, "last_hidden_state": hidden[None]})
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        called = False

        def hidden_states(*_: Any, **__: Any) -> Any:
            nonlocal called
            called = True
            return constant

        with _forward(backbone, hidden_states), head_without_hooks(lm) if gathers else nullcontext():
            outputs_of_head = own_forward(lm, input_ids=ids, use_cache=False, **inputs)
        if not called:  # then the logits are not of these hidden states
            raise TypeError(f"{type(lm).__name__} does not run the backbone that it names")
        return outputs_of_head

    def logits_of(hidden: Tensor, outputs: Any) -> Tensor:
        logits = own_outputs(hidden, outputs).logits.squeeze(0).float()
        if gaps is None:
            return logits[:, :columns]
        fill = torch.index_fill if torch.is_grad_enabled() else Tensor.index_fill_  # nothing else reads the logits
        return fill(logits, -1, gaps[gaps < logits.shape[-1]].to(logits.device), float("-inf"))

    def forward(**kwargs: Any) -> tuple[Tensor, ...]:
        outputs = backbone(**kwargs, use_cache=False, **routed)
        last = outputs.last_hidden_state.flatten(0, 1)
        hidden = last[batch["states"].to(last.device)]
        slim = type(outputs)(**{k: v for k, v in outputs.items() if k not in ("past_key_values", "router_logits")})

        def reduced(hidden: Tensor, *slices: Tensor) -> tuple[Tensor, ...]:
            logits = logits_of(hidden, slim)
            return reduce(logits, *(part.to(logits.device) for part in slices))  # the head may have its own device

        def all_tiles(hidden: Tensor) -> tuple[Tensor, ...]:
            training = torch.is_grad_enabled()
            device = hidden.device.type
            elements = TRAINING_TILE_ELEMENTS if training else TILE_ELEMENTS.get(device, TILE_ELEMENTS["other"])
            size = tile or max(1, elements // rows)
            stored = STORED_ELEMENTS // (size * rows) if training else len(hidden)
            recomputed = functools.partial(checkpoint, reduced, use_reentrant=False)
            tiles = zip(*(x.split(size) for x in (hidden, *per_state)), strict=True)
            results = [(reduced if i < stored else recomputed)(*slices) for i, slices in enumerate(tiles)]
            reductions = tuple(torch.cat(parts) for parts in zip(*results, strict=True))
            if not balance:
                return reductions
            counts = batch.get("occurrences", batch.get("attention_mask"))
            return *reductions, own_outputs(last[:1], outputs, attention_mask=counts, **routed).aux_loss

        if not gathers:
            return all_tiles(hidden)
        # one call of the head: its hooks gather its weights once, and autocast copies them once, caching or not
        kind = hidden.device.type
        caching = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), True)
        with _forward(head, all_tiles), caching:
            results: tuple[Tensor, ...] = head(hidden)
        return results

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
    """Return which of a model's vocabulary rows its tokenizer can emit, bool [rows]; None if all."""
    ids: Sequence[int] = [i for i in tokenizer.get_vocab().values() if i < rows]
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.tensor(ids, dtype=torch.long)] = True
    return None if bool(mask.all()) else mask
