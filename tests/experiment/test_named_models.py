"""Runs with models of the user's: what identifies them, and what depends on them."""

import json
import shutil

import pytest

from prefdistill.core.errors import UserError
from prefdistill.core.files import write_jsonl
from prefdistill.data.load import load_pairs
from prefdistill.experiment.doctor import examine
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.experiment.show_plan import plan_recipe
from prefdistill.models.load import load_model
from support.tiny_runs import QUICKSTART, ROOT, change_weights, rebuilt, stages


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
    changed = {name for name, reused in again.items() if not reused}
    assert changed == {
        "signals-teacher_reference-test",
        "signals-teacher_reference-student_response-start",
        "distill-adpa-0",
        "evaluate-adpa-0",
    }


def test_seeds_share_the_steps_that_draw_nothing(mine, tmp_path):
    """The signals of a named teacher are the same for every seed; those of a start that each seed trains are not."""
    recipe = load_recipe(mine / "recipe.yaml", ["seeds=2", "student.sft={max_steps: 1}"])
    planned = plan_recipe(recipe, tmp_path / "run")["steps"]
    reused = {step["name"] for step in planned if step["seed"] == 1 and step["action"] == "reuse"}
    assert reused == {"signals-teacher-train", "signals-teacher-test", "signals-teacher_reference-test"}
    assert {step["action"] for step in planned if step["seed"] == 0} == {"run"}
    results = run_recipe(recipe, tmp_path / "run")
    assert {stage["name"] for stage in results["stages"] if stage["reused"]} == reused
    for name in ("signals-teacher-train", "signals-reference-train"):
        first, second = (tmp_path / "run" / f"seed-{seed}" / name for seed in (0, 1))
        same = {
            file.relative_to(first)
            for file in first.rglob("*.parquet")
            if file.samefile(second / file.relative_to(first))
        }
        assert bool(same) == (name in reused)
    assert set(stages(run_recipe(recipe, tmp_path / "run")).values()) == {True}


def test_models_are_identified_by_content_not_by_place(mine, tmp_path):
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
def test_a_model_that_changes_during_the_run_stops_it(mine, tmp_path, monkeypatch, during):
    import prefdistill.experiment.steps.students as students

    def fit_meanwhile(trainer, out, what, **options):
        real(trainer, out, what, **options)
        if what == during:
            change_weights(mine / "teacher-dpo")

    real = students.fit
    with monkeypatch.context() as context:
        context.setattr(students, "fit", fit_meanwhile)
        with pytest.raises(UserError, match="teacher-dpo was changed during the run"):
            run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "run")
    trained = {path.parent.name for path in tmp_path.glob("run/seed-0/distill-*/model.safetensors")}
    assert trained == {"distill-dpo-0"}  # which does not depend on the teacher
    results = run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "run")
    assert stages(results)["distill-dpo-0"]
    new = run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "new")
    assert (results["methods"], results["shaping"]) == (new["methods"], new["shaping"])


def test_chat_template_and_trusted_code_are_part_of_the_key(mine, tmp_path):
    out, recipe = tmp_path / "run", mine / "recipe.yaml"
    run_recipe(load_recipe(recipe), out)
    for name in ("teacher-dpo", "teacher-sft", "student-sft"):
        template = mine / name / "chat_template.jinja"
        template.write_text("reverse: " + template.read_text())
    again = stages(run_recipe(load_recipe(recipe), out))
    assert not any(again.values())
    assert not any(stages(run_recipe(load_recipe(recipe, ["model.trust_remote_code=true"]), out)).values())


def test_only_dependants_of_a_changed_teacher_are_rebuilt(mine, tmp_path):
    run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "run")
    change_weights(mine / "teacher-dpo")
    again = stages(run_recipe(load_recipe(mine / "recipe.yaml"), tmp_path / "run"))
    changed = {name for name, reused in again.items() if not reused}
    assert changed == {"signals-teacher-test", "signals-teacher-train", "distill-tvkd-0", "evaluate-tvkd-0"}


def test_pairs_of_a_named_teacher_depend_on_its_reference_and_the_prompts(mine, tmp_path):
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


def test_a_tokenizer_is_not_trained_on_other_columns(finished, tmp_path):
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
    tokenizers = []
    for text in ("of no part", "xyzzy " * 9):
        write_jsonl(tmp_path / "pairs.jsonl", [{**row, "completion": text} for row in pairs])
        run_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / text[:2])
        tokenizers.append((tmp_path / text[:2] / "seed-0" / "init" / "tokenizer" / "tokenizer.json").read_bytes())
    assert tokenizers[0] == tokenizers[1]


def test_models_from_scratch_get_the_tokenizer_of_the_named_model(mine, tmp_path):
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    scratch = f"model.scratch={json.dumps({'teacher': shape, 'student': shape, 'vocab_size': 300})}"
    recipe = [mine / "recipe.yaml", ["model.student=null", scratch, "model.teacher_reference=null"]]
    first = stages(run_recipe(load_recipe(*recipe), tmp_path / "run"))
    assert not first["init"]
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


def test_a_named_reference_with_other_tokens_is_refused(named, tmp_path):
    shutil.copytree(named / "teacher-sft", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"reverse"', '"backwards"'))
    recipe = load_recipe(named / "recipe.yaml", [f"model.teacher_reference={tmp_path / 'other'}"])
    with pytest.raises(UserError, match=r"other have different tokenizers: .*e\.g\. 'reverse'"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_of_fewer_layers_is_a_step_of_the_run(tmp_path, make_model, tokenizer, pairs):
    whole, out = tmp_path / "whole", tmp_path / "run"
    make_model().save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    write_jsonl(tmp_path / "pairs.jsonl", list(pairs))
    raw = {
        "name": "fewer",
        "data": {"train": str(tmp_path / "pairs.jsonl")},
        "model": {"teacher": str(whole), "student": {"from": str(whole), "layers": 1}},
        "training": {"max_steps": 1, "batch_size": 4},
        "methods": {"dpo": {}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "again.yaml").write_text(recipe.as_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe

    planned = {step["name"]: step for step in plan_recipe(recipe, out)["steps"]}
    run_recipe(recipe, out)
    model = load_model(str(out / "seed-0" / "student-base"))
    size = 4 * model.num_parameters()
    assert model.config.num_hidden_layers == 1
    assert planned["student-base"]["disk"] == planned["distill-dpo-0"]["disk"] == size
    assert planned["student-base"]["memory"] == 2 * size + 4 * make_model().num_parameters()
    assert planned["distill-dpo-0"]["memory"] == 4 * size
    checkup = examine(recipe=recipe, out=out)
    assert checkup.facts["models"]["student"] == {"parameters": model.num_parameters()}
    assert checkup.facts["disk"]["weights of the student with fewer layers"] == size

    # other layers are another student, also in a study's cells, which share everything of the same key
    other = load_recipe(tmp_path / "recipe.yaml", ["model.student.layers=[0]"])
    assert rebuilt(run_recipe(other, out)) == {
        "student-base",
        "signals-reference-train",
        "distill-dpo-0",
        "evaluate-dpo-0",
    }
    assert other.cache_key() != recipe.cache_key()
    shutil.copytree(whole, tmp_path / "copy")
    moved = load_recipe(
        tmp_path / "recipe.yaml", [f"model.student.from={tmp_path / 'copy'}", "model.student.layers=[0]"]
    )
    assert not rebuilt(run_recipe(moved, out))
    assert moved.cache_key() == other.cache_key()

    too_many = load_recipe(tmp_path / "recipe.yaml", ["model.student.layers=2"])
    with pytest.raises(UserError, match="layers must be fewer than the 2 of the whole model"):
        run_recipe(too_many, tmp_path / "refused")
    assert "model.student: layers must be fewer" in str(examine(recipe=too_many).to_json()["findings"])
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("{from: a, layers: 0}", "model.student.layers must be greater than 0 or a valid list, got 0"),
        ("{from: a, layer: 2}", "unknown key 'model.student.layer'; did you mean 'layers'?"),
        ("{layers: 2}", "model.student.from is missing"),
        ("4", "model.student must be a valid string or a valid mapping, got 4"),
    ],
)
def test_what_is_wrong_with_a_student_of_fewer_layers_is_named(student, message):
    recipe = ROOT / "recipes" / "named-models.yaml"
    with pytest.raises(UserError) as error:
        load_recipe(recipe, ["data.train=x", "model.teacher=y", f"model.student={student}"])
    assert str(error.value) == f"{recipe}: {message}"
