"""A stand-in for Ray in this process: actors run their tasks at once, and what is sent is pickled as Ray does."""

import os
import pickle
import sys
from types import ModuleType
from typing import Any


class RayError(Exception):
    """A worker is gone."""


class RayTaskError(RayError):
    """A task of a worker has failed."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Killed(BaseException):
    """The process of a worker is killed."""


class _Actor:
    def __init__(self, kind: type) -> None:
        self._object, self._dead = kind(), False

    def __getattr__(self, name: str) -> "_Method":
        return _Method(self, name)


class _Method:
    def __init__(self, actor: _Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def remote(self, *arguments: Any) -> "_Result":
        if self.actor._dead:
            return _Result(error=RayError("The actor is dead."))
        try:
            value = getattr(self.actor._object, self.name)(*pickle.loads(pickle.dumps(arguments)))
            return _Result(pickle.loads(pickle.dumps(value)))
        except Killed:
            self.actor._dead = True
            return _Result(error=RayError("The actor died unexpectedly before finishing this task."))
        except Exception as error:
            return _Result(error=RayTaskError(pickle.loads(pickle.dumps(error))))


class _Result:
    def __init__(self, value: Any = None, error: Exception | None = None) -> None:
        self.value, self.error = value, error


_worker_resources: list[dict[str, Any]] = []  # resources of each worker


class _Remote:
    def __init__(self, kind: type) -> None:
        self.kind = kind

    def options(self, **resources: Any) -> "_Remote":
        _worker_resources.append(resources)
        return self

    def remote(self) -> _Actor:
        return _Actor(self.kind)


def _get(result: _Result) -> Any:
    if result.error is not None:
        raise result.error
    return result.value


def _kill_process(*_: Any) -> None:
    raise Killed


def install(monkeypatch: Any, **resources: float) -> list[dict[str, Any]]:
    """Make `import ray` import the stand-in, with a cluster of two CPUs, and `os.kill` the death of a worker.

    Args:
        resources: more of what the machine has, such as GPU=2.0.

    Returns:
        The resources that each worker from now on is started with.
    """
    _worker_resources.clear()
    ray, exceptions = ModuleType("ray"), ModuleType("ray.exceptions")
    exceptions.RayError, exceptions.RayTaskError = RayError, RayTaskError  # type: ignore[attr-defined]
    names = {
        "exceptions": exceptions,
        "is_initialized": lambda: True,
        "nodes": lambda: [
            {"Alive": True, "Resources": {"CPU": 2.0, **resources}},
            {"Alive": False, "Resources": {"CPU": 8.0}},
        ],
        "put": lambda value: value,
        "remote": _Remote,
        "wait": lambda results, num_returns: (results[:num_returns], results[num_returns:]),
        "get": _get,
        "kill": lambda actor: setattr(actor, "_dead", True),
    }
    for name, value in names.items():
        setattr(ray, name, value)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    monkeypatch.setattr(os, "kill", _kill_process)
    return _worker_resources
