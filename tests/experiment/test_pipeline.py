"""Whole recipes, small: every stage runs, is reused, and is made again when what it is made from changes."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from prefdistill.core.errors import UserError
from prefdistill.core.files import write_jsonl
from prefdistill.data.load import load_pairs
from prefdistill.evaluation.results import Role
from prefdistill.evaluation.verdict import verdict_of
from prefdistill.experiment.check import check_plan
from prefdistill.experiment.plan import build_plan
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.methods import METHODS
from prefdistill.models.identity import model_key
from prefdistill.report.run import PANELS, load_run
from prefdistill.signals import Signals

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "src" / "prefdistill" / "experiment" / "recipes" / "quickstart.yaml"
TINY = [
    "data.synthetic={demonstrations: 96, teacher_pairs: 60, pairs: 40, test_prompts: 24}",
    "teacher.sft.max_steps=30",
    "teacher.dpo.max_steps=2",
    "student.sft.max_steps=30",
    "training.max_steps=3",
    "training.logging_steps=1",
    "model.scratch.teacher={hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "model.scratch.student={hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "orders=2",
]


def stages(results):
    return {stage["name"]: stage["reused"] for stage in results["stages"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny quickstart that has run once."""
    out = tmp_path_factory.mktemp("quickstart")
    return out, run_recipe(load_recipe(QUICKSTART, TINY), out)


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run", dirs_exist_ok=True)
    return tmp_path / "run"


def test_the_quickstart_has_every_method_and_control(finished):
    out, results = finished
    controls = ["tvkd-shuffled", "tvkd-reversed-shuffled", "oracle-margin", "dpo-other-order"]
    methods = ["sft-chosen", "dpo", "tvkd", "tvkd-reversed", *controls]
    assert list(results["methods"]) == ["teacher", "start", *methods]
    assert list(results["differences"]) == [name for name in methods if name != "dpo"]
    for name in methods:
        for metric in ("reward", "reward_greedy", "win_rate_start", "reward_accuracy"):
            assert results["methods"][name][metric]["n"] == 2, (name, metric)
            assert results["methods"][name][metric]["over"] == "data orders"
    assert results["methods"]["start"]["win_rate_start"]["mean"] == 0.5
    assert {"shaping return", "teacher log-prob", "teacher Q (raw logits)", "teacher implicit reward"} <= set(
        results["margin_accuracy"]
    )
    assert [name for name, role in results["roles"].items() if Role(**role).is_control] == controls
    assert (results["roles"]["teacher"]["kind"], results["roles"]["start"]["kind"]) == ("teacher", "start")
    assert results["headline"] == {"metric": "reward", "method": "tvkd"}
    assert results["verdict"] == verdict_of(results)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))


def test_a_run_directory_holds_what_the_interface_names(finished):
    out, results = finished
    for name in ("recipe.yaml", "environment.json", "results.json", "report.html"):
        assert (out / name).stat().st_size > 100, name
    logged = [json.loads(line) for line in (out / "seed-0" / "distill-tvkd-1" / "metrics.jsonl").open()]
    assert logged
    assert "report" in (out / "report.html").read_text()
    assert all(stage["seconds"] >= 0 and not stage["reused"] for stage in results["stages"])
    assert all((out / stage["directory"] / "stage.json").is_file() for stage in results["stages"])
    trained = next(stage for stage in results["stages"] if stage["name"] == "distill-tvkd-1")
    labels = {"kind": "distill", "role": "student", "method": "tvkd", "order": 1, "round": 1}
    assert labels.items() <= trained.items()
    again = load_recipe(out / "recipe.yaml")
    assert again.methods.keys() == load_recipe(QUICKSTART, TINY).methods.keys()


def test_every_panel_of_the_report_is_logged_by_some_training(finished):
    curves = load_run(finished[0])["curves"]
    assert {panel for stage in curves.values() for panel in stage} == set(PANELS)


def test_everything_is_reused_by_the_same_recipe(copy, finished):
    results = run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert all(stages(results).values())
    assert results["methods"] == finished[1]["methods"]
    assert results["differences"] == finished[1]["differences"]


def stop(*_, **__):
    raise KeyboardInterrupt


def test_a_repair_that_was_cut_off_is_gone_on_with(copy, finished, monkeypatch):
    shard = copy / "seed-0" / "signals-teacher-test" / "store" / "shards" / "00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with monkeypatch.context() as cut:
        cut.setattr("prefdistill.experiment.steps.signals.extract_signals", stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert not shard.exists()
    results = run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert results["methods"] == finished[1]["methods"]
    assert shard.read_bytes() == whole


def test_results_of_another_recipe_do_not_stand_beside_the_new_one(copy, monkeypatch):
    there = {"results.json", "report.html"}
    monkeypatch.setattr("prefdistill.experiment.steps.students.fit", stop)
    run_recipe(load_recipe(QUICKSTART, TINY), copy)  # the same recipe: nothing is trained
    assert there <= {path.name for path in copy.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(QUICKSTART, [*TINY, "methods.tvkd.alpha=-9"]), copy)
    assert load_recipe(copy / "recipe.yaml").methods["tvkd"].options["alpha"] == -9
    assert there.isdisjoint(path.name for path in copy.iterdir())


def test_a_damaged_store_of_a_finished_stage_is_repaired(copy, finished, capsys):
    shard = copy / "seed-0" / "signals-teacher-test" / "store" / "shards" / "00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    results = run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert "00000.parquet is damaged (its checksum differs); rebuilding it" in capsys.readouterr().err
    assert shard.read_bytes() == whole
    assert set(stages(results).values()) == {True}
    assert results["methods"] == finished[1]["methods"]


def test_only_what_depends_on_a_change_is_made_again(copy):
    results = run_recipe(load_recipe(QUICKSTART, [*TINY, "methods.tvkd.alpha=0.2"]), copy)
    made = {name for name, reused in stages(results).items() if not reused}
    assert made == {"distill-tvkd-0", "distill-tvkd-1", "evaluate-tvkd-0", "evaluate-tvkd-1"}


def test_an_interrupted_run_goes_on_and_ends_the_same(finished, tmp_path, monkeypatch):
    import prefdistill.experiment.steps.students as students

    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    real = students.fit
    monkeypatch.setattr(students, "fit", interrupted)
    recipe = load_recipe(QUICKSTART, TINY, only=["tvkd"])
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    results = run_recipe(recipe, tmp_path / "run")
    reused = stages(results)
    assert reused["teacher-dpo"]
    assert reused["distill-dpo-0"]
    assert not reused["distill-dpo-1"]
    for name in ("dpo", "tvkd"):  # the very same numbers as in a run that was left alone
        assert results["methods"][name] == finished[1]["methods"][name]


def test_two_seeds_are_two_pipelines(tmp_path):
    results = run_recipe(load_recipe(QUICKSTART, [*TINY, "seeds=2", "orders=1"], only=["tvkd"]), tmp_path / "run")
    assert results["seeds"] == [0, 1]
    assert results["methods"]["tvkd"]["reward"]["over"] == "seeds"
    assert results["differences"]["tvkd"]["reward"]["n"] == 2
    first, second = (tmp_path / "run" / f"seed-{seed}" / "pairs" / "train.jsonl" for seed in (0, 1))
    assert first.read_text() != second.read_text()


# -- samples, starts, rounds -------------------------------------------------------------------------------------------

SMALL = [*TINY, "orders=1"]


def requests(out, stage):
    return json.loads((out / "seed-0" / stage / "stage-request.json").read_text())["request"]


def keys(out, stage):
    return json.loads((out / "seed-0" / stage / "stage.json").read_text())["key"]


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
    made = requests(out, "distill-adpa-plus-0")["inputs"]
    assert made["distill-dckd-0"] == keys(out, "distill-dckd-0")
    assert "student-sft" not in made
    sampled = requests(out, "sample-dckd-0")
    assert sampled["inputs"]["distill-dckd-0"] == keys(out, "distill-dckd-0")
    told = json.loads((out / "seed-0" / "sample-dckd-0" / "responses.jsonl.meta.json").read_text())
    assert told["request"]["model"]["key"] == model_key(dckd)
    # the teacher's reference is read where the teacher was, at its tokens
    teacher, reference = (
        Signals.open(out / "seed-0" / f"signals-{role}-student_response-dckd-0" / "store")
        for role in ("teacher", "teacher_reference")
    )
    assert reference.manifest["topk"]["ids_from"] == teacher.digest
    # only what is needed is made: no distributions of the pairs from the teacher's reference, no values of samples
    assert teacher.kinds == ("topk",)
    assert not (out / "seed-0" / "signals-teacher_reference-train").exists()
    # a stage that several methods share is made once
    names = [stage["name"] for stage in results["stages"]]
    assert len(names) == len(set(names))
    again = run_recipe(recipe, out)
    assert all(stages(again).values())


def test_rounds_sample_read_and_train_again_from_the_last_student(tmp_path):
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
    # fewer rounds: the last student is another one, and is made again from what there is
    fewer = run_recipe(load_recipe(QUICKSTART, [*SMALL, "methods.adpa.rounds=2"], only=["adpa"]), out)
    made = {name for name, reused in stages(fewer).items() if not reused}
    assert made == {"distill-adpa-0", "evaluate-adpa-0"}


def test_several_samples_of_each_prompt(tmp_path):
    out = tmp_path / "run"
    run_recipe(load_recipe(QUICKSTART, [*SMALL, "sampling.n=2"], only=["dpkd", "adpa"]), out)
    made = out / "seed-0"
    pairs = load_pairs(str(made / "pairs" / "train.jsonl"))
    teacher = load_pairs(str(made / "sample-teacher" / "responses.jsonl"), responses=("teacher_response",))
    student = load_pairs(str(made / "sample-start" / "responses.jsonl"), responses=("student_response",))
    prompts = [row["prompt"] for row in pairs][: len(teacher) // 2]
    assert teacher["prompt"][::2] == teacher["prompt"][1::2] == student["prompt"][::2] == prompts
    store = Signals.open(made / "signals-teacher-teacher_response" / "store")
    assert len(store) == len(teacher) == len(student)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods.tvkd.rounds=2"], "methods.tvkd.rounds: tvkd does not learn from the student's own responses"),
        (["methods.dpo.start=adpa"], "methods.dpo.start: 'adpa' must be a method that stands above it"),
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
        (["sampling.engine=magic"], "sampling.engine"),
        (["sampling.engine=vllm"], "vLLM is not installed"),
        (["sampling.temperature=0", "sampling.n=2"], "gives the same response 2 times"),
        (["model.teacher_reference=some/model"], "leave one of the two out"),
        (["data.max_prompt_length=64"], "max_prompt_length (64) leaves no room for a response"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_recipe(load_recipe(QUICKSTART, [*SMALL, *overrides], only=["all"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_endpoints_are_enough_for_tvkd(copy, finished):
    recipe = load_recipe(QUICKSTART, [*TINY, "signals.positions=endpoints"], only=["tvkd"])
    results = run_recipe(recipe, copy)
    made = {name for name, reused in stages(results).items() if not reused}
    assert "signals-teacher-train" in made
    assert "signals-teacher-test" not in made  # whose terms are compared with that of the value after the end token
    assert Signals.open(copy / "seed-0" / "signals-teacher-train" / "store").manifest["positions"] == "endpoints"
    for metric, value in results["methods"]["tvkd"].items():
        assert value["mean"] == pytest.approx(finished[1]["methods"]["tvkd"][metric]["mean"], abs=1e-3), metric


def test_samples_are_made_again_in_another_precision(tmp_path):
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


@pytest.fixture(scope="module")
def named(finished, tmp_path_factory):
    """Models by name, as a user has them, and pairs with what else real data hold: a date, responses of another run."""
    from datetime import datetime

    from datasets import Dataset

    made = finished[0] / "seed-0"
    place = tmp_path_factory.mktemp("named")
    pairs = load_pairs(str(made / "pairs" / "train.jsonl"))
    rows = [{**row, "when": datetime(2020, 1, 1), "student_response": row["chosen"]} for row in pairs]
    Dataset.from_list(rows).to_parquet(str(place / "pairs.parquet"))
    for name in ("teacher-dpo", "teacher-sft", "student-sft"):
        shutil.copytree(made / name, place / name)
    recipe = {
        "name": "named",
        "data": {"train": str(place / "pairs.parquet"), "test": str(place / "pairs.parquet"), "max_length": 48},
        "model": {
            "teacher": str(place / "teacher-dpo"),
            "teacher_reference": str(place / "teacher-sft"),
            "student": str(place / "student-sft"),
        },
        "sampling": {"max_new_tokens": 8},
        "training": {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8},
        "methods": {"dpo": {}, "adpa": {}},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return place


def test_a_named_teacher_and_its_reference(named, tmp_path, capsys):
    results = run_recipe(load_recipe(named / "recipe.yaml"), tmp_path / "run")
    assert "adpa" in results["differences"]
    assert "teacher implicit reward" in results["margin_accuracy"] or not results["margin_accuracy"]
    assert "the data's own student_response is not used" in capsys.readouterr().err
    kept = load_pairs(
        str(tmp_path / "run" / "seed-0" / "sample-start" / "responses.jsonl"), responses=("student_response",)
    )
    assert "when" not in kept.column_names
    # the reference of the advantage alone decides about it, and about nothing else
    other = tmp_path / "other"
    shutil.copytree(named / "student-sft", other)
    shutil.copytree(named / "teacher-dpo", other, dirs_exist_ok=True)
    again = stages(
        run_recipe(load_recipe(named / "recipe.yaml", [f"model.teacher_reference={other}"]), tmp_path / "run")
    )
    made = {name for name, reused in again.items() if not reused}
    assert made == {
        "signals-teacher_reference-test",
        "signals-teacher_reference-student_response-start",
        "distill-adpa-0",
        "evaluate-adpa-0",
    }


@pytest.fixture
def mine(named, tmp_path):
    """Copies of the named models and a recipe of short work with them."""
    place = shutil.copytree(named, tmp_path / "mine")
    text = (named / "recipe.yaml").read_text().replace(str(named), str(place))
    recipe = {**json.loads(text), "methods": {"dpo": {}, "tvkd": {}}}
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return place


def change_weights(directory):
    """Others with the same name, size and times."""
    file = directory / "model.safetensors"
    times, found = file.stat(), bytearray(file.read_bytes())
    found[-2:] = b"\x80\x3f"  # 1.0
    file.write_bytes(found)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_models_are_what_they_hold_and_not_where_they_lie(mine, tmp_path):
    out = tmp_path / "run"
    run_recipe(load_recipe(mine / "recipe.yaml"), out)
    moved = mine.rename(tmp_path / "moved")
    (moved / "teacher-dpo" / "notes.txt").write_text("the good one")
    text = (moved / "recipe.yaml").read_text().replace(str(mine), str(moved))
    (moved / "recipe.yaml").write_text(text)
    assert set(stages(run_recipe(load_recipe(moved / "recipe.yaml"), out)).values()) == {True}
    change_weights(moved / "student-sft")
    again = run_recipe(load_recipe(moved / "recipe.yaml"), out)
    assert {name for name, reused in stages(again).items() if reused} == {
        "signals-teacher-test",
        "signals-teacher-train",
        "signals-teacher_reference-test",
    }
    assert again["methods"] == run_recipe(load_recipe(moved / "recipe.yaml"), tmp_path / "new")["methods"]


@pytest.mark.parametrize("during", ["distill-dpo-0", "distill-tvkd-0"])
def test_a_model_that_changes_while_the_run_works_is_no_part_of_its_results(mine, tmp_path, monkeypatch, during):
    import prefdistill.experiment.steps.students as students

    def fit_meanwhile(trainer, out, what):
        real(trainer, out, what)
        if what == during:
            change_weights(mine / "teacher-dpo")

    real = students.fit
    with monkeypatch.context() as context:
        context.setattr(students, "fit", fit_meanwhile)
        with pytest.raises(UserError, match="teacher-dpo was changed during the run"):
            run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "run")
    made = {path.parent.name for path in tmp_path.glob("run/seed-0/distill-*/model.safetensors")}
    assert made == {"distill-dpo-0"}  # of which the teacher is no part
    results = run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "run")
    assert stages(results)["distill-dpo-0"]
    new = run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "new")
    assert (results["methods"], results["shaping"]) == (new["methods"], new["shaping"])


def test_a_template_and_code_that_is_let_in_are_part_of_what_named_models_are(mine, tmp_path):
    out, recipe = tmp_path / "run", mine / "recipe.yaml"
    run_recipe(load_recipe(recipe), out)
    for name in ("teacher-dpo", "teacher-sft", "student-sft"):
        template = mine / name / "chat_template.jinja"
        template.write_text("reverse: " + template.read_text())
    again = stages(run_recipe(load_recipe(recipe), out))
    assert not any(again.values())
    assert not any(stages(run_recipe(load_recipe(recipe, ["model.trust_remote_code=true"]), out)).values())


def test_what_a_trained_teacher_is_no_part_of_stays(mine, tmp_path):
    run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "run")
    change_weights(mine / "teacher-dpo")
    again = stages(run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "run"))
    made = {name for name, reused in again.items() if not reused}
    assert made == {"signals-teacher-test", "signals-teacher-train", "distill-tvkd-0", "evaluate-tvkd-0"}


def test_pairs_of_a_named_teacher_are_made_from_its_reference_and_the_prompts(mine, tmp_path):
    """In the synthetic task, whose pairs are sampled."""
    models = [f"model.teacher={mine / 'teacher-dpo'}", f"model.student={mine / 'student-sft'}", "student.sft=null"]
    nothing = ["teacher.sft=null", "teacher.dpo=null", "training.max_steps=1"]
    sizes = "data.synthetic={demonstrations: 32, teacher_pairs: %d, pairs: 16, test_prompts: 8}"
    small, more = [*models, *nothing, sizes % 24], [*models, *nothing, sizes % 30]
    reference = [*more, f"model.teacher_reference={mine / 'teacher-sft'}"]
    for changed in (small, more, reference):
        results = run_recipe(load_recipe(QUICKSTART, changed, only=["dpo"]), tmp_path / "run")
    new = run_recipe(load_recipe(QUICKSTART, reference, only=["dpo"]), tmp_path / "new")
    assert results["methods"] == new["methods"]
    for file in ("train.jsonl", "test.jsonl"):
        pairs = [(tmp_path / run / "seed-0" / "pairs" / file).read_bytes() for run in ("run", "new")]
        assert pairs[0] == pairs[1]


def test_other_columns_of_the_pairs_are_no_part_of_a_tokenizer(finished, tmp_path):
    pairs = load_pairs(str(finished[0] / "seed-0" / "pairs" / "train.jsonl"))
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = {
        "name": "scratch",
        "data": {"train": str(tmp_path / "pairs.jsonl"), "max_length": 48},
        "model": {"scratch": {"teacher": shape, "student": shape, "vocab_size": 300}},
        "training": {"max_steps": 1},
        "methods": {"dpo": {}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    found = []
    for text in ("of no part", "xyzzy " * 9):
        write_jsonl(tmp_path / "pairs.jsonl", [{**row, "completion": text} for row in pairs])
        run_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / text[:2])
        found.append((tmp_path / text[:2] / "seed-0" / "init" / "tokenizer" / "tokenizer.json").read_bytes())
    assert found[0] == found[1]


def test_results_go_before_stages_are_taken_from_a_pool(mine, tmp_path, monkeypatch):
    out, recipe = tmp_path / "run", mine / "recipe.yaml"
    for changed in ([], ["training.learning_rate=0.02"]):
        run_recipe(load_recipe(recipe, changed), out, pool=tmp_path / "pool")
    monkeypatch.setattr("prefdistill.experiment.run._results", stop)
    (out / "recipe.yaml").write_text(load_recipe(recipe).as_yaml())  # as if another run had seen to that
    (out / "seed-0" / "signals-teacher-test" / "stage.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(recipe), out, pool=tmp_path / "pool")
    assert not (out / "results.json").exists()


def test_a_named_models_tokenizer_is_that_of_the_models_made_beside_it(mine, tmp_path):
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    scratch = f"model.scratch={json.dumps({'teacher': shape, 'student': shape, 'vocab_size': 300})}"
    recipe = [mine / "recipe.yaml", ["model.student=null", scratch, "model.teacher_reference=null"]]
    made = stages(run_recipe(load_recipe(*recipe), tmp_path / "run"))
    assert not made["init"]
    assert stages(run_recipe(load_recipe(*recipe), tmp_path / "run"))["init"]
    change_weights(mine / "teacher-dpo")  # of which the student takes nothing
    assert stages(run_recipe(load_recipe(*recipe), tmp_path / "run"))["init"]
    pairs = load_pairs(str(mine / "pairs.parquet"))
    pairs.select(range(len(pairs) - 1)).to_parquet(str(mine / "pairs.parquet"))  # nor of these
    assert stages(run_recipe(load_recipe(*recipe), tmp_path / "run"))["init"]
    file = mine / "teacher-dpo" / "tokenizer.json"
    file.write_text(file.read_text().replace('"reverse"', '"backwards"'))
    again = stages(run_recipe(load_recipe(*recipe), tmp_path / "run"))
    assert not again["init"]
    assert not again["evaluate-dpo-0"]


def test_results_of_other_data_go_before_anything_is_made_of_the_new(mine, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run_recipe(load_recipe(mine / "recipe.yaml"), out)
    pairs = load_pairs(str(mine / "pairs.parquet"))
    pairs.select(range(len(pairs) - 1)).to_parquet(str(mine / "pairs.parquet"))
    monkeypatch.setattr("prefdistill.experiment.steps.signals.extract_signals", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(mine / "recipe.yaml"), out)
    assert not (out / "results.json").exists()
    assert not (out / "report.html").exists()


def test_a_named_reference_with_other_tokens_is_refused(named, tmp_path):
    shutil.copytree(named / "teacher-sft", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"reverse"', '"backwards"'))
    recipe = load_recipe(named / "recipe.yaml", [f"model.teacher_reference={tmp_path / 'other'}"])
    with pytest.raises(UserError, match=r"other have different tokenizers: .*e\.g\. 'reverse'"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- real pairs --------------------------------------------------------------------------------------------------------

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def fast(data_dir):
    data = data_dir / "alpacaeval_pairs"
    return [
        f"data.train={data / 'train.jsonl.gz'}",
        f"data.test={data / 'test.jsonl.gz'}",
        "data.max_train=48",
        "data.max_test=24",
        "training.batch_size=16",
    ]


def prompts_of_test(data_dir):
    test = load_pairs(str(data_dir / "alpacaeval_pairs" / "test.jsonl.gz")).select(range(24))
    return len({json.dumps(prompt) for prompt in test["prompt"]})


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """One run directory for all recipes: they differ in methods only, and share teacher, start and signals."""
    return tmp_path_factory.mktemp("real") / "run"


def test_every_method_has_a_recipe_and_a_page():
    recipes = [load_recipe(path, ["data.train=x.jsonl"]) for path in RECIPES]
    assert {run.method for recipe in recipes for run in recipe.methods.values()} == set(METHODS)
    index = (ROOT / "docs" / "methods.md").read_text()
    for name in METHODS:
        assert (ROOT / "recipes" / "local-pairs" / f"{name}.yaml").exists(), name
        assert (ROOT / "docs" / "methods" / f"{name}.md").exists(), name
        assert f"methods/{name}.md" in index, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_from_real_pairs_to_the_report(shared_run, data_dir, path):
    recipe = load_recipe(path, fast(data_dir), fast=True)
    results = run_recipe(recipe, shared_run)
    for name in recipe.methods:
        assert results["methods"][name]["reward_accuracy"]["n"] == prompts_of_test(data_dir)
    assert set(results["differences"]) == set(recipe.methods) - {recipe.baseline}
    page = (shared_run / "report.html").read_text()
    assert all(name in page for name in recipe.methods)


def test_real_pairs_through_the_shipped_recipe(tmp_path, data_dir):
    """The recipe for one's own pairs, in its fast profile and smaller still, with named models the second time."""
    overrides = fast(data_dir)
    recipe = ROOT / "recipes" / "local-pairs" / "tvkd.yaml"
    results = run_recipe(load_recipe(recipe, overrides, fast=True), tmp_path / "scratch")
    for name in ("dpo", "tvkd"):
        assert results["methods"][name]["reward_accuracy"]["n"] == prompts_of_test(data_dir)
    assert results["differences"]["tvkd"]["reward_accuracy"]["over"] == "test prompts"

    made = tmp_path / "scratch" / "seed-0"
    named = [
        *overrides,
        f"model.teacher={made / 'teacher-dpo'}",
        f"model.student={made / 'student-sft'}",
        "teacher.sft=null",
        "teacher.dpo=null",
        "student.sft=null",
    ]
    again = run_recipe(load_recipe(recipe, named, fast=True), tmp_path / "named")
    assert not {"init", "teacher-sft", "teacher-dpo", "student-sft"} & stages(again).keys()
    assert again["methods"]["tvkd"] == results["methods"]["tvkd"]
    assert again["margin_accuracy"]["shaping return"] == results["margin_accuracy"]["shaping return"]


# -- the judge ---------------------------------------------------------------------------------------------------------

JUDGE = {
    "share": 0.3,
    "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "training": {"max_steps": 2},
}


@pytest.fixture
def judged(named, tmp_path):
    """A recipe on copies of the named models with a judge of its own, and the prompts of its data, twice each."""
    shared, named = named, shutil.copytree(named, tmp_path / "named")
    recipe = json.loads((named / "recipe.yaml").read_text().replace(str(shared), str(named)))
    rows = list(load_pairs(recipe["data"]["train"]).select_columns(["prompt", "chosen", "rejected"]))
    (named / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))
    recipe["data"] |= {"train": str(named / "pairs.jsonl"), "test": str(named / "pairs.jsonl"), "max_test": 12}
    recipe |= {
        "reward_model": JUDGE,
        "evaluate": {"prompts": 10, "samples": 3, "max_new_tokens": 8, "length_ranges": [3, 5]},
        "methods": {"dpo": {}},
    }
    (named / "judged.yaml").write_text(json.dumps(recipe))
    return named / "judged.yaml"


def test_a_judge_is_trained_on_prompts_of_its_own_and_scores_every_model(judged, tmp_path):
    out = tmp_path / "run"
    results = run_recipe(load_recipe(judged), out)
    metrics = ["reward_model_win_rate_start", "reward_model_score", "rouge_l", "exact_match", "response_tokens"]
    assert list(results["methods"]) == ["teacher", "start", "dpo"]
    for name in results["methods"]:
        found = results["methods"][name]
        assert [metric for metric in found if metric in metrics] == metrics
        for metric in metrics:
            assert (found[metric]["n"], found[metric]["over"]) == (10, "test prompts")
            assert found[metric]["low"] <= found[metric]["mean"] <= found[metric]["high"]
        points = results["responses"][name]["points"]
        assert len(points) == 10
        assert sum(score for _, score in points) / 10 == pytest.approx(found["reward_model_score"]["mean"])
        assert sum(tokens for tokens, _ in points) / 10 == pytest.approx(found["response_tokens"]["mean"])
    assert results["methods"]["start"]["reward_model_win_rate_start"]["mean"] == 0.5
    assert "reward_accuracy" not in results["methods"]["teacher"]
    assert results["metrics"]["reward_model_win_rate_start"]["label"] == "reward model: win rate against the start"
    judge = results["reward_model"]
    assert (judge["pairs"], judge["accuracy"]["n"]) == (12, 12)
    assert judge["name"].startswith("trained on ")
    assert set(results["by_length"]) == {*metrics, "response_words"}
    ranges = results["by_length"]["rouge_l"]
    assert {(row["low"], row["high"]) for row in ranges} <= {(0, 3), (4, 5), (6, None)}
    assert sum(row["n"] for row in ranges) == 10
    assert all(row["methods"].keys() == results["methods"].keys() for row in ranges)
    assert len(results["samples"]) == 3
    assert set(results["samples"][0]["scores"]) == {"teacher", "start", "dpo"}
    assert all(stage["bytes"] > 0 and stage["peak_memory"] > 0 for stage in results["stages"])

    # the judge's prompts are nobody else's, and a reward model of another reader gives the same scores
    from prefdistill.data.load import load_prompts
    from prefdistill.evaluation.reward_model import RewardModel

    data = build_plan(load_recipe(judged), out, 0).user_data
    ours, theirs = ({json.dumps(prompt) for prompt in rows["prompt"]} for rows in (data.train, data.reward_pairs))
    assert ours
    assert theirs
    assert not ours & theirs
    assert len(data.train) + len(data.reward_pairs) == len(load_pairs(str(judged.parent / "pairs.jsonl")))
    assert len(theirs) == round(0.3 * len(ours | theirs))
    answers = load_prompts(str(out / "seed-0" / "evaluate-dpo-0" / "responses.jsonl"))
    scores = RewardModel(str(out / "seed-0" / "reward-model")).score(answers["prompt"][:], answers["response"][:])
    assert results["methods"]["dpo"]["reward_model_score"]["mean"] == pytest.approx(scores.mean(), abs=1e-5)

    # reused as it is; another judge is another judge, and the students learn from other pairs
    again = run_recipe(load_recipe(judged), out)
    assert all(stages(again).values())
    assert again["methods"] == results["methods"]
    longer = run_recipe(load_recipe(judged, ["reward_model.training.max_steps=3", "evaluate.length_ranges=[4]"]), out)
    made = {name for name, reused in stages(longer).items() if not reused}
    assert made == {"reward-model", "evaluate-reward-model", "evaluate-teacher", "evaluate-start", "evaluate-dpo-0"}
    assert longer["methods"]["dpo"]["reward_accuracy"] == results["methods"]["dpo"]["reward_accuracy"]
    assert longer["methods"]["dpo"]["reward_model_score"] != results["methods"]["dpo"]["reward_model_score"]


def refuse_system(*models):
    """Have the chat templates of models refuse a system message."""
    for model in models:
        template = Path(model) / "chat_template.jinja"
        refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        template.write_text(refusal + template.read_text())


def add_system(path, *numbers):
    """Give the prompts of some rows a system message."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for row in numbers:
        rows[row]["prompt"].insert(0, {"role": "system", "content": "> >"})
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_that_the_chat_template_refuses_are_left_out_of_every_stage(judged, tmp_path, capfd):
    recipe = json.loads(judged.read_text())
    refuse_system(recipe["model"]["teacher"], recipe["model"]["student"])
    add_system(recipe["data"]["train"], 1, 5)  # of which the first are tested on
    del recipe["model"]["teacher_reference"]
    few = {"max_steps": 1}
    recipe |= {"teacher": {"sft": few, "dpo": few}, "student": {"sft": few}}
    judged.write_text(json.dumps(recipe))
    capfd.readouterr()
    results = run_recipe(load_recipe(judged), tmp_path / "run")
    assert results["reward_model"]["accuracy"]["n"] == 10
    told = capfd.readouterr().err
    for stage in ("signals", "sample", "evaluate-reward-model"):
        assert f"{stage}: dropped 2 rows: the chat template refuses its messages (2, first row 1)" in told


def test_a_named_judge_leaves_all_pairs_to_the_students(judged, tmp_path):
    first = run_recipe(load_recipe(judged), tmp_path / "first")
    model = tmp_path / "first" / "seed-0" / "reward-model"
    results = run_recipe(load_recipe(judged, [f"reward_model.name={model}", "seeds=2"]), tmp_path / "run")
    assert "reward-model" not in stages(results)
    assert results["reward_model"]["name"] == str(model)
    assert results["reward_model"]["accuracy"]["mean"] == first["reward_model"]["accuracy"]["mean"]
    assert results["reward_model"]["accuracy"]["over"] == "seeds"
    assert results["by_length"]["rouge_l"][0]["methods"]["dpo"]["over"] == "seeds"


def test_prompts_that_a_named_judge_cannot_read_are_known_before_anything_is_made(judged, tmp_path):
    from prefdistill.models.load import load_tokenizer
    from prefdistill.models.scratch import random_model

    models, strict = json.loads(judged.read_text())["model"], tmp_path / "strict"
    tokenizer = load_tokenizer(models["student"])
    random_model(tokenizer, JUDGE["model"], seed=0, reward=True).save_pretrained(strict)
    tokenizer.save_pretrained(strict)
    refuse_system(strict)
    add_system(judged.parent / "pairs.jsonl", 5)
    by_name = f"reward_model.name={strict}"
    with pytest.raises(UserError, match=r"pairs.jsonl, row 5: the chat template of the reward model .* refuses"):
        run_recipe(load_recipe(judged, [by_name]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_plan(build_plan(load_recipe(judged, [by_name, "evaluate.prompts=5"]), tmp_path / "run", 0))
    refuse_system(models["teacher"], models["student"])
    results = run_recipe(load_recipe(judged, [by_name]), tmp_path / "run")  # what nobody answers, it need not read
    assert (results["reward_model"]["pairs"], results["methods"]["dpo"]["reward_model_score"]["n"]) == (11, 9)


def test_without_a_judge_responses_are_still_compared_with_the_references(judged, tmp_path):
    results = run_recipe(load_recipe(judged, ["reward_model=null"]), tmp_path / "run")
    assert {"rouge_l", "response_tokens"} <= results["methods"]["dpo"].keys()
    assert "reward_model_score" not in results["methods"]["dpo"]
    assert "judge" not in results
    assert results["responses"] == {}
    bare = run_recipe(load_recipe(judged, ["reward_model=null", "evaluate={}"]), tmp_path / "bare")
    assert list(bare["methods"]) == ["dpo"]
    assert bare["by_length"] == {}


def test_demonstrations_of_the_judges_prompts_are_left_out(judged, tmp_path):
    rows = load_pairs(str(judged.parent / "pairs.jsonl"))
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    data = build_plan(load_recipe(judged, [f"data.sft={tmp_path / 'sft.jsonl'}"]), tmp_path / "run", 0).user_data
    assert data.demonstrations["prompt"][:] == data.train["prompt"][:]
    alone = build_plan(load_recipe(judged, ["data.test=null"]), tmp_path / "run", 0)
    assert alone.reward_model is None
    assert len(alone.user_data.train) == len(rows)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward_model={share: 0.2}", "reward_model.name"),
        ("reward_model.share=1.0", "reward_model.share"),
        ("reward_model.share=0.0001", "leaves none for one side"),
        ("reward_model.training.lora.r=4", "random weights have nothing to adapt"),
        ("reward_model.name=nowhere", "no reward model at 'nowhere'"),
        ("evaluate.prompts=0", "reward_model has nothing to judge: give evaluate.prompts"),
        ("reward_model.training.batch_size=3", "batch_size"),
        ("reward_model.model.hidden=3", "the shape of a model from scratch has no 'hidden'"),
    ],
)
def test_judges_that_cannot_be(judged, tmp_path, override, message):
    overrides = [override, "reward_model.training.micro_batch_size=2"] if "batch_size" in override else [override]
    with pytest.raises(UserError, match=re.escape(message)):
        run_recipe(load_recipe(judged, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
