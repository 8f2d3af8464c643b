"""Verbs end to end, on a tiny model."""

import json
from pathlib import Path

import datasets
import pytest

from prefdistill.cli import main
from support.cli import FAST, MODEL, OUT, PAIRS, call, run
from support.pairs import write_jsonl


def test_the_small_profile_has_its_own_run_directory(place, monkeypatch):
    outs = []
    with (place / "recipe.yaml").open("a") as recipe:
        recipe.write("fast: {training.max_steps: 1}\n")
    monkeypatch.setattr(
        "prefdistill.experiment.run.run_recipe", lambda recipe, out, **_: outs.append(out) or {"warnings": []}
    )
    monkeypatch.setattr("prefdistill.report.verdict", lambda results: "")
    monkeypatch.setattr("prefdistill.report.method_table", lambda results: "")
    for arguments in ([], ["--fast"], ["--fast", "--out", "here"]):
        assert main(["run", "recipe.yaml", *arguments]) == 0
    assert outs == [Path("runs/x"), Path("runs/x-fast"), Path("here")]


def test_from_pairs_to_an_evaluated_student(place, capfd, make_model, tokenizer):
    import torch

    from prefdistill.models.load import load_model

    found, _ = call(capfd, "sft", *MODEL, *PAIRS, "--out", "sft", *FAST)
    assert (found["out"], found["reused"]) == ("sft", False)
    call(capfd, "dpo", "--model", "sft", *PAIRS, "--out", "teacher", *FAST, "beta=0.05")
    learnt = [load_model(name).lm_head.weight for name in ("model", "sft", "teacher")]
    assert not torch.equal(learnt[0], learnt[1])
    assert not torch.equal(learnt[1], learnt[2])

    found, _ = call(
        capfd, "signals", "--model", "teacher", *PAIRS, "--kind", "values,logps,q", "--out", "signals-teacher"
    )
    assert (found["pairs"], found["rows"], sorted(found["kinds"])) == (24, 24, ["logps", "q", "values"])
    assert 0 <= found["gauge_flips"]["mean"] <= 1
    assert found["bytes"] == sum(path.stat().st_size for path in (place / "signals-teacher" / "shards").iterdir())
    reference = ["--model", "model", *PAIRS, "--role", "reference", "--kind", "logps", "--out", "signals-start"]
    call(capfd, "signals", *reference)

    distill = ["distill", "--student", "model", *PAIRS, "--signals", "signals-teacher", "--signals", "signals-start"]
    distill += ["--method", "tvkd", "--out", "student", "alpha=0.5", "beta=0.2", *FAST]
    found, err = call(capfd, *distill)
    assert found["reused"] is False
    assert "warning" not in err  # the student is its reference
    metrics = [json.loads(line) for line in (place / "student" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2
    assert not (place / "student" / "checkpoints").exists()
    found, err = call(capfd, *distill)
    assert found["reused"] is True
    assert "distill tvkd: reused" in err
    assert main([*distill, "alpha=0.6"]) == 2
    assert "give another --out" in capfd.readouterr().err

    evaluate = [
        "evaluate",
        "--model",
        "student",
        *PAIRS,
        "--reference",
        "signals-start",
        "--teacher",
        "signals-teacher",
    ]
    found, _ = call(capfd, *evaluate, "--out", "e.json")
    assert found == json.loads((place / "e.json").read_text())
    assert found["metrics"]["reward_accuracy"]["n"] == 24
    assert {"shaping return", "teacher Q (raw logits)"} <= found["margin_accuracy"].keys()
    assert found["metrics"]["chosen_logp"]["mean"] < 0
    assert main([*evaluate, "--out", "e.json"]) == 0
    out = capfd.readouterr().out
    assert "reward_accuracy" in out
    assert "(24 prompts)" in out
    assert "accuracies of 24 pairs" in out


def test_from_pairs_to_an_adpa_student_with_its_own_samples(place, capfd):
    """Sample, read the teacher there, read its reference at the teacher's tokens, distill; each verb on its own."""
    own, of_own = ["--data", "own.jsonl"], ["--responses", "student_response", "--kind", "topk"]
    call(
        capfd, "sample", "--model", "model", *PAIRS, "--column", "student_response", "--out", "own.jsonl",
        "--max-new-tokens", "8",
    )  # fmt: skip
    exact = ["--k", "7", "--topk-coding", "float32"]
    call(capfd, "signals", "--model", "model", *own, *of_own, *exact, "--out", "teacher")
    lacking = ["distill", "--student", "model", *own, "--method", "adpa", "--signals", "teacher", "--out", "s", *FAST]
    assert main(lacking) == 2
    told = capfd.readouterr().err
    assert "ADPA lacks teacher_reference.topk of student_response" in told
    assert "--role teacher_reference --kind topk --responses student_response --ids-from" in told
    reference = ["--role", "teacher_reference", "--ids-from", "teacher", "--out", "reference"]
    found, _ = call(capfd, "signals", "--model", "model", *own, *of_own, *reference)
    assert found["kinds"] == ["topk"]
    found, _ = call(capfd, *lacking, "--signals", "reference", "gamma=0.5", "logging_steps=1")
    assert found["reused"] is False
    metrics = [json.loads(line) for line in (place / "s" / "metrics.jsonl").read_text().splitlines()]
    assert any(entry.get("advantage") == 0 for entry in metrics)  # the teacher is its own reference here
    # the reference was read at the ids of one teacher store and goes with no other
    call(capfd, "signals", "--model", "model", *own, *of_own, "--k", "5", "--out", "other")
    stores = ["--signals", "other", "--signals", "reference"]
    assert main(["distill", "--student", "model", *own, "--method", "adpa", *stores, "--out", "t", *FAST]) == 2
    assert "were not scored at the token ids of this teacher store" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["simpo", "wpo"])
def test_methods_that_need_no_signals(place, capfd, method):
    found, _ = call(capfd, "distill", "--student", "model", *PAIRS, "--method", method, "--out", "s", *FAST)
    assert found["reused"] is False
    assert (place / "s" / "model.safetensors").exists()


def test_weights_and_margins_are_read_where_a_method_names_them(place, capfd, pairs):
    """They are inputs then, no longer named as unread, and their numbers a part of the cache key."""
    rows = [row | {"weight": 1.0, "margin": 0.25 * (n % 3)} for n, row in enumerate(pairs)]
    write_jsonl(place / "weighted.jsonl", rows)
    distill = ["distill", "--student", "model", "--data", "weighted.jsonl", "--method", "simpo", *FAST]
    _, err = call(capfd, *distill, "--out", "plain")
    assert "weighted.jsonl: columns that are not read: weight, margin; `weight`, `margin` would change" in err
    _, err = call(capfd, *distill, "--out", "ones", "weight=weight")
    assert "columns that are not read: margin; `margin` would change" in err
    weights = [(place / name / "model.safetensors").read_bytes() for name in ("plain", "ones")]
    assert weights[0] == weights[1]  # every weight is 1
    both = [*distill, "--out", "both", "weight=weight", "margin=margin"]
    _, err = call(capfd, *both)
    assert "not read" not in err
    assert (place / "both" / "model.safetensors").read_bytes() != weights[0]
    assert call(capfd, *both)[0]["reused"] is True
    write_jsonl(place / "weighted.jsonl", [row | {"margin": 0.5} for row in rows])
    assert main(both) == 2
    assert "holds work of another request (columns differs (" in capfd.readouterr().err
    assert main([*both, "weight=lost"]) == 2
    assert "the data has no column 'lost'; give every pair a number there" in capfd.readouterr().err


def test_an_adapter_is_trained_and_evaluated(place, capfd):
    call(capfd, "signals", *MODEL, *PAIRS, "--role", "reference", "--kind", "logps", "--out", "start")
    distill = ["distill", "--student", "model", *PAIRS, "--signals", "start", "--method", "dpo", *FAST]
    call(capfd, *distill, "--out", "one", "lora={r: 4}", "learning_rate=1e-1")
    config = json.loads((place / "one" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(place / "model"))
    assert (place / "one" / "model.safetensors").exists()  # merged: it needs no other directory
    call(capfd, *distill, "--out", "two", "lora.r=4", "learning_rate=1e-1")  # a dotted key says the same
    assert json.loads((place / "two" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    found, _ = call(capfd, "evaluate", "--model", "one", *PAIRS, "--reference", "start", "--out", "e.json")
    assert found["metrics"]["reward_accuracy"]["mean"] != 0.5  # it has moved from its reference
    assert found["metrics"]["reward_accuracy"]["n"] == 24


@pytest.mark.parametrize(
    "verb", [["sft", *MODEL], ["dpo", *MODEL], ["distill", "--student", "model", "--method", "sft"]]
)
def test_a_stage_is_keyed_by_the_content_of_its_inputs(place, capfd, make_model, pairs, verb):
    """New data or new weights under an old name are other inputs, and what was made from the old ones is kept."""
    stage = [*verb, *PAIRS, *OUT, *FAST[1:], "max_steps=1"]
    assert call(capfd, *stage)[0]["reused"] is False
    assert call(capfd, *stage)[0]["reused"] is True
    assert call(capfd, *stage, "report_to=[]", "logging_steps=3")[0]["reused"] is True  # how it is watched is no input
    made = (place / OUT[1] / "model.safetensors").read_bytes()
    before = (place / "pairs.jsonl").read_bytes()
    write_jsonl(place / "pairs.jsonl", [row | {"chosen": row["rejected"]} for row in pairs])
    assert main(stage) == 2
    assert "holds work of another request (data differs (" in capfd.readouterr().err
    (place / "pairs.jsonl").write_bytes(before)
    assert main([*stage, "learning_rate=0.125"]) == 2
    told = capfd.readouterr().err
    assert "holds work of another request (training.learning_rate is 0.125, was " in told
    assert call(capfd, *stage)[0]["reused"] is True
    make_model(7).save_pretrained(place / "model")
    assert main(stage) == 2
    assert (place / OUT[1] / "model.safetensors").read_bytes() == made


def test_a_model_that_changes_during_training_leaves_no_result(place, capfd, monkeypatch):
    states = iter(["as it was", "as it was", "another"])
    monkeypatch.setattr("prefdistill.experiment.inputs.model_key", lambda name: next(states))
    assert main(["sft", *MODEL, *PAIRS, *OUT, *FAST[1:], "max_steps=1"]) == 2
    assert "model was changed during the run" in capfd.readouterr().err
    assert not (place / OUT[1]).exists()


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_rows_that_the_chat_template_refuses_are_dropped_and_counted(place, capfd, pairs, verb):
    template = place / "model" / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    system = {"role": "system", "content": "be brief"}
    mixed = [row | {"prompt": [system, *row["prompt"]]} if i in (3, 7) else row for i, row in enumerate(pairs)]
    write_jsonl(place / "mixed.jsonl", mixed)
    write_jsonl(place / "taken.jsonl", [row for i, row in enumerate(pairs) if i not in (3, 7)])
    few = (*FAST[1:], "max_steps=1")
    _, err = call(capfd, verb, *MODEL, "--data", "mixed.jsonl", "--out", "mixed", *few)
    assert f"{verb}: dropped 2 rows: the chat template refuses its messages (2, first row 3)" in err
    call(capfd, verb, *MODEL, "--data", "taken.jsonl", "--out", "taken", *few)
    assert (place / "mixed" / "model.safetensors").read_bytes() == (place / "taken" / "model.safetensors").read_bytes()
    write_jsonl(place / "refused.jsonl", mixed[3:4])
    assert main([verb, *MODEL, "--data", "refused.jsonl", "--out", "none", *few]) == 2
    assert "No row is left: dropped 1 row: the chat template refuses its messages" in capfd.readouterr().err


def test_a_model_is_never_overwritten_by_its_own_training(place, capfd):
    call(capfd, "sft", *MODEL, *PAIRS, "--out", "first", *FAST[1:], "max_steps=1")
    made = (place / "first" / "model.safetensors").read_bytes()
    assert main(["dpo", "--model", "first", *PAIRS, "--out", "first", *FAST[1:], "max_steps=1"]) == 2
    assert (place / "first" / "model.safetensors").read_bytes() == made


def test_a_finished_store_is_reused(place, capfd, monkeypatch):
    signals = ["signals", *MODEL, *PAIRS, "--out", "out"]
    first, _ = call(capfd, *signals)
    monkeypatch.setattr("prefdistill.signals.request.score_pairs", lambda *_, **__: 1 / 0)
    assert call(capfd, *signals)[0] == first
    assert main([*signals, "--max-length", "20"]) == 2
    assert "holds work of another request (truncation.max_length is" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["own.jsonl", "own.parquet"])
def test_sampled_responses_are_a_data_file(place, capfd, name):
    sample = [
        "sample",
        *MODEL,
        *PAIRS,
        "--out",
        name,
        "--column",
        "completion",
        "--n",
        "2",
        "--max-new-tokens",
        "8",
        "--top-p",
        "0.95",
    ]
    found, err = call(capfd, *sample, "--max-length", "60", "--seed", "3")
    rows = datasets.load_dataset(name.rpartition(".")[2].replace("jsonl", "json"), data_files=name, split="train")
    assert (found["out"], found["responses"], found["reused"]) == (name, 48, False)
    assert found["ended_share"] == pytest.approx(sum(rows["completion_ended"]) / 48, abs=1e-6)
    assert 48 <= found["tokens"] <= 48 * 8
    assert f"{found['tokens']:,} tokens, {found['tokens_per_second']:,} tokens/s" in err
    assert rows["prompt"][::2] == rows["prompt"][1::2]
    assert rows["completion"][::2] != rows["completion"][1::2]
    again, err = call(capfd, *sample, "--max-length", "60", "--seed", "3")
    assert again == found | {"reused": True}
    assert "sample: reused" in err
    assert main([*sample, "--max-length", "60", "--seed", "4"]) == 2
    assert (
        f"{name} holds work of another request (seed is 4, was 3); delete it or give another --out"
        in capfd.readouterr().err
    )
    call(capfd, "sft", *MODEL, "--data", name, "--out", "sft", *FAST)
    assert main(["sample", *MODEL, *PAIRS, "--out", "other.jsonl", "--max-new-tokens", "2"]) == 0
    assert "24 responses" in capfd.readouterr().out


@pytest.fixture
def finished(place):
    """The results of a run."""
    (place / "run").mkdir()
    results = {"methods": {"dpo": {"reward": {"mean": 1.0, "se": 0.1, "n": 3}}}}
    (place / "run" / "results.json").write_text(json.dumps(results))


def test_a_report_of_a_run(place, capfd, finished):
    found, _ = call(capfd, "report", "run", "--out", "page.html")
    assert found == {"out": "page.html", "runs": ["run"]}
    assert "<html" in (place / "page.html").read_text()
    call(capfd, "report", "run", "--out", "page.md")
    assert "<html" not in (place / "page.md").read_text()


def test_json_alone_is_on_stdout_in_a_real_process(finished):
    done = run("report", "run", "--out", "page.md", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"out": "page.md", "runs": ["run"]})
