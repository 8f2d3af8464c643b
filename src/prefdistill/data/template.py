"""Render messages through a chat template, and find the token with which the template ends a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefdistill.core.errors import UserError
from prefdistill.data.prompts import inputs_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = (
    "The data are conversations but the tokenizer has no chat template. For a teacher, name one: --chat-template FILE, "
    "or --chat-template plain, which writes them as text (in a recipe: model.teacher_chat_template). For a student, "
    "set tokenizer.chat_template. Or use text."
)


def check_text_form(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse text for a tokenizer whose form changes conversations alone. Another template may be for other data.

    Raises:
        UserError: naming what the form sets.
    """
    if settings := getattr(tokenizer, "form", {}).keys() - {"chat_template"}:
        raise UserError(
            "the data are plain text, which goes through no chat template, so "
            f"{', '.join(sorted(settings))} would change nothing; leave it out, or give conversations"
        )


class Ending(NamedTuple):
    """What the chat template writes after an assistant message: `before` up to and with the end token, then `after`."""

    token: int | None = None
    before: str = ""
    after: str = ""


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    generation_prompt: bool = False,
    inputs: Mapping[str, Any] | None = None,
) -> str:
    """Return messages as text, with the header of an assistant turn at the end if `generation_prompt`.

    Args:
        inputs: what else the template reads: tools, documents, its own variables.

    Raises:
        jinja2.TemplateError: whatever goes wrong in the template, which is a program and may raise anything.
    """
    from jinja2 import TemplateError, TemplateRuntimeError

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **(inputs or {})
        )
        return str(text)
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


def template_ending(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """Find the end token of the chat template: the first special token it writes after an assistant message."""
    if not tokenizer.chat_template:
        return Ending()
    from jinja2 import TemplateError

    response = "probe answer"
    conversation = [{"role": "user", "content": "probe question"}, {"role": "assistant", "content": response}]
    try:
        text = render_messages(tokenizer, conversation)
    except TemplateError as error:
        raise UserError(f"The chat template refuses a user and an assistant message ({error}). Fix it.") from error
    _, separator, tail = text.rpartition(response)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if separator else []:
        if token in special:
            before, end_text, after = tail.partition(str(tokenizer.convert_ids_to_tokens(token)))
            return Ending(token, before + end_text, after)
    return Ending()


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end a response: the tokenizer's EOS, and the end token of its chat template."""
    return {tokenizer.eos_token_id, template_ending(tokenizer).token} - {None}


PROBE = ({"role": "user", "content": "probe question"}, {"role": "assistant", "content": "probe answer"})


def changes_with_time(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[dict[str, Any]] = PROBE) -> bool:
    """Return whether the chat template renders a prompt in another way at another time, as one that prints the date."""
    if not tokenizer.chat_template:
        return False
    from jinja2 import TemplateError

    template, inputs = tokenizer.get_chat_template(), inputs_of(prompt)

    def render(clock: str) -> str | None:
        """Render with a function of this name that replaces the template's clock, or else replaces nothing."""
        replaced = f"{{% macro {clock}(pattern) %}}2099{{% endmacro %}}{template}"
        try:
            return render_messages(tokenizer, [*prompt], inputs={**inputs, "chat_template": replaced})
        except TemplateError:
            return None

    return len({render("unused"), render("unused"), render("strftime_now")}) > 1
