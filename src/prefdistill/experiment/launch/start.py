"""Start the processes of a launch, wait for them, and raise what went wrong in them."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json, write_json
from prefdistill.core.memory import free_devices
from prefdistill.experiment.launch.options import Launcher
from prefdistill.experiment.launch.outcome import CONFIG, LAUNCHER, REQUEST, error_of

# Signals that end a process from outside, or in native code; SIGTERM is what the launcher ends the others with, and
# SIGABRT what a library raises that has lost its connection to them.
KILLED = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


class ProcessLost(RuntimeError):
    """A process ended without a message of its own, such as one that was killed."""


def launch(module: str, request: dict[str, Any], launcher: Launcher) -> list[dict[str, Any]]:
    """Run a module in several processes, through accelerate's launcher, and return the result of each.

    All of them end when this process ends, however it ends. On Ctrl-C they are interrupted, and may write a checkpoint;
    on the second one they are killed.

    Args:
        module: its `main` is `process_main` of some work.
        request: of that work, as JSON.
        launcher: how the processes are started.

    Raises:
        UserError, OSError, KeyboardInterrupt, ...: the first error of a process, with its traceback as a note.
        ProcessLost: if one was killed.
    """
    free_devices()
    with TemporaryDirectory(prefix="prefdistill-") as place:
        directory = Path(place)
        write_json(directory / REQUEST, request)
        write_json(directory / CONFIG, launcher.config)
        options = ["--config_file", str(directory / CONFIG)]
        if launcher.config.get("main_process_port") is None:
            options += ["--main_process_port", "0"]  # a free one: other runs may be on this machine
        if launcher.processes > 1 and not launcher.sharded:
            options.append("--multi_gpu")  # also a CPU's processes
        command = [sys.executable, "-m", f"{__package__}.launcher", place, *options, "--module", module, place]
        status = _run(command)
        results = [read_json(path) for path in sorted(directory.glob("done-*.json"))]
        if status or len(results) < launcher.processes:
            raise failure_of(directory, launcher)
        return results


def _run(command: list[str]) -> int:
    """Run a command to its end, and return its status. Its standard input ends with this process."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # as torchrun sets it, which also says so
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=sys.__stderr__,  # stdout is for results
        env=environment,
        start_new_session=True,  # Ctrl-C in a terminal reaches this process alone
    )
    assert process.stdin is not None
    with process.stdin:
        try:
            return process.wait()
        except KeyboardInterrupt:
            if workers := psutil.Process(process.pid).children():
                for worker in workers:
                    with suppress(psutil.NoSuchProcess):
                        worker.send_signal(signal.SIGINT)
                process.wait()
            raise
        finally:
            process.stdin.close()
            process.wait()


def failure_of(directory: Path, launcher: Launcher) -> BaseException:
    """Return the error of the process that failed first. Where one was killed, others have lost their connection."""
    errors = {path.stem.partition("-")[2]: read_json(path) for path in directory.glob("error-*.json")}
    note = read_json(directory / LAUNCHER) if (directory / LAUNCHER).is_file() else {}
    statuses: dict[str, int] = note.get("statuses", {})
    killed = [rank for rank, status in statuses.items() if -status in KILLED]
    if errors:
        rank = min(errors, key=lambda name: errors[name]["time"])
        if not killed or errors[rank]["kind"] != "other":
            return error_of(errors[rank], f"process {rank} of {launcher}")
    if "error" in note:
        return UserError(f"accelerate cannot start {launcher}: {note['error']['name']}: {note['error']['text']}")
    if not statuses:
        return ProcessLost(f"the launcher of {launcher} was killed; the same command resumes")
    rank = next(iter([*killed, *statuses]))
    status = statuses[rank]
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    cause = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
    return ProcessLost(f"process {rank} of {launcher} {how}{cause}; the same command resumes")
