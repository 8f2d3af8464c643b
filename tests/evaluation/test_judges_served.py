"""Judges against a real OpenAI-compatible server: `transformers serve` on loopback, with a small model made here."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from prefdistill.cli import main

pytest.importorskip("openai", reason="judges are asked through the openai package (extra judges)")


@pytest.fixture(scope="module")
def files():
    root = Path(os.environ.get("PREFDISTILL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "mt_bench"
    if not root.is_dir():
        pytest.skip(f"no MT-Bench files at {root} (set PREFDISTILL_DATA to the directory that holds mt_bench)")
    return {
        "questions": root / "question.jsonl",
        "prompts": root / "judge_prompts.jsonl",
        "references": root / "reference_answer_gpt-4.jsonl",
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model, tokenizer):
    path = tmp_path_factory.mktemp("served") / "model"
    made = make_model(max_position_embeddings=16_384)
    made.generation_config.pad_token_id = tokenizer.pad_token_id
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("`transformers serve` needs the packages of transformers[serving]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("log") / "serve.log").open("w+")
    serve = "from transformers.cli.transformers import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", serve, "serve", str(model), "--host=127.0.0.1", f"--port={port}", "--device=cpu"],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    pytest.fail(f"transformers serve did not start:\n{log.read()[-2000:]}")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(10)
        log.close()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_turn_answers_are_judged_over_a_real_server(files, model, url, tmp_path, capsys):
    ours, theirs, out = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl", tmp_path / "judged"
    few = ["--max-questions=4"]
    make = ["judge", "answers", f"--model={model}", f"--questions={files['questions']}", "--max-new-tokens=8", *few]
    for path, seed in ((ours, 0), (theirs, 1)):
        assert main([*make, f"--out={path}", f"--seed={seed}", f"--name={path.stem}"]) == 0
    judge = [
        *("judge", "mt-bench", f"--answers={ours}", f"--against={theirs}", f"--url={url}", f"--judge-model={model}"),
        *(f"--{name}={path}" for name, path in files.items()),
        *(*few, f"--out={out}", "--concurrency=2", "max_tokens=4"),
    ]
    capsys.readouterr()
    assert main([*judge, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "results.json").read_text())
    rows = rows_of(out / "verdicts.jsonl")
    assert found["requests"]["errors"] == 0
    assert found["requests"]["verdicts"] == found["asked_now"] == len(rows)
    assert 24 <= len(rows) <= 32  # 8 turns: graded for both, and compared twice; the same answers are asked once
    assert found["requests"]["unparsable"] == len(rows)  # words of a random model
    assert found["single"]["answers"]["score"] is None
    assert "replies hold no verdict" in found["warnings"][0]
    assert found["judge"]["served_as"] == [f"{model}@main"]
    assert found["tokens"]["out"] == sum(row["tokens_out"] for row in rows)
    assert all(0 < row["tokens_out"] <= 4 < row["tokens_in"] for row in rows)
    assert found["answers"]["answers"]["models"] == ["ours"]
    assert found["answers"]["answers"]["made_from"]["seed"] == 0
    assert {row["prompt"] for row in rows} >= {"single-v1", "single-math-v1", "pair-v2-multi-turn"}
    assert main([*judge, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked_now"] == 0


def test_a_model_that_is_not_served_is_refused_in_one_line(files, model, url, tmp_path, capsys):
    answers = tmp_path / "a.jsonl"
    rows = [
        {"question_id": row["question_id"], "choices": [{"turns": ["a"] * len(row["turns"])}]}
        for row in rows_of(files["questions"])
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["judge", "mt-bench", f"--answers={answers}", f"--url={url}", "--judge-model=gpt-9"]
    arguments += [f"--{name}={path}" for name, path in files.items()]
    assert main([*arguments, "--max-questions=1", f"--out={tmp_path / 'out'}"]) == 1
    assert "requested 'gpt-9'" in capsys.readouterr().err


def test_answers_are_sampled_in_two_turns_at_the_temperature_of_the_category(model, tmp_path, capsys, monkeypatch):
    from prefdistill.evaluation.judges import answers as module

    questions = [
        {"question_id": 1, "category": "math", "turns": ["the small teacher", "reads"]},
        {"question_id": 2, "category": "writing", "turns": ["a long prompt"]},
        {"question_id": 3, "category": "stem", "turns": ["it says", "what"], "required_temperature": 0},
        {"question_id": 4, "category": "chess", "turns": ["every student", "copies"]},
    ]
    path, out = tmp_path / "q.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions))
    asked, real = [], module.sample_responses

    def seen(model, dataset, *rest, temperature, **options):
        asked.append((temperature, dataset["prompt"][:]))
        if len(asked) == stop:
            raise KeyboardInterrupt
        return real(model, dataset, *rest, temperature=temperature, **options)

    monkeypatch.setattr(module, "sample_responses", seen)
    command = ["judge", "answers", f"--model={model}", f"--questions={path}", f"--out={out}", "--max-new-tokens=6"]
    stop = 3  # the first turn is done
    assert main(command) == 130
    assert not out.exists()
    stop = None
    assert main([*command, "--seed=1"]) == 2
    told = f"{out} holds work of another request (seed is 1, was 0); delete it or give another --out"
    assert told in capsys.readouterr().err
    asked.clear()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == 7
    rows = rows_of(out)
    said = {row["question_id"]: row["choices"][0]["turns"] for row in rows}
    assert {name: len(turns) for name, turns in said.items()} == {1: 2, 2: 1, 3: 2, 4: 2}
    assert [temperature for temperature, _ in asked] == [0, 0.7, 0, 0.7]
    assert asked[2][1][0] == [
        {"role": "user", "content": "the small teacher"},
        {"role": "assistant", "content": said[1][0]},
        {"role": "user", "content": "reads"},
    ]
    assert {row["model_id"] for row in rows} == {"model"}
    before = out.read_bytes()
    assert main(command) == 0
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.meta.json", "q.jsonl"]
    assert main([*command, "--seed=1"]) == 2
    assert "seed is" in capsys.readouterr().err
    assert main([*command, "--batch-size=1"]) == 2  # other draws
    assert "batch_size is 1, was 16" in capsys.readouterr().err
    out.write_text("mine")
    assert main(command) == 2
    assert "is not as `prefdistill judge answers` wrote it" in capsys.readouterr().err


def test_the_answer_file_appears_after_its_seal(model, tmp_path, monkeypatch):
    """Killed between the two files, the same command resumes."""
    from prefdistill.core import file_artifact as module

    path, out = tmp_path / "q.jsonl", tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["the small teacher"]}) + "\n")
    command = ["judge", "answers", f"--model={model}", f"--questions={path}", f"--out={out}", "--max-new-tokens=4"]
    real = module.write_json

    def killed(file, value):
        if file == module.sidecar(out):
            raise KeyboardInterrupt
        real(file, value)

    monkeypatch.setattr(module, "write_json", killed)
    assert main(command) == 130
    assert not out.exists()
    monkeypatch.setattr(module, "write_json", real)
    assert main(command) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.meta.json", "q.jsonl"]
