"""Run a job once, in forks of this process: on one or several ranks, with a fault, on a file system of any size.

Every attempt is a fork of a process that has imported everything, so that no kill waits for PyTorch to load.
"""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
PAGE = os.sysconf("SC_PAGE_SIZE")
GRACE = 30.0  # seconds that torchrun gives processes after SIGTERM


@dataclass(frozen=True)
class Job:
    """A stage: the call, the part of `out` that is compared, and the file that marks it as finished."""

    call: Callable[[], int]
    result: Callable[[Path], Any]
    mark: str | None = None


@dataclass(frozen=True)
class Fault:
    """A signal, sent before the n-th change to the directory or after some seconds; None: a full disk.

    Args:
        change: the number of the change, counted on `rank`; a disk is full from there on.
        rank: the process that is hit. Ctrl-C reaches all of them, when this one gets there.
        room: size in bytes of a real file system.
        notice: seconds until a launcher notices that one of its processes has ended.
    """

    signal: int | None
    change: int | None = None
    seconds: float | None = None
    rank: int = 0
    room: int | None = None
    notice: float = 0.0

    def hit(self, tried: "Attempt") -> bool:
        """Return whether the fault ended the attempt, with the right status."""
        if self.signal == signal.SIGINT:
            return 130 in tried.ranks
        if self.signal is not None:
            return tried.ranks[self.rank] == -self.signal
        return tried.ranks[self.rank] == 1 if self.room is None else 1 in tried.ranks

    def __str__(self) -> str:
        name = {None: "full disk", signal.SIGKILL: "kill -9", signal.SIGINT: "Ctrl-C"}[self.signal]
        return f"{name} {'at a change' if self.change else 'in time' if self.room is None else 'at a size'}"


@dataclass
class Attempt:
    """The result of an attempt. The status is 0, or that of the first process that failed; negative: by a signal."""

    status: int
    ranks: tuple[int, ...]
    changes: tuple[int, ...]  # of each rank that finished
    seconds: float
    said: str


class Disk:
    """A small file system, with links to the inputs of a job.

    Raises:
        OSError: if nothing can be mounted here; try `unshare -rm COMMAND`.
    """

    PLENTY = 2**26

    def __init__(self, place: Path) -> None:
        self.place, self.at, self.peak = place, place / "disk", 0

    def __enter__(self) -> "Disk":
        self.at.mkdir(exist_ok=True)
        self._mount(f"size={self.PLENTY}")
        for path in self.place.iterdir():
            if path.name not in (self.at.name, "out"):
                (self.at / path.name).symlink_to(path)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self.at], check=True)

    def resize(self, room: int | None) -> None:
        self._mount(f"remount,size={room or self.PLENTY}")

    def used(self) -> int:
        found = os.statvfs(self.at)
        return (found.f_blocks - found.f_bfree) * found.f_bsize

    def look(self) -> None:
        self.peak = max(self.peak, self.used())

    def _mount(self, options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "faults", self.at], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise PermissionError(f"cannot mount a disk: {done.stderr.strip()}")


def attempt(
    job: Job,
    place: Path,
    fault: Fault | None = None,
    *,
    ranks: int = 1,
    disk: Disk | None = None,
    largest: int | None = None,
    timeout: float = 120,
) -> Attempt:
    """Run a job in forks of this process, with a fault, or with a limit of the size of files.

    Several ranks are started and ended as by torchrun: if one fails, the others get SIGTERM a moment later. Ctrl-C
    reaches each of them; those that have not ended 30 s after the first are killed.

    Args:
        largest: size limit of a file in bytes.
        timeout: seconds of the whole attempt.

    Raises:
        TimeoutError: if it hangs: for `timeout`, or after SIGTERM.
    """
    start = time.monotonic()
    logs = [place / f"log-{rank}.txt" for rank in range(ranks)]
    pipes = [os.pipe() for _ in range(ranks)]
    children: list[int] = []

    def work(rank: int) -> int:
        os.setpgid(0, children[0] if children else 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        descriptor = os.open(logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        os.chdir(disk.at if disk else place)
        _share_nothing()
        if ranks > 1:
            _forget_processes()
            os.environ.update(meeting, RANK=str(rank), LOCAL_RANK=str(rank))
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
        count = _watch(Path.cwd() / "out", fault if fault and fault.rank == rank else None)
        status = job.call()
        os.write(pipes[rank][1], str(count[0]).encode())
        return status

    statuses: dict[int, int] = {}
    with _rendezvous(ranks) as meeting:
        try:
            for rank in range(ranks):
                children.append(_fork(partial(work, rank)))
                os.setpgid(children[-1], children[0])  # so that they get Ctrl-C
            first = _wait(children, statuses, fault, start, timeout, disk)
        except TimeoutError as error:
            said = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs if log.exists())
            raise TimeoutError(f"{error} after {fault}: {said}") from None
        finally:
            for rank in set(range(len(children))) - set(statuses):
                os.kill(children[rank], signal.SIGKILL)
                os.waitpid(children[rank], 0)
    changes = []
    for read, write in pipes:
        os.close(write)
        with os.fdopen(read) as pipe:
            changes.append(int(pipe.read() or 0))
    said = "".join(log.read_text(errors="replace") for log in logs)
    ended = tuple(statuses[rank] for rank in range(ranks))
    return Attempt(0 if first is None else ended[first], ended, tuple(changes), time.monotonic() - start, said)


def _fork(work: Callable[[], int]) -> int:
    """Start a child that does the work and exits. Ctrl-C is blocked until the child handles it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            status = work()
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _wait(
    children: list[int], statuses: dict[int, int], fault: Fault | None, start: float, timeout: float, disk: Disk | None
) -> int | None:
    """Wait for all ranks, fill in their statuses, and return the first that failed."""
    due = start + fault.seconds if fault and fault.seconds is not None else None
    interrupted = fault is not None and fault.signal == signal.SIGINT
    first, ended_at, terminated = None, 0.0, interrupted
    while True:
        now = time.monotonic()
        for rank, child in enumerate(children):
            if rank not in statuses and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                if statuses[rank] and first is None:
                    first, ended_at = rank, now
        left = [rank for rank in range(len(children)) if rank not in statuses]
        if not left:
            return first
        if fault and due is not None and now >= due:
            for rank in left if interrupted else {fault.rank}.intersection(left):
                os.kill(children[rank], fault.signal or 0)
            due = None
        if first is not None and not terminated and now > ended_at + (fault.notice if fault else 0):
            for rank in left:
                os.kill(children[rank], signal.SIGTERM)
            terminated = True
        if first is not None and now > ended_at + GRACE:
            if not interrupted:
                raise TimeoutError(f"ranks {left} do not end, {GRACE:.0f} s after rank {first} did,")
            for rank in left:  # as torchrun: a rank that waits for others in native code does not see Ctrl-C
                os.kill(children[rank], signal.SIGKILL)
        if now > start + timeout:
            raise TimeoutError("hangs")
        if disk:
            disk.look()
        time.sleep(0.002)


@contextmanager
def _rendezvous(ranks: int) -> Iterator[dict[str, str]]:
    """Yield the environment by which ranks find each other; as with torchrun, the store outlives each rank."""
    if ranks == 1:
        yield {}
        return
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _share_nothing() -> None:
    """Reset what would block a fork: threads that only its parent has, and locks whose holder was killed."""
    import torch
    import tqdm

    torch.set_num_threads(1)
    lock, kinds = threading.RLock(), [tqdm.tqdm]  # tqdm's lock is shared by all processes
    while kinds:
        kind = kinds.pop()
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


def _forget_processes() -> None:
    """Reset accelerate's state: this process is alone, the fork is one of several."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # as accelerate's own tests do between two
    GradientState._reset_state()


def _watch(out: Path, fault: Fault | None) -> list[int]:
    """Count the changes to a directory from now on, and inject the fault before its change."""
    count, root = [0], f"{out}{os.sep}"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            changing = not set(mode or "").isdisjoint("wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
        elif event in CHANGES:
            path, changing = arguments[0], True
        else:
            return
        if not changing or not isinstance(path, str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(root):
            return
        count[0] += 1
        if fault is None or fault.change is None:
            return
        if fault.signal is None:
            if count[0] >= fault.change and event in ("open", "os.mkdir", "os.link"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))
        elif count[0] == fault.change:
            if fault.signal == signal.SIGINT:
                os.killpg(0, signal.SIGINT)
            else:
                os.kill(os.getpid(), fault.signal)

    sys.addaudithook(hook)
    return count
