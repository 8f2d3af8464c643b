"""Another chat template, system prompt or variables for one model, as another `tokenizer.chat_template`."""

import copy

import pytest
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.data.encoder import Encoder
from prefdistill.data.template import changes_with_time, render_messages, template_ending
from prefdistill.data.truncation import Truncation
from prefdistill.models.form import apply_form
from prefdistill.models.identity import tokenizer_identity
from prefdistill.models.options import Form
from prefdistill.models.vocabulary import stored_tokenizer
from support.tokenizer_styles import STYLES, make_tokenizer

USER, SYSTEM = {"role": "user", "content": "What is 2 + 3?"}, {"role": "system", "content": "Old."}
REPLY = {"role": "assistant", "content": " 5\n\n**yes** "}
TRICKY = 'Be "terse" \\ {{ x }} %} #} \'é 🙂\n\ttwo'

# Qwen3: a variable decides whether the generation prompt has an empty thinking block
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# what templates do with the messages and with white space around tags
UNUSUAL = {
    "macro": "{% macro turn(m) %}[{{ m.role }}]{{ m.content }}{% if m == messages[-1] %}!{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "first": "{% for m in messages %}{% if loop.first and m.role == 'system' %}<<{{ m.content }}>>{% else %}"
    "[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}",
    "taken apart": "{%- if messages[0]['role'] == 'system' %}{% set head = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set head = 'none' %}{% endif %}<<{{ head }}>>"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "space first": "\n  {% for m in messages %}\n    {{ m.role }}: {{ m.content }}\n  {% endfor %}\n",
    "indented tag": "  {% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
    "text first": "  Talk of {{ strftime_now('%Y') }}:{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
}


def formed(style, *, template=None, **form):
    tokenizer = copy.deepcopy(make_tokenizer(style))
    tokenizer.chat_template = template or tokenizer.chat_template
    return apply_form(tokenizer, Form(**form))


def with_template(template):
    return formed("chatml", template=template)


@pytest.mark.parametrize("style", STYLES)
def test_the_plain_form_is_text_that_ends_with_eos(style):
    tokenizer = formed(style, chat_template="plain")
    bos, eos = STYLES[style].bos or "", STYLES[style].eos
    prompt, whole = Encoder(tokenizer).ended_texts([SYSTEM, USER], [REPLY], cut=[False])
    assert prompt == f"{bos}System:\nOld.\n\nUser:\nWhat is 2 + 3?\n\nAssistant:\n"
    assert whole == f"{prompt}{REPLY['content']}{eos}"
    assert template_ending(tokenizer) == (tokenizer.eos_token_id, eos, "")
    assert "Assistant:\nHi\n\nUser:" in render_messages(tokenizer, [USER, REPLY | {"content": "Hi"}, USER])
    ids = Encoder(tokenizer).ids([USER], "5")
    assert ids.count(tokenizer.bos_token_id) == bool(bos)  # not a second one of the tokenizer's own
    assert Encoder(tokenizer).texts([USER, REPLY | {"tool_calls": [{"function": {"name": "f"}}]}]) is None


@pytest.mark.parametrize("style", [name for name in STYLES if name != "gemma"])
def test_a_system_prompt_replaces_that_of_the_row(style):
    own, tokenizer = make_tokenizer(style), formed(style, system_prompt=TRICKY)
    expected = render_messages(own, [{"role": "system", "content": TRICKY}, USER, REPLY])
    assert render_messages(tokenizer, [USER, REPLY]) == render_messages(tokenizer, [SYSTEM, USER, REPLY]) == expected
    assert template_ending(tokenizer) == template_ending(own)
    without = formed(style, system_prompt="")
    assert render_messages(without, [SYSTEM, USER, REPLY]) == render_messages(own, [USER, REPLY])


@pytest.mark.parametrize("template", UNUSUAL.values(), ids=UNUSUAL)
def test_a_template_of_any_kind_gets_the_system_prompt(template):
    own = with_template(template)
    new = {"role": "system", "content": TRICKY}
    for row in ([USER, REPLY], [SYSTEM, USER, REPLY], [USER, REPLY, USER]):
        rest = row[1:] if row[0] == SYSTEM else row
        assert render_messages(formed("chatml", template=template, system_prompt=TRICKY), row) == render_messages(
            own, [new, *rest]
        )
        assert render_messages(formed("chatml", template=template, system_prompt=""), row) == render_messages(own, rest)
    assert changes_with_time(formed("chatml", template=template, system_prompt=TRICKY)) == ("strftime_now" in template)


def test_variables_of_the_template_for_one_model():
    own = with_template(THINKS)
    tokenizer = formed("chatml", template=THINKS, template_kwargs={"enable_thinking": False})
    block = "<think>\n\n</think>\n\n"
    prompt = render_messages(own, [USER], generation_prompt=True)
    assert render_messages(tokenizer, [USER], generation_prompt=True) == prompt + block
    inputs = {"enable_thinking": True}  # of the data
    assert render_messages(tokenizer, [USER], generation_prompt=True, inputs=inputs) == prompt + block
    values = {"a": [1, -2.5, None, {"x": True, "é\"'": "y"}], "b": None, "c": "{{ 1 }}"}
    shows = with_template("{{ a }}|{{ b }}|{{ c }}{{ messages[0].content }}")
    shown = formed("chatml", template=shows.chat_template, template_kwargs=values)
    assert render_messages(shown, [USER]) == render_messages(shows, [USER], inputs=values)


# generation prompts that open a thinking block, which a finished conversation does not have, or has otherwise
OPENS = {
    "r1": "{{ bos_token }}{% for m in messages %}{% if m.role != 'assistant' %}<U>{{ m.content }}{% else %}"
    "{% set content = m.content.split('</think>')[-1] %}<A>{{ content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    "{{ '<A><think>\n' if add_generation_prompt else '' }}\n",  # the last newline is none of the text
    "empty block": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}",
    "style": STYLES["not_a_prefix"].template,
}


@pytest.mark.parametrize("template", OPENS.values(), ids=OPENS)
def test_a_response_behind_a_prefix_that_closes_what_the_generation_prompt_opens(template):
    own, prefix = with_template(template), "\n</think>\n\n"
    tokenizer = formed("chatml", template=template, response_prefix=prefix, system_prompt="Be kind.")
    for row in ([USER], [SYSTEM, USER], [USER, REPLY, USER]):
        asked = [{"role": "system", "content": "Be kind."}, *(row[1:] if row[0] == SYSTEM else row)]
        prompt, whole = Encoder(tokenizer).texts(row, [REPLY])
        assert prompt == render_messages(own, asked, generation_prompt=True) + prefix
        assert whole.startswith(prompt + REPLY["content"])
        (_, theirs) = Encoder(own).texts(asked, "x")
        assert whole.removeprefix(prompt + REPLY["content"]) == theirs[theirs.rindex("x") + 1 :]
    assert template_ending(tokenizer) == template_ending(own)
    rows = Dataset.from_list([{"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY | {"content": "6"}]}])
    with pytest.raises(UserError, match="No row is left"):
        encode_pairs(rows, own, Truncation())
    encoded, dropped = encode_pairs(rows, tokenizer, Truncation())
    assert not dropped
    assert tokenizer.decode(encoded[0]["rejected_ids"]) == "6<|im_end|>"
    assert Encoder(tokenizer).texts([USER], [REPLY | {"tool_calls": [{"function": {"name": "f"}}]}]) is None


def test_named_templates_all_get_the_form():
    templates = {"default": STYLES["chatml"].template, "tool_use": "{{ tools }}" + STYLES["chatml"].template}
    tokenizer = formed("chatml", template=templates, system_prompt="New.")
    for inputs in ({}, {"tools": [{"type": "function", "function": {"name": "f"}}]}):
        assert "system\nNew.<|im_end|>" in render_messages(tokenizer, [SYSTEM, USER], inputs=inputs)


def test_a_file_is_a_template_and_the_identity_has_the_form_in_words(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(THINKS, encoding="utf-8")
    tokenizer = formed("llama3", chat_template=str(file), template_kwargs={"enable_thinking": False})
    identity, own = tokenizer_identity(tokenizer), tokenizer_identity(make_tokenizer("llama3"))
    assert identity["form"] == {"chat_template": str(file), "template_kwargs": {"enable_thinking": False}}
    assert identity["sha256"] == own["sha256"]
    assert identity["template_sha256"] != own["template_sha256"]
    assert "form" not in own
    assert formed("llama3").chat_template == make_tokenizer("llama3").chat_template  # no form: nothing changes


def test_a_teachers_form_on_top_of_the_template_of_both_models_is_read_from_a_store(tmp_path):
    base = copy.deepcopy(make_tokenizer("llama3"))
    base.chat_template = None
    base.save_pretrained(tmp_path)
    both = apply_form(copy.deepcopy(base), Form(chat_template="plain"))
    teacher = apply_form(copy.deepcopy(both), Form(system_prompt="Be brief."))
    identity = tokenizer_identity(teacher)
    assert identity["form"] == {"chat_template": "plain", "system_prompt": "Be brief."}
    assert stored_tokenizer(identity, name=str(tmp_path)).chat_template == teacher.chat_template
    assert tokenizer_identity(both)["form"] == {"chat_template": "plain"}


@pytest.mark.parametrize(
    ("style", "form", "message"),
    [
        ("gemma", {"system_prompt": "x"}, "System role not supported.*leave the system prompt out"),
        ("chatml", {"chat_template": "missing.jinja"}, "no chat template at 'missing.jinja'.*'plain'"),
        ("chatml", {"chat_template": "."}, "no chat template at '.'"),
        ("chatml", {"template_kwargs": {"enable_thinking": False}}, "has no variable 'enable_thinking'"),
        ("chatml", {"template_kwargs": {"add_generation_prompt": False}}, "is no variable of a chat template"),
        ("chatml", {"template_kwargs": {"a b": 1}}, "is no variable of a chat template"),
    ],
)
def test_a_form_that_does_not_fit_is_refused(style, form, message):
    with pytest.raises(UserError, match=message):
        formed(style, **form)


@pytest.mark.parametrize("form", [{"system_prompt": "x"}, {"response_prefix": "x"}])
def test_text_has_no_form_but_another_template(form):
    data = Dataset.from_list([{"prompt": "q", "chosen": " good", "rejected": " bad"}])
    encode_pairs(data, formed("chatml", chat_template="plain"), Truncation())
    with pytest.raises(UserError, match=f"plain text.* so {next(iter(form))} would change nothing"):
        encode_pairs(data, formed("chatml", **form), Truncation())


def test_a_form_that_would_change_nothing_is_refused(tmp_path):
    deaf = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="writes no system prompt"):
        formed("chatml", template=deaf, system_prompt="x")
    bare = copy.deepcopy(make_tokenizer("chatml"))
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template to set system_prompt in"):
        apply_form(bare, Form(system_prompt="x"))
    for name, text, message in (("empty", " \n", "is empty"), ("wrong", "{% if %}", "cannot be rendered")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            apply_form(bare, Form(chat_template=str(tmp_path / name)))
