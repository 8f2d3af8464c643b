"""Exit status and messages: 0 done, 2 wrong input, 1 failed while running, 130 interrupted."""

import pytest

from prefdistill.cli import main
from support.cli import MODEL, PAIRS, run


def test_wrong_input_in_a_real_process(place):
    done = run("run", "recipe.yaml", "nmae=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "prefdistill: recipe.yaml: unknown key 'nmae'; did you mean 'name'?\n"


def test_debug_shows_the_traceback_of_wrong_input(place, capsys):
    assert main(["run", "none.yaml", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("prefdistill: no recipe at none.yaml; the shipped ones are under recipes/\n")


def test_json_prints_nothing_on_stdout_for_wrong_input(place, capsys):
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
def test_a_failure_while_running_is_status_1(failing, capsys, error):
    failing(error)
    assert main(["run", "x.yaml"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"prefdistill: {type(error).__name__}: ")
    assert len(err.splitlines()) == 2
    assert "--debug" in err.splitlines()[1]
    assert "Traceback" not in err


def test_debug_raises_the_error(failing):
    failing(RuntimeError("at the bottom"))
    with pytest.raises(RuntimeError, match="at the bottom") as error:
        main(["run", "x.yaml", "--debug"])
    assert error.traceback[-1].name == "fail"


def test_an_end_of_file_is_a_failure(failing, capsys):
    failing(EOFError("compressed file ended early"))
    assert main(["run", "x.yaml"]) == 1
    assert capsys.readouterr().err.lstrip().startswith("prefdistill: EOFError: compressed file ended early\n")


@pytest.mark.parametrize("flag", [[], ["--json"], ["--debug"]])
def test_an_interruption_is_status_130(failing, capsys, flag):
    failing(KeyboardInterrupt())
    assert main(["run", "x.yaml", *flag]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prefdistill: interrupted; finished work is kept")


def test_verbs_that_run_in_one_process_refuse_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "x.yaml"]) == 2
    assert "`prefdistill run` runs in one process" in capsys.readouterr().err
    assert main(["sample", *MODEL, *PAIRS, "--out", "out.jsonl"]) == 2
    assert "`prefdistill sample` runs in one process" in capsys.readouterr().err
