"""Checks of the chat template and the special tokens, on a conversation made up for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prefdistill.core.errors import UserError
from prefdistill.data.template import end_token_ids, render_messages, template_ending
from prefdistill.experiment.doctor.findings import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER, SYSTEM = "probe question", "probe answer", "probe instruction"


def missing(lender: PreTrainedTokenizerBase | None) -> Iterator[Finding]:
    """What follows from a tokenizer without a template; `lender` is the teacher's."""
    if lender is not None and lender.chat_template:
        yield Finding(
            "template.lent",
            "note",
            "the student's tokenizer has no chat template; a recipe lends it the teacher's, and so do the checks here",
            "For other commands save it: student.chat_template = teacher.chat_template; student.save_pretrained(...)",
        )
    else:
        yield Finding(
            "template.missing",
            "error",
            "the tokenizer has no chat template, which conversations need",
            "Set tokenizer.chat_template, or use plain text.",
        )


def refuses(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why the template takes no question and answer at all, if it does not."""
    try:
        template_ending(tokenizer)
    except UserError as error:
        return str(error)
    return ""


def end_token(tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    if not tokenizer.chat_template:
        return
    if why := refuses(tokenizer):
        yield Finding("template.refuses", "error", why, "Use a template that takes a question and an answer.")
        return
    ending = template_ending(tokenizer)
    if ending.token is None:
        yield Finding(
            "template.no-end",
            "warning",
            "the chat template writes no end token after an answer: the student does not learn to stop",
            "Write {{ eos_token }} after assistant messages in the template.",
        )
    elif ending.token != tokenizer.eos_token_id:
        token = tokenizer.convert_ids_to_tokens(ending.token)
        yield Finding(
            "template.end-not-eos",
            "note",
            f"the template ends an answer with {token}, and the tokenizer's EOS is {tokenizer.eos_token}",
            f"Where the student is used, let generation stop at {token} too (eos_token_id in generation_config.json).",
        )


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    if _render(tokenizer, [("user", QUESTION)]) == _render(tokenizer, [("user", QUESTION)], generate=True) is not None:
        yield Finding(
            "template.no-generation-prompt",
            "warning",
            "the chat template ignores add_generation_prompt: the header of an answer counts as a part of it",
            "Write the header of the assistant's turn {% if add_generation_prompt %}.",
        )


def system_message(tokenizer: PreTrainedTokenizerBase, used: bool) -> Iterator[Finding]:
    """Whether a system message arrives; a matter of concern where the data have some (`used`)."""
    if not tokenizer.chat_template or _render(tokenizer, [("user", QUESTION)]) is None:
        return
    text = _render(tokenizer, [("system", SYSTEM), ("user", QUESTION)])
    if text is not None and SYSTEM in text:
        return
    what = "refuses" if text is None else "drops"
    yield Finding(
        "template.system",
        "warning" if used else "note",
        f"the chat template {what} system messages" + ("" if used else " (the data have none)"),
        "Put the system message at the start of the user's." if used else "Nothing to do.",
    )


def padding(tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    if not refuses(tokenizer) and tokenizer.pad_token_id in end_token_ids(tokenizer):
        yield Finding(
            "template.pad-is-end",
            "note",
            f"the padding token is an end token ({tokenizer.pad_token}); training here and in TRL masks by length, so "
            "the end token is learnt all the same",
            "Elsewhere, beware of collators that mask by token (DataCollatorForLanguageModeling): give it its own pad.",
        )


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], generate: bool = False) -> str | None:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return render_messages(tokenizer, messages, generation_prompt=generate)
    except TemplateError:
        return None
