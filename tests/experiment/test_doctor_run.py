"""The doctor on recipes, memory and disk, and as a command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.experiment import memory
from prefdistill.experiment.doctor import as_text, examine, machine
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.models.load import empty_model
from prefdistill.signals import extract_signals
from prefdistill.signals.sizes import store_bytes
from prefdistill.training.options import Training
from support.doctor import (
    FROM_SCRATCH,
    LONG,
    SMALL,
    SUBJECTS,
    checks_found,
    clean,
    config_of,
    edited,
    finding_of,
    model_of,
    recipe_for,
    write,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.mark.parametrize(
    ("there", "check", "severity"),
    [
        ({"available_memory": ("cpu", 10**12, 10**12), "free_disk": 10**12}, "machine.memory", "note"),
        ({"available_memory": ("cpu", 10**5, 10**12), "free_disk": 10**12}, "machine.memory", "warning"),
        ({"available_memory": ("cuda", 10**5, 10**5), "free_disk": 10**12}, "machine.memory", "error"),
        ({"available_memory": ("cpu", 10**12, 10**12), "free_disk": 10**5}, "machine.disk", "error"),
    ],
)
def test_memory_and_disk_are_compared_with_the_machine(tmp_path, tokenizer, monkeypatch, there, check, severity):
    for name, value in there.items():
        monkeypatch.setattr(machine, name, lambda *_, value=value: value)
    model = model_of(tokenizer, tmp_path / "model")
    checkup = examine(write(tmp_path / "pairs.jsonl", clean()), student=model, teacher=model, truncation=LONG)
    assert finding_of(checkup, check).severity == severity
    assert checks_found(checkup) == ({check} if severity != "note" else set())


def test_file_cache_of_a_container_counts_as_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))
    for name, text in (("max", "1000000\n"), ("current", "900000\n"), ("stat", "anon 100000\ninactive_file 700000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine.available_memory() == ("cpu", 800_000, 1_000_000)
    (tmp_path / "memory.stat").unlink()
    assert machine.available_memory() == ("cpu", 100_000, 1_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory()[2] > 1_000_000


def test_an_unwritable_output_is_an_error(tmp_path, tokenizer):
    (tmp_path / "file").write_text("x")
    model = model_of(tokenizer, tmp_path / "model")
    checkup = examine(
        write(tmp_path / "pairs.jsonl", clean()), student=model, truncation=LONG, out=tmp_path / "file" / "x"
    )
    assert finding_of(checkup, "machine.place").severity == "error"
    assert checks_found(checkup) == {"machine.place"}


def test_a_huge_model_is_priced_without_allocating_it(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "huge")
    huge = config_of(tokenizer, hidden_size=65536, intermediate_size=262144, num_hidden_layers=200)
    huge.save_pretrained(tmp_path / "huge")
    checkup = examine(student=str(tmp_path / "huge"))
    assert "model.weights" in checks_found(checkup)  # it is a directory, in which they should be
    assert finding_of(checkup, "machine.memory").severity == "error"
    assert checkup.facts["models"]["student"]["parameters"] > 10**13


def test_training_bytes_are_weights_gradients_and_adam_moments(tmp_path, tokenizer, make_model):
    make_model().save_pretrained(tmp_path / "model")
    empty, model = empty_model(str(tmp_path / "model")), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert empty.num_parameters() == model.num_parameters()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for key, t in state.items() if key.startswith("exp_avg")]
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
    assert memory.training_memory(empty, Training(), "float32").state == sum(t.nbytes for t in held)
    lora = Training.model_validate({"lora": {"r": 2}})
    assert memory.weight_bytes(empty, "float32") < memory.training_memory(empty, lora, "float32").state
    assert (
        memory.training_memory(empty, lora, "float32").state
        < memory.training_memory(empty, Training(), "float32").state
    )


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": ("values", "logps")},
        {"kinds": ("values",), "positions": "endpoints"},
        {"kinds": ("values", "q"), "value_dtype": "float16"},
        {"kinds": ("topk",), "k": 8},
        {"kinds": ("topk",), "k": 8, "topk_coding": "float32"},
        {"kinds": ("topk",), "k": "vocab"},
    ],
    ids=str,
)
def test_store_bytes_predicts_the_size_of_signals(tmp_path, tokenizer, make_model, options):
    draw = np.random.default_rng(0)
    text = lambda: " ".join(draw.choice(SUBJECTS, draw.integers(10, 40)))  # noqa: E731
    pairs = Dataset.from_list([{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(60)])
    store = extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "store", truncation=LONG, **options)
    size = sum(path.stat().st_size for path in (tmp_path / "store" / "shards").iterdir())
    encoded, _ = encode_pairs(pairs, tokenizer, LONG)
    tokens = sum(len(ids) for side in ("chosen", "rejected") for ids in encoded[f"{side}_ids"])
    options = dict(options)
    packed = options.pop("topk_coding", None) != "float32" and options.get("k") != "vocab"
    predicted = store_bytes(options.pop("kinds"), tokens, 2 * len(store), len(tokenizer), packed=packed, **options)
    assert (
        size - 8_000 < predicted < 2 * size
    )  # a file has a footer with a row's ids, and what it compresses is left out


def test_every_check_has_a_test_and_a_line_in_the_docs():
    root = Path(__file__).parents[2]
    doctor = root / "src/prefdistill/experiment/doctor"
    source = "".join(path.read_text(encoding="utf-8") for path in doctor.glob("*.py"))
    checks = set(re.findall(r'"((?:data|tokens|template|vocabulary|model|machine|recipe)\.[a-z-]+)"', source))
    assert len(checks) > 50
    here = Path(__file__).parent
    tests = "".join(path.read_text(encoding="utf-8") for path in here.glob("test_doctor_*.py"))
    docs = (root / "docs/doctor.md").read_text(encoding="utf-8")
    assert {check for check in checks if f'"{check}"' not in tests} == set()
    assert {check for check in checks if not re.search(f"`({check}|{check.partition('.')[2]})`", docs)} == set()


def test_a_recipe_is_priced_stage_by_stage(tmp_path, tokenizer):
    checkup = examine(recipe=recipe_for(tmp_path, tokenizer), out=tmp_path / "runs" / "x")
    assert checks_found(checkup) == set()
    memory, disk = checkup.facts["memory"], checkup.facts["disk"]
    n = checkup.facts["models"]["student"]["parameters"]
    assert memory["training tvkd"] == memory["training wpo"] == 16 * n
    assert memory["training the teacher's DPO"] == 20 * n  # it holds its reference
    assert 4 * n < memory["training tvkd-lora"] < 16 * n
    assert disk["weights of dpo"] == 4 * n
    assert disk["checkpoints while training"] == 2 * 12 * n
    assert any(key.startswith("signals of the teacher on train") and "topk" in key for key in disk)
    assert any(key.startswith("signals of the reference on test") for key in disk)
    assert "sampled responses, at most" in disk
    assert not (tmp_path / "runs").exists()
    assert "training dpo, tvkd, dckd, wpo, seqkd" in as_text(checkup)  # they take the same


def test_save_total_limit_counts_in_disk(tmp_path, tokenizer):
    recipe = recipe_for(tmp_path, tokenizer, "training.arguments.save_total_limit=3")
    facts = examine(recipe=recipe, out=tmp_path / "runs").facts
    parameters = facts["models"]["student"]["parameters"]
    assert facts["disk"]["checkpoints while training"] == (3 + 1) * 12 * parameters


def test_a_reward_model_is_priced(tmp_path, tokenizer):
    judge = f"{{model: {json.dumps(SMALL)}, training: {{epochs: 1}}}}"
    asked = [f"reward_model={judge}", "evaluate.prompts=4"]
    memory = examine(recipe=recipe_for(tmp_path, tokenizer, *asked)).facts["memory"]
    head = SMALL["hidden_size"] * (len(tokenizer) - 1)  # one score in place of the vocabulary
    assert memory["training the reward model"] == memory["training dpo"] - 16 * head
    named = examine(
        recipe=recipe_for(tmp_path, tokenizer, asked[1], f"reward_model={{name: {tmp_path}/model, training: {{}}}}")
    )
    assert "it is a language model" in finding_of(named, "model.shape").message


def test_a_reward_model_need_not_be_a_decoder(tmp_path, tokenizer):
    shape = {"num_labels": 1, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    judge = DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, **shape))
    judge.config.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    asked = [f"reward_model={{name: {tmp_path}/judge, training: {{}}}}", "evaluate.prompts=4"]
    checkup = examine(recipe=recipe_for(tmp_path, tokenizer, *asked))
    assert checks_found(checkup) == set()
    assert checkup.facts["memory"]["reading the reward model"] == 4 * judge.num_parameters()


def test_options_that_leave_nothing_to_learn_are_a_finding(tmp_path, tokenizer):
    checkup = examine(recipe=recipe_for(tmp_path, tokenizer, "methods.far={method: distillm2, skew: 0.99}"))
    finding = finding_of(checkup, "recipe.method")
    assert (finding.severity, finding.message[:28]) == ("warning", "methods.far: skew=0.99 leave")


def test_the_usual_scale_of_a_named_teacher_is_a_finding(tmp_path, tokenizer):
    finding = finding_of(examine(recipe=recipe_for(tmp_path, tokenizer, "methods.tvkd.alpha=-0.7")), "recipe.method")
    assert finding.message.startswith(
        "methods.tvkd: the shaping margin of the pairs will have a spread of about 4.9 nats"
    )
    unnamed = recipe_for(tmp_path, tokenizer, FROM_SCRATCH, "methods.tvkd.alpha=-0.7")
    assert "recipe.method" not in checks_found(examine(recipe=unnamed))


def test_a_start_that_has_seen_the_chosen_responses_of_few_prompts_is_a_finding(tmp_path, tokenizer, monkeypatch):
    heal = "student.sft={learning_rate: 1e-4}"
    recipe = recipe_for(tmp_path, tokenizer, heal)
    finding = finding_of(examine(recipe=recipe), "recipe.start")
    prompts = len(clean())
    assert finding.message.startswith(f"student.sft learns the chosen responses of the {prompts} prompts")
    demonstrations = write(tmp_path / "sft.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(4)])
    for other in ([heal, f"data.sft={demonstrations}"], [heal, FROM_SCRATCH], []):
        assert "recipe.start" not in checks_found(examine(recipe=recipe_for(tmp_path, tokenizer, *other)))
    monkeypatch.setattr("prefdistill.experiment.check.FEW_PROMPTS", prompts)
    assert "recipe.start" not in checks_found(examine(recipe=recipe))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.arguments={save_total_limit: many}"], "save_total_limit must be a valid integer"),
        (["training.lora={target_modules: [nope]}"], "training.lora: Target modules {'nope'} not found"),
        ([FROM_SCRATCH, "model.scratch.student.hiden_size=8"], "model.scratch.student: .* did you mean 'hidden_size'"),
        ([FROM_SCRATCH, "model.scratch.teacher.hidden_act=nope"], "model.scratch.teacher: .* there is no 'nope'"),
        (
            ["reward_model={model: {hiden_size: 8}, training: {}}", "evaluate.prompts=4"],
            "reward_model.model: .* did you mean 'hidden_size'",
        ),
    ],
)
def test_an_invalid_recipe_value_is_a_finding_beside_the_others(tmp_path, tokenizer, overrides, message):
    recipe = recipe_for(tmp_path, tokenizer, *overrides, rows=edited({1: {"chosen": ""}}))
    checkup = examine(recipe=recipe, out=tmp_path / "runs")
    assert checks_found(checkup) == {"recipe.check", "data.empty-response"}
    assert re.search(message, finding_of(checkup, "recipe.check").message)


def test_a_run_uses_the_disk_that_was_predicted(tmp_path, tokenizer):
    methods = """{
      dckd: {training: {lora: {r: 2}}}, tvkd: {}, dpo: {start: tvkd},
      adpa-plus: {method: adpa, start: dckd, rounds: 2}, seqkd: {}}"""
    recipe = recipe_for(
        tmp_path,
        tokenizer,
        FROM_SCRATCH,
        "training={max_steps: 1, batch_size: 4}",
        "signals={topk_coding: float32, k: 64}",
        "sampling.max_new_tokens=60",
        f"methods={methods}",
    )
    plan = examine(recipe=recipe, out=tmp_path / "run").facts["disk"]
    run_recipe(recipe, tmp_path / "run")
    there = {path.name: path for path in (tmp_path / "run" / "seed-0").iterdir()}

    signals = {re.match(r"signals of the (.+) on (\w+) ", name): size for name, size in plan.items()}
    stores = {name for name in there if name.startswith("signals-")}
    for told, size in signals.items():
        if told:
            start = f"signals-{told[1].replace(' ', '_')}-{told[2]}"
            mine = {name for name in stores if f"{name}-".startswith(f"{start}-")}
            shards = [shard.stat().st_size for name in mine for shard in there[name].rglob("*.parquet")]
            assert 0 < sum(shards) < size + 6_000 * len(shards)  # a file has a footer
            stores -= mine
    assert stores == set()

    weights = [path for directory in there.values() for path in directory.rglob("*.safetensors")]
    held = sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in weights)
    assert held == sum(size for name, size in plan.items() if name.startswith("weights of "))


def test_what_a_run_would_refuse_is_an_error(tmp_path, tokenizer):
    recipe = recipe_for(tmp_path, tokenizer, "methods.dpo.training.batch_size=6")
    finding = finding_of(examine(recipe=recipe), "recipe.check")
    assert finding.severity == "error"
    assert "batch_size=6 is not a multiple" in finding.message


def test_models_from_scratch_are_priced(tmp_path):
    checkup = examine(
        recipe=load_recipe(Path(__file__).parents[2] / "src/prefdistill/experiment/recipes/quickstart.yaml")
    )
    assert checkup.ok
    assert {"teacher", "student"} <= set(checkup.facts["models"])
    assert "reading the teacher" in checkup.facts["memory"]


def test_exit_status_and_json(tmp_path, tokenizer, capsys):
    model = model_of(tokenizer, tmp_path / "model")
    good, bad = write(tmp_path / "a.jsonl", edited({1: {"chosen": ""}})), write(tmp_path / "b.jsonl", ["{"])
    assert main(["doctor", "--data", good, "--student", model, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    finding = next(f for f in told["findings"] if f["check"] == "data.empty-response")
    assert finding == {
        "check": "data.empty-response",
        "severity": "warning",
        "message": "a response has no text",
        "fix": "Remove these rows.",
        "count": 1,
        "of": 12,
        "rows": [1],
        "example": "row 1: chosen is ''",
        "data": "train",
    }
    assert main(["doctor", "--data", bad, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main(["doctor", "--data", bad]) == 2
    assert capsys.readouterr().out.rstrip().endswith("1 error, 0 warnings, 0 notes")


def test_options_override_the_recipe(tmp_path, tokenizer, capsys):
    recipe_for(tmp_path, tokenizer)
    other = write(tmp_path / "other.jsonl", edited({2: {"chosen": ""}}))
    arguments = [
        "doctor",
        "--recipe",
        "recipe.yaml",
        "--data",
        other,
        "--max-length",
        "50",
        "--json",
        "data.max_test=5",
    ]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["train"]["source"] == other
    assert told["facts"]["test"]["rows"] == 5
    assert {f["check"] for f in told["findings"] if f["severity"] == "warning"} >= {
        "data.empty-response",
        "tokens.response-cut",
    }


@pytest.mark.parametrize("arguments", [[], ["--data", "a.jsonl", "x=1"], ["--recipe", "nowhere.yaml"]])
def test_the_command_needs_something_to_check(arguments, capsys):
    assert main(["doctor", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_examine_needs_something_to_check():
    with pytest.raises(UserError, match="nothing to check"):
        examine()


def test_demonstrations_of_a_recipe_are_read_as_the_run_reads_them(tmp_path, tokenizer, capsys):
    rows = [{"question": "Why?", "completion": "So.", "source": "x"}]
    sft = f"data.sft={write(tmp_path / 'sft.jsonl', rows)}"
    refusal = finding_of(examine(recipe=recipe_for(tmp_path, tokenizer, sft)), "data.refused")
    assert refusal.data == "sft"
    assert "no column 'prompt'" in refusal.message
    checkup = examine(recipe=recipe_for(tmp_path, tokenizer, sft, "data.sft_columns.prompt=question"))
    assert "data.refused" not in {finding.check for finding in checkup.findings}
    assert "sft.jsonl: columns that are not read: source" in capsys.readouterr().err
