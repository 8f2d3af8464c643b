"""Recipes whose teacher reads the conversations in a form of its own, or is a GGUF file."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.data.encoder import Encoder
from prefdistill.data.load import load_pairs
from prefdistill.experiment.check import check_plan
from prefdistill.experiment.inputs import Sources, source_fingerprints
from prefdistill.experiment.plan import build_plan
from prefdistill.experiment.readings import read_of
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.report import render_html, render_markdown
from support.runs import small_run
from support.tiny_runs import QUICKSTART, rebuilt

PLAIN = "model.teacher_chat_template=plain"
SYSTEM = "model.teacher_system_prompt=Be kind."
PREFIX = 'model.teacher_response_prefix="- "'


def planned(recipe, *changes):
    return build_plan(load_recipe(recipe, changes), QUICKSTART.parent / "nowhere", 0)


def test_a_form_changes_the_keys_of_what_is_read_from_the_teachers_alone(named, tmp_path):
    before = {step.name: step.key for step in planned(named / "recipe.yaml").steps}
    plan = planned(named / "recipe.yaml", PLAIN, SYSTEM, PREFIX)
    with pytest.raises(UserError, match=r"adpa needs .* another chat template .* the keys of the teacher's form out"):
        check_plan(plan)
    same = {step.name for step in plan.steps if before[step.name] == step.key}
    of_students = {"signals-reference-train", "signals-reference-test", "distill-dpo-0", "evaluate-dpo-0"}
    assert same == {*of_students, "sample-start"}
    prompt, context = [{"role": "user", "content": "Hi"}], plan.context
    texts = {role: Encoder(context.tokenizer_of(role).tokenizer).text(prompt) for role in ("teacher", "student")}
    assert texts["teacher"].endswith("System:\nBe kind.\n\nUser:\nHi\n\nAssistant:\n- ")
    assert "System:" not in texts["student"]  # the tokenizer that both would share
    assert context.tokenizer_of("teacher_reference") is context.tokenizer_of("teacher")
    assert not context.two_vocabularies

    read = read_of(plan)
    form = {"chat_template": "plain", "system_prompt": "Be kind.", "response_prefix": "- "}
    assert read["teacher_tokenizer"]["form"] == form
    run = small_run(tmp_path, {"methods": {"tvkd": {"r": 1.5}}, "read": read})
    for page in (render_html([run]), render_markdown([run])):
        assert "in a form of its own: as plain text; system prompt" in page


def test_teacher_and_student_respond_to_the_prompts_that_both_accept(mine, tmp_path, capsys):
    """Each template refuses another system message, and the teacher's writes more before one prompt."""
    rows = load_pairs(str(mine / "pairs.parquet")).to_list()
    for row, word in ((1, "teacher"), (5, "student"), (6, "teacher"), (7, "both")):
        rows[row]["prompt"] = [{"role": "system", "content": word}, *rows[row]["prompt"]]
    rows[9]["prompt"] = [{"role": "user", "content": "long"}]
    Dataset.from_list(rows).to_parquet(str(mine / "pairs.parquet"))
    template = mine / "student-sft" / "chat_template.jinja"
    text = template.read_text()
    refuse = "{%% if messages[0].content in ('both', '%s') %%}{{ raise_exception('no system') }}{%% endif %%}"
    template.write_text(refuse % "student" + text)
    longer = "{% if messages[0].content == 'long' %}{{ bos_token * 60 }}{% endif %}"
    (mine / "teacher.jinja").write_text(refuse % "teacher" + longer + text)
    changes = [
        f"model.teacher_chat_template={mine / 'teacher.jinja'}",
        'methods={"dpkd": {}}',
        "orders=1",
        "baseline=dpkd",
    ]
    out, recipe = tmp_path / "run", load_recipe(mine / "recipe.yaml", [*changes, "sampling.max_new_tokens=8"])
    results = run_recipe(recipe, out)
    samples = [
        load_pairs(str(out / "seed-0" / name / "responses.jsonl"), responses=(column,))
        for name, column in (("sample-teacher", "teacher_response"), ("sample-start", "student_response"))
    ]
    accepted_prompts = [row["prompt"] for number, row in enumerate(rows) if number not in (1, 5, 6, 7, 9)]
    assert [[m["content"] for m in prompt] for prompt in samples[0]["prompt"]] == [
        [m["content"] for m in prompt] for prompt in accepted_prompts
    ]
    assert samples[0]["prompt"][:] == samples[1]["prompt"][:]
    read = {stage["name"]: stage["read"] for stage in results["stages"]}
    refused, long = (
        "the chat template refuses its messages",
        "the prompt leaves no room for a response within max_length",
    )
    counts = {"rows": len(rows), "kept": len(accepted_prompts)}
    assert read["sample-teacher"].items() >= counts.items() <= read["sample-start"].items()
    assert read["sample-teacher"]["dropped"] == {
        refused: 2,
        long: 1,
        f"{refused}, as the student reads it": 2,
    }
    teacher = "as the teacher reads it"
    assert read["sample-start"]["dropped"] == {refused: 1, f"{refused}, {teacher}": 3, f"{long}, {teacher}": 1}
    assert f"sample-start: dropped 4 rows: {refused}, {teacher} (3, first row 1)" in capsys.readouterr().err
    # they are part of the key: a template that refuses others
    template.write_text(text)
    assert {"sample-teacher", "sample-start"} <= rebuilt(run_recipe(recipe, out))


def test_the_template_of_a_teacher_is_part_of_the_keys_by_its_text(named, tmp_path):
    file = tmp_path / "mine.jinja"
    key = f"model.teacher_chat_template={file}"
    body = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"

    def prints(text):
        file.write_text(text + "{% if add_generation_prompt %}assistant: {% endif %}", encoding="utf-8")
        plan = planned(named / "recipe.yaml", key)
        fingerprint = source_fingerprints(load_recipe(named / "recipe.yaml", [key]), Sources())["teacher_form"]
        return fingerprint, {step.name: step.key for step in plan.steps}["signals-teacher-test"]

    first, again, other = prints(body), prints(body), prints("Talk:\n" + body)
    moved = str(shutil.move(file, tmp_path / "moved.jinja"))
    file.write_text("")
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]
    recipe = load_recipe(named / "recipe.yaml", [f"model.teacher_chat_template={moved}"])
    assert source_fingerprints(recipe, Sources())["teacher_form"] == other[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.teacher_chat_template=none.jinja"], "no chat template at 'none.jinja'"),
        (["model.teacher_template_kwargs={enable_thinking: false}"], "has no variable 'enable_thinking'"),
        (["model.teacher_gguf_file=none.gguf"], r"no GGUF file none\.gguf in .*teacher-dpo"),
        (["model.teacher=null", PLAIN, "model.scratch={teacher: {}, student: {}}"], "name model.teacher or"),
        (["model.teacher=null", "model.teacher_gguf_file=a.gguf"], "is a file of model.teacher; name that too"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_plan(named, changes, message):
    with pytest.raises(UserError, match=message):
        check_plan(
            planned(named / "recipe.yaml", *changes, "model.teacher_reference=null", "methods={dpo: {}, tvkd: {}}")
        )


def test_a_gguf_teacher_is_named_by_its_place(named):
    recipe = load_recipe(named / "recipe.yaml", ["model.teacher_gguf_file=q8.gguf"])
    assert Path(str(recipe.model.teacher)) == named / "teacher-dpo" / "q8.gguf"
    assert load_recipe(named / "recipe.yaml", [f"model={json.dumps(recipe.model.model_dump())}"]).model == recipe.model
