"""Read the student: one forward pass over a batch, reduced to what a method's loss needs."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from prefdistill.methods import Method, Student
from prefdistill.models.logprobs import (
    log_sum_squares,
    reduce_logits,
    sum_by_response,
    token_and_topk_logps,
    token_logps,
)


def read_student(
    model: nn.Module,
    batch: dict[str, Tensor],
    method: Method,
    signals: dict[str, Tensor],
    *,
    emittable: Tensor | None = None,
    tile: int | None = None,
    balance: bool = False,
) -> Student:
    """Return what a method reads from the student on a batch, in one forward pass and without full logits.

    Args:
        model: the student, possibly wrapped.
        batch: of a `PairCollator` with the method's responses, on the model's device.
        method: says which responses it reads, and whether it needs the student's most likely tokens.
        signals: the batch's features; `RESPONSE_ids` [states, k] are the token ids to score a response at.
        emittable, tile, balance: see `logprobs.reduce_logits`.
    """
    responses, lengths = method.responses, batch["lengths"]
    rows = len(lengths) // len(responses)
    states = [sum(batch["sizes"][start : start + rows]) for start in range(0, len(lengths), rows)]
    ids_by_response = [signals.get(f"{response}_ids") for response in responses]
    topk_ids = _pad_together(ids_by_response, states, like=batch["input_ids"])

    def reduce(logits: Tensor, tokens: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
        columns = [*token_and_topk_logps(logits, tokens, *ids)] if ids else [*token_logps(logits, tokens)]
        if method.reads_likeliest:
            best = logits.argmax(-1)
            columns += [best, *token_logps(logits, best)]
        if method.reads_log_sum_squares:
            columns.append(log_sum_squares(logits))
        return tuple(columns)

    columns: Iterator[Tensor] = iter(
        reduce_logits(model, batch, reduce, batch["tokens"], *topk_ids, emittable=emittable, tile=tile, balance=balance)
    )

    def by_response(per_state: Tensor) -> dict[str, Tensor]:
        return dict(zip(responses, per_state.split(states), strict=True))

    all_token_logps = next(columns)
    logps = sum_by_response(all_token_logps, lengths).chunk(len(responses))
    topk: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    likeliest: dict[str, tuple[Tensor, Tensor]] = {}
    if topk_ids:
        topk_logps, rest_logps = by_response(next(columns)), by_response(next(columns))
        for response, ids in zip(responses, ids_by_response, strict=True):
            if ids is not None:
                topk[response], rest[response] = topk_logps[response][:, : ids.shape[1]], rest_logps[response]
    if method.reads_likeliest:
        best_ids, best_logps = by_response(next(columns)), by_response(next(columns))
        likeliest = {response: (best_ids[response], best_logps[response]) for response in responses}
    tokens = dict(zip(responses, lengths.chunk(len(responses)), strict=True))
    of_tokens = by_response(all_token_logps) if method.reads_token_logps else {}
    squares = by_response(next(columns)) if method.reads_log_sum_squares else {}
    balance_loss = next(columns) if balance else None
    by_name = dict(zip(responses, logps, strict=True))
    return Student(by_name, tokens, topk, rest, likeliest, of_tokens, squares, balance_loss)


def _pad_together(ids_by_response: list[Tensor | None], states: list[int], like: Tensor) -> list[Tensor]:
    """Concatenate token ids [states, k] of several responses into one tensor, padded with -1; empty if there are none.

    A response without ids, where another has some, gets -1 throughout.
    """
    widths = [ids.shape[1] for ids in ids_by_response if ids is not None]
    if not widths:
        return []
    parts = [like.new_full((n, 0), -1) if ids is None else ids for ids, n in zip(ids_by_response, states, strict=True)]
    return [torch.cat([nn.functional.pad(ids, (0, max(widths) - ids.shape[1]), value=-1) for ids in parts])]
