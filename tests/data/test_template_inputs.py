"""Columns that the chat template reads beside the messages: tools, documents, and variables of the template."""

import copy
import json

import pytest
from datasets import Dataset, load_from_disk

from prefdistill.core.errors import UserError
from prefdistill.data.encode import drop_refused, encode_pairs, render_pairs
from prefdistill.data.encoder import Encoder, accepts_prompt, reward_model_ids
from prefdistill.data.fingerprint import data_fingerprint, demonstrations_fingerprint
from prefdistill.data.load import load_messages, load_pairs, load_prompts
from prefdistill.data.prompts import prompt_of, prompt_text, prompts_of
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.responses import references_of, unique_prompts
from prefdistill.experiment.user_data import split_prompts
from prefdistill.sampling.options import Sampling
from prefdistill.sampling.sampler import Sampler
from support.pairs import assistant, user, write_jsonl
from support.tokenizer_styles import make_tokenizer

TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{% for d in documents or [] %}({{ d.text }}){% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking is defined %}{{ thinking }}:{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    own = copy.deepcopy(make_tokenizer("llama3"))  # the original is shared by tests
    own.chat_template = TEMPLATE
    return own


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def row(prompt="go", **columns):
    return {"prompt": [user(prompt)], "chosen": [assistant("yes")], "rejected": [assistant("no")], **columns}


ROWS = [
    row(tools=[tool("add", a={"type": "number"})], documents=[{"text": "one"}], chat_template_kwargs={"mood": "calm"}),
    row(tools=[tool("find", city={"enum": ["x", "y"]}), tool("stop")], chat_template_kwargs={"deep": {"a": [1]}}),
    row(documents=[{"text": "two", "title": "t"}], chat_template_kwargs={}),
    row(tools=[], chat_template_kwargs=None),
]


def as_text(rows):
    """The same rows with JSON text in place of lists and objects."""
    return [{k: json.dumps(v) if k in ("tools", "chat_template_kwargs") else v for k, v in row.items()} for row in rows]


def test_every_format_gives_the_texts_of_apply_chat_template(tmp_path, tokenizer):
    columns = {name for one in ROWS for name in one}
    rows = [{name: one.get(name) for name in columns} for one in ROWS]
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(tmp_path / "saved")
    sources = [write_jsonl(tmp_path / "rows.jsonl", ROWS), str(tmp_path / "rows.parquet"), str(tmp_path / "saved")]
    loaded = [load_pairs(source) for source in (*sources, write_jsonl(tmp_path / "text.jsonl", as_text(ROWS)))]
    assert len({data_fingerprint(pairs) for pairs in loaded}) == 1
    inputs = [("tools", "documents"), ("tools",), ("documents",), ()]
    right = [
        tokenizer.apply_chat_template(
            one["prompt"],
            tokenize=False,
            add_generation_prompt=True,
            **{name: one[name] for name in names},
            **(one["chat_template_kwargs"] or {}),
        )
        for one, names in zip(ROWS, inputs, strict=True)
    ]
    assert "add" in right[0]
    assert "(two)" in right[2]
    for pairs in loaded:
        assert [texts[0] for texts in render_pairs(pairs, tokenizer)] == right
        encoded, _ = encode_pairs(pairs, tokenizer, Truncation(None))
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in right]
        assert encoded["prompt_ids"][:] == ids
        sampler = Sampler(tokenizer, Sampling(), None)
        assert sampler.encode_all(prompts_of(pairs))[0] == ids
        assert [
            reward_model_ids(tokenizer, prompt_of(one), one["chosen"])[: len(i)]
            for one, i in zip(pairs, ids, strict=True)
        ] == ids
    saved = load_from_disk(tmp_path / "saved")  # in memory, never seen by the loader
    assert data_fingerprint(saved) == data_fingerprint(loaded[0])
    assert encode_pairs(saved, tokenizer, Truncation(None))[0]["prompt_ids"][:] == ids


@pytest.mark.parametrize(
    "change",
    [{"tools": [tool("mul")]}, {"documents": [{"text": "x"}]}, {"chat_template_kwargs": {"thinking": "on"}}],
    ids=lambda change: next(iter(change)),
)
def test_rows_that_differ_in_one_input_only_are_told_apart(tmp_path, tokenizer, change):
    bare = load_pairs(write_jsonl(tmp_path / "bare.jsonl", [row(), row()]))
    pairs = load_pairs(write_jsonl(tmp_path / "rows.jsonl", [row(), row(**change)]))
    assert data_fingerprint(pairs) != data_fingerprint(bare)
    (same, _), (_, other) = bare["prompt"][:], prompts_of(pairs)
    assert prompt_text(other) != prompt_text(same)
    assert len(unique_prompts(pairs)) == len(references_of(pairs)) == 2  # evaluated as two prompts
    assert {len(part) for part in split_prompts(pairs, 0.5, 0)} == {1}  # and split as two
    messages = [load_messages(str(tmp_path / f"{name}.jsonl")) for name in ("bare", "rows")]
    assert len({demonstrations_fingerprint(rows) for rows in messages}) == 2
    assert prompt_text(prompts_of(messages[1])[1]) == prompt_text(other)
    assert prompt_text(prompts_of(load_prompts(str(tmp_path / "rows.jsonl")))[1]) == prompt_text(other)


def test_a_template_that_refuses_an_input_drops_the_row(tmp_path, tokenizer):
    picky = copy.deepcopy(tokenizer)
    picky.chat_template = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + TEMPLATE
    pairs = load_pairs(write_jsonl(tmp_path / "rows.jsonl", [row(), row(tools=[tool("add")])]))
    assert len(drop_refused(pairs, picky, "test")[0]) == 1
    assert [accepts_prompt(picky, prompt) for prompt in prompts_of(pairs)] == [True, False]
    assert encode_pairs(pairs, picky, Truncation(None))[1].first_rows == {"the chat template refuses its messages": 1}


def test_variables_of_the_recipe_stand_below_those_of_the_row(tmp_path, tokenizer):
    rows = [row(), row(chat_template_kwargs={"thinking": "own"})]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for load in (load_pairs, load_messages, load_prompts):
        loaded = load(path, chat_template_kwargs={"thinking": "recipe"})
        texts = [Encoder(tokenizer).text(prompt) for prompt in prompts_of(loaded)]
        assert [text.rpartition("<|assistant|>")[2] for text in texts] == ["recipe:", "own:"]
    assert data_fingerprint(load_pairs(path)) != data_fingerprint(load_pairs(path, chat_template_kwargs={"a": 1}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "calculator"}, "row 1: 'tools' must be a list of objects, or JSON text of one, not 'calculator'"),
        ({"documents": ["a text"]}, "row 1: 'documents' must be a list of objects"),
        ({"chat_template_kwargs": [1]}, "row 1: 'chat_template_kwargs' must be an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "row 1: 'chat_template_kwargs' sets 'tokenize'"),
    ],
    ids=["tools", "documents", "variables", "an argument"],
)
def test_unreadable_inputs_are_refused_by_row(tmp_path, columns, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [row(), row(**columns)])
    with pytest.raises(UserError, match=r"leave the column out with data\.columns") as error:
        load_pairs(path)
    assert message in str(error.value)
    assert len(load_pairs(path, columns=dict.fromkeys(columns))) == 2


def test_text_has_no_place_for_them(tmp_path):
    pair = {"prompt": "go", "chosen": "yes", "rejected": "no"}
    path = write_jsonl(tmp_path / "rows.jsonl", [pair, pair | {"tools": [tool("add")]}])
    with pytest.raises(
        UserError, match=r"row 1: 'tools' is for a chat template, and 'prompt' is text.*\{tools: null\}"
    ):
        load_pairs(path)
    assert load_pairs(path, columns={"tools": None}).column_names == ["prompt", "chosen", "rejected"]
    with pytest.raises(UserError, match=r"row 0: 'data\.chat_template_kwargs' is for a chat template"):
        load_pairs(path, columns={"tools": None}, chat_template_kwargs={"a": 1})


@pytest.mark.parametrize("sides", ["conversations", "texts"])
def test_a_system_column_beside_pairs_without_a_prompt(tmp_path, capsys, sides):
    pair = {side: [user("go"), *row()[side]] for side in ("chosen", "rejected")}
    if sides == "texts":
        pair = {"chosen": "Human: go\n\nAssistant: yes", "rejected": "Human: go\n\nAssistant: no"}
    pairs = load_pairs(write_jsonl(tmp_path / "rows.jsonl", [pair | {"system": "be kind"}]))
    if sides == "conversations":
        assert pairs[0]["prompt"] == [{"role": "system", "content": "be kind"}, user("go")]
    else:
        assert pairs[0]["prompt"].endswith("Assistant:")
        assert "`system` is not read" in capsys.readouterr().err


def test_demonstrations_name_the_columns_that_are_not_read(tmp_path, capsys):
    load_messages(write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b", "source": "c"}]))
    assert "columns that are not read: source" in capsys.readouterr().err
