"""Steps on several processes: the option, the errors of processes, and the results of a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full, write_json
from prefdistill.core.options import validate
from prefdistill.experiment.launch.options import Launch, launcher_of
from prefdistill.experiment.launch.outcome import error_of, error_record
from prefdistill.experiment.launch.start import ProcessLost, failure_of, launch
from prefdistill.training.nan_guard import NotFinite

SUPPORT = Path(__file__).parents[1]
CONFIGS = SUPPORT.parent / "configs"
TWO = Launch(distill={"processes": 2})


def config(place, **settings):
    path = place / "accelerate.yaml"
    path.write_text(json.dumps({"distributed_type": "MULTI_GPU", "num_processes": 2, **settings}))
    return Launch(distill=str(path), signals=str(path))


# -- the option --------------------------------------------------------------------------------------------------------


def test_a_launcher_is_a_file_or_a_number_of_processes(tmp_path):
    assert launcher_of(TWO, "sft") is launcher_of(TWO, "evaluate") is None
    launcher = launcher_of(TWO, "distill")
    assert (launcher.processes, launcher.sharded, str(launcher)) == (2, False, "2 processes")
    assert str(launcher_of(Launch(sft={"processes": 1}), "sft")) == "1 process"
    sharded = launcher_of(config(tmp_path, distributed_type="FSDP", num_processes=8), "distill")
    assert (sharded.processes, sharded.sharded) == (8, True)
    assert str(sharded) == f"{tmp_path / 'accelerate.yaml'} (8 processes)"


@pytest.mark.parametrize(
    ("name", "processes", "sharded"), [("fsdp2", 8, True), ("zero3", 8, True), ("one-gpu", 1, False)]
)
def test_the_shipped_configurations_are_launchers(name, processes, sharded, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: True)
    launcher = launcher_of(Launch(distill=str(CONFIGS / f"{name}.yaml")), "distill")
    assert (launcher.processes, launcher.sharded) == (processes, sharded)
    with pytest.raises(UserError, match="num_machines is 2"):
        launcher_of(Launch(distill=str(CONFIGS / "fsdp2-two-nodes.yaml")), "distill")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_proceses": 2}, "unknown key 'num_proceses'; did you mean 'num_processes'?"),
        ({"fsdp_config": {"fsdp_verison": 2}}, "unknown key 'fsdp_config.fsdp_verison'; did you mean 'fsdp_version'?"),
        ({"deepspeed_config": {"zero_stag": 3}}, "unknown key 'deepspeed_config.zero_stag'"),
        ({"num_processes": None}, "num_processes must be a positive number, got None"),
        ({"num_machines": 2}, "num_machines is 2: a run starts processes on its own machine"),
        ({"distributed_type": "MULTI_CPU"}, "MULTI_CPU needs MPI; write {processes: N}"),
        ({"distributed_type": "CLUSTER"}, "must be NO, MULTI_GPU, FSDP or DEEPSPEED, got 'CLUSTER'"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment AMAZON_SAGEMAKER is not supported"),
    ],
)
def test_a_configuration_of_accelerate_is_checked(tmp_path, settings, message):
    with pytest.raises(UserError) as error:
        launcher_of(config(tmp_path, **settings), "distill")
    assert str(error.value).startswith(f"launch.distill: {tmp_path / 'accelerate.yaml'}: ")
    assert message in str(error.value)


def test_what_cannot_be_launched_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no configuration of accelerate at none\.yaml; name a file for launch\.sft"):
        launcher_of(Launch(sft="none.yaml"), "sft")
    with pytest.raises(UserError, match="each process of signals holds the whole model"):
        launcher_of(config(tmp_path, distributed_type="FSDP"), "signals")
    with pytest.raises(UserError, match="unknown key 'evaluate'; known there: sft, dpo, distill, signals"):
        validate(Launch, {"evaluate": {"processes": 2}}, "recipe")
    with pytest.raises(UserError, match=r"distill\.processes must be greater than 0, got 0"):
        validate(Launch, {"distill": {"processes": 0}}, "recipe")


# -- errors of processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [UserError("a", "b", where="f"), NotFinite("nan at step 3"), KeyboardInterrupt(), OSError(2, "none", "x")]
)
def test_an_error_is_the_same_in_another_process(error):
    again = error_of(json.loads(json.dumps(error_record(error))), "process 1")
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert "in process 1:" in again.__notes__[0]


def test_an_unknown_error_keeps_its_name_and_a_full_disk_is_one():
    again = error_of(error_record(type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")), "process 0")
    assert (type(again).__name__, str(again)) == ("OutOfMemoryError", "CUDA out of memory")
    full = RuntimeError("the writer failed")
    full.__cause__ = OSError(28, "No space left on device")
    assert disk_full(error_of(error_record(full), "process 0"))
    assert not disk_full(error_of(error_record(RuntimeError("the writer failed")), "process 0"))


def start(directory, monkeypatch=None, **ranks):
    request = {"directory": str(directory), **{name.removeprefix("rank"): what for name, what in ranks.items()}}
    return launch("support.process_work", request, launcher_of(TWO, "distill"))


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *map(str, sys.path)]))


def gone(directory):
    """Wait until no process that has started there is alive."""
    pids = [int(path.read_text()) for path in directory.glob("started-*")]
    end = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return bool(pids)


def test_processes_return_results_or_their_first_error(tmp_path, importable, capfd):
    results = start(tmp_path, rank0="return", rank1="return")
    assert [result["rank"] for result in results] == [0, 1]
    with pytest.raises(UserError) as refused:
        start(tmp_path, rank1="refuse")  # the other one waits, and is ended
    assert str(refused.value) == "recipe.yaml: (1) alpha is 7 (2) beta is 8"
    assert "in process 1 of 2 processes:\nTraceback" in refused.value.__notes__[0]
    assert gone(tmp_path)
    assert capfd.readouterr() == ("", "")  # the launcher's own report is not shown


def test_a_killed_process_is_named_and_not_the_lost_connection_of_another(tmp_path):
    launcher, lost = launcher_of(TWO, "distill"), error_record(RuntimeError("connection reset by peer"))
    write_json(tmp_path / "error-0.json", lost)
    write_json(tmp_path / "launcher.json", {"statuses": {"0": 1, "1": -signal.SIGKILL}})
    assert str(failure_of(tmp_path, launcher)).startswith("process 1 of 2 processes was killed by SIGKILL")
    write_json(tmp_path / "error-0.json", error_record(UserError("refused")))
    assert str(failure_of(tmp_path, launcher)) == "refused"
    write_json(tmp_path / "error-0.json", lost)
    write_json(tmp_path / "launcher.json", {"statuses": {"0": 1, "1": -signal.SIGTERM}})
    assert str(failure_of(tmp_path, launcher)) == "connection reset by peer"
    (tmp_path / "error-0.json").unlink()
    write_json(tmp_path / "launcher.json", {"statuses": {"1": 3}})
    assert str(failure_of(tmp_path, launcher)).startswith("process 1 of 2 processes ended with status 3;")
    (tmp_path / "launcher.json").unlink()
    assert str(failure_of(tmp_path, launcher)).startswith("the launcher of 2 processes was killed")


def test_a_killed_process_ends_the_others(tmp_path, importable):
    with pytest.raises(ProcessLost, match="process 1 of 2 processes was killed by SIGKILL, as the system does"):
        start(tmp_path, rank1="die")
    assert gone(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_end_with_the_run(tmp_path, importable, how):
    """On Ctrl-C they are interrupted, once; with a run that is killed they end at once."""
    script = (
        "import sys; from pathlib import Path; from experiment.test_launch import start; "
        f"start(Path({str(tmp_path)!r}))"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("started-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    run.send_signal(how)
    _, err = run.communicate(timeout=60)
    assert gone(tmp_path)
    interrupted = len(list(tmp_path.glob("interrupted-*")))
    if how == signal.SIGINT:
        assert interrupted == 2
        assert err.rstrip().endswith("KeyboardInterrupt")
    else:
        assert interrupted == 0
