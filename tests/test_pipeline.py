"""Whole recipes, small: every stage runs, is reused, and is made again when what it is made from changes."""

import json
import shutil
from pathlib import Path

import pytest

from prefdistill.config import load_recipe
from prefdistill.results import run_recipe

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "src" / "prefdistill" / "recipes" / "quickstart.yaml"
TINY = [
    "data.synthetic={demonstrations: 96, teacher_pairs: 60, pairs: 40, test_prompts: 24}",
    "teacher.sft.max_steps=30",
    "teacher.dpo.max_steps=2",
    "student.sft.max_steps=30",
    "training.max_steps=3",
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
        for metric in ("reward", "reward_greedy", "win_rate", "reward_accuracy"):
            assert results["methods"][name][metric]["n"] == 2, (name, metric)
            assert results["methods"][name][metric]["over"] == "data orders"
    assert results["methods"]["start"]["win_rate"]["mean"] == 0.5
    assert {"shaping return", "teacher log-prob", "teacher Q (raw logits)", "teacher implicit reward"} <= set(
        results["margin_accuracy"]
    )
    assert results["controls"] == controls
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))


def test_a_run_directory_holds_what_the_interface_names(finished):
    out, results = finished
    for name in ("recipe.yaml", "environment.json", "results.json", "report.html"):
        assert (out / name).stat().st_size > 100, name
    logged = [json.loads(line) for line in (out / "seed-0" / "distill-tvkd-1" / "metrics.jsonl").open()]
    assert logged
    assert "report" in (out / "report.html").read_text()
    assert all(stage["seconds"] >= 0 and not stage["reused"] for stage in results["stages"])
    again = load_recipe(out / "recipe.yaml")
    assert again.methods.keys() == load_recipe(QUICKSTART, TINY).methods.keys()


def test_everything_is_reused_by_the_same_recipe(copy, finished):
    results = run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert all(stages(results).values())
    assert results["methods"] == finished[1]["methods"]
    assert results["differences"] == finished[1]["differences"]


def test_only_what_depends_on_a_change_is_made_again(copy):
    results = run_recipe(load_recipe(QUICKSTART, [*TINY, "methods.tvkd.alpha=0.2"]), copy)
    made = {name for name, reused in stages(results).items() if not reused}
    assert made == {"distill-tvkd-0", "distill-tvkd-1", "evaluate-tvkd-0", "evaluate-tvkd-1"}


def test_an_interrupted_run_goes_on_and_ends_the_same(finished, tmp_path, monkeypatch):
    import prefdistill.pipeline as pipeline

    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    real = pipeline.fit
    monkeypatch.setattr(pipeline, "fit", interrupted)
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


def test_real_pairs_through_the_shipped_recipe(tmp_path, data_dir):
    """The recipe for one's own pairs, in its fast profile and smaller still, with named models the second time."""
    data = data_dir / "alpacaeval_pairs"
    overrides = [
        f"data.train={data / 'train.jsonl.gz'}",
        f"data.test={data / 'test.jsonl.gz'}",
        "data.max_train=48",
        "data.max_test=24",
        "training.batch_size=16",
    ]
    recipe = ROOT / "recipes" / "local-pairs" / "tvkd.yaml"
    results = run_recipe(load_recipe(recipe, overrides, fast=True), tmp_path / "scratch")
    for name in ("dpo", "tvkd"):
        assert results["methods"][name]["reward_accuracy"]["n"] == 24
    assert results["differences"]["tvkd"]["reward_accuracy"]["over"] == "test items"

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
