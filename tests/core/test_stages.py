"""Stages: reused, resumed, rebuilt or refused; weights that are lost; the pool."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from prefdistill import __version__
from prefdistill.core import stages
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json
from prefdistill.core.lock import locked
from prefdistill.core.memory import bytes_on_disk
from prefdistill.core.stages import run_stage


class Work:
    """The work of a stage: counts its calls, and writes a file in each."""

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


def test_a_changed_request_is_refused_or_rebuilt_from_nothing(tmp_path, capsys):
    work, out = Work(), tmp_path / "stage"
    first = run_stage("sft", out, {"rate": 1}, work)
    (out / "checkpoints").mkdir()
    message = re.escape(f"{out} holds work of another request (rate is 2, was 1); delete it or give another --out")
    with pytest.raises(UserError, match=message):  # the user may want to keep it
        run_stage("sft", out, {"rate": 2}, work)
    assert work.calls == 1
    second = run_stage("sft", out, {"rate": 2}, work, replace=True)
    assert work.calls == 2
    assert second.key != first.key
    assert second.reused is False
    assert names(out) == ["made-2", "stage-request.json", "stage.json"]
    assert "sft: rebuilding: its inputs changed (rate is 2, was 1)" in capsys.readouterr().err
    assert run_stage("sft", out, {"rate": 2}, work).reused is True


def test_the_refusal_names_the_differences(tmp_path, monkeypatch):
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


def train(directory):
    """The work of a stage that writes weights; it must start from nothing."""
    assert not list(directory.rglob("*.safetensors"))
    assert not (directory / "checkpoints").exists()
    (directory / "student").mkdir(exist_ok=True)
    for name in ("model.safetensors", "student/model.safetensors"):
        (directory / name).write_text("weights")


WEIGHTS = ["model.safetensors", "student/model.safetensors"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("half")])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("replace", [True, False])
def test_a_finished_stage_that_lost_weights_is_rebuilt(tmp_path, capsys, damage, name, replace):
    out = tmp_path / "stage"
    run_stage("sft", out, {}, train, replace=replace)
    (out / "notes.md").write_text("mine")
    (out / "mine.safetensors").write_text("mine")
    assert run_stage("sft", out, {}, train, replace=replace).reused
    (out / "mine.safetensors").unlink()
    (out / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # it was also killed before it was tidied
    damage(out / name)
    again = run_stage("sft", out, {}, train, replace=replace)
    assert not again.reused
    told = f"sft: rebuilding: {name} is missing or damaged"
    assert told in capsys.readouterr().err
    assert [(out / name).read_text() for name in WEIGHTS] == ["weights", "weights"]
    assert (out / "notes.md").read_text() == "mine"
    assert run_stage("sft", out, {}, train, replace=replace).reused


@pytest.mark.parametrize("removal", [1, 2])
def test_a_kill_while_lost_weights_are_cleared_still_rebuilds(tmp_path, monkeypatch, removal):
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


def test_lost_weights_are_taken_from_the_pool(tmp_path):
    out, pool = tmp_path / "a" / "sft", tmp_path / "pool"
    run_stage("sft", out, {}, train, replace=True, pool=pool)
    (out / "model.safetensors").unlink()
    assert run_stage("sft", out, {}, train, replace=True, pool=pool).reused
    assert (out / "model.safetensors").read_text() == "weights"


def test_a_pool_that_lost_weights_is_repaired(tmp_path):
    """A file that is overwritten in place changes in every directory that shares it."""
    pool = tmp_path / "pool"
    runs = [tmp_path / name / "sft" for name in "abc"]
    for out in runs[:2]:
        run_stage("sft", out, {}, train, replace=True, pool=pool)
    (runs[0] / "model.safetensors").write_text("half")
    made = [run_stage("sft", out, {}, train, replace=True, pool=pool).reused for out in (runs[0], runs[1], runs[2])]
    assert made == [False, True, True]
    assert {(out / "model.safetensors").read_text() for out in (*runs, *pool.iterdir())} == {"weights"}


def test_checkpoints_may_be_a_link_to_another_disk(tmp_path):
    """Our checkpoints are removed from there, and the link stays."""
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


def test_another_version_rebuilds(tmp_path, monkeypatch):
    work = Work()
    run_stage("sft", tmp_path / "stage", {}, work)
    monkeypatch.setattr(stages, "__version__", "9.9")
    assert run_stage("sft", tmp_path / "stage", {}, work, replace=True).reused is False


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), UserError("a bad row")])
def test_an_interrupted_stage_keeps_its_files_and_resumes(tmp_path, capsys, error):
    out = tmp_path / "stage"
    with pytest.raises(type(error)):
        run_stage("sft", out, {"a": 1}, Work(fail=error))
    assert names(out) == ["made-1", "stage-request.json"]

    def resume(directory):
        assert (directory / "made-1").exists()
        (directory / "rest").write_text("x")

    assert run_stage("sft", out, {"a": 1}, resume).reused is False
    assert names(out) == ["made-1", "rest", "stage-request.json", "stage.json"]
    assert "sft: resuming" in capsys.readouterr().err


def test_an_interrupted_stage_of_another_request_is_emptied(tmp_path):
    out = tmp_path / "stage"
    with pytest.raises(RuntimeError):
        run_stage("sft", out, {"a": 1}, Work(fail=RuntimeError()))
    run_stage("sft", out, {"a": 2}, lambda directory: (directory / "new").write_text("x"), replace=True)
    assert names(out) == ["new", "stage-request.json", "stage.json"]


@pytest.mark.parametrize("again", ["new", "old"])
def test_a_kill_while_a_stale_stage_is_cleared_rebuilds_from_nothing(tmp_path, monkeypatch, again):
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

    for removal in range(1, 6):  # the seal, and four files
        shutil.rmtree(tmp_path / "stage", ignore_errors=True)
        run_stage("sft", tmp_path / "stage", {"request": "old"}, work)
        with monkeypatch.context() as killed:
            killed.setattr(Path, "unlink", stop_at(removal))
            with pytest.raises(KeyboardInterrupt):
                run_stage("sft", tmp_path / "stage", {"request": "new"}, work, replace=True)
        stage = run_stage("sft", tmp_path / "stage", {"request": again}, work, replace=True)
        assert stage.reused is (again == "old" and removal == 1)  # nothing was removed yet
        assert len(list((tmp_path / "stage").glob("made-*"))) == 4


def test_seconds_are_of_all_attempts(tmp_path, monkeypatch):
    clock = iter([10.0, 13.5, 20.0, 22.0])
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(clock))
    with pytest.raises(RuntimeError):
        run_stage("sft", tmp_path / "stage", {}, Work(fail=RuntimeError()))
    assert run_stage("sft", tmp_path / "stage", {}, Work()).seconds == 5.5
    assert run_stage("sft", tmp_path / "stage", {}, Work()).seconds == 5.5  # reused


def test_a_refusal_before_any_work_leaves_nothing(tmp_path):
    def refuse(directory):
        raise UserError("batch_size=5 is not a multiple of 4")

    out = tmp_path / "stage"
    with pytest.raises(UserError, match="multiple"), locked(out):
        run_stage("sft", out, {}, refuse)
    assert not out.exists()


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
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


def test_an_empty_directory_is_used(tmp_path):
    (tmp_path / "stage").mkdir()
    assert run_stage("sft", tmp_path / "stage", {}, Work()).reused is False


def test_a_damaged_seal_is_named(tmp_path):
    run_stage("sft", tmp_path / "stage", {}, Work())
    (tmp_path / "stage" / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"stage\.json is not valid JSON"):
        run_stage("sft", tmp_path / "stage", {}, Work())


# -- the pool ---------------------------------------------------------------------------------------------------------


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
    # hard links take no space
    assert (tmp_path / "a" / "sft" / "made-1").samefile(tmp_path / "b" / "sft" / "made-1")
    # another request or name is another stage
    assert not run_stage("sft", tmp_path / "c" / "sft", {"a": 2}, work, pool=pool).reused
    assert not run_stage("dpo", tmp_path / "c" / "dpo", {"a": 1}, work, pool=pool).reused
    assert len(names(pool)) == 3


def test_a_kill_after_the_seal_is_tidied_and_shared(tmp_path, monkeypatch):
    """Between the seal and the removal of the checkpoints."""
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


def test_a_rebuild_leaves_the_pool_alone(tmp_path):
    pool, out = tmp_path / "pool", tmp_path / "a" / "sft"
    first = run_stage("sft", out, {"a": 1}, Work(), pool=pool)
    second = run_stage("sft", out, {"a": 2}, lambda d: (d / "made-1").write_text("other"), replace=True, pool=pool)
    assert (pool / f"sft-{first.key}" / "made-1").read_text() == "x"
    assert (pool / f"sft-{second.key}" / "made-1").read_text() == "other"
    back = run_stage("sft", out, {"a": 1}, Work(fail=AssertionError()), replace=True, pool=pool)
    assert back.reused
    assert (out / "made-1").read_text() == "x"


def test_a_half_copied_pool_entry_is_removed_by_the_next_stage_of_its_name(tmp_path):
    pool = tmp_path / "pool"
    first = run_stage("sft", tmp_path / "a" / "sft", {"a": 1}, Work(), pool=pool)
    whole = pool / f"sft-{first.key}"
    half = pool / f".{whole.name}.{'0' * 32}.tmp"
    shutil.copytree(whole, half)
    other = pool / f".other-key.{'0' * 32}.tmp"  # another process may be writing it
    other.mkdir()
    shutil.rmtree(whole)
    run_stage("sft", tmp_path / "b" / "sft", {"a": 1}, Work(), pool=pool)
    assert sorted(path.name for path in pool.iterdir()) == sorted([whole.name, other.name])


def test_several_processes_may_share_one_stage_at_once(tmp_path):
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
    # an unfinished stage is replaced by a finished one from the pool
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


def test_a_second_run_may_finish_the_same_stage_first(tmp_path):
    pool = tmp_path / "pool"

    def slow(directory):
        (directory / "made").write_text("first")
        run_stage("sft", tmp_path / "b" / "sft", {}, lambda d: (d / "made").write_text("second"), pool=pool)

    stage = run_stage("sft", tmp_path / "a" / "sft", {}, slow, pool=pool)
    assert not stage.reused
    assert (pool / f"sft-{stage.key}" / "made").read_text() == "second"
    assert names(pool) == [f"sft-{stage.key}"]
