"""Help: at once, without heavy libraries, with examples that run as they stand."""

import re
import resource
import shutil
from pathlib import Path

import pytest

from prefdistill import __version__
from prefdistill.cli import main
from prefdistill.cli.verbs import VERBS
from support.cli import run, run_code
from support.pairs import write_jsonl

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch", "transformers", "trl", "datasets", "pandas", "peft", "pyarrow", "scipy", "matplotlib", "ruamel", "numpy",
)  # fmt: skip


def test_help_takes_less_than_half_a_second():
    """Of processor time, which other work on the machine does not change; with some slack."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert all(f"  {verb.partition(' ')[0]} " in done.stdout for verb in VERBS)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.8


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from prefdistill.cli import main; import prefdistill\n"
        "for verb in sys.argv[1:]: assert main([*verb.split(), '--help']) == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = run_code(code, *VERBS, "")
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_has_help_with_an_example(verb, flag, capsys):
    assert main([*verb.split(), flag]) == 0
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


# -- the examples ------------------------------------------------------------------------------------------------------


def examples(verb):
    """The commands in the help of a verb, without `prefdistill`."""
    text = " ".join(VERBS[verb].__doc__.partition("Example:")[2].split())
    return [part.split(" or, ")[0].split() for part in re.split(r"(?:^|[ ])prefdistill ", text)[1:]]


# Where the examples of long work, or of work that needs an endpoint or downloads, stop: their input is checked then.
STOPS = {
    "quickstart": "prefdistill.experiment.run.run_recipe",
    "run": "prefdistill.experiment.run.run_recipe",
    "plan": "prefdistill.experiment.show_plan.plan_recipe",
    "study": "prefdistill.experiment.study.run.run_study",
    "report": "prefdistill.report.write_report",
    "judge answers": "prefdistill.evaluation.judges.answers.answer_questions",
    "judge mt-bench": "prefdistill.evaluation.judges.mt_bench.judge_mt_bench",
    "judge alpaca-eval": "prefdistill.evaluation.judges.alpaca.judge_alpaca_eval",
}


class Reached(Exception):
    """The work of a verb began."""


@pytest.fixture(scope="module")
def example_files(tmp_path_factory, make_model, tokenizer, pairs):
    """The files that the examples name."""
    from transformers import AutoModelForSequenceClassification

    from prefdistill.signals import extract_signals

    directory = tmp_path_factory.mktemp("examples")
    pairs = pairs.select_columns(["prompt", "chosen", "rejected"])
    for name, rows in {"pairs": range(12), "sft": range(12), "test": range(12, 24)}.items():
        write_jsonl(directory / f"{name}.jsonl", pairs.select(rows))
    model = make_model(num_hidden_layers=1)
    for name in ("my/base", "my/teacher", "my/student", "models/teacher-sft", "models/tvkd"):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    config = model.config.to_dict() | {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    AutoModelForSequenceClassification.from_config(type(model.config)(**config)).save_pretrained(
        directory / "my/reward-model"
    )
    tokenizer.save_pretrained(directory / "my/reward-model")
    shutil.copytree(ROOT / "recipes", directory / "recipes")
    shutil.copytree(ROOT / "studies", directory / "studies")
    own = {"model": str(directory / "my/student"), "dataset": str(directory / "pairs.jsonl")}
    extract_signals(**own, out=directory / "stores/teacher")
    extract_signals(**own, out=directory / "stores/reference", role="reference", kinds=("logps",))
    return directory


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_in_the_help_runs_as_it_stands(verb, example_files, tmp_path, monkeypatch, capfd):
    place = tmp_path / "place"
    shutil.copytree(example_files, place)
    if verb in ("distill", "inspect"):  # which read what `signals` writes
        (place / "stores").rename(place / "signals")
        shutil.rmtree(place / "models")  # `distill` writes one
    monkeypatch.chdir(place)
    if verb in STOPS:

        def stop(*_, **__):
            raise Reached

        monkeypatch.setattr(STOPS[verb], stop)
    commands = examples(verb)
    assert commands
    for command in commands:
        status = main(command)
        err = capfd.readouterr().err
        assert (status, "Reached" in err) == ((1, True) if verb in STOPS else (0, False)), err


def test_no_verify_turns_an_option_off():
    """An option that is on by default has a flag that turns it off."""
    from prefdistill.cli.flags import command
    from prefdistill.cli.verbs.train import sft

    arguments = ["--model", "m", "--data", "d", "--out", "o", "epochs=2"]
    for flags, training in (([], {"epochs": 2}), (["--no-verify"], {"epochs": 2, "verify": False})):
        call = command("sft", sft).main([*arguments, *flags], standalone_mode=False)
        assert call.options().training_options() == training
