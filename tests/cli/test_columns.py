"""`--columns` and `--chat-template-kwargs`, wherever data are given by name."""

import json

import pytest
from transformers import AutoTokenizer

from prefdistill.cli import main
from prefdistill.data.load import load_prompts
from prefdistill.data.prompts import inputs_of, prompts_of
from support.cli import FAST, MODEL, call
from support.pairs import write_jsonl

TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'deep' if think }}{% endif %}"
)
NAMES = {"prompt": "question", "chosen": "good", "rejected": "bad", "tools": "functions"}
COLUMNS = ["--columns", "prompt=question,chosen=good", "--columns", "rejected=bad,tools=functions"]
STEP = [*FAST[1:], "max_steps=1"]


@pytest.fixture
def renamed(place):
    """The model gets a chat template; `usual.jsonl` and `renamed.jsonl` hold the same rows."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("model")
    rows = []
    for number in range(4):
        turns = [[{"role": role, "content": text}] for role, text in (("user", f"{number}?"), ("assistant", "yes"))]
        rejected = [{"role": "assistant", "content": "no" * (number + 1)}]
        rows.append(dict(zip(NAMES, [*turns, rejected, [{"name": f"f{number}"}]], strict=True)))
    write_jsonl(place / "usual.jsonl", rows)
    write_jsonl(place / "renamed.jsonl", [{NAMES[name]: value for name, value in row.items()} for row in rows])
    return place


def test_signals_of_renamed_columns_are_those_of_the_usual_ones(renamed, capfd):
    store = ["signals", *MODEL, "--data", "renamed.jsonl", *COLUMNS, "--kind", "values,logps"]
    call(capfd, *store, "--role", "reference", "--out", "signals")
    whole = (renamed / "signals" / "shards" / "00000.parquet").read_bytes()
    (renamed / "signals" / "shards" / "00000.parquet").unlink()
    call(capfd, "signals", "--repair", "--out", "signals")  # the store knows how it read the data
    assert (renamed / "signals" / "shards" / "00000.parquet").read_bytes() == whole
    distill = ["distill", "--student", "model", "--method", "dpo", "--signals", "signals", *STEP]
    call(capfd, *distill, "--data", "usual.jsonl", "--out", "student")
    assert call(capfd, *distill, "--data", "renamed.jsonl", *COLUMNS, "--out", "student")[0]["reused"] is True
    for other in (["--columns", "tools=null"], ["--chat-template-kwargs", "think=true"]):
        assert main([*distill, "--data", "usual.jsonl", *other, "--out", "other"]) == 2
        assert "made from other data" in capfd.readouterr().err
    call(capfd, "inspect", "--data", "renamed.jsonl", *COLUMNS, "--signals", "signals", "--out", "page.html")
    evaluate = ["evaluate", *MODEL, "--reference", "signals", "--out", "e.json"]
    assert call(capfd, *evaluate, "--data", "renamed.jsonl", *COLUMNS)[0]["pairs"] == 4


def test_samples_keep_what_the_template_reads(renamed, capfd):
    sample = ["sample", *MODEL, "--max-new-tokens", "2", "--chat-template-kwargs", "think=true"]
    call(capfd, *sample, "--data", "renamed.jsonl", *COLUMNS, "--out", "own.jsonl")
    inputs = [inputs_of(prompt) for prompt in prompts_of(load_prompts("own.jsonl"))]
    assert inputs == [{"tools": [{"name": f"f{number}"}], "think": True} for number in range(4)]
    for name, rows in (("usual", []), ("renamed", COLUMNS)):  # the same prompts give the same responses
        call(capfd, *sample, "--data", f"{name}.jsonl", *rows, "--out", f"{name}-own.jsonl")
    first, second = ((renamed / f"{name}-own.jsonl").read_text().splitlines() for name in ("usual", "renamed"))
    assert [json.loads(line)["completion"] for line in first] == [json.loads(line)["completion"] for line in second]


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_stages_through_trl_read_them(renamed, capfd, verb):
    stage = [verb, *MODEL, "--out", "stage", *STEP]
    call(capfd, *stage, "--data", "renamed.jsonl", *COLUMNS)
    assert call(capfd, *stage, "--data", "usual.jsonl")[0]["reused"] is True
    assert main([*stage, "--data", "usual.jsonl", "--columns", "tools=null"]) == 2
    assert "data differs" in capfd.readouterr().err


def test_doctor_reads_them_and_mistakes_are_named(renamed, capfd):
    findings = call(capfd, "doctor", "--data", "renamed.jsonl", *COLUMNS, "--student", "model")[0]["findings"]
    assert "data.columns" not in {finding["check"] for finding in findings}
    assert main(["doctor", "--data", "renamed.jsonl", "--columns", "prompt"]) == 2
    assert "--columns prompt: write KEY=VALUE" in capfd.readouterr().err
    assert main(["evaluate", "--generations", "own.jsonl", "--columns", "prompt=q", "--out", "e.json"]) == 2
    assert "--columns needs --data" in capfd.readouterr().err
