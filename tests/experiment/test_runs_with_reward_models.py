"""Runs that score responses with a reward model, trained or named."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefdistill.core.errors import UserError
from prefdistill.data.load import load_pairs
from prefdistill.experiment.check import check_plan
from prefdistill.experiment.doctor import examine
from prefdistill.experiment.plan import build_plan
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.experiment.show_plan import plan_recipe
from prefdistill.models.load import load_tokenizer
from support.tiny_runs import rebuilt, stages

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


def test_a_reward_model_is_trained_on_prompts_of_its_own_and_scores_every_model(judged, tmp_path):
    out = tmp_path / "run"
    results = run_recipe(load_recipe(judged), out)
    metrics = ["reward_model_win_rate_start", "reward_model_score", "rouge_l", "exact_match", "response_tokens"]
    assert list(results["methods"]) == ["teacher", "start", "dpo"]
    for name in results["methods"]:
        scores = results["methods"][name]
        assert [metric for metric in scores if metric in metrics] == metrics
        for metric in metrics:
            assert (scores[metric]["n"], scores[metric]["over"]) == (10, "test prompts")
            assert scores[metric]["low"] <= scores[metric]["mean"] <= scores[metric]["high"]
        points = results["responses"][name]["points"]
        assert len(points) == 10
        assert sum(score for _, score in points) / 10 == pytest.approx(scores["reward_model_score"]["mean"])
        assert sum(tokens for tokens, _ in points) / 10 == pytest.approx(scores["response_tokens"]["mean"])
    assert results["methods"]["start"]["reward_model_win_rate_start"]["mean"] == 0.5
    assert "reward_accuracy" not in results["methods"]["teacher"]
    assert [name for name, scores in results["methods"].items() if "kl_start" in scores] == ["dpo"]
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
    student_prompts, reward_prompts = (
        {json.dumps(prompt) for prompt in rows["prompt"]} for rows in (data.train, data.reward_pairs)
    )
    assert student_prompts
    assert reward_prompts
    assert not student_prompts & reward_prompts
    assert len(data.train) + len(data.reward_pairs) == len(load_pairs(str(judged.parent / "pairs.jsonl")))
    assert len(reward_prompts) == round(0.3 * len(student_prompts | reward_prompts))
    answers = load_prompts(str(out / "seed-0" / "evaluate-dpo-0" / "responses.jsonl"))
    rescored = RewardModel(str(out / "seed-0" / "reward-model")).score(answers["prompt"][:], answers["response"][:])
    assert results["methods"]["dpo"]["reward_model_score"]["mean"] == pytest.approx(rescored.mean(), abs=1e-5)

    # reused as it is; another judge is another judge, and the students learn from other pairs
    again = run_recipe(load_recipe(judged), out)
    assert all(stages(again).values())
    assert again["methods"] == results["methods"]
    longer = run_recipe(load_recipe(judged, ["reward_model.training.max_steps=3", "evaluate.length_ranges=[4]"]), out)
    assert rebuilt(longer) == {
        "reward-model",
        "evaluate-reward-model",
        "evaluate-teacher",
        "evaluate-start",
        "evaluate-dpo-0",
    }
    assert longer["methods"]["dpo"]["reward_accuracy"] == results["methods"]["dpo"]["reward_accuracy"]
    assert longer["methods"]["dpo"]["reward_model_score"] != results["methods"]["dpo"]["reward_model_score"]


def test_a_reward_model_is_trained_from_a_pretrained_model(judged, tmp_path, make_model, tokenizer):
    source = tmp_path / "pretrained"  # with a tokenizer of its own
    make_model().save_pretrained(source)
    tokenizer.save_pretrained(source)
    training = ["reward_model.training.learning_rate=1e-7", "evaluate.prompts=12"]
    recipe = load_recipe(judged, [f"reward_model.model={{from: {source}}}", *training])
    planned = {step["name"]: step for step in plan_recipe(recipe, tmp_path / "run")["steps"]}
    results = run_recipe(recipe, tmp_path / "run")
    trained = tmp_path / "run" / "seed-0" / "reward-model"
    weights = AutoModelForSequenceClassification.from_pretrained(trained).state_dict()
    assert planned["reward-model"]["disk"] == 4 * sum(weight.numel() for weight in weights.values())
    assert "reward-model-base" in planned["reward-model"]["inputs"]
    for name, weight in make_model().model.state_dict().items():
        torch.testing.assert_close(weights[f"model.{name}"], weight, atol=1e-5, rtol=0)
    assert load_tokenizer(str(trained)).get_vocab() == tokenizer.get_vocab()

    # another model is another judge, fewer layers of it are a third, and nobody else notices
    fewer = load_recipe(judged, [f"reward_model.model={{from: {source}, layers: 1}}", *training])
    assert fewer.cache_key() != recipe.cache_key()
    again = run_recipe(fewer, tmp_path / "run")
    judging = {"reward-model", "evaluate-reward-model", "evaluate-teacher", "evaluate-start", "evaluate-dpo-0"}
    assert rebuilt(again) == judging
    assert AutoConfig.from_pretrained(trained).num_hidden_layers == 1
    assert examine(recipe=fewer).facts["memory"]["reading the reward model"] < 4 * make_model().num_parameters()

    # both judges are reported, beside length and where it says nothing, before what they say
    for run in (results, again):
        assert run["reward_model"].keys() == {"name", "pairs", "accuracy", "longer_is_better", "length_controlled"}
        assert run["methods"]["start"]["reward_model_lc_win_rate_start"]["mean"] == 0.5
        wins = run["methods"]["dpo"]
        assert wins["reward_model_lc_win_rate_start"]["n"] == wins["reward_model_win_rate_start"]["n"] == 12

    copy = shutil.copytree(source, tmp_path / "no-template")
    (copy / "chat_template.jinja").unlink()
    for change, message in (
        (f"reward_model.model={{from: {copy}}}", "has no chat template, and the data are conversations"),
        (f"reward_model.model={{from: {source}, layers: 2}}", "layers must be fewer than the 2 of the whole model"),
        ("reward_model.model={from: missing}", "no reward model at 'missing'"),
    ):
        with pytest.raises(UserError, match=message):
            run_recipe(load_recipe(judged, [change]), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    for model, message in (
        ("{from: a, layer: 1}", "unknown key 'reward_model.model.layer'; did you mean 'layers'?"),
        ("{from: 3}", "reward_model.model.from must be a valid string, got 3"),
        ("3", "reward_model.model must be a mapping of names to values, got 3"),
        ("null", "or a `model` to train it from: {from: NAME}, or the shape of a random one"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load_recipe(judged, [f"reward_model.model={model}"])


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


def test_every_step_drops_rows_that_the_chat_template_refuses(judged, tmp_path, capfd):
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
    log = capfd.readouterr().err
    for stage in ("signals", "sample", "evaluate-reward-model"):
        assert f"{stage}: dropped 2 rows: the chat template refuses its messages (2, first row 1)" in log
    train, judge, test = results["read"]["data"]
    assert (train["name"], judge["name"], test["name"]) == ("train", "reward model", "test")
    assert train["rows"] + judge["rows"] == len(load_pairs(recipe["data"]["train"]))
    assert (test["rows"], test["unread"]) == (12, [])
    assert results["read"]["template"]["tokenizer"] == recipe["model"]["student"]
    read = {stage["name"]: stage["read"] for stage in results["stages"]}
    assert read["signals-reference-test"]["dropped"] == {"the chat template refuses its messages": 2}
    assert read["teacher-dpo"] == read["signals-reference-train"] == read["distill-dpo-0"]  # the same rows and ids
    assert read["teacher-sft"]["data"] == "demonstrations"
    assert (read["reward-model"]["data"], read["reward-model"]["rows"]) == ("reward-model-pairs", judge["rows"])
    assert not results["warnings"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What was read" in page
    assert "2: the chat template refuses its messages" in page
    checkup = examine(recipe=load_recipe(judged))
    doctor = checkup.facts["test"]["read"]
    assert {**doctor, **read["signals-reference-test"]} == {**read["signals-reference-test"], **doctor}


def test_a_named_reward_model_leaves_all_pairs_to_the_students(judged, tmp_path):
    first = run_recipe(load_recipe(judged), tmp_path / "first")
    model = tmp_path / "first" / "seed-0" / "reward-model"
    results = run_recipe(load_recipe(judged, [f"reward_model.name={model}", "seeds=2"]), tmp_path / "run")
    assert "reward-model" not in stages(results)
    assert results["reward_model"]["name"] == str(model)
    assert results["reward_model"]["accuracy"]["mean"] == first["reward_model"]["accuracy"]["mean"]
    assert results["reward_model"]["accuracy"]["over"] == "seeds"
    assert results["by_length"]["rouge_l"][0]["methods"]["dpo"]["over"] == "seeds"


def test_prompts_that_a_named_reward_model_cannot_read_are_refused_first(judged, tmp_path):
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


def test_without_a_reward_model_responses_are_compared_with_the_references(judged, tmp_path):
    results = run_recipe(load_recipe(judged, ["reward_model=null"]), tmp_path / "run")
    assert {"rouge_l", "response_tokens"} <= results["methods"]["dpo"].keys()
    assert "reward_model_score" not in results["methods"]["dpo"]
    assert "judge" not in results
    assert results["responses"] == {}
    bare = run_recipe(load_recipe(judged, ["reward_model=null", "evaluate={}"]), tmp_path / "bare")
    assert list(bare["methods"]) == ["dpo"]
    assert bare["by_length"] == {}


def test_demonstrations_exclude_the_prompts_of_the_reward_model(judged, tmp_path):
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
        ("reward_model={share: 0.2}", "reward_model needs a `name`"),
        ("reward_model.share=1.0", "reward_model.share"),
        ("reward_model.share=0.0001", "leaves none for one side"),
        ("reward_model.training.lora.r=4", "its head is new, so all weights are trained"),
        ("reward_model.name=nowhere", "no reward model at 'nowhere'"),
        ("evaluate.prompts=0", "reward_model has nothing to judge: give evaluate.prompts"),
        ("reward_model.training.batch_size=3", "batch_size"),
        ("reward_model.model.hidden=3", "the shape of a model from scratch has no 'hidden'"),
    ],
)
def test_wrong_reward_models_are_refused(judged, tmp_path, override, message):
    overrides = [override, "reward_model.training.micro_batch_size=2"] if "batch_size" in override else [override]
    with pytest.raises(UserError, match=re.escape(message)):
        run_recipe(load_recipe(judged, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_are_compared_on_the_prompts_that_both_chat_templates_accept(judged, tmp_path, capfd):
    """Else the teacher's responses would stand beside the student's to other prompts."""
    recipe = json.loads(judged.read_text())
    del recipe["model"]["teacher_reference"]
    refuse_system(recipe["model"]["teacher"])
    recipe["model"]["teacher_chat_template"] = str(Path(recipe["model"]["teacher"]) / "chat_template.jinja")
    judged.write_text(json.dumps(recipe))
    add_system(recipe["data"]["train"], 1, 5)
    out = tmp_path / "run"
    results = run_recipe(load_recipe(judged), out)
    assert "evaluate: no response to 2 test prompts, which a chat template refuses" in capfd.readouterr().err
    for name, step in (("teacher", "evaluate-teacher"), ("start", "evaluate-start"), ("dpo", "evaluate-dpo-0")):
        lines = (out / "seed-0" / step / "responses.jsonl").read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        assert len(prompts) == results["methods"][name]["response_tokens"]["n"] == 10
        assert all(prompt[0]["role"] != "system" for prompt in prompts)
        assert "reward_model_win_rate_start" in results["methods"][name]
    # a student's evaluation is not reused where the teacher accepts all
    again = run_recipe(load_recipe(judged, ["model.teacher_chat_template=null"]), out)
    assert not stages(again)["evaluate-start"]
    assert again["methods"]["start"]["response_tokens"]["n"] == 10
