"""Compare the vocabularies of tokenizers, and of a tokenizer and a model."""

from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.progress import say
from prefdistill.models.form import apply_form
from prefdistill.models.load import load_tokenizer
from prefdistill.models.options import Form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_conflicts(tokenizer: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> list[str]:
    """Return the tokens of one tokenizer with another id in the other one, or whose id is another token's there."""
    ids, other_ids = tokenizer.get_vocab(), other.get_vocab()
    used = set(other_ids.values())
    moved = [token for token in sorted(ids.keys() & other_ids.keys()) if ids[token] != other_ids[token]]
    return moved + [token for token, number in ids.items() if token not in other_ids and number in used]


def check_same_tokens(
    tokenizer: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase", fix: str = "choose two of one family"
) -> None:
    """Check that no id stands for different tokens in two tokenizers. Either may have ids that the other one lacks.

    Raises:
        UserError: naming the first token that has two ids.
    """
    tokens, other_tokens = tokenizer.get_vocab().keys(), other.get_vocab().keys()
    name, other_name = tokenizer.name_or_path, other.name_or_path
    if conflicts := token_conflicts(tokenizer, other):
        raise UserError(
            f"{name} and {other_name} have different tokenizers: {len(conflicts)} of {len(tokens)} tokens differ, "
            f"e.g. {conflicts[0]!r}; {fix}"
        )
    if len(tokens) != len(other_tokens):
        shared = len(tokens & other_tokens)
        say(f"{name} has {len(tokens)} tokens, {other_name} {len(other_tokens)}; the {shared} they share agree")


def tokenizer_for(
    model: str, name: str | None = None, form: Form | None = None, *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of this name to read a model with, in a form; None is the model's own.

    Raises:
        UserError: if an id stands for another token than in the model's own tokenizer, where it has one, or the form
            does not fit the template.
    """
    tokenizer = apply_form(load_tokenizer(name or model, trust_remote_code=trust_remote_code), form or Form())
    if name is None:
        return tokenizer
    try:
        own = load_tokenizer(model, trust_remote_code=trust_remote_code)
    except UserError:
        say(f"{model} has no tokenizer to compare that of {name} with")
        return tokenizer
    check_same_tokens(
        tokenizer, own, f"{model} cannot be read with {name}; leave it out: a teacher may have other tokens"
    )
    return tokenizer


def stored_tokenizer(
    identity: dict[str, Any],
    *,
    name: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a `tokenizer_identity` in its form; `name` and `chat_template` are their places now.

    Raises:
        UserError: as `load_tokenizer` and `apply_form` do.
    """
    form = identity.get("form", {}) | ({"chat_template": chat_template} if chat_template else {})
    tokenizer = load_tokenizer(name or identity["name"], trust_remote_code=trust_remote_code)
    return apply_form(tokenizer, Form(**form))


def check_ids(highest: int, model: Any, tokenizer: Any) -> None:
    """Check that a model has an embedding for the tokens up to this id, and for padding.

    An id without one raises a bare IndexError, or on a GPU aborts the process.

    Raises:
        UserError: naming the token without an embedding.
    """
    top, rows = max(highest, tokenizer.pad_token_id or 0), model.get_input_embeddings().weight.shape[0]
    if top >= rows:
        raise UserError(
            f"the token {tokenizer.convert_ids_to_tokens(top)!r} has the id {top:,} and the model {rows:,} embedding "
            "rows; use the tokenizer it was trained with, or resize its embeddings (model.resize_token_embeddings)"
        )
