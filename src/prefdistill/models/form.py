"""Read a model in another form: another chat template, system prompt or template variables, for this model alone.

A form is nothing but another `tokenizer.chat_template`, so that identities, cache keys and the end of responses follow.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import value_digest
from prefdistill.models.options import Form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A conversation as text, for base models: the role on a line of its own, the content as it is, an empty line; EOS after
# the last response. A newline before the response, because a space would become part of its first token.
PLAIN = """\
{% if tools or documents %}{{ raise_exception('the plain form has no tools and no documents') }}{% endif %}
{% for message in messages %}
{% if message.tool_calls %}{{ raise_exception('the plain form has no tool calls') }}{% endif %}
{{ message.role | capitalize }}:{{ '\\n' }}{{ message.content }}
{%- if loop.last and message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}Assistant:{{ '\\n' }}{% endif %}"""
# The form of Llama 3's instruct models, for its base models, whose vocabulary has the tokens.
LLAMA3 = """\
{% for message in messages %}
<|start_header_id|>{{ message.role }}<|end_header_id|>{{ '\\n\\n' }}{{ message.content | trim }}<|eot_id|>
{%- endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"""
BUILTIN = {"plain": PLAIN, "llama3": LLAMA3}
# Arguments of `apply_chat_template` that are no variables of the template, but `documents`.
RESERVED = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}
PROBE = [{"role": "user", "content": "probe question"}]
REPLY = {"role": "assistant", "content": "probe answer"}


def apply_form(tokenizer: "PreTrainedTokenizerBase", form: Form) -> "PreTrainedTokenizerBase":
    """Give a tokenizer the chat template of a form, and note the form as `tokenizer.form`, with that of an earlier one;
    return the tokenizer.

    Raises:
        UserError: if the template cannot be read or refuses a plain question, or does not use what the form sets.
    """
    settings = form.model_dump(exclude_defaults=True)
    if not settings:
        return tokenizer
    name = tokenizer.name_or_path
    if form.chat_template is not None:
        tokenizer.chat_template = _template(tokenizer, form.chat_template)
    if not tokenizer.chat_template:
        raise UserError(f"{name} has no chat template to set {', '.join(settings)} in; give a chat_template too")
    template = tokenizer.chat_template
    for variable in form.template_kwargs:
        if variable in RESERVED or not variable.isidentifier():
            raise UserError(f"{variable!r} is no variable of a chat template; leave it out")
        if not re.search(rf"\b{variable}\b", str(template)):
            raise UserError(f"the chat template of {name} has no variable {variable!r}; leave it out")
    tokenizer.chat_template = (
        {key: _rewritten(tokenizer, part, form) for key, part in template.items()}
        if isinstance(template, dict)
        else _rewritten(tokenizer, template, form)
    )
    _check(tokenizer, form)
    tokenizer.form = getattr(tokenizer, "form", {}) | settings
    return tokenizer


def read_template(source: str) -> str:
    """Return the built-in template of this name, or that of a file.

    Raises:
        UserError: if there is none.
    """
    if source in BUILTIN:
        return BUILTIN[source]
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"no chat template at {source!r} ({error}); name a file, or {' or '.join(map(repr, BUILTIN))}"
        ) from error
    if not text.strip():
        raise UserError(f"the chat template {source} is empty")
    return text


def form_key(form: Form) -> dict[str, Any]:
    """Return what identifies a form: its settings, with the text of its template instead of its place."""
    source = form.chat_template
    return form.model_dump() | {"chat_template": source and value_digest(read_template(source))}


def _template(tokenizer: "PreTrainedTokenizerBase", source: str) -> str:
    """Return a template, a built-in one with BOS where the tokenizer writes it."""
    bos = tokenizer.bos_token_id
    writes_bos = source in BUILTIN and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return ("{{ bos_token }}" if writes_bos else "") + read_template(source)


def _rewritten(tokenizer: "PreTrainedTokenizerBase", template: str, form: Form) -> str:
    """Return a template that assigns what the form sets before it renders, and writes a prefix before a response."""
    lines = [f"{variable} = {_literal(value)}" for variable, value in form.template_kwargs.items()]
    if form.system_prompt is not None:
        system = [{"role": "system", "content": form.system_prompt}] if form.system_prompt else []
        without_system = "(messages[1:] if messages and messages[0].role in ['system', 'developer'] else messages)"
        lines.append(f"messages = {_literal(system)} + {without_system}")
    after = ""
    if form.response_prefix is not None:
        # a response is written behind the generation prompt that the model gets, and ends as the template ends it
        tail = _render(tokenizer, [*PROBE, REPLY], template).rpartition(REPLY["content"])[2]
        lines += [
            "form_response = messages[-1] if not add_generation_prompt and messages[-1].role == 'assistant' else none",
            "add_generation_prompt = add_generation_prompt or form_response is not none",
            f"form_prefix = {_literal(form.response_prefix)} if add_generation_prompt else ''",
            "messages = messages if form_response is none else messages[:-1]",
        ]
        no_calls = "{{ raise_exception('a response behind a prefix has no tool calls') }}"
        after = (
            "{{ form_prefix }}{% if form_response is not none %}"
            f"{{% if form_response.tool_calls %}}{no_calls}{{% endif %}}"
            f"{{{{ form_response.content }}}}{{{{ {_literal(tail)} }}}}{{% endif %}}"
        )
        template = template.removesuffix("\n")  # as transformers renders it, where it is at the end
    # transformers removes the newline after a tag, so that the template still starts at the beginning of a line
    return "".join(f"{{% set {line} %}}\n" for line in lines) + template + after


def _literal(value: Any) -> str:
    """Return a JSON value as a literal of Jinja."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], template: str | None = None, advice: str = ""
) -> str:
    """Return messages as text, with a generation prompt if the last is not a response.

    Raises:
        UserError: if the template cannot be rendered.
    """
    prompt = messages[-1]["role"] != "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # a template is a program and may raise anything
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} cannot be rendered ({error}){advice}"
        ) from error
    return str(text)


def _check(tokenizer: "PreTrainedTokenizerBase", form: Form) -> None:
    """Check that the template renders a question, with the system prompt of the form in it."""
    advice = "; leave the system prompt out" if form.system_prompt else ""
    text = _render(tokenizer, PROBE, advice=advice)
    if form.system_prompt and form.system_prompt.strip() not in text:
        raise UserError(f"the chat template of {tokenizer.name_or_path} writes no system prompt{advice}")
