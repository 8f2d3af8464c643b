"""Locks: they keep other processes out, and end with theirs."""

import fcntl
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from filelock import FileLock

from prefdistill.core import lock
from prefdistill.core.errors import UserError
from prefdistill.core.lock import locked

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


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_a_process_that_waited_for_a_removed_lock_tries_again(tmp_path, monkeypatch):
    """The file is removed after it was opened and before it is locked: locking it would keep nobody out."""
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


def test_the_lock_keeps_a_second_process_out(tmp_path):
    attempt = HOLDER.replace("sys.stdin.read()", "")
    with locked(tmp_path):
        refused = subprocess.run([sys.executable, "-c", attempt, str(tmp_path)], capture_output=True, text=True)
    assert "Timeout" in refused.stderr
    assert subprocess.run([sys.executable, "-c", attempt, str(tmp_path)], capture_output=True).returncode == 0


def test_the_lock_is_released_while_the_error_is_still_referenced(tmp_path):
    (tmp_path / "work").write_text("x")
    with pytest.raises(RuntimeError) as error, locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):  # `error` still holds the frames of the first block
        assert error.tb is not None


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot make the directory .* give another --out"), locked(out):
            pytest.fail("in a file?")
    assert (tmp_path / "file").read_text() == "x"


def test_an_empty_directory_that_was_there_stays(tmp_path):
    with pytest.raises(UserError, match="no"), locked(tmp_path):
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_machine_may_take_a_while_to_show(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "APPEARS", 0.0)
    assert not lock.appears(tmp_path / "missing" / "file")
    assert not lock.appears(tmp_path / "file")
    monkeypatch.setattr(lock, "APPEARS", 60.0)
    monkeypatch.setattr(lock.time, "sleep", lambda _: (tmp_path / "file").touch())
    assert lock.appears(tmp_path / "file")


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("main", [True, False])
def test_all_processes_of_a_run_must_see_one_directory(tmp_path, monkeypatch, main, shares):
    """The main process makes a file whose name the others cannot guess; if one does not see it, all stop."""
    team = SimpleNamespace(is_main_process=main, num_processes=2, wait_for_everyone=lambda: None)
    monkeypatch.setattr(lock, "processes", lambda: team)
    monkeypatch.setattr(lock, "APPEARS", 0.0)

    def broadcast(names):
        if not main and shares:
            (tmp_path / names[0]).touch()
        return names

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", broadcast)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda seen: [*seen, None if shares or not main else "other"])
    if shares:
        with lock.locked_together(tmp_path):
            pass
    else:
        with pytest.raises(UserError, match="is not the directory that the other machines have"):
            lock.locked_together(tmp_path).__enter__()
