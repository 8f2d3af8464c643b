"""Runs whose teacher has another tokenizer than the student."""

import json

import pytest

from prefdistill.core.errors import UserError
from prefdistill.data.synthetic import build_other_tokenizer
from prefdistill.experiment.check import check_plan
from prefdistill.experiment.inputs import Sources, source_fingerprints
from prefdistill.experiment.plan import build_plan
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.experiment.show_plan import plan_recipe
from prefdistill.models.scratch import random_model
from support.tiny_runs import QUICKSTART, SMALL, stages

OTHER = "data.synthetic.teacher_tokenizer=other"
SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model that reads the words of the built-in task in pieces."""
    place = tmp_path_factory.mktemp("models") / "other"
    tokenizer = build_other_tokenizer()
    random_model(tokenizer, SHAPE, seed=0).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def keys(recipe, *changes, only=None):
    plan = build_plan(load_recipe(recipe, changes, only=only), QUICKSTART.parent / "nowhere", 0)
    return plan.context, {step.name: step.key for step in plan.steps}


def test_a_teacher_of_another_tokenizer_changes_the_keys_of_what_is_read_from_it_alone():
    same, before = keys(QUICKSTART, *SMALL, only=["tvkd"])
    context, after = keys(QUICKSTART, *SMALL, OTHER, only=["tvkd"])
    assert not same.two_tokenizers
    assert same.tokenizer_of("teacher") is same.tokenizer_of("student")
    assert context.two_vocabularies
    assert context.tokenizer_of("teacher_reference").tokenizer.tokenize("sort") == ["s", "ort"]
    unchanged = {name for name in before if before[name] == after[name]}
    assert unchanged == {"data", "student-sft", "evaluate-start"}
    assert after.keys() - before.keys() == {"init-teacher"}


def test_a_named_tokenizer_with_the_same_tokens_changes_no_key(named, other):
    context, default = keys(named / "recipe.yaml")
    assert not context.two_tokenizers
    tokenizer = f"model.teacher_tokenizer={named / 'student-sft'}"
    assert keys(named / "recipe.yaml", tokenizer)[1] == default


def test_a_teacher_from_scratch_is_made_for_its_tokenizer(named, other):
    scratch = json.dumps({"teacher": SHAPE, "student": SHAPE})
    changes = [f"model.scratch={scratch}", "model.teacher=null", "model.teacher_reference=null"]
    context, from_scratch = keys(named / "recipe.yaml", *changes, f"model.teacher_tokenizer={other}", only=["dpo"])
    assert context.tokenizer_of("teacher").tokenizer.name_or_path == other
    assert context.tokenizer_of("student").tokenizer.name_or_path == str(named / "student-sft")
    assert {"init-teacher"} == {name for name in from_scratch if name.startswith("init")}


def test_a_tokenizer_that_is_named_is_watched_for_changes_like_a_model(named):
    place = str(named / "student-sft")
    recipe = load_recipe(
        named / "recipe.yaml", [f"model.teacher_tokenizer={place}", "model.student=other", "methods.tvkd={}"]
    )
    steps = {step.name: step for step in build_plan(recipe, QUICKSTART.parent / "nowhere", 0).steps}
    assert place in steps["signals-teacher-train"].models
    assert place not in steps["signals-reference-train"].models


def test_a_named_teacher_is_read_with_its_own_tokenizer_and_reading_is_priced_in_its_tokens(named, other, capsys):
    changes = [f"model.teacher={other}", "model.teacher_reference=null", "methods.tvkd={}"]
    recipe = load_recipe(named / "recipe.yaml", changes, only=["tvkd"])
    plan = build_plan(recipe, QUICKSTART.parent / "nowhere", 0)
    check_plan(plan)
    readers = {step.name: step.reads_with.tokenizer.name_or_path for step in plan.steps}
    assert {name for name, reader in readers.items() if reader == other} == {
        "signals-teacher-train",
        "signals-teacher-test",
    }
    assert "the teacher is read with its own tokenizer" in capsys.readouterr().err
    tokens = {step["name"]: step["tokens"] for step in plan_recipe(recipe, QUICKSTART.parent / "nowhere")["steps"]}
    assert tokens["signals-teacher-train"] > 1.2 * tokens["signals-reference-train"]
    fingerprints = source_fingerprints(
        load_recipe(named / "recipe.yaml", [*changes, f"model.teacher_tokenizer={other}"], only=["tvkd"]), Sources()
    )
    assert "teacher_tokenizer" in fingerprints


@pytest.mark.parametrize("method", ["vanillakd", "dckd", "adpa", "distillm2", "dpkd-token"])
def test_methods_that_compare_distributions_are_refused_before_anything_runs(method, tmp_path):
    recipe = load_recipe(QUICKSTART, [*SMALL, OTHER], only=[method])
    with pytest.raises(
        UserError, match=rf"methods\.{method} needs teacher\.topk .* the teacher has other tokens .* tvkd"
    ):
        check_plan(build_plan(recipe, tmp_path, 0))


def test_tokens_that_do_not_say_what_they_write_are_not_mapped(tmp_path):
    words = load_recipe(QUICKSTART, [*SMALL, OTHER, "methods.dckd.across=first_token"], only=["dckd"])
    with pytest.raises(UserError, match=r"a single token of .* does not say what text it writes .* no steps\)"):
        check_plan(build_plan(words, tmp_path, 0))


def test_methods_that_read_numbers_of_the_text_pass(tmp_path):
    names = ["tvkd", "seqkd", "dpkd", "dadpo", "oracle-margin", "simpo"]
    check_plan(build_plan(load_recipe(QUICKSTART, [*SMALL, OTHER], only=names), tmp_path, 0))


def test_a_teacher_and_its_reference_have_the_same_tokens(named, other, tmp_path):
    changes = [f"model.teacher={other}", "methods.tvkd={}"]
    recipe = load_recipe(named / "recipe.yaml", changes, only=["tvkd"])
    with pytest.raises(UserError, match=r"other and .*teacher-sft have different tokenizers"):
        check_plan(build_plan(recipe, tmp_path, 0))


def test_the_built_in_tokenizer_is_for_a_teacher_from_scratch(other):
    for name in ("teacher", "teacher_tokenizer"):
        with pytest.raises(UserError, match="teacher_tokenizer is for a teacher from scratch"):
            load_recipe(QUICKSTART, [*SMALL, OTHER, f"model.{name}={other}"])


def test_a_whole_run_with_two_tokenizers(tmp_path):
    changes = [
        *SMALL,
        OTHER,
        *("teacher.sft.max_steps=60", "teacher.sft.learning_rate=0.02"),
        *("student.sft.max_steps=40", "student.sft.learning_rate=0.02"),
    ]
    recipe = load_recipe(QUICKSTART, changes, only=["tvkd", "dpkd"])
    results = run_recipe(recipe, tmp_path / "run")
    assert {"teacher", "start", "dpo", "tvkd", "dpkd"} == results["methods"].keys()
    assert "teacher implicit reward" in results["margin_accuracy"]
    assert not any("other rows or tokens of train" in warning for warning in results["warnings"])
    read = {stage["name"]: stage["read"] for stage in results["stages"] if stage["read"]}
    readers = {name for name, one in read.items() if one["tokenizer"] == "teacher"}
    assert {name for name in read if "teacher" in name} == readers
    assert read["distill-tvkd-0"]["kept"] == read["signals-teacher-train"]["kept"]
    about = results["read"]["teacher_tokenizer"]
    assert (about["tokenizer"], about["tokens"], about["same_tokens"]) == ("made in this run", 71, False)
    assert about["template"]["sha256"] != results["read"]["template"]["sha256"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "The teacher was read with a tokenizer of other tokens than the student's" in report
    assert report.count("Chat template of <code>made in this run</code>") == 2
    assert all(stages(run_recipe(recipe, tmp_path / "run")).values())
