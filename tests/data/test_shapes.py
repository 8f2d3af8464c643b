"""Public shapes of preference data: each is read as prompt, chosen and rejected, and said aloud."""

import csv
import json

import pytest
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.load import load_messages, load_pairs, load_prompts
from prefdistill.data.shapes import NO_RESPONSE, OTHER_TURNS
from prefdistill.experiment.doctor.pairs import read_pairs
from support.pairs import assistant, conversation, plain, user, write_jsonl

PAIR = conversation("why?", "so", "no")
TEXT = plain("why?", "so", "no")
SYSTEM = {"role": "system", "content": "be kind"}
WITH_SYSTEM = {**PAIR, "prompt": [SYSTEM, user("why?")]}
WHOLE = {"chosen": [user("why?"), assistant("so")], "rejected": [user("why?"), assistant("no")]}


def parts(text):
    return [{"type": "text", "text": text}]


SHAPES = {
    "ultrafeedback_binarized": ({"prompt": "why?", **WHOLE, "messages": WHOLE["chosen"], "score_chosen": 8.5}, PAIR),
    "whole conversations, messages prompt": ({"prompt": [user("why?")], **WHOLE}, PAIR),
    "whole conversations, prompt inside": ({"prompt": "why", **WHOLE, "question": "other"}, PAIR),
    "system in whole conversations": (
        {"prompt": "why?", **{side: [SYSTEM, *value] for side, value in WHOLE.items()}},
        WITH_SYSTEM,
    ),
    "orca_dpo_pairs": ({"system": "be kind", "question": "why?", "chosen": "so", "rejected": "no"}, WITH_SYSTEM),
    "orca_dpo_pairs without system": ({"system": "", "question": "why?", "chosen": "so", "rejected": "no"}, TEXT),
    "distilabel orca": ({"system": "be kind", "input": "why?", "chosen": "so", "rejected": "no"}, WITH_SYSTEM),
    "system beside messages": ({"system": "be kind", **PAIR}, WITH_SYSTEM),
    "system there already": ({"system": "be kind", **WITH_SYSTEM}, WITH_SYSTEM),
    "message objects": ({**PAIR, "chosen": assistant("so"), "rejected": assistant("no")}, PAIR),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "why?"}],
            "chosen": {"from": "gpt", "value": "so"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        PAIR,
    ),
    "parts": (
        {
            "prompt": [{"role": "user", "content": parts("why?")}],
            "chosen": [{"role": "assistant", "content": [*parts("s"), *parts("o")]}],
            "rejected": [{"role": "assistant", "content": parts("no")}],
        },
        PAIR,
    ),
    "Alpaca": ({"instruction": "why?", "input": "", "chosen": "so", "rejected": "no"}, TEXT),
    "Alpaca list": ({"instruction": "why", "input": "x?", "output": ["so", "no"]}, {**TEXT, "prompt": "why\nx?"}),
    "argilla": ({"instruction": "why?", "chosen_response": "so", "rejected_response": "no"}, TEXT),
    "helpsteer": ({"prompt": "why?", "response_chosen": "so", "response_rejected": "no"}, TEXT),
    "stack exchange": ({"question": "why?", "response_j": "so", "response_k": "no"}, TEXT),
    "SafeRLHF": ({"prompt": "why?", "response_0": "no", "response_1": "so", "better_response_id": 1}, TEXT),
    "SHP": ({"history": "why?", "human_ref_A": "so", "human_ref_B": "no", "labels": 1}, TEXT),
    "HelpSteer3": (
        {"context": [user("why?")], "response1": "no", "response2": "so", "overall_preference": 2},
        PAIR,
    ),
    "HelpSteer2": ({"prompt": "why?", "response_1": "so", "response_2": "no", "preference_strength": -1}, TEXT),
    "arena conversations": (
        {"conversation_a": WHOLE["chosen"], "conversation_b": WHOLE["rejected"], "winner": "model_a", "model_a": "x"},
        PAIR,
    ),
    "arena texts": (
        {
            "prompt": '["why?"]',
            "response_a": '["no"]',
            "response_b": '["so"]',
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        TEXT,
    ),
    "UltraInteract": (
        {"trajectory": [{"from": "user", "value": "why?"}], "chosen": "so", "rejected": "no", "id": 3},
        PAIR,
    ),
    "text responses": ({**PAIR, "chosen": "so", "rejected": "no"}, PAIR),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_public_shape_is_read_and_said(tmp_path, name, capsys):
    row, pair = SHAPES[name]
    path = write_jsonl(tmp_path / "pairs.jsonl", [row, row])
    dataset = load_pairs(path)
    said = capsys.readouterr().err
    assert all({key: row[key] for key in pair} == pair for row in dataset)
    assert data_fingerprint(load_prompts(path)) == data_fingerprint(dataset)
    if "parts" not in name and "objects" not in name and "without" not in name:
        assert f"{path}: " in said
    found, findings = read_pairs(path, "train")
    assert [{key: p.columns[key] for key in pair} for p in found.pairs] == [pair, pair]
    assert {finding.severity for finding in findings} <= {"note"}
    Dataset.from_list([row, row]).to_parquet(tmp_path / "pairs.parquet")
    scored = [data_fingerprint(load_pairs(str(tmp_path / f"pairs.{kind}"))) for kind in ("parquet", "jsonl")]
    assert len({*scored}) == 1


LONGER = [user("why?"), assistant("hm"), user("why?"), assistant("so")]
LEFT_OUT = {
    "HelpSteer3": {"overall_preference": 0},
    "HelpSteer2": {"preference_strength": 0},
    "arena conversations": {"winner": "tie (bothbad)"},
    "arena texts": {"winner_model_b": 0, "winner_tie": 1},
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_rows_without_a_preference_are_left_out_and_counted(tmp_path, capsys, name):
    row, pair = SHAPES[name]
    tie = row | LEFT_OUT[name]
    path = write_jsonl(tmp_path / "pairs.jsonl", [tie, row, tie])
    dataset = load_pairs(path)
    assert [{key: one[key] for key in pair} for one in dataset] == [pair]
    assert "dropped 2 rows: neither response is preferred (2, first row 0)" in capsys.readouterr().err
    found, findings = read_pairs(path, "train")
    assert [one.row for one in found.pairs] == [1]
    assert [(f.severity, f.count, f.rows) for f in findings if f.check == "data.left-out"] == [("note", 2, (0, 2))]
    with pytest.raises(UserError, match="no row holds a preference pair: neither response is preferred"):
        load_pairs(write_jsonl(tmp_path / "ties.jsonl", [tie]))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("arena conversations", {"conversation_a": LONGER, "conversation_b": [*LONGER[:1], *LONGER]}, OTHER_TURNS),
        ("arena texts", dict.fromkeys(("prompt", "response_a", "response_b"), '["a", "b"]'), OTHER_TURNS),
        ("arena texts", {"response_a": "[null]"}, NO_RESPONSE),
    ],
    ids=["conversations", "texts", "null"],
)
def test_rows_of_other_turns_are_left_out(tmp_path, capsys, name, change, reason):
    row, _ = SHAPES[name]
    assert len(load_pairs(write_jsonl(tmp_path / "pairs.jsonl", [row, row | change]))) == 1
    assert f"dropped 1 row: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "why?", "completion": "so", "label": True}, "single responses with a label"),
        ({"prompt": "why?", "answers": [{"answer": "so", "rank": 1}], "num_responses": 1}, "rankings"),
        ({"instruction": "why?", "completions": [{"response": "so"}]}, "ultrafeedback_binarized"),
        ({"prompt": "why?", "response": "so", "helpfulness": 4}, "two responses to the same prompt"),
        ({"question": "why?"}, "A pair has `prompt`, `chosen`, `rejected`"),
    ],
    ids=["KTO", "Nectar", "UltraFeedback", "HelpSteer", "none of them"],
)
def test_what_is_no_pair_is_refused_with_what_to_do(tmp_path, row, hint):
    path = write_jsonl(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(UserError, match="no column") as error:
        load_pairs(path)
    assert hint in str(error.value)
    _, findings = read_pairs(path, "train")
    assert [hint in finding.fix for finding in findings if finding.check == "data.columns"] == [True]


def test_own_names_of_columns(tmp_path, capsys):
    rows = [{"q": "why?", "response_j": "so", "response_k": "no", "system": "x", "chosen": "other"}]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    names = {"chosen": "response_j", "prompt": "q", "rejected": "response_k", "system": None}
    assert list(load_pairs(path, columns=names)) == [TEXT]
    with pytest.raises(UserError, match=r"data\.columns names 'absent', but the columns are 'q', 'response_j'"):
        load_pairs(path, columns={"chosen": "absent"})
    with pytest.raises(UserError, match=r"sets 'promt', which nothing reads; did you mean 'prompt'\?"):
        load_pairs(path, columns={"promt": "q"})
    pairs, findings = read_pairs(path, "train", options={"columns": names})
    assert (len(pairs.pairs), findings) == (1, [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "other", **WHOLE}, "row 0: 'prompt' is not in the conversations .* data.columns: {prompt: null}"),
        ({"system": "x", **WITH_SYSTEM}, "row 0: the prompt has a system message already"),
        ({"system": ["x"], **PAIR}, r"row 0: 'system' must be text, not \['x'\]"),
        ({"instruction": "why", "input": "", "output": ["so"]}, "row 0: 'output' must be a list of the chosen"),
        (
            {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 2},
            "row 0: 'labels' must be 0 or 1, not 2",
        ),
        ({"prompt": "why?", "completion": "so", "label": True}, "no column 'chosen', 'rejected'"),
    ],
)
def test_rows_that_no_shape_explains_are_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_pairs(write_jsonl(tmp_path / "pairs.jsonl", [row]))


def test_tool_calls_of_sharegpt(tmp_path):
    """As text they become an assistant's tool call, what is no call stays text, and unknown speakers are refused."""
    call = {"name": "add", "arguments": {"a": 2}}
    turns = [("human", "q"), ("function_call", json.dumps(call)), ("tool_response", "5")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns]} | {
        side: {"from": "gpt", "value": text} for side, text in (("chosen", "so"), ("rejected", "no"))
    }
    path = tmp_path / "pairs.jsonl"
    (pair,) = load_pairs(write_jsonl(path, [row]))
    called = pair["prompt"][1]
    assert [message["role"] for message in pair["prompt"]] == ["user", "assistant", "tool"]
    assert (called["content"], called["tool_calls"][0]["function"]) == ("", call)
    row["conversations"][1]["value"] = "adding"
    assert load_pairs(write_jsonl(path, [row]))[0]["prompt"][1] == assistant("adding")
    row["conversations"][1]["from"] = "narrator"
    with pytest.raises(UserError, match=r"row 0: 'prompt' must be text or a list of messages .*narrator"):
        load_pairs(write_jsonl(path, [row]))


def test_text_responses_that_go_on_with_a_turn_of_the_user_are_said(tmp_path, capsys):
    start = "\n\nHuman: q\n\nAssistant:"
    rows = [{"chosen": f"{start} so", "rejected": f"{start} no"}]
    load_pairs(write_jsonl(tmp_path / "whole.jsonl", rows))
    assert "goes on" not in capsys.readouterr().err
    rows.append({"chosen": f"{start} a\n\nHuman: b\n\nAssistant: c", "rejected": f"{start} x"})
    load_pairs(write_jsonl(tmp_path / "turns.jsonl", rows))
    assert "in 1 rows, the first is row 1, a response goes on with a user's turn" in capsys.readouterr().err


def test_csv_and_json_files_give_the_rows_of_jsonl(tmp_path):
    rows = [{**plain("p, q", 'c "x"\nd', "r"), "score_chosen": 1.5, "score_rejected": -1.0, "note": "n"}] * 2
    expected = load_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows))
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("array.json", "lines.json", "pairs.csv"):
        assert list(load_pairs(str(tmp_path / name))) == list(expected) == rows, name
        assert data_fingerprint(load_pairs(str(tmp_path / name))) == data_fingerprint(expected)


def test_conversations_in_csv_are_json(tmp_path):
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([list(PAIR), [json.dumps(value) for value in PAIR.values()]])
    assert list(load_pairs(str(tmp_path / "pairs.csv"))) == [PAIR]
    (tmp_path / "pairs.csv").write_text('prompt,chosen,rejected\nas JSON,"{""a"": 1}","[{""a"": 2}]"\n')
    assert list(load_pairs(str(tmp_path / "pairs.csv"))) == [plain("as JSON", '{"a": 1}', '[{"a": 2}]')]  # no messages
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n\"[{'role': 'user'}]\",a,b\n")
    with pytest.raises(UserError, match="row 0: 'prompt' holds messages as Python prints them; write them as JSON"):
        load_pairs(str(tmp_path / "pairs.csv"))
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\na,b\n")
    with pytest.raises(UserError, match="row 0: has more or fewer values than the header"):
        load_pairs(str(tmp_path / "pairs.csv"))
    (tmp_path / "pairs.json").write_text('[{"prompt": 1},\n{]')
    with pytest.raises(UserError, match=r"pairs.json, line 2: not valid JSON"):
        load_pairs(str(tmp_path / "pairs.json"))


def test_demonstrations_take_the_chosen_responses_of_any_shape(tmp_path):
    row = {"system": "be kind", "question": "why?", "chosen": "so", "rejected": "no"}
    assert list(load_messages(write_jsonl(tmp_path / "a.jsonl", [row]))) == [
        {"prompt": WITH_SYSTEM["prompt"], "completion": [assistant("so")]}
    ]
    row = {"system": "be kind", "messages": WHOLE["chosen"]}
    assert load_messages(write_jsonl(tmp_path / "b.jsonl", [row]))[0]["prompt"] == WITH_SYSTEM["prompt"]


def test_columns_that_are_not_read_are_named_once(tmp_path, capsys):
    row = {**PAIR, "note": 1, "weight": 2.0, "score_chosen": 1.0, "mine": "x", "mine_ended": True}
    path = write_jsonl(tmp_path / "pairs.jsonl", [row])
    line = f"{path}: columns that are not read: weight, note; `weight` would change what other trainers learn\n"
    for expected in (line, ""):
        load_pairs(path)
        assert capsys.readouterr().err == expected
