"""Benchmarks through the lm-evaluation-harness, with a task file and data of our own: no network."""

import json
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.evaluation.benchmarks import GROUPS, known_tasks, run_benchmarks

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="the lm-evaluation-harness (extra lm-eval) is not installed"
)

TASK = """
task: care
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
"""


@pytest.fixture(scope="module")
def questions():
    words = ["teacher", "student", "prompt", "care", "answers", "reads", "long"]
    return [
        {"question": f"the {a} {b}", "choices": [a, b, "small"], "answer": i % 3}
        for i, (a, b) in enumerate(zip(words, [*words[1:], words[0]], strict=True))
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, questions):
    """A directory with a task file, and its data; one for all tests, because the harness takes its time to look."""
    place = tmp_path_factory.mktemp("harness")
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (place / "tasks").mkdir()
    (place / "tasks" / "care.yaml").write_text(TASK.format(data=place / "data.jsonl"))
    return place / "tasks"


def by_hand(model, tokenizer, questions):
    """Whether the likeliest choice after the question, a blank between them, is the right one."""
    right = []
    for row in questions:
        scores = []
        for choice in row["choices"]:
            start = tokenizer(row["question"])["input_ids"]
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logps[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        right.append(scores.index(max(scores)) == row["answer"])
    return right


@needs_harness
def test_a_local_task_by_hand(tasks, make_model, tokenizer, questions):
    model = make_model(4)
    results = run_benchmarks(model, tokenizer, ["care"], include=tasks)
    right = by_hand(model, tokenizer, questions)
    assert 0 < sum(right) < len(right)
    task = results["tasks"]["care"]
    assert task["metrics"]["acc"]["mean"] == pytest.approx(sum(right) / len(right))
    mean = sum(right) / len(right)
    assert task["metrics"]["acc"]["se"] == pytest.approx((mean * (1 - mean) / (len(right) - 1)) ** 0.5)
    assert (task["version"], task["shots"], task["n"]) == (1.5, 0, 7)
    assert results["lm_eval"] == version("lm_eval")
    assert "groups" not in results


@needs_harness
def test_the_verb_keeps_stdout_for_its_json(tasks, tmp_path, make_model, tokenizer, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_model(4).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["evaluate", "--model", "model", "--lm-eval", "care", "--lm-eval-include", str(tasks), "--out", "e.json"]
    assert main([*command, "--limit", "3", "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    assert results == json.loads((tmp_path / "e.json").read_text())
    assert results["benchmarks"]["tasks"]["care"]["n"] == 3
    assert results["benchmarks"]["limit"] == 3
    command[command.index("care")] = "care,hellaswagg"
    assert main([*command, "--limit", "3"]) == 2
    assert "has no task 'hellaswagg'; did you mean hellaswag" in capfd.readouterr().err


@needs_harness
def test_the_leaderboards_are_groups_of_the_installed_harness(tasks):
    index = known_tasks(str(tasks)).task_index
    first = [part["task"] for part in index[GROUPS["open-llm-leaderboard"]].cfg["task"]]
    assert set(first) == {"arc_challenge", "hellaswag", "truthfulqa", "mmlu", "winogrande", "gsm8k"}
    assert GROUPS["open-llm-leaderboard-2"] in index


def test_a_missing_harness_names_the_extra_to_install(make_model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install \"prefdistill\[lm-eval\]\""):
        run_benchmarks(make_model(), tokenizer, ["care"])
