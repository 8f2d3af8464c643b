"""Recipes whose steps run on several processes."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import load_file

from prefdistill.core.errors import UserError
from prefdistill.core.files import write_jsonl
from prefdistill.experiment.check import check_launch
from prefdistill.experiment.launch.start import ProcessLost
from prefdistill.experiment.recipe import Recipe, load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.experiment.show_plan import as_text, plan_recipe
from prefdistill.models.load import load_model
from support import ray_stand_in

SUPPORT = Path(__file__).parents[1]
CONFIGS = SUPPORT.parent / "configs"
KINDS = ("sft", "dpo", "distill", "signals")
LAUNCH = f"launch={{{', '.join(f'{kind}: {{processes: 2}}' for kind in KINDS)}}}"


@pytest.fixture
def place(in_tmp_path, make_model, tokenizer, pairs, monkeypatch):
    """The working directory with two models, pairs and a recipe that has every kind of stage."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *map(str, sys.path)]))
    write_jsonl(in_tmp_path / "pairs.jsonl", list(pairs))
    for seed, name in enumerate(("teacher", "student")):
        make_model(seed, num_hidden_layers=1).save_pretrained(name)
        tokenizer.save_pretrained(name)
    recipe = {
        "name": "launched",
        "data": {"train": "pairs.jsonl", "max_length": 64},
        "model": {"teacher": "teacher", "student": "student"},
        "teacher": {"dpo": {"max_steps": 2}},
        "student": {"sft": {"max_steps": 2}},
        "training": {
            "max_steps": 3, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "schedule": "constant",
            "logging_steps": 1,
        },
        "methods": {"dpo": {}, "tvkd": {}},
    }  # fmt: skip
    Path("recipe.yaml").write_text(json.dumps(recipe))
    return in_tmp_path


def test_a_plan_names_the_launcher_which_is_in_no_key(place):
    alone, launched = (plan_recipe(load_recipe("recipe.yaml", more), place / "run") for more in ([], [LAUNCH]))
    assert [step["key"] for step in alone["steps"]] == [step["key"] for step in launched["steps"]]
    assert {step["kind"] for step in launched["steps"] if step["launch"] == "2 processes"} == set(KINDS)
    assert not any(step["launch"] for step in alone["steps"])
    lines = as_text(launched).splitlines()
    assert [line for line in lines if line.startswith("launch: ")] == [
        f"launch: {kind} on 2 processes" for kind in ("dpo", "sft", "signals", "distill")
    ]


def test_the_recipe_that_processes_get_is_the_same(place):
    recipe = load_recipe("recipe.yaml", [LAUNCH])
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json"))), strict=False) == recipe


def test_what_starts_the_teachers_dpo_says_nothing_about_the_method_dpo(place):
    check_launch(load_recipe("recipe.yaml", ["launch.dpo={processes: 2}", "methods.dpo.training.batch_size=4"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["launch.distill={processes: 3}"],
            "methods.dpo.training: batch_size=8 is not a multiple of micro_batch_size x",
        ),
        (["launch.sft=none.yaml"], "no configuration of accelerate at none.yaml"),
        (["launch.dpo=bf16.yaml"], "sets mixed_precision bf16, and teacher.dpo trains with bf16=false"),
        (["launch.signals={processes: 2}", "signals.engine=ray"], "signals.engine=ray and launch.signals each start"),
        (["launch.evaluate={processes: 2}"], "unknown key 'launch.evaluate'; known there: sft, dpo, distill, signals"),
    ],
)
def test_a_launcher_is_refused_before_anything_runs(place, changes, message):
    Path("bf16.yaml").write_text("{distributed_type: MULTI_GPU, num_processes: 2, mixed_precision: bf16}")
    with pytest.raises(UserError, match=message):
        run_recipe(load_recipe("recipe.yaml", changes), place / "run")
    assert not (place / "run").exists()


def test_the_workers_of_a_run_write_the_signals_of_a_run_without_them(place, monkeypatch):
    results = {}
    for name, more in (("alone", []), ("workers", ["signals.engine=ray", "signals.workers=2"])):
        if more:
            resources = ray_stand_in.install(monkeypatch)
        results[name] = run_recipe(
            load_recipe("recipe.yaml", [*more, "baseline=tvkd", "methods={tvkd: {}}"]), place / name
        )
    assert resources == [{"num_cpus": 1}] * 2  # one for the shard of the teacher, one for that of the reference
    alone, workers = (sorted((place / name).glob("seed-0/*/store/shards/*.parquet")) for name in results)
    assert len(alone) == 2
    assert [path.read_bytes() for path in alone] == [path.read_bytes() for path in workers]
    again = run_recipe(load_recipe("recipe.yaml", ["baseline=tvkd", "methods={tvkd: {}}"]), place / "workers")
    assert all(stage["reused"] for stage in again["stages"])


@pytest.mark.slow
def test_a_run_on_two_processes_has_the_results_of_one(place):
    results = {}
    for name, more in (("one", []), ("two", [LAUNCH])):
        results[name] = run_recipe(load_recipe("recipe.yaml", more), place / name)
    one, two = place / "one" / "seed-0", place / "two" / "seed-0"
    trained = [path.parent.name for path in sorted(one.glob("*/metrics.jsonl"))]
    assert trained == ["distill-dpo-0", "distill-tvkd-0", "student-sft", "teacher-dpo"]
    for name in trained:
        for line, other in zip(*(read_lines(root / name / "metrics.jsonl") for root in (one, two)), strict=True):
            assert line.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), abs=2e-5), name
        weights, others = (load_file(root / name / "model.safetensors") for root in (one, two))
        for key, weight in weights.items():
            np.testing.assert_allclose(weight, others[key], atol=1e-4, err_msg=f"{name} {key}")
    assert [stage["name"] for stage in results["one"]["stages"]] == [
        stage["name"] for stage in results["two"]["stages"]
    ]
    assert all(stage["peak_memory"] for stage in results["two"]["stages"])
    again = run_recipe(load_recipe("recipe.yaml"), place / "two")  # in one process: it has nothing to do
    assert all(stage["reused"] for stage in again["stages"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "said"), [("fsdp2", "the weights are sharded by FSDP2"), ("zero2", ""), ("zero3", "")]
)
def test_a_run_shards_the_trainings_whose_launcher_is_a_file(engine, said, place, monkeypatch, capfd):
    """The file of configs/, with two processes instead of eight."""
    if engine != "fsdp2":
        pytest.importorskip("deepspeed", reason='DeepSpeed is not installed: pip install "prefdistill[deepspeed]"')
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = YAML(typ="safe").load(CONFIGS / f"{engine}.yaml") | {"num_processes": 2}
    if "deepspeed_config" in config:
        config["deepspeed_config"]["deepspeed_config_file"] = str(CONFIGS / f"{engine}.json")
    Path("engine.yaml").write_text(json.dumps(config))
    changes = ["teacher.dpo=null", "student.sft=null", "model.teacher_reference=null", "methods={dpo: {}}"]
    for name, more in (("one", []), ("sharded", ["launch.distill=engine.yaml"])):
        run_recipe(load_recipe("recipe.yaml", [*changes, *more]), place / name)
    assert said in capfd.readouterr().err
    one, sharded = (place / name / "seed-0" / "distill-dpo-0" for name in ("one", "sharded"))
    for line, other in zip(*(read_lines(root / "metrics.jsonl") for root in (one, sharded)), strict=True):
        assert line.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), abs=2e-5)
    weights, others = (load_file(root / "model.safetensors") for root in (one, sharded))
    for key, weight in weights.items():
        np.testing.assert_allclose(weight, others[key], atol=1e-4, err_msg=key)
    assert load_model(str(sharded))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_step_resumes_after_its_processes_have_failed(place, capfd):
    change = "methods={sft: {method: 'support.fragile:Fragile', training: {save_steps: 1, max_steps: 4}}}"
    changes = [change, "baseline=sft", "teacher.dpo=null", "student.sft=null", "launch.distill={processes: 2}"]
    recipe = load_recipe("recipe.yaml", changes)
    step, message = place / "run" / "seed-0" / "distill-sft-0", "the third batch is empty; remove it"
    run_recipe(recipe, place / "straight")
    Path("fail").write_text("refuse")
    with pytest.raises(UserError) as error:
        run_recipe(recipe, place / "run")
    assert str(error.value) == message
    assert "support/fragile.py" in error.value.__notes__[0]
    Path("fail").write_text("kill")
    with pytest.raises(ProcessLost, match="process 1 of 2 processes was killed by SIGKILL"):
        run_recipe(recipe, place / "run")
    assert "distill-sft-0: resuming from step 2" in capfd.readouterr().err
    assert list(step.glob("checkpoints/checkpoint-*"))
    assert not (step / "stage.json").exists()
    Path("fail").unlink()
    run_recipe(recipe, place / "run")
    assert capfd.readouterr().err.count("distill-sft-0: resuming from step 3") == 1
    straight = place / "straight" / "seed-0" / "distill-sft-0"
    assert (step / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert load_model(str(step))
