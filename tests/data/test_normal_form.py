"""The normal form of messages, prompts implied by two responses, and fingerprints that must not change."""

import copy

import pytest
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.data.encoder import Encoder
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.load import load_messages, load_pairs
from prefdistill.data.truncation import Truncation
from support.pairs import assistant, conversation, plain, user, write_jsonl
from support.tokenizer_styles import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c | tojson }}]"
    "{% endfor %}{% if m.thinking is defined %}({{ m.thinking }}){% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def calling(arguments, content=""):
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }


def called(arguments, content="", answer="yes"):
    prompt = [user("go"), calling(arguments, content), {"role": "tool", "content": "done"}]
    return {"prompt": prompt, "chosen": [assistant(answer)], "rejected": [assistant("no")]}


def both_formats(tmp_path, rows):
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    return [
        load_pairs(write_jsonl(tmp_path / "rows.jsonl", rows)),
        load_pairs(str(tmp_path / "rows.parquet")),
        load_pairs(str(tmp_path / "saved")),
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [called({"a": 1}), called({"city": "x"})],
        [called({"where": {"lat": 1.5}}), called({"where": {"city": {"name": "x"}}, "list": [{"a": 1}, {"b": 2}]})],
        [called({"a": 1}, answer="1"), {**called({"a": 2}), "chosen": [{**assistant("ok"), "thinking": "hm"}]}],
        [called({"a": 1}, None), called({"a": 2}, None)],
    ],
    ids=["arguments", "deeper", "a key in one response", "content null"],
)
def test_nulls_of_arrow_reach_neither_text_nor_fingerprint(tmp_path, rows):
    tokenizer = copy.deepcopy(make_tokenizer("llama3"))  # the original is shared by tests
    tokenizer.chat_template = TEMPLATE
    loaded = both_formats(tmp_path, rows)
    texts = [[Encoder(tokenizer).text(row["prompt"], row["chosen"]) for row in dataset] for dataset in loaded]
    ids = [[row["chosen_ids"] for row in encode_pairs(dataset, tokenizer, Truncation(None))[0]] for dataset in loaded]
    assert texts[0] == texts[1] == texts[2]
    assert ids[0] == ids[1] == ids[2]
    assert not any(word in text for text in texts[0] for word in ("null", "None"))
    assert len({data_fingerprint(dataset) for dataset in loaded}) == 1
    assert list(loaded[0]) == list(loaded[1])  # so that TRL's own trainers read the same rows


def test_content_may_be_null_only_beside_tool_calls(tmp_path):
    rows = [load_pairs(write_jsonl(tmp_path / f"{c}.jsonl", [called({"a": 1}, c)])) for c in (None, "")]
    assert rows[0][0]["prompt"][1]["content"] == ""
    assert data_fingerprint(rows[0]) == data_fingerprint(rows[1])
    with pytest.raises(UserError, match="row 0: 'prompt' must be text or a list of messages"):
        load_pairs(write_jsonl(tmp_path / "bad.jsonl", [{**called({}), "prompt": [user(None)]}]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("\n\nHuman: ok?\n\nAssistant: Yes.", "\n\nHuman: ok?\n\nAssistant: Yeah.", "\n\nHuman: ok?\n\nAssistant:"),
        ("\n\nHuman: a\n\nAssistant: I can", "\n\nHuman: a\n\nAssistant: I can do it", "\n\nHuman: a\n\nAssistant:"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:"),
        (
            "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: The sky",
            "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: The sun",
            "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        ),
        ("### Instruction:\nx\n\n### Response:\nYes", "### Instruction:\nx\n\n### Response:\nYe", None),
        ("<|im_start|>assistant\nTo be", "<|im_start|>assistant\nTo go", "<|im_start|>assistant\n"),
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("Is it? Yes.", "Is it? Yeah.", "Is it?"),
        ("Is it?\nYes.", "Is it?\nYeah.", "Is it?\n"),
        ("Which?\nA: one\nB: two\nA", "Which?\nA: one\nB: two\nB", "Which?\nA: one\nB: two\n"),
        ("天空？是蓝的", "天空？是绿的", "天空？"),
    ],
)
def test_an_implied_prompt_ends_at_a_turn_or_a_word(tmp_path, chosen, rejected, prompt):
    prompt = prompt or "### Instruction:\nx\n\n### Response:\n"
    row = load_pairs(write_jsonl(tmp_path / "p.jsonl", [{"chosen": chosen, "rejected": rejected}]))[0]
    assert row == plain(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    assert row["chosen"]
    assert row["rejected"]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Yes", "Yeah"),
        ("Why? so", "Why? so it is"),
        ("Why? so", "Why? so"),
        (" a", " b"),
        ("\n\nHuman: a", "\n\nHuman: a b"),
    ],
)
def test_a_prompt_that_no_boundary_ends_is_refused_by_row(tmp_path, chosen, rejected):
    rows = [{"chosen": "Q: a", "rejected": "Q: b"}, {"chosen": chosen, "rejected": rejected}]
    with pytest.raises(UserError, match=r"row 1: .* up to the end of a turn or a word\. Add a `prompt` column"):
        load_pairs(write_jsonl(tmp_path / "p.jsonl", rows))


def test_the_prompt_of_conversations_never_takes_a_whole_response(tmp_path):
    said = [user("q"), assistant("a")]
    cases = {
        "equal": (said, said, 1),
        "one goes on": (said, [*said, assistant("b")], 1),
        "begin alike": ([*said, assistant("b")], [*said, assistant("c")], 1),
        "after a tool": (
            [user("q"), calling({"a": 1}), {"role": "tool", "content": "t"}, assistant("b")],
            [user("q"), calling({"a": 1}, None), {"role": "tool", "content": "t"}, assistant("c")],
            3,
        ),
    }
    for name, (chosen, rejected, length) in cases.items():
        row = load_pairs(write_jsonl(tmp_path / "p.jsonl", [{"chosen": chosen, "rejected": rejected}]))[0]
        assert len(row["prompt"]) == length, name
        assert row["chosen"], name
        assert row["rejected"], name


def test_fingerprints_of_rows_without_these_features_are_as_before(tmp_path):
    scored = {**conversation("Hi?", "Hello.", "No."), "score_chosen": 1, "score_rejected": 0.25, "source": "a"}
    cases = {
        "c2edb25ceba758177b047c41729e2de7de4120d4478909fbfb49c15da8854f49": [scored],
        "42f7e81b781e1819fe86fd3bc9725e1f3143150ac844c1ab3d2916c91c89738b": [plain("p", "c", "r")],
        "9ae5bdbf42cb570c7f1a363aa7c93a73612650fd1dac81545c02aae04d3370aa": [
            {**scored, "prompt": [{**user("x"), "name": "Ann"}]},
            scored,
        ],
        "cab5cf1a3af59beca68a2b1e52ca61e6681561b67330f7025c1073d2ffc3cdd2": [
            {"chosen": "The sky is blue.", "rejected": "The sky is green."}
        ],
    }
    for fingerprint, rows in cases.items():
        assert data_fingerprint(load_pairs(write_jsonl(tmp_path / "rows.jsonl", rows))) == fingerprint


def test_demonstrations_are_in_normal_form_too(tmp_path):
    messages = [user("go"), calling({"a": 1}, None), {"role": "tool", "content": "x"}, assistant("done")]
    row = load_messages(write_jsonl(tmp_path / "sft.jsonl", [{"messages": messages}]))[0]
    assert row == {"prompt": [messages[0], calling({"a": 1}), messages[2]], "completion": [assistant("done")]}
