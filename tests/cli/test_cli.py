"""The command line: help at once, mistakes in a line or two with status 2 and nothing written, verbs end to end."""

import json
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from prefdistill import __version__
from prefdistill.cli import main
from prefdistill.cli.verbs import VERBS as REGISTRY

VERBS = [name for name in REGISTRY if " " not in name]
FAST = ["max_steps=2", "batch_size=4", "micro_batch_size=4", "learning_rate=1e-3"]


def write_pairs(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def place(tmp_path, monkeypatch, make_model, tokenizer, pairs):
    """A working directory with pairs and a tiny model, and things that are neither."""
    datasets.disable_progress_bars()  # the command does so through the environment, before it imports datasets
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ndata: {train: nowhere.jsonl}\nmodel: {teacher: model, student: model}\nmethods: {dpo: {}}\n"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all of it")
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def files(directory):
    return {path: path.is_dir() or path.stat().st_mtime_ns for path in Path(directory).rglob("*")}


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "prefdistill", *arguments], capture_output=True, text=True, **options)


def test_the_small_profile_does_not_take_the_place_of_the_whole_run(place, monkeypatch):
    outs = []
    with (place / "recipe.yaml").open("a") as recipe:
        recipe.write("fast: {training.max_steps: 1}\n")
    monkeypatch.setattr(
        "prefdistill.experiment.run.run_recipe", lambda recipe, out, **_: outs.append(out) or {"warnings": []}
    )
    monkeypatch.setattr("prefdistill.report.verdict", lambda results: "")
    monkeypatch.setattr("prefdistill.report.method_table", lambda results: "")
    for arguments in ([], ["--fast"], ["--fast", "--out", "here"]):
        assert main(["run", "recipe.yaml", *arguments]) == 0
    assert outs == [Path("runs/x"), Path("runs/x-fast"), Path("here")]


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_answers_at_once():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert all(f"  {verb} " in done.stdout for verb in VERBS)
    assert min(seconds) < 1


def test_help_and_the_package_itself_do_not_load_the_heavy_libraries():
    code = (
        "import sys; from prefdistill.cli import main; import prefdistill\n"
        "for verb in sys.argv[1:]: assert main([verb, '--help']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'numpy', 'peft', 'matplotlib', 'yaml')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *VERBS], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_explains_itself_with_an_example(verb, flag, capsys):
    assert main([verb, flag]) == 0
    out = capsys.readouterr().out
    assert f"Usage: prefdistill {verb}" in out
    assert f"Example: prefdistill {verb} " in " ".join(out.split())
    assert "--json" in out
    assert "--debug" in out


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert "Usage: prefdistill [OPTIONS] COMMAND" in capsys.readouterr().out


def test_help_wins_over_json(capsys):
    assert main(["run", "--json", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: prefdistill run")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


# -- mistakes ----------------------------------------------------------------------------------------------------------

MODEL, PAIRS, OUT = ["--model", "model"], ["--data", "pairs.jsonl"], ["--out", "out"]
SAMPLE = ["sample", *MODEL, *PAIRS, "--out"]
SIGNALS = ["signals", *MODEL, *PAIRS, *OUT]
DISTILL = ["distill", "--student", "model", *PAIRS, *OUT]
EVALUATE = ["evaluate", *MODEL, *PAIRS, "--out", "out.json"]
MISTAKES = [
    (["frobnicate"], "No such command 'frobnicate'"),
    (["distil"], "No such command 'distil'. Did you mean 'distill'?"),
    (["--bogus"], "No such option: --bogus"),
    (["run"], "Missing argument 'RECIPE'"),
    (["run", "recipe.yaml", "--bogus"], "No such option: --bogus"),
    (["run", "none.yaml"], "no recipe at none.yaml"),
    (["run", "empty"], "no recipe at empty"),
    (["run", "pairs.jsonl"], "pairs.jsonl is not"),
    (["run", "recipe.yaml", "training.learning_rat=1", *OUT], "did you mean 'learning_rate'?"),
    (["run", "recipe.yaml", "fast", *OUT], "'fast' is not an override; write key=value"),
    (["run", "recipe.yaml", *OUT], "nowhere.jsonl: no such file or directory"),
    (["run", "recipe.yaml", "data.train=pairs.jsonl", "data.test=broken.jsonl", *OUT], "broken.jsonl, line 1"),
    (["run", "recipe.yaml", "data.train=pairs.jsonl", "model.student=empty", *OUT], "empty exists but holds no"),
    (["run", "recipe.yaml", "data.train=pairs.jsonl", "training.batch_size=5", *OUT], "batch_size=5 is not a multiple"),
    (["quickstart", "--methods", "dpo,nope", *OUT], "has no method 'nope'; it has sft-chosen, dpo"),
    (["quickstart", "--methods", "", *OUT], "--methods is empty"),
    (["quickstart", "--seeds", "0", *OUT], "--seeds must be greater than 0"),
    (["quickstart", "--seed", "-1", *OUT], "--seed must be greater than or equal to 0"),
    (["quickstart", "--seed", "one", *OUT], "--seed must be a valid integer, got 'one'"),
    (["sft", *MODEL, "--data", "pairs.jsonl"], "--out is missing"),
    (["sft", *MODEL, "--data", "columns.jsonl", *OUT], "SFT data has `messages`, or `prompt` and `completion`"),
    (["sft", *MODEL, *PAIRS, *OUT, "beta=0.1"], "command line: unknown key 'beta'"),
    (["sft", *MODEL, *PAIRS, *OUT, "learning_rate=-1"], "learning_rate must be greater than 0, got -1"),
    (["sft", *MODEL, *PAIRS, *OUT, "batch_size=5"], "batch_size=5 is not a multiple of micro_batch_size x processes"),
    (["sft", *MODEL, *PAIRS, "--out", "full"], "full is not empty and was not made by prefdistill; give another --out"),
    (["sft", *MODEL, *PAIRS, "--out", "pairs.jsonl"], "cannot make the directory pairs.jsonl"),
    (["dpo", "--model", "nowhere", *PAIRS, *OUT], "no tokenizer at 'nowhere'"),
    (["dpo", *MODEL, "--data", "broken.jsonl", *OUT], "broken.jsonl, line 1: not valid JSON"),
    (["dpo", *MODEL, "--data", "empty.jsonl", *OUT], "empty.jsonl: there are no rows in it"),
    (["dpo", *MODEL, *PAIRS, *OUT, "beta=strong"], "beta must be a valid number, got 'strong'"),
    (["dpo", *MODEL, *PAIRS, *OUT, "--dtype", "int8"], "--dtype must be 'auto', 'float32'"),
    (["dpo", *MODEL, *PAIRS, *OUT, "--max-length", "0"], "--max-length must be greater than 0"),
    (["dpo", *MODEL, *PAIRS, *OUT, "arguments.optim=adamx"], "training arguments: adamx is not a valid"),
    (["sample", *MODEL, *PAIRS], "--out is missing"),
    ([*SAMPLE, "out"], "out: unknown file type. Give --out a name that ends in .jsonl, .jsonl.gz, .parquet"),
    ([*SAMPLE, "out.jsonl", "--n", "0"], "--n must be greater than 0"),
    ([*SAMPLE, "out.jsonl", "--n", "2", "--temperature", "0"], "temperature=0 gives the same response 2 times"),
    ([*SAMPLE, "out.jsonl", "--temperature", "-1"], "--temperature must be greater than or equal to 0"),
    ([*SAMPLE, "out.jsonl", "--top-p", "0"], "--top-p must be greater than 0"),
    ([*SAMPLE, "out.jsonl", "--column", "chosen"], "pairs.jsonl has a column 'chosen' already; name another"),
    ([*SAMPLE, "out.jsonl", "--engine", "magic"], "unknown engine 'magic'; known: transformers, vllm"),
    ([*SAMPLE, "out.jsonl", "--dtype", "int8"], "dtype must be 'auto', 'float32'"),
    ([*SAMPLE, "out.jsonl", "--max-length", "3"], "No prompt is left: dropped 24 rows: the prompt leaves no room"),
    ([*SAMPLE, "pairs.jsonl"], "pairs.jsonl is not as `prefdistill sample` wrote it; give another --out"),
    (["sample", *MODEL, "--data", "columns.jsonl", "--out", "out.jsonl"], "columns.jsonl: no column 'prompt'"),
    (["sample", "--model", "empty", *PAIRS, "--out", "out.jsonl"], "empty exists but holds no tokenizer"),
    (["signals", "--model", "empty", *PAIRS, *OUT], "empty exists but holds no tokenizer"),
    (["signals", *MODEL, "--data", "columns.jsonl", *OUT], "columns.jsonl: no column"),
    ([*SIGNALS, "--kind", "values,hopes"], "unknown signal kind 'hopes'"),
    ([*SIGNALS, "--ids-from", "own"], "no signals in own"),
    (["signals", *MODEL, *PAIRS, *OUT, "--kind", ""], "--kind is empty"),
    (["signals", *MODEL, *PAIRS, *OUT, "--role", "parrot"], "role must be 'teacher', "),
    (["signals", *MODEL, *PAIRS, *OUT, "--value-temperature", "inf"], "--value-temperature must be a finite number"),
    (["signals", *MODEL, *PAIRS, *OUT, "--batch-tokens", "0"], "--batch-tokens must be greater than 0"),
    (["signals", *MODEL, *PAIRS, *OUT, "--max-prompt-length", "2000"], "max_prompt_length (2000) leaves no room"),
    (["signals", *MODEL, *PAIRS, "--out", "full"], "full is not empty and was not made by prefdistill"),
    (["signals", *MODEL, *PAIRS, "--out", "pairs.jsonl"], "pairs.jsonl is not"),
    ([*DISTILL, "--method", "magic"], "unknown method 'magic'; known: sft, dpo, tvkd"),
    ([*DISTILL, "alpah=0.5"], "command line: unknown key 'alpah'; did you mean 'alpha'?"),
    ([*DISTILL, "beta=inf"], "tvkd: beta must be a"),
    ([*DISTILL, "potential=hope"], "tvkd: potential must be 'value', 'shuffled', "),
    ([*DISTILL, "lora.rank=2"], "command line: unknown key 'lora.rank'"),
    (
        [*DISTILL, *FAST],
        "TVKD lacks reference.logps of chosen, rejected; teacher.values of chosen, rejected. Make it with "
        "`prefdistill signals --role reference --kind logps --model STUDENT --data DATA --out DIR`",
    ),
    ([*DISTILL, "--method", "adpa", *FAST], "`prefdistill sample --column student_response` makes such a column"),
    ([*DISTILL, "--method", "dckd", *FAST], "DCKD lacks teacher.topk of chosen, rejected. Make it with"),
    ([*DISTILL, "--method", "wpo", "gamma=1.0", *FAST], "unknown key 'gamma'"),
    ([*SIGNALS, "--kind", "topk", "--k", "many"], "--k must be a valid integer or 'vocab', got 'many'"),
    ([*SIGNALS, "--kind", "topk", "--k", "0"], "k must be greater than 0"),
    ([*SIGNALS, "--kind", "topk", "--p", "2"], "p must be less than or equal to 1"),
    ([*SIGNALS, "--responses", "student_response"], "no column 'student_response'"),
    ([*SIGNALS, "--responses", ""], "--responses is empty"),
    ([*SIGNALS, "--kind", "logprob_values"], "logprob_values at value_temperature 1 is 0 everywhere"),
    ([*SIGNALS, "--kind", "topk", "--ids-from", "nowhere"], "no signals in nowhere"),
    ([*DISTILL, "--signals", "empty"], "no signals in empty: make them with `prefdistill signals --out empty"),
    ([*DISTILL, "--method", "sft", "batch_size=5"], "batch_size=5 is not a multiple"),
    ([*EVALUATE], "nothing to evaluate: give --reference (pairs), --generate"),
    ([*EVALUATE, "--reward-model", "model"], "it is a language model, LlamaForCausalLM"),
    ([*EVALUATE, "--reward-model", "nowhere"], "no reward model at 'nowhere'"),
    ([*EVALUATE, "--lm-eval", "x", "--length-ranges", "5"], "--length-ranges needs responses"),
    ([*EVALUATE, "--reference", "empty"], "no signals in empty"),
    ([*EVALUATE[:-1], "empty", "--reference", "empty"], "empty is a directory; --out names the file"),
    (["report", *OUT], "Missing argument 'RUNS'"),
    (["report", "nowhere", "--out", "r.html"], "run directory nowhere does not exist"),
    (["report", "empty", "--out", "r.html"], "empty holds no results.json"),
    (["report", "empty", "--out", "r.html", "--format", "pdf"], "--format must be 'html' or 'md', got 'pdf'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes(place, capsys, arguments, message):
    before = files(place)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    lines = err.strip().splitlines()
    assert len(lines) <= 2
    assert lines[0].startswith("prefdistill: ")
    assert "Traceback" not in err
    assert files(place) == before


def test_a_mistake_in_a_real_process(place):
    done = run("run", "recipe.yaml", "nmae=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "prefdistill: recipe.yaml: unknown key 'nmae'; did you mean 'name'?\n"


def test_debug_shows_where_a_mistake_was_found(place, capsys):
    assert main(["run", "none.yaml", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("prefdistill: no recipe at none.yaml; the shipped ones are under recipes/\n")


def test_json_says_nothing_on_stdout_for_a_mistake(place, capsys):
    assert main(["run", "none.yaml", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prefdistill: no recipe")


@pytest.fixture
def failing(monkeypatch):
    """Make loading a recipe raise."""

    def fail_with(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("prefdistill.experiment.recipe.load_recipe", fail)

    return fail_with


@pytest.mark.parametrize("error", [RuntimeError("all of it\nwent wrong"), KeyError("x"), OSError(5, "Input/output")])
def test_a_failure_is_not_the_users_mistake(failing, capsys, error):
    failing(error)
    assert main(["run", "x.yaml"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"prefdistill: {type(error).__name__}: ")
    assert len(err.splitlines()) == 2
    assert "--debug" in err.splitlines()[1]
    assert "Traceback" not in err


def test_debug_shows_where_it_failed(failing):
    failing(RuntimeError("at the bottom"))
    with pytest.raises(RuntimeError, match="at the bottom") as error:
        main(["run", "x.yaml", "--debug"])
    assert error.traceback[-1].name == "fail"


def test_the_end_of_a_file_is_no_interruption(failing, capsys):
    failing(EOFError("compressed file ended early"))
    assert main(["run", "x.yaml"]) == 1
    assert capsys.readouterr().err.lstrip().startswith("prefdistill: EOFError: compressed file ended early\n")


@pytest.mark.parametrize("flag", [[], ["--json"], ["--debug"]])
def test_an_interruption_is_130_and_says_what_was_kept(failing, capsys, flag):
    failing(KeyboardInterrupt())
    assert main(["run", "x.yaml", *flag]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prefdistill: interrupted; finished work is kept")


def test_one_process_only(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "x.yaml"]) == 2
    assert "`prefdistill run` runs in one process" in capsys.readouterr().err
    assert main([*SAMPLE, "out.jsonl"]) == 2
    assert "`prefdistill sample` runs in one process" in capsys.readouterr().err


# -- end to end --------------------------------------------------------------------------------------------------------


def call(capfd, *arguments):
    """The JSON object a verb prints, and what it says on stderr."""
    capfd.readouterr()
    status = main([*arguments, "--json"])
    out, err = capfd.readouterr()
    assert status == 0, err
    found = json.loads(out)
    assert isinstance(found, dict)
    assert out.count("\n") == 1
    return found, err


def test_from_pairs_to_an_evaluated_student(place, capfd, make_model, tokenizer):
    import torch

    from prefdistill.models.load import load_model

    found, _ = call(capfd, "sft", *MODEL, *PAIRS, "--out", "sft", *FAST)
    assert (found["out"], found["reused"]) == ("sft", False)
    call(capfd, "dpo", "--model", "sft", *PAIRS, "--out", "teacher", *FAST, "beta=0.05")
    learnt = [load_model(name).lm_head.weight for name in ("model", "sft", "teacher")]
    assert not torch.equal(learnt[0], learnt[1])
    assert not torch.equal(learnt[1], learnt[2])

    found, _ = call(
        capfd, "signals", "--model", "teacher", *PAIRS, "--kind", "values,logps,q", "--out", "signals-teacher"
    )
    assert (found["pairs"], found["rows"], sorted(found["kinds"])) == (24, 24, ["logps", "q", "values"])
    assert 0 <= found["gauge_flips"]["mean"] <= 1
    assert found["bytes"] == sum(path.stat().st_size for path in (place / "signals-teacher" / "shards").iterdir())
    reference = ["--model", "model", *PAIRS, "--role", "reference", "--kind", "logps", "--out", "signals-start"]
    call(capfd, "signals", *reference)

    distill = ["distill", "--student", "model", *PAIRS, "--signals", "signals-teacher", "--signals", "signals-start"]
    distill += ["--method", "tvkd", "--out", "student", "alpha=0.5", "beta=0.2", *FAST]
    found, err = call(capfd, *distill)
    assert found["reused"] is False
    assert "warning" not in err  # the student is its reference
    metrics = [json.loads(line) for line in (place / "student" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2
    assert not (place / "student" / "checkpoints").exists()
    found, err = call(capfd, *distill)
    assert found["reused"] is True
    assert "distill tvkd: reused" in err
    assert main([*distill, "alpha=0.6"]) == 2
    assert "give another --out" in capfd.readouterr().err

    evaluate = [
        "evaluate",
        "--model",
        "student",
        *PAIRS,
        "--reference",
        "signals-start",
        "--teacher",
        "signals-teacher",
    ]
    found, _ = call(capfd, *evaluate, "--out", "e.json")
    assert found == json.loads((place / "e.json").read_text())
    assert found["metrics"]["reward_accuracy"]["n"] == 24
    assert {"shaping return", "teacher Q (raw logits)"} <= found["margin_accuracy"].keys()
    assert found["metrics"]["chosen_logp"]["mean"] < 0
    assert main([*evaluate, "--out", "e.json"]) == 0
    out = capfd.readouterr().out
    assert "reward_accuracy" in out
    assert "(24 prompts)" in out
    assert "accuracies of 24 pairs" in out


def test_from_pairs_to_an_adpa_student_by_way_of_its_own_samples(place, capfd):
    """Sample, read the teacher there, read its reference at the teacher's tokens, distill; each verb on its own."""
    own, of_own = ["--data", "own.jsonl"], ["--responses", "student_response", "--kind", "topk"]
    call(
        capfd, "sample", "--model", "model", *PAIRS, "--column", "student_response", "--out", "own.jsonl",
        "--max-new-tokens", "8",
    )  # fmt: skip
    exact = ["--k", "7", "--topk-coding", "float32"]
    call(capfd, "signals", "--model", "model", *own, *of_own, *exact, "--out", "teacher")
    lacking = ["distill", "--student", "model", *own, "--method", "adpa", "--signals", "teacher", "--out", "s", *FAST]
    assert main(lacking) == 2
    told = capfd.readouterr().err
    assert "ADPA lacks teacher_reference.topk of student_response" in told
    assert "--role teacher_reference --kind topk --responses student_response --ids-from" in told
    reference = ["--role", "teacher_reference", "--ids-from", "teacher", "--out", "reference"]
    found, _ = call(capfd, "signals", "--model", "model", *own, *of_own, *reference)
    assert found["kinds"] == ["topk"]
    found, _ = call(capfd, *lacking, "--signals", "reference", "gamma=0.5", "logging_steps=1")
    assert found["reused"] is False
    metrics = [json.loads(line) for line in (place / "s" / "metrics.jsonl").read_text().splitlines()]
    assert any(entry.get("advantage") == 0 for entry in metrics)  # the teacher is its own reference here
    # the reference was read at the ids of one teacher store and goes with no other
    call(capfd, "signals", "--model", "model", *own, *of_own, "--k", "5", "--out", "other")
    stores = ["--signals", "other", "--signals", "reference"]
    assert main(["distill", "--student", "model", *own, "--method", "adpa", *stores, "--out", "t", *FAST]) == 2
    assert "were not read at the token ids of this teacher store" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["simpo", "wpo"])
def test_methods_of_trl_need_no_signals(place, capfd, method):
    found, _ = call(capfd, "distill", "--student", "model", *PAIRS, "--method", method, "--out", "s", *FAST)
    assert found["reused"] is False
    assert (place / "s" / "model.safetensors").exists()


def test_an_adapter_is_trained_and_evaluated(place, capfd):
    call(capfd, "signals", *MODEL, *PAIRS, "--role", "reference", "--kind", "logps", "--out", "start")
    distill = ["distill", "--student", "model", *PAIRS, "--signals", "start", "--method", "dpo", *FAST]
    call(capfd, *distill, "--out", "one", "lora={r: 4}", "learning_rate=1e-1")
    config = json.loads((place / "one" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "model")
    assert (place / "one" / "model.safetensors").exists()  # merged: it needs no other directory
    call(capfd, *distill, "--out", "two", "lora.r=4", "learning_rate=1e-1")  # a dotted key says the same
    assert json.loads((place / "two" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    found, _ = call(capfd, "evaluate", "--model", "one", *PAIRS, "--reference", "start", "--out", "e.json")
    assert found["metrics"]["reward_accuracy"]["mean"] != 0.5  # it has moved from its reference
    assert found["metrics"]["reward_accuracy"]["n"] == 24


@pytest.mark.parametrize(
    "verb", [["sft", *MODEL], ["dpo", *MODEL], ["distill", "--student", "model", "--method", "sft"]]
)
def test_what_a_stage_is_made_from_is_looked_at_not_its_name(place, capfd, make_model, pairs, verb):
    """New data or new weights under an old name are other inputs, and what was made from the old ones is kept."""
    stage = [*verb, *PAIRS, *OUT, *FAST[1:], "max_steps=1"]
    assert call(capfd, *stage)[0]["reused"] is False
    assert call(capfd, *stage)[0]["reused"] is True
    assert call(capfd, *stage, "report_to=[]", "logging_steps=3")[0]["reused"] is True  # how it is watched is no input
    made = (place / OUT[1] / "model.safetensors").read_bytes()
    before = (place / "pairs.jsonl").read_bytes()
    write_pairs(place / "pairs.jsonl", [row | {"chosen": row["rejected"]} for row in pairs])
    assert main(stage) == 2
    assert "holds work of another request (data differs (" in capfd.readouterr().err
    (place / "pairs.jsonl").write_bytes(before)
    assert main([*stage, "learning_rate=0.125"]) == 2
    told = capfd.readouterr().err
    assert "holds work of another request (training.learning_rate is 0.125, was " in told
    assert call(capfd, *stage)[0]["reused"] is True
    make_model(7).save_pretrained(place / "model")
    assert main(stage) == 2
    assert (place / OUT[1] / "model.safetensors").read_bytes() == made


def test_nothing_is_left_of_a_model_that_has_changed_meanwhile(place, capfd, monkeypatch):
    states = iter(["as it was", "as it was", "another"])
    monkeypatch.setattr("prefdistill.experiment.inputs.model_key", lambda name: next(states))
    assert main(["sft", *MODEL, *PAIRS, *OUT, *FAST[1:], "max_steps=1"]) == 2
    assert "model was changed during the run" in capfd.readouterr().err
    assert not (place / OUT[1]).exists()


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_rows_that_the_chat_template_refuses_are_left_out_and_told(place, capfd, pairs, verb):
    template = place / "model" / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    system = {"role": "system", "content": "be brief"}
    mixed = [row | {"prompt": [system, *row["prompt"]]} if i in (3, 7) else row for i, row in enumerate(pairs)]
    write_pairs(place / "mixed.jsonl", mixed)
    write_pairs(place / "taken.jsonl", [row for i, row in enumerate(pairs) if i not in (3, 7)])
    few = (*FAST[1:], "max_steps=1")
    _, err = call(capfd, verb, *MODEL, "--data", "mixed.jsonl", "--out", "mixed", *few)
    assert f"{verb}: dropped 2 rows: the chat template refuses its messages (2, first row 3)" in err
    call(capfd, verb, *MODEL, "--data", "taken.jsonl", "--out", "taken", *few)
    assert (place / "mixed" / "model.safetensors").read_bytes() == (place / "taken" / "model.safetensors").read_bytes()
    write_pairs(place / "refused.jsonl", mixed[3:4])
    assert main([verb, *MODEL, "--data", "refused.jsonl", "--out", "none", *few]) == 2
    assert "No row is left: dropped 1 row: the chat template refuses its messages" in capfd.readouterr().err


def test_a_model_is_never_made_over_itself(place, capfd):
    call(capfd, "sft", *MODEL, *PAIRS, "--out", "first", *FAST[1:], "max_steps=1")
    made = (place / "first" / "model.safetensors").read_bytes()
    assert main(["dpo", "--model", "first", *PAIRS, "--out", "first", *FAST[1:], "max_steps=1"]) == 2
    assert (place / "first" / "model.safetensors").read_bytes() == made


def test_signals_of_a_finished_store_are_not_made_again(place, capfd, monkeypatch):
    signals = ["signals", *MODEL, *PAIRS, "--out", "out"]
    first, _ = call(capfd, *signals)
    monkeypatch.setattr("prefdistill.signals.request.score_pairs", lambda *_, **__: 1 / 0)
    assert call(capfd, *signals)[0] == first
    assert main([*signals, "--max-length", "20"]) == 2
    assert "holds work of another request (truncation.max_length is" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["own.jsonl", "own.parquet"])
def test_sampled_responses_are_data_like_any_other(place, capfd, name):
    sample = [*SAMPLE, name, "--column", "completion", "--n", "2", "--max-new-tokens", "8", "--top-p", "0.95"]
    found, err = call(capfd, *sample, "--max-length", "60", "--seed", "3")
    rows = datasets.load_dataset(name.rpartition(".")[2].replace("jsonl", "json"), data_files=name, split="train")
    assert (found["out"], found["responses"], found["reused"]) == (name, 48, False)
    assert found["ended_share"] == pytest.approx(sum(rows["completion_ended"]) / 48, abs=1e-6)
    assert 48 <= found["tokens"] <= 48 * 8
    assert f"{found['tokens']:,} tokens, {found['tokens_per_second']:,} tokens/s" in err
    assert rows["prompt"][::2] == rows["prompt"][1::2]
    assert rows["completion"][::2] != rows["completion"][1::2]
    again, err = call(capfd, *sample, "--max-length", "60", "--seed", "3")
    assert again == found | {"reused": True}
    assert "sample: reused" in err
    assert main([*sample, "--max-length", "60", "--seed", "4"]) == 2
    assert (
        f"{name} holds work of another request (seed is 4, was 3); delete it or give another --out"
        in capfd.readouterr().err
    )
    call(capfd, "sft", *MODEL, "--data", name, "--out", "sft", *FAST)
    assert main([*SAMPLE, "other.jsonl", "--max-new-tokens", "2"]) == 0
    assert "24 responses" in capfd.readouterr().out


@pytest.fixture
def finished(place):
    """The results of a run."""
    (place / "run").mkdir()
    results = {"methods": {"dpo": {"reward": {"mean": 1.0, "se": 0.1, "n": 3}}}}
    (place / "run" / "results.json").write_text(json.dumps(results))


def test_a_report_of_a_run(place, capfd, finished):
    found, _ = call(capfd, "report", "run", "--out", "page.html")
    assert found == {"out": "page.html", "runs": ["run"]}
    assert "<html" in (place / "page.html").read_text()
    call(capfd, "report", "run", "--out", "page.md")
    assert "<html" not in (place / "page.md").read_text()


def test_json_alone_is_on_stdout_in_a_real_process(finished):
    done = run("report", "run", "--out", "page.md", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"out": "page.md", "runs": ["run"]})
