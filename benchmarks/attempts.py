"""One attempt at a job, in forks of this process: on one or several ranks, with a fault in it, on a disk of any size.

Every attempt is a fork of a process that has imported everything: no kill waits for PyTorch to be loaded.
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
GRACE = 30.0  # seconds that torchrun gives processes it has told to end


@dataclass(frozen=True)
class Job:
    """A stage: what is called in the place, what of `out` is compared, and what there says that it is finished."""

    call: Callable[[], int]
    result: Callable[[Path], Any]
    mark: str | None = None


@dataclass(frozen=True)
class Fault:
    """A signal, sent before the n-th change to the directory or after some seconds; None: the disk is full.

    Args:
        change: before which it comes, counted on `rank`; a disk is full from there on.
        rank: the process it hits. Ctrl-C reaches all of them, when this one is there.
        room: bytes of a disk that is really full at that size.
        notice: seconds until a launcher sees that one of its processes is gone.
    """

    signal: int | None
    change: int | None = None
    seconds: float | None = None
    rank: int = 0
    room: int | None = None
    notice: float = 0.0

    def hit(self, tried: "Attempt") -> bool:
        """Whether it has ended the attempt, and as it should."""
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
    """What came of it. The status is 0, or that of the process that ended badly first; negative: by a signal."""

    status: int
    ranks: tuple[int, ...]
    changes: tuple[int, ...]  # by each rank, where it came to the end
    seconds: float
    said: str


class Disk:
    """A small file system of its own, where a job finds what it reads through links.

    Raises:
        OSError: if nothing can be mounted here; `unshare -rm COMMAND` may lend a command the right to.
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
    """Do a job in forks of this process, with a fault in it, or with files of some bytes at most.

    Several ranks are started, and ended, as torchrun does: if one ends badly the others get SIGTERM a moment later.
    After Ctrl-C each has its own signal, and time to end by itself.

    Raises:
        TimeoutError: if it hangs: for so long altogether, or after a rank was told to end.
    """
    start = time.monotonic()
    logs = [place / f"log-{rank}.txt" for rank in range(ranks)]
    pipes = [os.pipe() for _ in range(ranks)]
    children: list[int] = []

    def work(rank: int) -> int:
        os.setpgid(0, children[0] if children else 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
                os.setpgid(children[-1], children[0])  # they hear Ctrl-C, which this process does not pass on
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
    """A child that works, and never comes back. Until it can take Ctrl-C itself it hears none."""
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
    """Wait for all, note how each has ended, and return who ended badly first."""
    due = start + fault.seconds if fault and fault.seconds is not None else None
    interrupted = fault is not None and fault.signal == signal.SIGINT
    first, gone, told = None, 0.0, interrupted
    while True:
        now = time.monotonic()
        for rank, child in enumerate(children):
            if rank not in statuses and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                if statuses[rank] and first is None:
                    first, gone = rank, now
        left = [rank for rank in range(len(children)) if rank not in statuses]
        if not left:
            return first
        if fault and due is not None and now >= due:
            for rank in left if interrupted else {fault.rank}.intersection(left):
                os.kill(children[rank], fault.signal or 0)
            due = None
        if first is not None and not told and now > gone + (fault.notice if fault else 0):
            for rank in left:
                os.kill(children[rank], signal.SIGTERM)
            told = True
        if first is not None and now > gone + GRACE:
            raise TimeoutError(f"ranks {left} do not end, {GRACE:.0f} s after rank {first} did,")
        if now > start + timeout:
            raise TimeoutError("hangs")
        if disk:
            disk.look()
        time.sleep(0.002)


@contextmanager
def _rendezvous(ranks: int) -> Iterator[dict[str, str]]:
    """Where the ranks find each other, as torchrun keeps it: outside of them, so that it outlives each."""
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
    """A fork waits for ever for threads that only its parent has, and for a lock whose holder was killed."""
    import torch
    import tqdm

    torch.set_num_threads(1)
    lock, kinds = threading.RLock(), [tqdm.tqdm]  # tqdm's own lock is one for all processes
    while kinds:
        kind = kinds.pop()
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


def _forget_processes() -> None:
    """What this process has found out about itself, one alone, is not so for a fork that is one of several."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # as accelerate's own tests do between two
    GradientState._reset_state()


def _watch(out: Path, fault: Fault | None) -> list[int]:
    """Count the changes to a directory from now on, and do what the fault says before the one it names."""
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
