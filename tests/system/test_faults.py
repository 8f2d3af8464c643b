"""Finished work is kept and resumed work gives the undisturbed result: kills, full disks, two runs at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from benchmarks.attempts import PAGE, Disk, Fault, Job, attempt
from benchmarks.faults import FEW, JOBS, ON_SEVERAL, PAIRS, RECIPE, STORES, TINY, command, disturb, make_place
from benchmarks.histories import change_option, live
from safetensors.torch import save_file
from tqdm.auto import tqdm

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full
from prefdistill.core.lock import locked
from prefdistill.data.load import load_pairs
from prefdistill.evaluation.judges.mt_bench import PROMPTS
from prefdistill.sampling.files import sample_responses, write_rows
from prefdistill.signals import Signals
from prefdistill.training.checkpoints import WHOLE
from support.judges import Judge, answers, jsonl

ROOT = Path(__file__).parents[2]
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
        "evaluate",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("sft", "dpo", "distill", "run")),
    ],
)
def test_a_stage_killed_at_20_random_moments_gives_the_undisturbed_result(stage, place):
    tally = disturb(JOBS[stage], place, kills=20, seed=1)
    assert tally.lost == []
    assert tally.changes >= (60 if stage in ("signals", "sample") else 30), "the work is not done in several parts"
    assert tally.injected.total() == 20
    assert {"kill -9 at a change", "kill -9 in time", "Ctrl-C at a change", "full disk at a change"} <= set(
        tally.injected
    )
    assert tally.compared >= 1


def test_a_lost_result_is_detected(place):
    """A stage that resumes with part of its work missing, and one that leaves files behind."""

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


@pytest.mark.parametrize("held", ["its threads", "the lock of all progress bars"])
def test_an_attempt_does_not_hang_on_threads_or_locks_of_another_process(held, place):
    """In forks: a thread pool that was not copied with its process, a lock whose holder was killed."""

    def compute():
        torch.softmax(torch.randn(4_000, 2_000), -1)
        return 0

    def die():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def show():
        list(tqdm(range(3)))
        return 0

    if held == "its threads":
        torch.set_num_threads(2)
        try:
            compute()
            assert attempt(Job(compute, lambda out: None), place, timeout=30).status == 0
        finally:
            torch.set_num_threads(1)
    else:
        show()
        assert attempt(Job(die, lambda out: None), place).status == -signal.SIGKILL
        assert attempt(Job(show, lambda out: None), place, timeout=30).status == 0


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "largest"),
    [
        (SIGNALS, 4_000),  # between the manifest and the shard
        (("distill", "--student", "model", *PAIRS, *STORES, "--out", "out", *FEW), 30_000),  # in a checkpoint
    ],
)
def test_a_full_disk_is_one_line_and_the_next_call_resumes(place, arguments, largest):
    job = Job(command(*arguments), lambda out: None)
    failed = attempt(job, place, largest=largest)
    assert failed.status == 1
    told = [line for line in failed.said.splitlines() if line.startswith("prefdistill: ")]
    assert len(told) == 1
    assert told[0].startswith("prefdistill: no room on the disk")
    assert told[0].endswith("free some, and the same command resumes")
    assert "Traceback" not in failed.said
    assert not list((place / "out").rglob(".*.tmp"))
    assert not (place / "out" / "manifest.json").exists()
    assert not (place / "out" / "stage.json").exists()
    assert attempt(job, place).status == 0
    if arguments is SIGNALS:
        assert len(Signals.open(place / "out")) == 12


def test_a_checkpoint_with_a_torn_file_is_discarded(place):
    """All of it is there but the seal; the last file to be written is empty."""
    job = JOBS["distill"]
    whole = attempt(job, place)
    assert whole.status == 0
    expected = job.result(place / "out")
    shutil.rmtree(place / "out")
    late = Fault(signal.SIGKILL, change=2 * whole.changes[0] // 3)
    assert attempt(job, place, late).status == -signal.SIGKILL
    checkpoints = sorted((place / "out" / "checkpoints").glob("checkpoint-*"))
    torn = checkpoints[0].with_name("checkpoint-3")
    shutil.copytree(checkpoints[0], torn)
    (torn / "trainer_state.json").write_text("")
    (torn / WHOLE).unlink()
    assert attempt(job, place).status == 0
    assert job.result(place / "out") == expected


@pytest.fixture
def disk(place):
    """A file system of any size for `out`; needs root, or user mounts."""
    try:
        with Disk(place) as disk:
            yield disk
    except OSError as error:  # the right to, or the command
        pytest.skip(f"{error}; try `unshare -rm pytest ...`")


@pytest.mark.parametrize(
    ("stage", "kills"),
    [
        ("signals", 5),
        ("sample", 5),
        *(pytest.param(s, 20, marks=pytest.mark.slow) for s in ("distill", "sft", "dpo", "evaluate", "run")),
    ],
)
def test_a_small_file_system_that_fills_up_loses_nothing(stage, kills, place, disk):
    tally = disturb(JOBS[stage], place, kills, seed=2, disk=disk)
    assert tally.lost == []
    assert tally.injected == {"full disk at a size": kills}
    assert tally.compared >= 1


def test_half_written_files_on_a_full_disk_are_detected(place, disk):
    """A stage that leaves a temporary file, and one that does not mention the disk."""

    def careless():
        (Path("out") / "x").mkdir(parents=True, exist_ok=True)
        Path("out/x/.a.tmp").write_bytes(bytes(20 * PAGE))
        return 0

    tally = disturb(Job(careless, lambda out: None), place, 2, seed=0, disk=disk)
    assert any("half written" in reason for reason in tally.lost)
    assert any("unexpected output" in reason for reason in tally.lost)


def optimizer_state(path):
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(300)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), path)


WORDS = {"words": [np.random.default_rng(n).bytes(200).hex() for n in range(4_000)]}  # too many for a dictionary
WRITERS = {
    "safetensors": lambda path: save_file({"weight": torch.randn(100_000)}, path),
    "torch": optimizer_state,
    "torch, old format": lambda path: torch.save(torch.randn(100_000), path, _use_new_zipfile_serialization=False),
    "parquet": lambda path: pq.write_table(pa.table({"x": np.random.default_rng(0).random(100_000)}), path),
    "arrow": lambda path: datasets.Dataset.from_dict(WORDS).save_to_disk(str(path)),
    "text": lambda path: path.write_text("x" * 10**6),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("room", [PAGE, 20 * PAGE])
def test_the_full_disk_error_of_each_writer_is_recognised(name, room, disk):
    disk.resize(disk.used() + room)
    with pytest.raises(Exception) as raised:  # noqa: PT011  (of whatever library)
        WRITERS[name](disk.at / "made")
    assert disk_full(raised.value), raised.value
    assert not disk_full(RuntimeError("CUDA error: device-side assert"))


def test_a_full_disk_for_temporary_files_is_not_an_error_in_the_data(place, disk, monkeypatch):
    (place / "plenty").mkdir(exist_ok=True)
    jsonl(place / "plenty" / "a.jsonl", [{"prompt": "p", "chosen": f"a{n}" * 200, "rejected": "b"} for n in range(500)])
    monkeypatch.setattr(tempfile, "tempdir", str(disk.at))
    disk.resize(disk.used() + 4 * PAGE)
    with pytest.raises(Exception, match="generating the dataset") as raised:
        load_pairs(str(place / "plenty"))
    assert disk_full(raised.value)
    disk.resize(None)
    assert len(load_pairs(str(place / "plenty"))) == 500


@pytest.mark.parametrize("room", [PAGE, 100 * PAGE])
def test_responses_as_parquet_on_a_full_disk_do_not_abort_the_process(room, place, disk):
    """Arrow's writer does, if a column holds more words than its dictionary."""
    responses = datasets.Dataset.from_dict(WORDS)

    def write():
        try:
            write_rows(responses, Path("made.parquet"), "made.parquet")
        except OSError as error:
            return 1 if disk_full(error) else 3
        return 0

    disk.resize(disk.used() + room)
    assert attempt(Job(write, lambda out: None), place, disk=disk).status == 1
    disk.resize(None)
    assert attempt(Job(write, lambda out: None), place, disk=disk).status == 0
    assert pq.read_table(disk.at / "made.parquet").to_pydict() == WORDS


# -- two at once -------------------------------------------------------------------------------------------------------


def hold(directory, name=".lock"):
    """Start a process that holds a lock as long as it lives; return its id."""
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


JUDGED = ("--url", "URL", "--judge-model", "j", "--out", "out")
BENCH = ("--questions", "questions.jsonl", "--prompts", "judge-prompts.jsonl", "--references", "reference.jsonl")
STUDY = {
    "name": "tiny",
    "question": "Small?",
    "grid": {"methods.tvkd.alpha": [0.5]},
    "methods": ["tvkd"],
    "x": "methods.tvkd.alpha",
    "seeds": 1,
}


@pytest.fixture
def judge(place):
    """A judge that prefers the answer shown first, and the input files of the judge verbs."""
    jsonl(place / "questions.jsonl", [{"question_id": 81, "category": "writing", "turns": ["the small", "a prompt"]}])
    prompts = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": " ".join(f"{{{p}}}" for p in places)}
        for name, places in PROMPTS.values()
    ]
    jsonl(place / "judge-prompts.jsonl", prompts)
    answers(place / "reference.jsonl", {})
    answers(place / "ours.jsonl", {81: ["the teacher", "reads"]})
    for name in ("we", "they"):
        (place / f"{name}.json").write_text(json.dumps([{"instruction": "do", "output": name, "generator": name}]))
    (place / "prompt.txt").write_text("<|im_start|>user\n{instruction}\n{output_1}\n{output_2}\n<|im_end|>")
    (place / "study.yaml").write_text(json.dumps(STUDY))
    server = Judge(lambda text, _: "m" if "they" in text else "[[7]]")
    yield server
    server.close()


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
        (("run", "RECIPE", "--out", "out", "--methods", "tvkd", *TINY), "out", ".lock"),
        (("study", "study.yaml", "--out", "out", *TINY), "out", ".lock"),
        (
            *(("judge", "answers", "--model", "model", *BENCH[:2], "--out", "out/a.jsonl", "--max-new-tokens", "4"),),
            *("out/a.jsonl.parts", ".lock"),
        ),
        (("judge", "mt-bench", "--answers", "ours.jsonl", *BENCH, *JUDGED), "out", ".lock"),
        (
            *(("judge", "alpaca-eval", "--answers", "we.json", "--against", "they.json", *JUDGED),),
            *("out", ".lock"),
        ),
    ],
    ids=lambda value: " ".join(value[: 1 + (value[0] == "judge")]) if isinstance(value, tuple) else "",
)
def test_a_second_run_is_refused_until_the_first_ends(place, judge, monkeypatch, capsys, arguments, where, name):
    monkeypatch.chdir(place)
    if arguments[0] == "judge":
        pytest.importorskip("openai", reason="judges are asked through the openai package (extra judges)")
    stands_for = {"RECIPE": str(ROOT / RECIPE), "URL": judge.url}
    arguments = [stands_for.get(argument, argument) for argument in arguments]
    if "alpaca-eval" in arguments:
        arguments += ["--prompt", "prompt.txt"]
    holder = hold(place / where, name)
    try:
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert f"another prefdistill run is working in {where.removesuffix('/a.json')}" in said
        assert said.count("\n") == 1
        assert not judge.seen
        assert {path.name for path in (place / where).iterdir()} == {name}
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert (place / where / name).exists()  # the file is still there, but nobody holds it
    assert main(arguments) == 0, capsys.readouterr().err
    assert not list((place / "out").rglob("*.lock"))


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "kills"),
    [("signals", 5), *(pytest.param(s, 20, marks=pytest.mark.slow) for s in ON_SEVERAL)],
)
def test_a_kill_of_one_of_two_ranks_loses_nothing(stage, kills, place):
    tally = disturb(JOBS[stage], place, kills, seed=3, ranks=2, alone=stage == "signals")
    assert tally.lost == []
    assert tally.injected.total() == kills
    assert tally.compared >= 1


@pytest.fixture
def _ignoring_sigterm():
    """This process does not end at SIGTERM, as after `ray.init`."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_ignoring_sigterm")
def test_a_rank_that_waits_for_a_killed_one_is_terminated(place):
    """As by the launcher; a rank that ignores the signal is detected."""

    def waits(stubborn):
        if os.environ["RANK"] == "0":
            while not (place / "deaf").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (place / "deaf").touch()
        time.sleep(30)
        return 0

    tried = attempt(Job(lambda: waits(False), lambda out: None), place, ranks=2)
    assert tried.ranks == (-signal.SIGKILL, -signal.SIGTERM)
    assert tried.status == -signal.SIGKILL
    (place / "deaf").unlink()
    with pytest.raises(TimeoutError):
        attempt(Job(lambda: waits(True), lambda out: None), place, ranks=2, timeout=1)


def test_a_rank_that_does_not_see_ctrl_c_is_killed_as_by_the_launcher(place, monkeypatch):
    """It waits in native code for another that is gone, where Python's handler does not run."""
    monkeypatch.setattr("benchmarks.attempts.GRACE", 0.2)

    def waits():
        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(30)
        return 0

    tried = attempt(Job(waits, lambda out: None), place, Fault(signal=signal.SIGINT, seconds=0.5), ranks=2)
    assert tried.ranks == (-signal.SIGKILL, 130)


@pytest.mark.parametrize("stage", sorted(set(JOBS) - set(ON_SEVERAL)))
def test_other_stages_refuse_several_processes(place, stage):
    tried = attempt(JOBS[stage], place, ranks=2)
    assert tried.status == 2
    assert set(tried.ranks) <= {2, -signal.SIGTERM}  # the slower one may be ended before it has refused
    assert f"`prefdistill {stage}` runs in one process" in tried.said
    assert not (place / "out").exists()


def test_single_process_work_refuses_several_processes_from_python_too(place):
    def sample():
        try:
            sample_responses("model", "pairs.jsonl", out="out/a.jsonl", max_new_tokens=1)
        except UserError as error:
            return 2 if "runs in one process" in str(error) else 1
        return 0

    tried = attempt(Job(sample, lambda out: None), place, ranks=2)
    assert tried.status == 2
    assert set(tried.ranks) <= {2, -signal.SIGTERM}
    assert not (place / "out").exists()


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "prefdistill"]


def launched(place, out):
    """Start a training on two processes."""
    options = {"max_steps": 300, "batch_size": 4, "micro_batch_size": 2, "logging_steps": 1, "save_steps": 10}
    arguments = ["distill", "--student", "model", *PAIRS, "--method", "sft", "--out", out]
    arguments += [f"{name}={value}" for name, value in options.items()]
    with (place / "log.txt").open("w") as said:
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*LAUNCH, *arguments], cwd=place, stdout=said, stderr=said, env=alone)


@pytest.mark.slow
def test_after_a_kill_of_one_rank_the_others_end_and_the_next_call_resumes(place):
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
    assert "resuming from step" in (place / "log.txt").read_text()
    assert launched(place, "straight").wait(timeout=240) == 0
    a, b = ((place / name / "model.safetensors").read_bytes() for name in ("out", "straight"))
    assert a == b


# -- histories ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["run", "study"])
def test_results_do_not_depend_on_the_history_of_the_directory(verb, tmp_path):
    tally = live(make_place(tmp_path), 12, 4, verb)
    assert tally.differing == []
    assert tally.compared >= 2
    assert tally.changes.total() >= tally.compared


@pytest.mark.slow
def test_a_change_that_is_missing_from_a_cache_key_is_detected(tmp_path, monkeypatch):
    """Here: the options of the training."""
    monkeypatch.setattr("prefdistill.training.options.Training.cache_key", lambda self: {})
    monkeypatch.setattr("benchmarks.histories.CHANGES", [change_option])
    monkeypatch.setattr("benchmarks.histories.OPTIONS", {"recipe.yaml": {"training.learning_rate": [0.01, 0.02]}})
    assert live(make_place(tmp_path), 4, seed=1).differing
