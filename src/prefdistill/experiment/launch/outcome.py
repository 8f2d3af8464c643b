"""Write the result or the error of a worker process to a file, for the run that has started it."""

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import disk_full, read_json, write_json

REQUEST, CONFIG, LAUNCHER = "request.json", "config.json", "launcher.json"  # in the directory of a launch
Work = Callable[[dict[str, Any]], dict[str, Any]]


def end_with_run() -> None:
    """End this process when the run that has started it ends: standard input is a pipe that the run holds open."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def process_main(work: Work) -> None:
    """Do the work of one process of a launch: call `work(request)`, write its result or its error, and exit."""
    end_with_run()
    directory, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    try:
        write_json(directory / f"done-{rank}.json", work(read_json(directory / REQUEST)))
    except BaseException as error:
        write_json(directory / f"error-{rank}.json", error_record(error))
        sys.stderr.flush()
        os._exit(1)  # an orderly exit may wait for processes that wait for this one


def error_record(error: BaseException) -> dict[str, Any]:
    """Return what `error_of` needs to raise an error again in another process."""
    record: dict[str, Any] = {
        "time": time.time(),
        "name": type(error).__name__,
        "text": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, KeyboardInterrupt):
        return record | {"kind": "interrupt"}
    if isinstance(error, UserError):
        return record | {"kind": "user", "messages": list(error.messages), "where": error.where}
    if isinstance(error, OSError) and error.errno is not None:
        return record | {"kind": "system", "arguments": [error.errno, error.strerror, error.filename]}
    if disk_full(error):
        return record | {"kind": "system", "arguments": [errno.ENOSPC, str(error), None]}
    return record | {"kind": "other"}


def error_of(record: dict[str, Any], process: str) -> BaseException:
    """Return the error of a record, with its traceback as a note: of the same class if it is Python's or this
    package's, else of one with the same name.

    Args:
        record: of `error_record`.
        process: names the process, for the note.
    """
    error: BaseException
    if record["kind"] == "interrupt":
        error = KeyboardInterrupt()
    elif record["kind"] == "user":
        error = _user_error(record["name"])(*record["messages"], where=record["where"])
    elif record["kind"] == "system":
        error = OSError(*record["arguments"])
    else:
        error = type(record["name"], (RuntimeError,), {})(record["text"])
    error.add_note(f"in {process}:\n{record['traceback']}")
    return error


def _user_error(name: str) -> type[UserError]:
    """Return the kind of UserError of this name, if it is made like one, such as NotFinite."""
    kinds = {kind.__name__: kind for kind in UserError.__subclasses__() if "__init__" not in vars(kind)}
    return kinds.get(name, UserError)
