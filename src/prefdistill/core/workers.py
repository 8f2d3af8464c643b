"""Workers on a Ray cluster: each loads its work once, then runs tasks. The task of a worker that dies runs again.

These are actors, not a Ray Data job: one load serves several calls (the request, then the shards), a result is yielded
as soon as it is there, and a task that kills its workers ends the run after a few retries.
"""

import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from prefdistill.core.errors import UserError
from prefdistill.core.lazy import is_installed
from prefdistill.core.progress import say

RETRIES = 3  # times that a task, or the start of workers, is tried again after its worker died


class Workers:
    """Processes on the machines of a Ray cluster; a context manager.

    A program that has called `ray.init` keeps its cluster. Otherwise the cluster of RAY_ADDRESS is used, or one that
    runs on this machine, or a local one is started. On a cluster with GPUs each worker has one. On CPUs each worker
    computes with as many threads as this process does, so that it rounds the same.

    Args:
        load: called once in each worker, which keeps what it returns. It is pickled, so it is a function of a module,
            or a `functools.partial` of one. All machines have the package.
        count: the most workers at a time; default: as many as the cluster has room for.

    Example:
        >>> with Workers(partial(load_model, "my/teacher"), 2) as workers:              # doctest: +SKIP
        ...     for number, result in workers.map("score", batches):
        ...         ...
    """

    def __init__(self, load: Callable[[], Any], count: int | None = None) -> None:
        self.load, self.count = load, count or 0
        self.started: list[Any] = []  # all workers, also those that died
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}  # worker by what its start returns
        self.running: dict[Any, tuple[Any, int, Any]] = {}  # worker and task by the result
        self.failed_starts = 0

    def __enter__(self) -> Self:
        import torch

        from prefdistill.core.memory import free_devices

        free_devices()
        with ExitStack() as stack:
            self.ray = stack.enter_context(_cluster())
            self.work = self.ray.put(self.load)
            self.threads = torch.get_num_threads()
            machines = [machine["Resources"] for machine in self.ray.nodes() if machine["Alive"]]
            gpus = sum(int(resources.get("GPU", 0)) for resources in machines)
            self.resources = {"num_gpus": 1} if gpus else {"num_cpus": self.threads}
            room = gpus or sum(int(resources.get("CPU", 0)) // self.threads for resources in machines)
            if room == 0:
                raise UserError(
                    f"no machine of the Ray cluster has {self.threads} CPUs, as many as this process has threads; set "
                    "OMP_NUM_THREADS, or threads in a recipe, to fewer"
                )
            self.count = self.count or room
            self.disconnect = stack.pop_all().close
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.started:
            self.ray.kill(worker)
        self.disconnect()

    def call(self, method: str, task: Any = None) -> Any:
        """Return what one worker's method returns."""
        return next(result for _, result in self.map(method, [task]))

    def map(self, method: str, tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the number of each task with what a method of the loaded object returns for it, as they finish.

        Raises:
            UserError: the worker's, or if workers keep dying.
        """
        tasks = list(tasks)
        waiting, lost = deque(enumerate(tasks)), Counter[int]()
        for _ in range(min(self.count, len(tasks)) - len(self.idle) - len(self.starting)):
            self._start()
        while waiting or self.running:
            while waiting and self.idle:
                (number, task), worker = waiting.popleft(), self.idle.pop()
                self.running[worker.run.remote(method, task)] = worker, number, task
            (done,), _ = self.ray.wait([*self.starting, *self.running], num_returns=1)
            if done in self.starting:
                self._started(done)
                continue
            worker, number, task = self.running.pop(done)
            try:
                result = self._result(done)
            except _Lost as error:
                self.ray.kill(worker)
                lost[number] += 1
                if lost[number] > RETRIES:
                    raise UserError(
                        f"part {number} has lost its worker {lost[number]} times ({error}); if its memory was full, "
                        "give smaller batches or a machine with more memory"
                    ) from error
                say(f"a worker died ({error}); part {number} runs again on another one")
                waiting.appendleft((number, task))
                self._start()
                continue
            self.idle.append(worker)
            yield number, result

    def _start(self) -> None:
        actor = cast(Any, self.ray.remote(_Worker))
        worker = actor.options(**self.resources).remote()
        self.started.append(worker)
        self.starting[worker.start.remote(self.work, os.getcwd(), self.threads)] = worker

    def _started(self, done: Any) -> None:
        worker = self.starting.pop(done)
        try:
            self._result(done)
        except _Lost as error:
            self.ray.kill(worker)
            self.failed_starts += 1
            if self.failed_starts > RETRIES:
                raise UserError(f"{self.failed_starts} workers died while they loaded ({error})") from error
            say(f"a worker died while it loaded ({error}); another one starts")
            self._start()
            return
        self.failed_starts = 0
        self.idle.append(worker)

    def _result(self, done: Any) -> Any:
        """Return a result, or raise the error of the worker's own code.

        Raises:
            _Lost: if the worker died.
        """
        from ray.exceptions import RayError, RayTaskError

        try:
            return self.ray.get(done)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise _Lost(str(error).strip().splitlines()[0]) from error


@contextmanager
def _cluster() -> Iterator[Any]:
    """Yield the module ray, connected to a cluster: the program's own, or one that is left at the end."""
    check_ray()
    import ray

    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)  # which ray.init replaces, and ray.shutdown does not restore
    try:
        try:
            ray.init(include_dashboard=False)
        except ConnectionError as error:
            address = os.environ.get("RAY_ADDRESS", "")
            raise UserError(f"no Ray cluster at RAY_ADDRESS={address}; start one, or unset RAY_ADDRESS") from error
        yield ray
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def check_ray() -> None:
    """Check that Ray is installed, without importing it.

    Raises:
        UserError: if it is not.
    """
    if not is_installed("ray"):
        raise UserError('the engine ray needs ray: pip install "prefdistill[ray]"')


def check_tokenizer(tokenizer: Any) -> None:
    """Check that a tokenizer can be sent to workers.

    Raises:
        UserError: if its class is code of its repository, which workers do not have.
    """
    if type(tokenizer).__module__.startswith("transformers_modules"):
        raise UserError(
            "the tokenizer's class is code of its own repository, which workers of Ray do not have; use the engine "
            "transformers"
        )


class _Lost(Exception):
    """A worker died: it was killed, its memory was full, or its machine is gone."""


class _Worker:
    """A worker process. Its work is loaded by `start`, so that an error in it is not the death of the worker."""

    def start(self, load: Callable[[], Any], directory: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        if Path(directory).is_dir():
            os.chdir(directory)  # relative names mean what they mean to the driver
        with _naming_host():
            self.work = load()

    def run(self, method: str, task: Any) -> Any:
        with _naming_host():
            return getattr(self.work, method)(task)


@contextmanager
def _naming_host() -> Iterator[None]:
    """Say in errors which machine they come from."""
    try:
        yield
    except UserError as error:
        where = f"worker on {socket.gethostname()}"
        raise UserError(*error.messages, where=f"{where}: {error.where}" if error.where else where) from None
