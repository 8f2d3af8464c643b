"""TODO docstring."""

from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_conflicts(ours: "PreTrainedTokenizerBase", theirs: "PreTrainedTokenizerBase") -> list[str]:
    """Tokens of ours that have another id in theirs, or whose id is another token's there."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    taken = set(b.values())
    moved = [token for token in sorted(a.keys() & b.keys()) if a[token] != b[token]]
    return moved + [token for token, i in a.items() if token not in b and i in taken]


def check_same_tokens(ours: "PreTrainedTokenizerBase", theirs: "PreTrainedTokenizerBase") -> None:
    """Two models can speak of the same tokens only if no id means two things; ids that one of them lacks are trimmed.

    Raises:
        UserError: naming the first token that has two ids.
    """
    a, b = ours.get_vocab(), theirs.get_vocab()
    if clash := token_conflicts(ours, theirs):
        raise UserError(
            f"{ours.name_or_path} and {theirs.name_or_path} have different tokenizers: {len(clash)} of {len(a)} tokens "
            f"differ, e.g. {clash[0]!r}; choose a teacher and a student of one family"
        )
    if len(a) != len(b):
        shared = len(a.keys() & b.keys())
        say(f"{ours.name_or_path} has {len(a)} tokens, {theirs.name_or_path} {len(b)}; the {shared} they share agree")


def check_ids(highest: int, model: Any, tokenizer: Any) -> None:
    """Whether a model can be given tokens up to this id, and padding: an id without an embedding ends in an IndexError,
    or on a GPU in the loss of the whole process.

    Raises:
        UserError: naming the token that the model has no row for.
    """
    top, rows = max(highest, tokenizer.pad_token_id or 0), model.get_input_embeddings().weight.shape[0]
    if top >= rows:
        raise UserError(
            f"the token {tokenizer.convert_ids_to_tokens(top)!r} has the id {top:,} and the model {rows:,} embedding "
            "rows; use the tokenizer it was trained with, or resize its embeddings (model.resize_token_embeddings)"
        )
