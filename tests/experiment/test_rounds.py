"""Samples, signals, starts and rounds of training."""

import json
import re
import shutil

import pytest

from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import sidecar
from prefdistill.data.load import load_pairs
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.methods import METHODS
from prefdistill.models.identity import model_key
from prefdistill.sampling.files import OtherPrompts
from prefdistill.signals import Signals
from support.tiny_runs import QUICKSTART, SMALL, TINY, rebuilt, stages, stop


def requests(out, stage):
    return json.loads((out / "seed-0" / stage / "stage-request.json").read_text())["request"]


def keys(out, stage):
    return json.loads((out / "seed-0" / stage / "stage.json").read_text())["key"]


@pytest.mark.slow
def test_all_methods_on_the_quickstart(tmp_path):
    out = tmp_path / "run"
    recipe = load_recipe(QUICKSTART, SMALL, only=["all"])
    results = run_recipe(recipe, out)
    used = {run.method for run in recipe.methods.values()}
    assert used == set(METHODS)
    for name in recipe.methods:
        assert results["methods"][name]["reward"]["n"] > 1, name
        assert (name == "dpo") or name in results["differences"]
    # ADPA+ starts from the DCKD student, and so do the samples whose states it learns from
    dckd = str(out / "seed-0" / "distill-dckd-0")
    inputs = requests(out, "distill-adpa-plus-0")["inputs"]
    assert inputs["distill-dckd-0"] == keys(out, "distill-dckd-0")
    assert "student-sft" not in inputs
    sampled = requests(out, "sample-dckd-0")
    assert sampled["inputs"]["distill-dckd-0"] == keys(out, "distill-dckd-0")
    seal = json.loads((out / "seed-0" / "sample-dckd-0" / "responses.jsonl.meta.json").read_text())
    assert seal["request"]["model"]["key"] == model_key(dckd)
    # the teacher's reference is read where the teacher was, at its tokens
    teacher, reference = (
        Signals.open(out / "seed-0" / f"signals-{role}-student_response-dckd-0" / "store")
        for role in ("teacher", "teacher_reference")
    )
    assert reference.manifest["topk"]["ids_from"] == teacher.digest
    # nothing else is read: no distributions of the pairs from the teacher's reference, no values of samples
    assert teacher.kinds == ("topk",)
    assert not (out / "seed-0" / "signals-teacher_reference-train").exists()
    # a stage that several methods share runs once
    names = [stage["name"] for stage in results["stages"]]
    assert len(names) == len(set(names))
    again = run_recipe(recipe, out)
    assert all(stages(again).values())


def test_each_round_starts_from_the_student_of_the_last(tmp_path):
    out = tmp_path / "run"
    recipe = load_recipe(QUICKSTART, [*SMALL, "methods.adpa.rounds=3"], only=["adpa"])
    results = run_recipe(recipe, out)
    first, second, third = ("distill-adpa-0-round-1", "distill-adpa-0-round-2", "distill-adpa-0")
    assert requests(out, first)["inputs"]["student-sft"] == keys(out, "student-sft")
    assert requests(out, second)["inputs"][first] == keys(out, first)
    assert requests(out, third)["inputs"][second] == keys(out, second)
    responses = [
        (out / "seed-0" / name / "responses.jsonl").read_text()
        for name in ("sample-start", "sample-adpa-0-round-1", "sample-adpa-0-round-2")
    ]
    assert len(set(responses)) == 3
    weights = {(out / "seed-0" / name / "model.safetensors").read_bytes() for name in (first, second, third)}
    assert len(weights) == 3
    assert results["methods"]["adpa"]["reward"]["n"] == 24
    # fewer rounds: the last student is another one, and is rebuilt
    fewer = run_recipe(load_recipe(QUICKSTART, [*SMALL, "methods.adpa.rounds=2"], only=["adpa"]), out)
    assert rebuilt(fewer) == {"distill-adpa-0", "evaluate-adpa-0"}


def test_several_samples_of_each_prompt(tmp_path, capsys, monkeypatch):
    out, recipe = tmp_path / "run", load_recipe(QUICKSTART, [*SMALL, "sampling.n=2"], only=["dpkd", "adpa"])
    run_recipe(recipe, out)
    root = out / "seed-0"
    pairs = load_pairs(str(root / "pairs" / "train.jsonl"))
    teacher = load_pairs(str(root / "sample-teacher" / "responses.jsonl"), responses=("teacher_response",))
    student = load_pairs(str(root / "sample-start" / "responses.jsonl"), responses=("student_response",))
    prompts = [row["prompt"] for row in pairs][: len(teacher) // 2]
    assert teacher["prompt"][::2] == teacher["prompt"][1::2] == student["prompt"][::2] == prompts
    store = Signals.open(root / "signals-teacher-teacher_response" / "store")
    assert len(store) == len(teacher) == len(student)
    # responses to prompts that are rendered otherwise now are sampled again, if a step is to run
    file = root / "sample-teacher" / "responses.jsonl"
    whole, check = file.read_bytes(), teacher["teacher_response_check"][0]
    file.write_bytes(whole.replace(str(check).encode(), str(check ^ 1).encode(), 1))
    shutil.rmtree(root / "evaluate-dpkd-0")
    capsys.readouterr()
    again = run_recipe(recipe, out)
    assert "sample-teacher: the prompt of row 0 of" in (said := capsys.readouterr().err)
    assert said.count("sampling again") == 1
    assert file.read_bytes() == whole
    assert rebuilt(again) == {"evaluate-dpkd-0"}
    # and again after an interruption in between, also where what was sampled by then is of yesterday
    file.write_bytes(whole.replace(str(check).encode(), str(check ^ 1).encode(), 1))
    shutil.rmtree(root / "evaluate-dpkd-0")
    with monkeypatch.context() as cut:
        cut.setattr("prefdistill.experiment.steps.signals.sample_responses", stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, out)
    assert not file.exists()

    def of_yesterday(*arguments, **options):
        monkeypatch.undo()
        raise OtherPrompts("the prompt of row 0 is rendered otherwise; delete the file")

    monkeypatch.setattr("prefdistill.experiment.steps.signals.sample_responses", of_yesterday)
    assert rebuilt(run_recipe(recipe, out)) == {"evaluate-dpkd-0"}
    assert file.read_bytes() == whole
    sidecar(file).unlink()
    assert rebuilt(run_recipe(recipe, out)) == set()
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods.tvkd.rounds=2"], "methods.tvkd.rounds: tvkd does not learn from the student's own responses"),
        (["methods.dpo.start=adpa"], "methods.dpo.start: 'adpa' must be a method defined before it"),
        (["methods.adpa-plus.first_order=7"], "methods.adpa-plus.first_order differs from that of dckd"),
        (
            ["methods.tvkd.values_from=logprobs", "methods.tvkd.value_temperature=2.0"],
            "needs signals.value_temperature=2.0, but it is 1.0",
        ),
        (["teacher.dpo=null"], "the model the teacher's DPO started from: name it as model.teacher_reference"),
        (
            ["signals.positions=endpoints", "methods.tvkd.discount=0.9"],
            "needs signals.positions=all, but it is endpoints",
        ),
        (["signals.k=0"], "signals.k"),
        (["signals.p=1.5"], "signals.p"),
        (["sampling.engine=magic"], "unknown engine 'magic'"),
        (["sampling.engine=vllm"], "vLLM is not installed"),
        (["sampling.engine=vllm", "signals.device_map=auto"], "vLLM is not installed"),  # which places a model itself
        (["sampling.engine=vllm", "signals.quantization=4bit"], "quantization applies to the engine transformers"),
        (["sampling.engine=ray", "signals.device_map=auto"], "device_map applies to the engine transformers"),
        (["sampling.temperature=0", "sampling.n=2"], "gives the same response 2 times"),
        (["model.teacher_reference=some/model"], "remove one of the two"),
        (["data.max_prompt_length=64"], "max_prompt_length (64) leaves no room for a response"),
    ],
)
def test_wrong_recipes_are_refused_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_recipe(load_recipe(QUICKSTART, [*SMALL, *overrides], only=["all"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_endpoints_are_enough_for_tvkd(copy, finished):
    recipe = load_recipe(QUICKSTART, [*TINY, "signals.positions=endpoints"], only=["tvkd"])
    results = run_recipe(recipe, copy)
    steps = rebuilt(results)
    assert "signals-teacher-train" in steps
    assert "signals-teacher-test" not in steps  # whose terms are compared with that of the value after the end token
    assert Signals.open(copy / "seed-0" / "signals-teacher-train" / "store").manifest["positions"] == "endpoints"
    for metric, value in results["methods"]["tvkd"].items():
        assert value["mean"] == pytest.approx(finished[1]["methods"]["tvkd"][metric]["mean"], abs=1e-3), metric


def test_samples_are_rebuilt_in_another_dtype(tmp_path):
    out = tmp_path / "run"
    run_recipe(load_recipe(QUICKSTART, SMALL, only=["seqkd"]), out)
    again = stages(run_recipe(load_recipe(QUICKSTART, [*SMALL, "signals.dtype=bfloat16"], only=["seqkd"]), out))
    assert not again["sample-teacher"]
    assert again["teacher-dpo"]


def test_every_student_is_compared_with_its_start_on_the_held_out_pairs(tmp_path):
    """Also where no method has a reference."""
    recipe = load_recipe(QUICKSTART, [*SMALL, "baseline=seqkd"], only=["seqkd", "dckd"])
    results = run_recipe(recipe, tmp_path / "run")
    assert {name: "reward_accuracy" in results["methods"][name] for name in recipe.methods} == {
        "seqkd": True,
        "dckd": True,
    }
