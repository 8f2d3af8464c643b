"""The shipped recipes on real pairs."""

import json

import pytest

from prefdistill.core.files import write_jsonl
from prefdistill.data.load import load_pairs
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.experiment.show_plan import plan_recipe
from prefdistill.methods import METHODS, make_method
from support.tiny_runs import ROOT, stages

LOCAL = sorted((ROOT / "recipes" / "local-pairs").rglob("*.yaml"))
SMOLLM2 = sorted((ROOT / "recipes" / "smollm2").glob("*.yaml"))
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


LONG = {"all", "adpa-plus"}  # the others cover what they do


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LONG else ()) for path in LOCAL],
    ids=lambda path: path.stem,
)
def test_every_recipe_from_real_pairs_to_the_report(shared_run, data_dir, path):
    recipe = load_recipe(path, fast(data_dir), fast=True)
    results = run_recipe(recipe, shared_run)
    for name in recipe.methods:
        assert results["methods"][name]["reward_accuracy"]["n"] == prompts_of_test(data_dir)
    assert set(results["differences"]) == set(recipe.methods) - {recipe.baseline}
    page = (shared_run / "report.html").read_text()
    assert all(name in page for name in recipe.methods)


def test_real_pairs_through_the_shipped_recipe(shared_run, tmp_path, data_dir):
    """The recipe for one's own pairs, in its fast profile and smaller still, with named models the second time."""
    overrides = fast(data_dir)
    recipe = ROOT / "recipes" / "local-pairs" / "tvkd.yaml"
    results = run_recipe(load_recipe(recipe, overrides, fast=True), shared_run)
    for name in ("dpo", "tvkd"):
        assert results["methods"][name]["reward_accuracy"]["n"] == prompts_of_test(data_dir)
    assert results["differences"]["tvkd"]["reward_accuracy"]["over"] == "test prompts"

    root = shared_run / "seed-0"
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


@pytest.mark.parametrize("path", SMOLLM2, ids=lambda path: path.stem)
def test_the_recipes_for_smollm2_take_directories_and_heal_the_student_first(
    tmp_path, make_model, tokenizer, pairs, path
):
    make_model().save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    write_jsonl(tmp_path / "pairs.jsonl", list(pairs))
    shipped, small = load_recipe(path, only=["all"]), tmp_path / "small"
    overrides = [f"data.{part}={tmp_path / 'pairs.jsonl'}" for part in ("train", "test")]
    overrides += [f"model.teacher={small}", f"reward_model.model.from={small}"]
    overrides += [f"model.teacher_reference={small}"] if shipped.model.teacher_reference else []
    pruned = shipped.model.student_layers is not None
    overrides += [f"model.student={{from: {small}, layers: 1}}" if pruned else f"model.student={small}"]
    named = {shipped.model.name_of(role) for role in ("teacher", "student", "teacher_reference")} - {None}
    assert all(name.startswith("HuggingFaceTB/SmolLM2-") for name in {*named, shipped.reward_model.source})
    for fast in (False, True):
        recipe = load_recipe(path, overrides, fast=fast, only=["all"])
        steps = {step["name"]: step for step in plan_recipe(recipe, tmp_path / "run")["steps"]}
        assert ("student-base" in steps) == pruned
        assert all("student-sft" in steps[f"distill-{name}-0"]["inputs"] for name in recipe.methods)
        assert steps["reward-model"]["inputs"] == ["reward-model-pairs", "tokenizer", "reward-model-base"]
    assert not any(method.disproportion() for method in methods_of(shipped, without={"tvkd-raw"}))
    assert all(method.disproportion() for method in methods_of(shipped, without=shipped.methods.keys() - {"tvkd-raw"}))


def methods_of(recipe, without):
    return [make_method(run.method, run.options) for name, run in recipe.methods.items() if name not in without]
