"""What was finished is kept, and what goes on ends as if nothing had happened: kills, full disks, two runs at once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prefdistill.checkpoints import WHOLE
from prefdistill.cli import _call
from prefdistill.signals import Signals
from prefdistill.stages import locked

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.faults import FEW, JOBS, PAIRS, STORES, Fault, Job, attempt, command, disturb, make_place

SIGNALS = ("signals", "--model", "model", *PAIRS, "--out", "out")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("faults").resolve())


@pytest.fixture(autouse=True)
def tidy(place):
    yield
    shutil.rmtree(place / "out", ignore_errors=True)


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage",
    [
        "signals",
        "sample",
        "distill",
        "evaluate",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("sft", "dpo", "run")),
    ],
)
def test_a_stage_that_is_cut_off_at_20_random_moments_ends_as_if_it_had_not_been(stage, place):
    tally = disturb(JOBS[stage], place, kills=20, seed=1)
    assert tally.lost == []
    assert tally.injected.total() == 20
    assert {"kill -9 at a change", "kill -9 in time", "Ctrl-C at a change", "full disk at a change"} <= set(
        tally.injected
    )
    assert tally.compared >= 1


def test_a_loss_would_be_seen(place):
    """A stage that goes on with half of its work missing, and one that leaves files behind."""

    def careless():
        out = Path("out")
        out.mkdir(exist_ok=True)
        for name in "abcdef":
            if not (out / name).exists():
                (out / name).touch()
                time.sleep(0.01)
                (out / name).write_text("whole")
        return 0

    tally = disturb(Job(careless, lambda out: [path.read_text() for path in sorted(out.iterdir())]), place, 20, seed=0)
    assert any("another result" in reason for reason in tally.lost)


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "largest"),
    [
        (SIGNALS, 4_000),  # between the manifest and the shard
        (("distill", "--student", "model", *PAIRS, *STORES, "--out", "out", *FEW), 30_000),  # in a checkpoint
    ],
)
def test_a_disk_without_room_is_one_line_and_the_next_call_goes_on(place, arguments, largest):
    job = Job(command(*arguments), lambda out: None)
    failed = attempt(job, place, largest=largest)
    assert failed.status == 1
    told = [line for line in failed.said.splitlines() if line.startswith("prefdistill: ")]
    assert len(told) == 1
    assert told[0].startswith("prefdistill: no room on the disk")
    assert told[0].endswith("make some, and the same command goes on")
    assert "Traceback" not in failed.said
    assert not list((place / "out").rglob(".*.tmp"))
    assert not (place / "out" / "manifest.json").exists()
    assert not (place / "out" / "stage.json").exists()
    assert attempt(job, place).status == 0
    if arguments is SIGNALS:
        assert len(Signals.open(place / "out")) == 12


def test_a_checkpoint_of_which_the_last_file_is_torn_is_no_checkpoint(place):
    """All of it is there but the mark that it is on the disk; the last file to be written is empty."""
    job = JOBS["distill"]
    whole = attempt(job, place)
    assert whole.status == 0
    expected = job.result(place / "out")
    shutil.rmtree(place / "out")
    late = Fault(signal.SIGKILL, change=2 * whole.changes // 3)
    assert attempt(job, place, late).status == -signal.SIGKILL
    checkpoints = sorted((place / "out" / "checkpoints").glob("checkpoint-*"))
    torn = checkpoints[0].with_name("checkpoint-3")
    shutil.copytree(checkpoints[0], torn)
    (torn / "trainer_state.json").write_text("")
    (torn / WHOLE).unlink()
    assert attempt(job, place).status == 0
    assert job.result(place / "out") == expected


# -- two at once -------------------------------------------------------------------------------------------------------


def hold(directory, name=".lock"):
    """A process that holds a lock as long as it lives; returns its id."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(directory, name):
            os.write(write, b"!")
            time.sleep(600)
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"!"
    os.close(read)
    return child


@pytest.mark.parametrize(
    ("arguments", "where", "name"),
    [
        (SIGNALS, "out", ".lock"),
        (("sample", "--model", "model", *PAIRS, "--out", "out/a.jsonl"), "out/a.jsonl.parts", ".lock"),
        (
            ("evaluate", "--model", "model", *PAIRS, "--reference", "signals-start", "--out", "out/a.json"),
            "out",
            ".a.json.lock",
        ),
        (("sft", "--model", "model", *PAIRS, "--out", "out", *FEW), "out", ".lock"),
        (("distill", "--student", "model", *PAIRS, *STORES, "--out", "out", *FEW), "out", ".lock"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_second_run_is_refused_until_the_first_is_dead(place, monkeypatch, capsys, arguments, where, name):
    monkeypatch.chdir(place)
    holder = hold(place / where, name)
    try:
        assert _call(list(arguments)) == 2
        assert f"another prefdistill run is working in {where.removesuffix('/a.json')}" in capsys.readouterr().err
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert (place / where / name).exists()  # the file is still there, but nobody holds it
    assert _call(list(arguments)) == 0
    assert not list((place / "out").rglob("*.lock"))


# -- several processes -------------------------------------------------------------------------------------------------


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "prefdistill"]


def launched(place, out):
    """Training on two processes, begun."""
    options = {"max_steps": 300, "batch_size": 4, "micro_batch_size": 2, "logging_steps": 1, "save_steps": 10}
    arguments = ["distill", "--student", "model", *PAIRS, "--method", "sft", "--out", out]
    arguments += [f"{name}={value}" for name, value in options.items()]
    with (place / "log.txt").open("w") as said:
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*LAUNCH, *arguments], cwd=place, stdout=said, stderr=said, env=alone)


@pytest.mark.slow
def test_if_one_rank_is_killed_the_others_end_and_the_next_call_goes_on(place):
    first = launched(place, "out")
    start = time.monotonic()
    while not list((place / "out" / "checkpoints").glob(f"*/{WHOLE}")):
        assert first.poll() is None, (place / "log.txt").read_text()[-2000:]
        assert time.monotonic() < start + 240
        time.sleep(0.05)
    ranks = sorted(psutil.Process(first.pid).children(), key=lambda process: process.pid)
    assert len(ranks) == 2
    ranks[1].kill()
    assert first.wait(timeout=120) != 0
    assert not any(rank.is_running() for rank in ranks)
    assert not (place / "out" / "stage.json").exists()
    assert launched(place, "out").wait(timeout=240) == 0
    assert "going on from step" in (place / "log.txt").read_text()
    assert launched(place, "straight").wait(timeout=240) == 0
    a, b = ((place / name / "model.safetensors").read_bytes() for name in ("out", "straight"))
    assert a == b
