"""Find the number of learned positions of a model, and refuse texts beyond it before a pass."""

from typing import Any

from torch import nn

from prefdistill.core.errors import UserError
from prefdistill.models.backbone import causal_lm


def learned_positions(model: Any) -> int | None:
    """Return the number of positions of a model with a table of them, such as GPT-2; None if it has no such table.

    Rotary and relative positions have no end, so texts beyond `max_position_embeddings` can be read.
    """
    lm = causal_lm(model)
    tables = [
        module.num_embeddings
        for name, module in lm.named_modules()
        if isinstance(module, nn.Embedding) and _names_positions(name)
    ]
    tables += [
        len(buffer)
        for name, buffer in lm.named_buffers()
        if buffer.dim() == 2 and buffer.is_floating_point() and _names_positions(name)
    ]
    if not tables:
        return None
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)  # a table may have rows before these
    return min([*tables, limit] if isinstance(limit, int) else tables)


def _names_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "wpe" or "pos" in last.split("_") or "position" in last or "positions" in last


def check_positions(longest: int, model: Any, what: str = "texts") -> None:
    """Check that a model has a position for every token of texts of up to `longest` tokens.

    A position outside the table raises a bare IndexError, or on a GPU aborts the process.

    Raises:
        UserError: with the length to set.
    """
    limit = learned_positions(model)
    if limit is not None and longest > limit:
        raise UserError(
            f"{what} have up to {longest:,} tokens and the model has {limit:,} positions; set --max-length {limit} "
            f"(max_length={limit}; data.max_length in a recipe), or use a model with more positions"
        )
