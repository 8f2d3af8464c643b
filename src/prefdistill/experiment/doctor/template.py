"""Checks of the chat template and the special tokens, on a made-up conversation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.data.template import PROBE, changes_with_time, end_token_ids, render_messages, template_ending
from prefdistill.experiment.doctor.findings import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, SYSTEM = "probe question", "probe instruction"


def missing(teacher: PreTrainedTokenizerBase | None) -> Iterator[Finding]:
    """Report a tokenizer without a chat template, for which a recipe uses the teacher's."""
    if teacher is not None and teacher.chat_template:
        yield Finding(
            "template.from-teacher",
            "note",
            "the student's tokenizer has no chat template; recipes and these checks use the teacher's",
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
    """Return why the template refuses a user and an assistant message; "" if it does not."""
    try:
        template_ending(tokenizer)
    except UserError as error:
        return str(error)
    return ""


def end_token(tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    if not tokenizer.chat_template:
        return
    if why := refuses(tokenizer):
        yield Finding("template.refuses", "error", why, "Use a template that renders a user and an assistant message.")
        return
    ending = template_ending(tokenizer)
    if ending.token is None:
        yield Finding(
            "template.no-end",
            "warning",
            "the chat template writes no end token after a response: nothing is learnt of where to stop",
            "Write {{ eos_token }} after assistant messages in the template.",
        )
    elif ending.token != tokenizer.eos_token_id:
        token = tokenizer.convert_ids_to_tokens(ending.token)
        yield Finding(
            "template.end-not-eos",
            "note",
            f"the template ends a response with {token}, but the tokenizer's EOS is {tokenizer.eos_token}",
            f"Models trained here stop at both; let others stop at {token} too (generation_config.json).",
        )


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    if _render(tokenizer, [("user", QUESTION)]) == _render(tokenizer, [("user", QUESTION)], generate=True) is not None:
        yield Finding(
            "template.no-generation-prompt",
            "warning",
            "the chat template ignores add_generation_prompt: the header of a response counts as part of it",
            "Write the header of the assistant's turn {% if add_generation_prompt %}.",
        )


def system_message(tokenizer: PreTrainedTokenizerBase, used: bool) -> Iterator[Finding]:
    """Report a template that drops or refuses system messages: a warning if the data have any (`used`)."""
    if not tokenizer.chat_template or _render(tokenizer, [("user", QUESTION)]) is None:
        return
    text = _render(tokenizer, [("system", SYSTEM), ("user", QUESTION)])
    if text is not None and SYSTEM in text:
        return
    verb = "refuses" if text is None else "drops"
    yield Finding(
        "template.system",
        "warning" if used else "note",
        f"the chat template {verb} system messages" + ("" if used else " (the data have none)"),
        "Move the system message to the start of the user message." if used else "Nothing to do.",
    )


def clock(tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict[str, Any]]]) -> Iterator[Finding]:
    """Report a template that prints the date or other text that changes; without prompts, in a made-up conversation."""
    if any(changes_with_time(tokenizer, prompt) for prompt in prompts or [[*PROBE]]):
        yield Finding(
            "template.date",
            "warning",
            "the chat template prints the date, or other text that changes with time: token ids change with it, and "
            "signals and samples of another day are refused",
            "Set the variable that the template takes (`chat_template_kwargs: {date_string: ...}`), or write a fixed "
            "date into the template (tokenizer.chat_template).",
        )


def padding(tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    if not refuses(tokenizer) and tokenizer.pad_token_id in end_token_ids(tokenizer):
        yield Finding(
            "template.pad-is-end",
            "note",
            f"the padding token is an end token ({tokenizer.pad_token}); training here and in TRL masks by length, so "
            "the end token is learned all the same",
            "Elsewhere, collators that mask by token (DataCollatorForLanguageModeling) hide it: set another pad_token.",
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
