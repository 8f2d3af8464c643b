"""Wrong verbs, flags and keys: status 2, a line or two, no traceback, nothing written; every mistake is named."""

import json

import pytest

from prefdistill.cli import main
from support.cli import FAST, MODEL, OUT, PAIRS, files, run_code

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
    (["run", "recipe.yaml", "training.learning_rat=1", *OUT], "did you mean 'learning_rate'?"),
    (["run", "recipe.yaml", "fast", *OUT], "'fast' is not an override; write key=value"),
    (["run", "recipe.yaml", "data.train=pairs.jsonl", "data.test=broken.jsonl", *OUT], "broken.jsonl, line 1"),
    (["run", "recipe.yaml", "data.train=pairs.jsonl", "training.batch_size=5", *OUT], "batch_size=5 is not a multiple"),
    (["quickstart", "--methods", "dpo,nope", *OUT], "has no method 'nope'; it has sft-chosen, dpo"),
    (["quickstart", "--methods", "", *OUT], "--methods is empty"),
    (["quickstart", "--seeds", "0", *OUT], "--seeds must be greater than 0"),
    (["quickstart", "--seed", "-1", *OUT], "--seed must be greater than or equal to 0"),
    (["quickstart", "--seed", "one", *OUT], "--seed must be a valid integer, got 'one'"),
    (["sft", *MODEL, "--data", "pairs.jsonl"], "--out is missing"),
    (["sft", *MODEL, "--data", "columns.jsonl", *OUT], "SFT data has `messages`, or `prompt` and `completion`"),
    (["sft", *MODEL, *PAIRS, *OUT, "batch_size=5"], "batch_size=5 is not a multiple of micro_batch_size x processes"),
    (["dpo", "--model", "nowhere", *PAIRS, *OUT], "no tokenizer at 'nowhere'"),
    (["dpo", *MODEL, "--data", "broken.jsonl", *OUT], "broken.jsonl, line 1: not valid JSON"),
    (["dpo", *MODEL, *PAIRS, *OUT, "beta=strong"], "beta must be a valid number, got 'strong'"),
    (["dpo", *MODEL, *PAIRS, *OUT, "--dtype", "int8"], "--dtype must be 'auto', 'float32'"),
    (["dpo", *MODEL, *PAIRS, *OUT, "--max-length", "0"], "--max-length must be greater than 0"),
    (["dpo", *MODEL, *PAIRS, *OUT, "arguments.optim=adamx"], "training arguments: adamx is not a valid"),
    (["sample", *MODEL, *PAIRS], "--out is missing"),
    ([*SAMPLE, "out"], "out: unknown file type. Give --out a name that ends in .jsonl, .jsonl.gz, .parquet"),
    ([*SAMPLE, "out.jsonl", "--n", "0"], "--n must be greater than 0"),
    ([*SAMPLE, "out.jsonl", "--n", "2", "--temperature", "0"], "temperature=0 gives the same response 2 times"),
    ([*SAMPLE, "out.jsonl", "--top-p", "0"], "--top-p must be greater than 0"),
    ([*SAMPLE, "out.jsonl", "--column", "chosen"], "pairs.jsonl has a column 'chosen' already; name another"),
    ([*SAMPLE, "out.jsonl", "--engine", "magic"], "unknown engine 'magic'; known: transformers, ray, vllm"),
    ([*SAMPLE, "out.jsonl", "--max-length", "3"], "No prompt is left: dropped 24 rows: the prompt leaves no room"),
    ([*SAMPLE, "pairs.jsonl"], "pairs.jsonl is not as `prefdistill sample` wrote it; delete it"),
    ([*SIGNALS, "--kind", "values,hopes"], "unknown signal kind 'hopes'"),
    ([*SIGNALS, "--ids-from", "own"], "no signals in own"),
    (["signals", *MODEL, *PAIRS, *OUT, "--kind", ""], "--kind is empty"),
    (["signals", *MODEL, *PAIRS, *OUT, "--batch-tokens", "0"], "--batch-tokens must be greater than 0"),
    (["signals", *MODEL, *PAIRS, *OUT, "--max-prompt-length", "2000"], "max_prompt_length (2000) leaves no room"),
    ([*DISTILL, "--method", "magic"], "unknown method 'magic'; known: sft, dpo, tvkd"),
    ([*DISTILL, "beta=inf"], "tvkd: beta must be a"),
    ([*DISTILL, "potential=hope"], "tvkd: potential must be 'value', 'shuffled', "),
    (
        [*DISTILL, *FAST],
        "TVKD lacks reference.logps of chosen, rejected; teacher.values of chosen, rejected. Make it with "
        "`prefdistill signals --role reference --kind logps --model STUDENT --data DATA --out DIR`",
    ),
    ([*DISTILL, "--method", "adpa", *FAST], "`prefdistill sample --column student_response` makes such a column"),
    ([*DISTILL, "--method", "dckd", *FAST], "DCKD lacks teacher.topk of chosen, rejected. Make it with"),
    ([*DISTILL, "--method", "wpo", "gamma=1.0", *FAST], "unknown key 'gamma'"),
    ([*SIGNALS, "--kind", "topk", "--k", "many"], "--k must be a valid integer or 'vocab', got 'many'"),
    ([*DISTILL, "--signals", "empty"], "no signals in empty: extract them with `prefdistill signals --out empty"),
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


@pytest.fixture
def place(place):
    """With files that are wrong in one way each."""
    (place / "broken.jsonl").write_text('{"prompt": "a"\n')
    (place / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (place / "empty.jsonl").write_text("")
    (place / "empty").mkdir()
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("all of it")
    return place


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_wrong_flags(place, capsys, arguments, message):
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


RUN = ["run", "recipe.yaml"]
# Commands, and what is said of each of their mistakes.
SEVERAL = {
    "flags": (
        ["sample", *MODEL, "--n", "x", "--temperature", "-1", "--engine", "magic"],
        "--n must be a valid integer, got 'x'",
        "--temperature must be greater",
        "unknown engine 'magic'",
        "--data is missing",
        "--out is missing",
    ),
    "keys of a training": (
        ["sft", *MODEL, *PAIRS, *OUT, "learning_rat=1", "epochs=-1", "training.warmp=0"],
        "unknown key 'learning_rat'; did you mean 'learning_rate'?",
        "epochs must be greater than 0, got -1",
        "unknown key 'warmp'; did you mean 'warmup'?",
    ),
    "a method and its training": (
        ["distill", "--student", "model", *PAIRS, *OUT, "alpha=much", "discount=many", "epoch=2", "lora.rank=3"],
        "tvkd: alpha must be a number, got 'much'",
        "tvkd: discount must be a number",
        "unknown key 'epoch'; did you mean 'epochs'?",
        "unknown key 'lora.rank'",
    ),
    "a recipe": (
        [
            *RUN,
            "nmae=x",
            "training.epochs=0",
            "training.lr=1",
            "methods.dpo.bata=1",
            "methods.t={method: Tvkd, alpah: 1}",
        ],
        "unknown key 'nmae'; did you mean 'name'?",
        "training: epochs must be",
        "training: unknown key 'lr'",
        "methods.dpo: dpo has no option 'bata'; did you mean 'beta'?",
        "methods.t: tvkd has no option 'alpah'; did you mean 'alpha'?",
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_every_mistake_is_named_at_once(place, capsys, name):
    arguments, *messages = SEVERAL[name]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert [message for message in messages if message not in err] == []
    assert all(f"({number})" in err for number in range(1, len(messages) + 1))
    assert len(err.strip().splitlines()) == 1


def test_keys_are_checked_before_torch_is_imported(place):
    commands = [["signals", *MODEL, *PAIRS, *OUT, "--kind", "hope"], *(command for command, *_ in SEVERAL.values())]
    code = (
        "import json, sys; from prefdistill.cli import main\n"
        "for arguments in json.loads(sys.argv[1]): assert main(arguments) == 2\n"
        "assert {'torch', 'transformers', 'datasets', 'pandas'}.isdisjoint(sys.modules)"
    )
    done = run_code(code, json.dumps(commands))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("key", ["learning_rate", "training.learning_rate"])
@pytest.mark.parametrize("verb", ["sft", "dpo", "distill"])
def test_one_spelling_of_keys_works_in_every_verb(place, capsys, verb, key):
    model = ["--student", "model", "--method", "SFT"] if verb == "distill" else MODEL
    assert main([verb, *model, *PAIRS, *OUT, f"{key}=-1"]) == 2
    assert capsys.readouterr().err == "prefdistill: command line: learning_rate must be greater than 0, got -1\n"


@pytest.mark.parametrize("key", ["alpha", "method.alpha"])
@pytest.mark.parametrize("method", ["tvkd", "TVKD", "Tvkd"])
def test_methods_in_any_case_and_their_options_in_two_spellings(place, capsys, key, method):
    assert main(["distill", "--student", "model", *PAIRS, *OUT, "--method", method, f"{key}=much"]) == 2
    assert "tvkd: alpha must be a number, got 'much'" in capsys.readouterr().err
