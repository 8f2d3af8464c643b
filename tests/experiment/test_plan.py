"""The plan: what it lists before a run is what the run does; what it says of steps that are on disk."""

import json
import shutil

import pytest

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.core.files import write_jsonl
from prefdistill.data.load import load_pairs
from prefdistill.experiment.check import check_plan
from prefdistill.experiment.plan import build_plan, build_plans
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.experiment.show_plan import as_text, plan_recipe
from prefdistill.experiment.step import Input, Step
from support.tiny_runs import QUICKSTART, SMALL, TINY, stages

SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def keys_on_disk(out):
    return {path.parent.name: json.loads(path.read_text())["key"] for path in out.glob("seed-0/*/stage.json")}


def actions(plan):
    return {step["name"]: step["action"] for step in plan["steps"]}


def test_the_plan_lists_what_the_run_does(finished, tmp_path):
    out, results = finished
    plan = build_plan(load_recipe(QUICKSTART, TINY), tmp_path / "run", 0)
    assert [(step.name, step.kind) for step in plan.steps] == [(s["name"], s["kind"]) for s in results["stages"]]
    assert {step.name: step.key for step in plan.steps} == keys_on_disk(out)  # known before anything has run
    assert not (tmp_path / "run").exists()


def test_every_step_stands_behind_the_steps_that_it_reads():
    plan = build_plan(load_recipe(QUICKSTART, only=["all"]), QUICKSTART.parent / "nowhere", 0)
    for place, step in enumerate(plan.steps):
        assert set(step.after) <= set(plan.steps[:place]), step.name
    names = {step.name: [other.name for other in step.after] for step in plan.steps}
    assert {"distill-dckd-0", "sample-dckd-0", "signals-teacher-student_response-dckd-0"} <= {
        *names["distill-adpa-plus-0"]
    }
    assert names["evaluate-teacher"] == ["teacher-dpo", "data"]


def test_every_seed_and_order_is_planned(tmp_path):
    plans = build_plans(load_recipe(QUICKSTART, ["seeds=2", "orders=2"], only=["tvkd"]), tmp_path)
    assert [plan.context.seed for plan in plans] == [0, 1]
    for plan in plans:
        orders = [step.order for step in plan.steps if step.kind == "distill" and step.method == "tvkd"]
        assert orders == [0, 1]
    first, second = ({step.key for step in plan.steps} for plan in plans)
    assert not first & second


def test_keys_that_depend_on_a_trained_tokenizer_are_known_before_it_is(finished, tmp_path):
    pairs = load_pairs(str(finished[0] / "seed-0" / "pairs" / "train.jsonl"))
    pairs.select_columns(["prompt", "chosen", "rejected"]).to_json(str(tmp_path / "pairs.jsonl"))
    recipe = {
        "name": "scratch",
        "data": {"train": str(tmp_path / "pairs.jsonl"), "test": str(tmp_path / "pairs.jsonl"), "max_length": 48},
        "model": {"scratch": {"teacher": SHAPE, "student": SHAPE, "vocab_size": 300}},
        "training": {"max_steps": 1},
        "reward_model": {"share": 0.3, "model": SHAPE},
        "evaluate": {"prompts": 2, "max_new_tokens": 4},
        "methods": {"dpo": {}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    plan = build_plan(recipe, tmp_path / "run", 0)
    before = {step.name: step.key for step in plan.steps}
    results = run_recipe(recipe, tmp_path / "run")
    assert before == keys_on_disk(tmp_path / "run")
    assert {step["rows"] for step in plan_recipe(recipe, tmp_path / "run")["steps"] if step["kind"] == "distill"}
    assert set(actions(plan_recipe(recipe, tmp_path / "run")).values()) == {"reuse"}
    # the reward model depends on the tokenizer, not on the shape of the student
    wider = load_recipe(tmp_path / "recipe.yaml", ["model.scratch.student.hidden_size=16"])
    rebuilt = {name for name, action in actions(plan_recipe(wider, tmp_path / "run")).items() if action == "rebuild"}
    assert {"init", "distill-dpo-0", "evaluate-dpo-0", "evaluate-start"} <= rebuilt
    assert not {"reward-model", "evaluate-reward-model", "evaluate-teacher"} & rebuilt
    assert {name for name, reused in stages(run_recipe(wider, tmp_path / "run")).items() if not reused} == rebuilt
    assert results["reward_model"]["pairs"] > 0


def test_weights_of_rows_are_an_input_of_the_methods_that_name_them(tmp_path, pairs, tokenizer, make_model, capsys):
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = {
        "name": "weighted",
        "data": {"train": str(tmp_path / "pairs.jsonl"), "test": str(tmp_path / "test.jsonl")},
        "model": dict.fromkeys(("teacher", "student"), str(tmp_path / "model")),
        "training": {"max_steps": 1},
        "reward_model": None,
        "methods": {"dpo": {}, "weighted": {"method": "dpo", "weight": "weight"}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    write_jsonl(tmp_path / "test.jsonl", list(pairs))

    def keys(weights):
        weighted = [dict(row) | {"weight": weight} for row, weight in zip(pairs, weights, strict=True)]
        write_jsonl(tmp_path / "pairs.jsonl", weighted)
        plan = build_plan(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run", 0)
        check_plan(plan)
        return {step.name: step.key for step in plan.steps}

    first, second = keys([1.0] * 24), keys([1.0] * 23 + [0.5])
    assert {name for name in first if first[name] != second[name]} == {"distill-weighted-0", "evaluate-weighted-0"}
    assert "not read" not in capsys.readouterr().err
    with pytest.raises(UserError, match="weights must be 0 or more, not all 0; the least in column 'weight' is -1"):
        keys([-1.0] + [1.0] * 23)
    with pytest.raises(UserError, match=r"weighted needs a number in 'weight' for every pair; 1 of data\.train"):
        keys([None] + [1.0] * 23)
    with pytest.raises(UserError, match=r"dpo needs a column 'weight' of the data; the built-in task has none"):
        check_plan(build_plan(load_recipe(QUICKSTART, ["methods.dpo.weight=weight"]), tmp_path / "run", 0))


def test_two_steps_of_one_name_are_refused(tmp_path):
    methods = ["methods.adpa.rounds=2", "methods.adpa-0-round={method: dpo, first_order: 1}"]
    recipe = load_recipe(QUICKSTART, [*methods, "orders=1"], only=["adpa", "adpa-0-round"])
    with pytest.raises(UserError, match="two steps of this run would be named distill-adpa-0-round-1"):
        build_plan(recipe, tmp_path, 0)


# -- what is on disk ---------------------------------------------------------------------------------------------------


def test_after_a_run_everything_is_reused(finished):
    plan = plan_recipe(load_recipe(QUICKSTART, TINY), finished[0])
    assert set(actions(plan).values()) == {"reuse"}
    assert plan["totals"]["actions"] == {"reuse": len(plan["steps"])}
    assert not any(step["reason"] or step["changes"] for step in plan["steps"])


def test_a_changed_option_is_the_reason_of_its_dependants_alone(finished):
    plan = plan_recipe(load_recipe(QUICKSTART, [*TINY, "methods.tvkd.alpha=0.2"]), finished[0])
    steps = {step["name"]: step for step in plan["steps"]}
    rebuilt = {name for name, action in actions(plan).items() if action != "reuse"}
    assert rebuilt == {"distill-tvkd-0", "distill-tvkd-1", "evaluate-tvkd-0", "evaluate-tvkd-1"}
    assert steps["distill-tvkd-0"]["reason"] == "options.alpha is 0.2, was 0.3"
    assert steps["distill-tvkd-0"]["changes"] == [{"path": "options.alpha", "was": 0.3, "is": 0.2}]
    assert steps["evaluate-tvkd-0"]["reason"] == "distill-tvkd-0 changed"
    assert "distill-tvkd-1: rebuild: options.alpha is 0.2, was 0.3" in as_text(plan)


def test_unfinished_and_damaged_steps_are_told_apart(copy):
    (copy / "seed-0" / "teacher-sft" / "stage.json").unlink()
    (copy / "seed-0" / "student-sft" / "model.safetensors").unlink()
    shutil.rmtree(copy / "seed-0" / "distill-dpo-0")
    plan = plan_recipe(load_recipe(QUICKSTART, TINY), copy)
    unlike = {name: action for name, action in actions(plan).items() if action != "reuse"}
    assert unlike == {"teacher-sft": "resume", "student-sft": "rebuild", "distill-dpo-0": "run"}
    student = next(step for step in plan["steps"] if step["name"] == "student-sft")
    assert student["reason"] == "model.safetensors is missing or damaged"


def test_the_plan_changes_nothing_and_loads_no_weights(named, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    for module in ("models.load", "experiment.steps.synthetic", "experiment.steps.students", "training.trl"):
        monkeypatch.setattr(f"prefdistill.{module}.load_model", refuse)
    plan = plan_recipe(load_recipe(named / "recipe.yaml"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert set(actions(plan).values()) == {"run"}
    steps = {step["name"]: step for step in plan["steps"]}
    pairs = len(load_pairs(str(named / "pairs.parquet")))
    assert steps["signals-reference-train"]["rows"] == pairs
    assert steps["signals-reference-train"]["exact"]
    assert steps["signals-reference-train"]["tokens"] > 10 * pairs
    assert not steps["sample-start"]["exact"]
    assert steps["distill-dpo-0"]["rows"] == 2 * 8  # steps times batch
    assert all(step["memory"] > 0 for step in plan["steps"])
    assert steps["distill-dpo-0"]["memory"] > steps["distill-dpo-0"]["disk"] > 0


def test_the_disk_that_is_planned_bounds_what_a_run_writes(finished):
    out, results = finished
    plan = plan_recipe(load_recipe(QUICKSTART, TINY), out)
    planned = {step["name"]: step["disk"] for step in plan["steps"]}
    for stage in results["stages"]:
        if stage["kind"] in ("sft", "dpo", "distill", "init"):
            weights = sum(path.stat().st_size for path in (out / stage["directory"]).rglob("*.safetensors"))
            assert 0 < planned[stage["name"]] <= weights
        if stage["kind"] == "signals":
            shards = [path.stat().st_size for path in (out / stage["directory"]).rglob("*.parquet")]
            assert sum(shards) < planned[stage["name"]] + 6_000 * len(shards)  # a file has a footer


# -- one model in two roles --------------------------------------------------------------------------------------------


def test_self_distillation_reads_one_model_in_two_roles(mine, tmp_path):
    """The same directory as teacher and as start: each is read as its role says, and as if it lay in two places."""
    teacher = mine / "teacher-dpo"
    overrides = [
        "model.teacher_reference=null",
        "signals.dtype=bfloat16",
        "evaluate={prompts: 4, max_new_tokens: 6}",
    ]
    alike = load_recipe(mine / "recipe.yaml", [*overrides, f"model.student={teacher}"])
    plan = build_plan(alike, tmp_path / "alike", 0)
    of_teacher, of_start = (plan.evaluations[name][0] for name in ("teacher", "start"))
    assert of_teacher.model is not of_start.model
    assert of_teacher.model.place == of_start.model.place
    assert (of_teacher.options["dtype"], of_start.options["dtype"]) == ("bfloat16", "float32")

    shutil.copytree(teacher, mine / "copy")
    apart = load_recipe(mine / "recipe.yaml", [*overrides, f"model.student={mine / 'copy'}"])
    assert {step.key for step in plan.steps} == {step.key for step in build_plan(apart, tmp_path / "apart", 0).steps}
    one, two = (run_recipe(recipe, tmp_path / name) for recipe, name in ((alike, "alike"), (apart, "apart")))
    assert one["methods"] == two["methods"]
    for name, dtype in (("teacher", "bfloat16"), ("start", "float32")):
        seal = tmp_path / "alike" / "seed-0" / f"evaluate-{name}" / "responses.jsonl.meta.json"
        assert json.loads(seal.read_text())["request"]["dtype"] == dtype


def test_inputs_and_steps_are_equal_only_to_themselves():
    assert Step.__eq__ is Input.__eq__ is object.__eq__
    assert Step.__hash__ is Input.__hash__ is object.__hash__


def test_the_verb_prints_the_table_or_one_json_object(named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(named / "recipe.yaml")
    assert main(["plan", recipe, "--methods", "dpo"]) == 0
    assert "distill-dpo-0" in capsys.readouterr().out
    assert main(["plan", recipe, "--methods", "dpo", "--out", "run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["out"] == "run"
    assert plan["totals"]["steps"] == len(plan["steps"]) > 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=nowhere.jsonl", "nowhere.jsonl: no such file or directory"),
        ("model.teacher=nowhere/model", "no tokenizer at 'nowhere/model'"),
        ("training.batch_size=9", "batch_size=9 is not a multiple of micro_batch_size"),
        ("methods.dpo.gamma=1", "dpo has no option 'gamma'"),
        ("training.lora={target_modules: [nope]}", "training.lora: "),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(named, capsys, override, message):
    assert main(["plan", str(named / "recipe.yaml"), override]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("prefdistill: ")
    assert message in line


def test_the_plan_of_a_small_recipe_is_a_table(tmp_path):
    plan = plan_recipe(load_recipe(QUICKSTART, [*SMALL, "seeds=2"], only=["tvkd"]), tmp_path / "run")
    lines = as_text(plan).splitlines()
    assert lines[0].split() == ["step", "kind", "action", "rows", "tokens", "memory", "disk", "reads"]
    assert lines[1].split()[:3] == ["seed-0/data", "data", "run"]
    assert f"{len(plan['steps'])} steps: {len(plan['steps'])} to run" in lines
    assert sum(line.startswith("seed-1/") for line in lines) == len(plan["steps"]) / 2


def test_engines_with_the_same_responses_share_a_key(tmp_path):
    keys = []
    for engine in ("transformers", "ray"):
        recipe = load_recipe(QUICKSTART, [*SMALL, f"sampling.engine={engine}"], only=["seqkd"])
        keys.append([step["key"] for step in plan_recipe(recipe, tmp_path / "run")["steps"]])
    assert keys[0] == keys[1]
