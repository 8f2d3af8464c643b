"""Stages are done once, gone on with and made again; locks go with their process; files are whole or not there."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from prefdistill import __version__
from prefdistill.core import stages
from prefdistill.core.errors import UserError
from prefdistill.core.files import (
    atomic_path,
    file_digest,
    read_json,
    value_digest,
    write_json,
    write_jsonl,
    write_text,
)
from prefdistill.core.lock import locked
from prefdistill.core.memory import bytes_on_disk
from prefdistill.core.stages import run_stage


class Work:
    """A stage's work that counts its calls, and leaves a file for each."""

    def __init__(self, fail=None):
        self.calls, self.fail = 0, fail

    def __call__(self, directory):
        self.calls += 1
        (directory / f"made-{self.calls}").write_text("x")
        if self.fail:
            raise self.fail


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_finished_stage_is_reused(tmp_path, capsys):
    work, out = Work(), tmp_path / "stage"
    first = run_stage("sft", out, {"a": 1, "b": [2]}, work)
    again = run_stage("sft", out, {"b": [2], "a": 1}, work)  # the order of keys is no change
    assert work.calls == 1
    assert (first.reused, again.reused) == (False, True)
    assert (first.key, first.seconds, first.directory) == (again.key, again.seconds, again.directory)
    assert "sft: reused" in capsys.readouterr().err
    assert read_json(out / "stage.json")["name"] == "sft"


def test_another_request_makes_it_again_from_nothing(tmp_path, capsys):
    work, out = Work(), tmp_path / "stage"
    first = run_stage("sft", out, {"rate": 1}, work)
    (out / "checkpoints").mkdir()
    message = re.escape(f"{out} holds work of another request (rate is 2, was 1); delete it or give another --out")
    with pytest.raises(UserError, match=message):  # someone may want it
        run_stage("sft", out, {"rate": 2}, work)
    assert work.calls == 1
    second = run_stage("sft", out, {"rate": 2}, work, replace=True)
    assert work.calls == 2
    assert second.key != first.key
    assert second.reused is False
    assert names(out) == ["made-2", "stage-request.json", "stage.json"]
    assert "sft: rebuilding: its inputs changed (rate is 2, was 1)" in capsys.readouterr().err
    assert run_stage("sft", out, {"rate": 2}, work).reused is True


def test_what_differs_is_named_in_a_line_or_two(tmp_path, monkeypatch):
    many, out = dict.fromkeys("bcdefgh", 0), tmp_path / "stage"
    run_stage("sft", out, {"a": "x" * 99, "training": {"rate": 1}, **many}, Work())
    other = {"a": "y" * 99, "training": {"rate": 2}, **dict.fromkeys("bcdefgh", 1)}
    told = "(a is 'yyy'; b is 1, was 0; c is 1, was 0; d is 1, was 0; e is 1, was 0; 4 more); delete it"
    told = told.replace("'yyy'", f"'{'y' * 39}..., was '{'x' * 39}...")
    with pytest.raises(UserError, match=re.escape(told)):
        run_stage("sft", out, other, Work())
    monkeypatch.setattr(stages, "__version__", "9.9")
    told = f"(version is '9.9', was {__version__!r}); delete it"
    with pytest.raises(UserError, match=re.escape(told)):
        run_stage("sft", out, {"a": "x" * 99, "training": {"rate": 1}, **many}, Work())


# -- weights that are lost ---------------------------------------------------------------------------------------------


def train(directory):
    """A stage's work that leaves weights, and must begin anew."""
    assert not list(directory.rglob("*.safetensors"))
    assert not (directory / "checkpoints").exists()
    (directory / "student").mkdir(exist_ok=True)
    for name in ("model.safetensors", "student/model.safetensors"):
        (directory / name).write_text("weights")


WEIGHTS = ["model.safetensors", "student/model.safetensors"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("half")])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("replace", [True, False])
def test_a_finished_stage_that_has_lost_weights_is_made_again(tmp_path, capsys, damage, name, replace):
    out = tmp_path / "stage"
    run_stage("sft", out, {}, train, replace=replace)
    (out / "notes.md").write_text("mine")
    (out / "mine.safetensors").write_text("mine")
    assert run_stage("sft", out, {}, train, replace=replace).reused
    (out / "mine.safetensors").unlink()
    (out / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # it was killed when it was done, too
    damage(out / name)
    again = run_stage("sft", out, {}, train, replace=replace)
    assert not again.reused
    told = f"sft: rebuilding: {name} is missing or damaged"
    assert told in capsys.readouterr().err
    assert [(out / name).read_text() for name in WEIGHTS] == ["weights", "weights"]
    assert (out / "notes.md").read_text() == "mine"
    assert run_stage("sft", out, {}, train, replace=replace).reused


@pytest.mark.parametrize("removal", [1, 2])
def test_a_stage_that_was_killed_when_its_lost_weights_were_noticed_is_made_again(tmp_path, monkeypatch, removal):
    out, count, unlink = tmp_path / "stage", [0], Path.unlink
    run_stage("sft", out, {}, train)
    (out / "model.safetensors").unlink()

    def removes(path, missing_ok=False):
        count[0] += path.is_relative_to(out) and path.exists()
        if count[0] == removal:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", removes)
        with pytest.raises(KeyboardInterrupt):
            run_stage("sft", out, {}, train)
    assert not run_stage("sft", out, {}, train).reused
    assert [(out / name).read_text() for name in WEIGHTS] == ["weights", "weights"]


def test_lost_weights_come_from_the_pool_where_that_has_them(tmp_path):
    out, pool = tmp_path / "a" / "sft", tmp_path / "pool"
    run_stage("sft", out, {}, train, replace=True, pool=pool)
    (out / "model.safetensors").unlink()
    assert run_stage("sft", out, {}, train, replace=True, pool=pool).reused
    assert (out / "model.safetensors").read_text() == "weights"


def test_a_pool_that_has_lost_weights_gets_them_again(tmp_path):
    """What was written over in place is the same file in all directories that share it."""
    pool = tmp_path / "pool"
    runs = [tmp_path / name / "sft" for name in "abc"]
    for out in runs[:2]:
        run_stage("sft", out, {}, train, replace=True, pool=pool)
    (runs[0] / "model.safetensors").write_text("half")
    made = [run_stage("sft", out, {}, train, replace=True, pool=pool).reused for out in (runs[0], runs[1], runs[2])]
    assert made == [False, True, True]
    assert {(out / "model.safetensors").read_text() for out in (*runs, *pool.iterdir())} == {"weights"}


def test_checkpoints_may_be_a_link_to_another_disk(tmp_path):
    """Ours are removed from there, and the link is kept for those to come."""
    out, disk = tmp_path / "stage", tmp_path / "disk"
    disk.mkdir()
    (disk / "thesis").write_text("x")
    out.mkdir()
    (out / "checkpoints").symlink_to(disk)

    def work(directory, fail=None):
        (directory / "checkpoints" / "checkpoint-3").mkdir()
        if fail:
            raise fail

    with pytest.raises(RuntimeError):
        run_stage("sft", out, {"rate": 1}, partial(work, fail=RuntimeError()))
    assert names(disk) == ["checkpoint-3", "thesis"]
    (disk / "checkpoint-notes").write_text("x")
    run_stage("sft", out, {"rate": 2}, work, replace=True, pool=tmp_path / "pool")
    assert (out / "checkpoints").is_symlink()
    assert names(disk) == ["checkpoint-notes", "thesis"]
    assert not list(tmp_path.glob("pool/*/checkpoints"))
    disk.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        run_stage("sft", out, {"rate": 3}, work, replace=True)
    assert (out / "checkpoints").is_symlink()


def test_another_version_makes_it_again(tmp_path, monkeypatch):
    work = Work()
    run_stage("sft", tmp_path / "stage", {}, work)
    monkeypatch.setattr(stages, "__version__", "9.9")
    assert run_stage("sft", tmp_path / "stage", {}, work, replace=True).reused is False


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), UserError("a bad row")])
def test_an_interrupted_stage_keeps_its_files_and_goes_on(tmp_path, capsys, error):
    out = tmp_path / "stage"
    with pytest.raises(type(error)):
        run_stage("sft", out, {"a": 1}, Work(fail=error))
    assert names(out) == ["made-1", "stage-request.json"]

    def go_on(directory):
        assert (directory / "made-1").exists()
        (directory / "rest").write_text("x")

    assert run_stage("sft", out, {"a": 1}, go_on).reused is False
    assert names(out) == ["made-1", "rest", "stage-request.json", "stage.json"]
    assert "sft: resuming" in capsys.readouterr().err


def test_an_interrupted_stage_of_another_request_is_emptied(tmp_path):
    out = tmp_path / "stage"
    with pytest.raises(RuntimeError):
        run_stage("sft", out, {"a": 1}, Work(fail=RuntimeError()))
    run_stage("sft", out, {"a": 2}, lambda directory: (directory / "new").write_text("x"), replace=True)
    assert names(out) == ["new", "stage-request.json", "stage.json"]


@pytest.mark.parametrize("again", ["new", "old"])
def test_a_stage_that_was_killed_while_it_was_emptied_is_made_from_nothing(tmp_path, monkeypatch, again):
    def work(directory):
        assert not any(path.name.startswith("made") for path in directory.iterdir())
        for name in "abcd":
            (directory / f"made-{name}").write_text("x")

    def stop_at(removal):
        count, unlink = [0], Path.unlink

        def removes(path, missing_ok=False):
            count[0] += path.parent.name == "stage" and path.exists()
            if count[0] == removal:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        return removes

    for removal in range(1, 6):  # the mark, and four files
        shutil.rmtree(tmp_path / "stage", ignore_errors=True)
        run_stage("sft", tmp_path / "stage", {"request": "old"}, work)
        with monkeypatch.context() as killed:
            killed.setattr(Path, "unlink", stop_at(removal))
            with pytest.raises(KeyboardInterrupt):
                run_stage("sft", tmp_path / "stage", {"request": "new"}, work, replace=True)
        stage = run_stage("sft", tmp_path / "stage", {"request": again}, work, replace=True)
        assert stage.reused is (again == "old" and removal == 1)  # then nothing was gone yet
        assert len(list((tmp_path / "stage").glob("made-*"))) == 4


def test_the_seconds_of_all_attempts_count(tmp_path, monkeypatch):
    clock = iter([10.0, 13.5, 20.0, 22.0])
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(clock))
    with pytest.raises(RuntimeError):
        run_stage("sft", tmp_path / "stage", {}, Work(fail=RuntimeError()))
    assert run_stage("sft", tmp_path / "stage", {}, Work()).seconds == 5.5
    assert run_stage("sft", tmp_path / "stage", {}, Work()).seconds == 5.5  # reused


def test_a_mistake_found_before_anything_was_made_leaves_nothing(tmp_path):
    def refuse(directory):
        raise UserError("batch_size=5 is not a multiple of 4")

    out = tmp_path / "stage"
    with pytest.raises(UserError, match="multiple"), locked(out):
        run_stage("sft", out, {}, refuse)
    assert not out.exists()


def test_a_directory_of_someone_else_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "stage"
    out.mkdir()
    (out / "thesis.tex").write_text("all of it")
    work = Work()
    with (
        pytest.raises(UserError, match="is not empty and was not made by prefdistill; give another --out"),
        locked(out),
    ):
        run_stage("sft", out, {}, work)
    assert work.calls == 0
    assert (out / "thesis.tex").read_text() == "all of it"


def test_an_empty_directory_that_was_there_stays(tmp_path):
    with pytest.raises(UserError, match="no"), locked(tmp_path):
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_will_do(tmp_path):
    (tmp_path / "stage").mkdir()
    assert run_stage("sft", tmp_path / "stage", {}, Work()).reused is False


def test_damaged_notes_are_named(tmp_path):
    run_stage("sft", tmp_path / "stage", {}, Work())
    (tmp_path / "stage" / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"stage\.json is not valid JSON"):
        run_stage("sft", tmp_path / "stage", {}, Work())


# -- locks -------------------------------------------------------------------------------------------------------------

# Holds a lock as `locked` does, without waiting for torch to be imported.
HOLDER = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1] + "/.lock")
lock.acquire(timeout=0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused(tmp_path, holder):
    message = "another prefdistill run is working in"
    with pytest.raises(UserError, match=message) as error, locked(tmp_path):
        pytest.fail("two at once")
    assert str(tmp_path) in str(error.value)
    holder.communicate("")  # it ends
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_the_lock_of_a_killed_process_does_not_hold(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_who_waited_for_a_lock_that_is_gone_holds_nothing(tmp_path, monkeypatch):
    """The file is removed between the opening and the locking of it: the lock of it would keep nobody out."""
    first, second = (FileLock(tmp_path / ".lock", is_singleton=False) for _ in range(2))
    first.acquire()
    flock, waiting = fcntl.flock, [True]

    def end_of_the_first(descriptor, operation):
        if waiting and operation & fcntl.LOCK_EX:
            waiting.clear()
            (tmp_path / ".lock").unlink()
            first.release()
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", end_of_the_first)
    second.acquire(timeout=1)
    with pytest.raises(UserError, match="another prefdistill run"), locked(tmp_path):
        pytest.fail("two at once")
    second.release()


def test_we_keep_a_second_process_out(tmp_path):
    attempt = HOLDER.replace("sys.stdin.read()", "")
    with locked(tmp_path):
        refused = subprocess.run([sys.executable, "-c", attempt, str(tmp_path)], capture_output=True, text=True)
    assert "Timeout" in refused.stderr
    assert subprocess.run([sys.executable, "-c", attempt, str(tmp_path)], capture_output=True).returncode == 0


def test_the_lock_is_released_at_the_end_of_the_block_even_while_the_error_is_looked_at(tmp_path):
    (tmp_path / "work").write_text("x")
    with pytest.raises(RuntimeError) as error, locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):  # `error` still holds the frames of the first block
        assert error.tb is not None


def test_a_place_where_no_directory_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot make the directory .* give another --out"), locked(out):
            pytest.fail("in a file?")
    assert (tmp_path / "file").read_text() == "x"


# -- files -------------------------------------------------------------------------------------------------------------


def fail_half_way(path, error):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_half_written_is_left(tmp_path, error):
    path = tmp_path / "new" / "results.json"
    with pytest.raises(error):
        fail_half_way(path, error)
    assert names(path.parent) == []


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        fail_half_way(path, RuntimeError)
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename within one file system is atomic
    assert path.read_text() == "new"
    assert names(tmp_path) == ["results.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    """After a loss of power: never an empty file under the name, never the old one once it is called written."""
    order, fsync, replace = [], os.fsync, Path.replace

    def record_fsync(descriptor):
        order.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_replace(path, target):
        order.append(("replace", path, target))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    with atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert order == [("fsync", temporary), ("replace", temporary, tmp_path / "a.json"), ("fsync", tmp_path)]


def test_values_that_are_no_json_leave_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    assert names(tmp_path) == ["a.json"]


def test_json_lines(tmp_path):
    rows = [{"text": "one\ntwo"}, {"text": "ü"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_digests(tmp_path):
    write_text(tmp_path / "a", "abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert value_digest({"a": 1, "b": 2}) == value_digest({"b": 2, "a": 1})
    assert len({value_digest(value) for value in (1, "1", [1], {"1": 1}, None, 1.5, True)}) == 7


# -- a pool ------------------------------------------------------------------------------------------------------------


def test_a_stage_is_taken_from_the_pool(tmp_path):
    work, pool = Work(), tmp_path / "pool"
    first = run_stage("sft", tmp_path / "a" / "sft", {"a": 1}, work, pool=pool)
    again = run_stage("sft", tmp_path / "b" / "sft", {"a": 1}, work, pool=pool)
    assert work.calls == 1
    assert (first.reused, again.reused) == (False, True)
    assert (first.key, first.seconds) == (again.key, again.seconds)
    assert again.directory == tmp_path / "b" / "sft"
    assert (
        names(tmp_path / "a" / "sft") == names(tmp_path / "b" / "sft") == ["made-1", "stage-request.json", "stage.json"]
    )
    assert names(pool) == [f"sft-{first.key}"]
    assert names(tmp_path / "b") == ["sft"]
    # no space is taken
    assert (tmp_path / "a" / "sft" / "made-1").samefile(tmp_path / "b" / "sft" / "made-1")
    # another request, another name: another stage
    assert not run_stage("sft", tmp_path / "c" / "sft", {"a": 2}, work, pool=pool).reused
    assert not run_stage("dpo", tmp_path / "c" / "dpo", {"a": 1}, work, pool=pool).reused
    assert len(names(pool)) == 3


def test_a_stage_that_was_killed_when_it_was_done_is_tidied_and_lent(tmp_path, monkeypatch):
    """Between its mark and the removal of its checkpoints."""
    out, pool = tmp_path / "stage", tmp_path / "pool"

    def make(directory):
        (directory / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (directory / "model.safetensors").write_text("weights")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr("prefdistill.core.artifact.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            run_stage("sft", out, {}, make, pool=pool)
    assert (out / "stage.json").exists()
    assert (out / "checkpoints").exists()
    stage = run_stage("sft", out, {}, make, pool=pool)
    assert (stage.reused, stage.bytes) == (True, bytes_on_disk(out))
    assert not (out / "checkpoints").exists()
    assert (pool / f"sft-{stage.key}" / "stage.json").exists()


def test_what_is_made_again_leaves_the_pool_alone(tmp_path):
    pool, out = tmp_path / "pool", tmp_path / "a" / "sft"
    first = run_stage("sft", out, {"a": 1}, Work(), pool=pool)
    second = run_stage("sft", out, {"a": 2}, lambda d: (d / "made-1").write_text("other"), replace=True, pool=pool)
    assert (pool / f"sft-{first.key}" / "made-1").read_text() == "x"
    assert (pool / f"sft-{second.key}" / "made-1").read_text() == "other"
    back = run_stage("sft", out, {"a": 1}, Work(fail=AssertionError()), replace=True, pool=pool)
    assert back.reused
    assert (out / "made-1").read_text() == "x"


def test_what_a_killed_process_has_left_in_the_pool_goes_with_the_next_stage_of_its_name(tmp_path):
    pool = tmp_path / "pool"
    first = run_stage("sft", tmp_path / "a" / "sft", {"a": 1}, Work(), pool=pool)
    whole = pool / f"sft-{first.key}"
    half = pool / f".{whole.name}.{'0' * 32}.tmp"
    shutil.copytree(whole, half)
    other = pool / f".other-key.{'0' * 32}.tmp"  # another process may be making it
    other.mkdir()
    shutil.rmtree(whole)
    run_stage("sft", tmp_path / "b" / "sft", {"a": 1}, Work(), pool=pool)
    assert sorted(path.name for path in pool.iterdir()) == sorted([whole.name, other.name])


def test_two_processes_may_leave_one_stage_in_the_pool_at_once(tmp_path):
    pool = tmp_path / "pool"

    def make(name):
        return run_stage("sft", tmp_path / name / "sft", {"a": 1}, Work(), pool=pool)

    with ThreadPoolExecutor(4) as threads:
        keys = {stage.key for stage in threads.map(make, "abcd")}
    assert [path.name for path in pool.iterdir()] == [f"sft-{key}" for key in keys]


def test_only_finished_stages_are_in_the_pool(tmp_path):
    pool = tmp_path / "pool"
    with pytest.raises(RuntimeError):
        run_stage("sft", tmp_path / "a" / "sft", {"a": 1}, Work(fail=RuntimeError()), pool=pool)
    assert not pool.exists()
    # what another run has begun gives way to what a third has finished
    run_stage("sft", tmp_path / "b" / "sft", {"a": 1}, lambda d: (d / "whole").write_text("x"), pool=pool)
    assert run_stage("sft", tmp_path / "a" / "sft", {"a": 1}, Work(fail=AssertionError()), pool=pool).reused
    assert names(tmp_path / "a" / "sft") == ["stage-request.json", "stage.json", "whole"]


def test_a_pool_on_another_file_system_holds_copies(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run_stage("sft", tmp_path / "a" / "sft", {}, Work(), pool=tmp_path / "pool")
    run_stage("sft", tmp_path / "b" / "sft", {}, Work(fail=AssertionError()), pool=tmp_path / "pool")
    assert not (tmp_path / "a" / "sft" / "made-1").samefile(tmp_path / "b" / "sft" / "made-1")


def test_two_runs_that_finish_the_same_stage(tmp_path):
    pool = tmp_path / "pool"

    def slow(directory):
        (directory / "made").write_text("first")
        run_stage("sft", tmp_path / "b" / "sft", {}, lambda d: (d / "made").write_text("second"), pool=pool)

    stage = run_stage("sft", tmp_path / "a" / "sft", {}, slow, pool=pool)
    assert not stage.reused
    assert (pool / f"sft-{stage.key}" / "made").read_text() == "second"
    assert names(pool) == [f"sft-{stage.key}"]
