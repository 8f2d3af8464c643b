"""A teacher of another chat template is read with the student's tokenizer, stage by stage."""

import copy
import json
import shutil

import pytest

from prefdistill import METHODS
from prefdistill.cli import main
from prefdistill.core.file_artifact import sidecar
from prefdistill.core.files import read_json
from prefdistill.data.load import load_pairs
from prefdistill.signals import Signals
from prefdistill.training.rows import prepare_rows
from support.pairs import write_jsonl


@pytest.fixture
def models(in_tmp_path, make_model, tokenizer, pairs):
    """A teacher and a student that share their vocabulary and not their template; `other` shares neither."""
    from prefdistill.models.scratch import train_tokenizer

    instruct = copy.deepcopy(tokenizer)
    instruct.chat_template = "[I] " + tokenizer.chat_template
    for seed, (name, its) in enumerate({"student": tokenizer, "teacher": instruct}.items()):
        make_model(seed).save_pretrained(name)
        its.save_pretrained(name)
    train_tokenizer(["quite another text, of other words"], 300).save_pretrained("other")
    write_jsonl(in_tmp_path / "pairs.jsonl", pairs.select(range(6)))
    return in_tmp_path


def test_signals_of_a_teacher_in_the_template_of_the_student(models, tokenizer, capsys):
    def signals(model, *flags, out, status=0):
        command = ["signals", "--model", model, "--data", "pairs.jsonl", "--kind", "logps", "--out", out, *flags]
        assert main(command) == status
        return capsys.readouterr().err

    signals("student", "--role", "reference", out="ref")
    signals("teacher", out="own")
    signals("teacher", "--tokenizer", "student", out="t")
    pairs = load_pairs("pairs.jsonl")

    def distill(teacher):
        stores = ["--signals", teacher, "--signals", "ref"]
        return main(
            ["distill", "--student", "student", "--data", "pairs.jsonl", *stores, "--method", "dadpo", "--out", "m"]
        )

    assert distill("own") == 0  # the values of the teacher's own reading, at the same places in the text
    about = "are of other tokens than the student's (teacher), which share 100% of the student's states"
    assert about in capsys.readouterr().err
    stored = [Signals.open(name).manifest["tokenizer"] for name in ("t", "ref", "own")]
    assert stored[0] == stored[1] != stored[2]
    rows, *_ = prepare_rows(pairs, METHODS["dpo"](), [Signals.open("ref")], tokenizer, None)
    assert len(rows) == 6
    # the tokenizer is part of the request: another one is refused, the same reuses the store
    assert "tokenizer.template_sha256 differs" in signals("teacher", out="t", status=2)
    assert "signals: reused" in signals("teacher", "--tokenizer", "student", out="t")
    assert "different tokenizers" in signals("teacher", "--tokenizer", "other", out="o", status=2)
    assert not (models / "o").exists()
    # a repair reads with the store's tokenizer, or with that of another place
    before = Signals.open("t").digest
    for flags in ([], ["--tokenizer", "moved"]):
        (models / "t" / "shards" / "00000.parquet").unlink()
        if flags:
            shutil.move("student", "moved")
            assert main(["signals", "--repair", "--out", "t"]) == 2
            assert "student" in capsys.readouterr().err
        assert main(["signals", "--repair", "--out", "t", *flags]) == 0
        assert Signals.open("t").digest == before


def test_samples_of_a_teacher_in_the_template_of_the_student(models, capsys):
    command = ["sample", "--model", "teacher", "--data", "pairs.jsonl", "--out", "own.jsonl", "--max-new-tokens", "4"]
    assert main([*command, "--tokenizer", "student"]) == 0
    assert main(command) == 2
    assert "tokenizer.template_sha256 differs" in capsys.readouterr().err
    assert main([*command[:-2], "--out", "other.jsonl", "--tokenizer", "other"]) == 2
    assert "different tokenizers" in capsys.readouterr().err


def test_a_teacher_without_a_template_in_a_form_of_its_own(models, capsys):
    def signals(*flags, out="t"):
        status = main(["signals", "--data", "pairs.jsonl", "--kind", "logps", "--out", out, *flags])
        return status, capsys.readouterr().err

    (models / "teacher" / "chat_template.jinja").unlink()
    status, error = signals("--model", "teacher")
    assert status == 2
    assert "--chat-template plain" in error
    assert not (models / "t").exists()

    form = ["--chat-template", "plain", "--system-prompt", "Be kind."]
    assert signals("--model", "teacher", *form)[0] == 0
    stored = Signals.open("t").manifest["tokenizer"]
    assert stored["form"] == {"chat_template": "plain", "system_prompt": "Be kind."}
    assert "tokenizer.template_sha256 differs" in signals("--model", "teacher", *form[:2])[1]
    before = Signals.open("t").digest
    view = ["inspect", "--data", "pairs.jsonl", "--signals", "t", "--out", "t.html", "--json"]
    capsys.readouterr()
    assert main(view) == 0  # in the form of the store
    assert json.loads(capsys.readouterr().out)["pairs"] == 6
    assert "read as plain text; system prompt" in (models / "t.html").read_text()
    shutil.move("teacher", "moved")
    for flags in (["--model", "moved"], ["--model", "moved", "--tokenizer", "moved"]):
        (models / "t" / "shards" / "00000.parquet").unlink()
        assert main(["signals", "--repair", "--out", "t", *flags]) == 0  # in the form of the store
        assert Signals.open("t").digest == before

    command = ["sample", "--model", "moved", "--data", "pairs.jsonl", "--out", "own.jsonl", "--max-new-tokens", "4"]
    assert main([*command, *form]) == 0
    assert main([*command, *form, "--template-kwargs", "messages=1"]) == 2
    assert "'messages' is no variable of a chat template" in capsys.readouterr().err

    command = ["evaluate", "--model", "moved", "--data", "pairs.jsonl", "--generate", "--max-new-tokens", "4"]
    assert main([*command, "--out", "e.json"]) == 2
    assert main([*command, "--out", "e.json", *form]) == 0
    sampled = [read_json(sidecar(models / name))["request"] for name in ("own.jsonl", "e.generations.jsonl")]
    assert sampled[0]["tokenizer"] == sampled[1]["tokenizer"]
    capsys.readouterr()
    assert main(["evaluate", "--generations", "own.jsonl", "--out", "g.json", *form]) == 2
    assert "--chat-template needs a model that reads texts" in capsys.readouterr().err
