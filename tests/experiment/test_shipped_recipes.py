"""The shipped recipes on real pairs."""

import json

import pytest

from prefdistill.data.load import load_pairs
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.methods import METHODS
from support.tiny_runs import ROOT, stages

LOCAL = sorted((ROOT / "recipes" / "local-pairs").rglob("*.yaml"))
NAMES = ["model.teacher=big", "model.student=small"]


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
    recipes = [load_recipe(path, ["data.train=x.jsonl"]) for path in LOCAL]
    named = load_recipe(ROOT / "recipes" / "named-models.yaml", ["data.train=x.jsonl", *NAMES], only=["all"])
    assert {run.method for recipe in recipes for run in recipe.methods.values()} == set(METHODS)
    assert {run.method for run in named.methods.values()} == set(METHODS)
    index = (ROOT / "docs" / "methods.md").read_text()
    for name in METHODS:
        assert (ROOT / "recipes" / "local-pairs" / f"{name}.yaml").exists(), name
        assert (ROOT / "docs" / "methods" / f"{name}.md").exists(), name
        assert f"methods/{name}.md" in index, name


@pytest.mark.parametrize("path", LOCAL, ids=lambda path: path.stem)
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

    root = tmp_path / "scratch" / "seed-0"
    models = [f"model.teacher={root / 'teacher-dpo'}", f"model.student={root / 'student-sft'}"]
    named = [*overrides, *models, "teacher.sft=null", "teacher.dpo=null", "student.sft=null"]
    again = run_recipe(load_recipe(recipe, named, fast=True), tmp_path / "named")
    assert not {"init", "teacher-sft", "teacher-dpo", "student-sft"} & stages(again).keys()
    assert again["methods"]["tvkd"] == results["methods"]["tvkd"]
    assert again["margin_accuracy"]["shaping return"] == results["margin_accuracy"]["shaping return"]

    fitted = ROOT / "recipes" / "named-models.yaml"
    results = run_recipe(load_recipe(fitted, [*overrides, *models], fast=True, only=["tvkd"]), tmp_path / "fitted")
    assert results["methods"]["tvkd"]["reward_accuracy"]["n"] == prompts_of_test(data_dir)
    assert "reward_model" not in results
