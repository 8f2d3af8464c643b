"""Workers on a Ray cluster: they load once, and the task of one that dies runs again."""

import functools
import signal
import sys

import pytest
import torch

from prefdistill.core.errors import UserError
from prefdistill.core.workers import RETRIES, Workers, check_ray, check_tokenizer
from support import ray_stand_in
from support.ray_work import Work, refuse


@pytest.fixture(autouse=True, params=["stand-in", pytest.param("ray", marks=pytest.mark.slow)])
def _cluster(request, monkeypatch):
    """Ray itself takes seconds to start, and each of its workers imports torch."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    else:
        ray_stand_in.install(monkeypatch)


def test_the_task_of_a_worker_that_dies_runs_again(tmp_path, capsys):
    with Workers(functools.partial(Work, tmp_path), 2) as workers:
        assert workers.call("double", 1) == 2
        assert len(list(tmp_path.glob("loaded-*"))) == 1  # workers start when there is work for them
        assert dict(workers.map("double", [0, 1, 2, 3, 4])) == {0: 0, 1: 2, 2: 4, 3: 6, 4: 8}
        with pytest.raises(UserError, match=r"worker on .*: double: 5 is refused"):
            list(workers.map("double", [4, 5]))
    assert "a worker died" in capsys.readouterr().err
    loaded = len(list(tmp_path.glob("loaded-*")))
    assert 2 <= loaded <= 3  # the killed one and the one in its place; the other may still be loading when all is done


def test_a_task_that_kills_every_worker_ends(tmp_path, capsys):
    with (
        Workers(functools.partial(Work, tmp_path), 1) as workers,
        pytest.raises(UserError, match=rf"part 0 has lost its worker {RETRIES + 1} times .*memory"),
    ):
        list(workers.map("die", [0]))
    assert capsys.readouterr().err.count("runs again") == RETRIES


def test_what_workers_cannot_load_is_the_users_error():
    with Workers(refuse, 1) as workers, pytest.raises(UserError, match=r"worker on .*: no model here"):
        workers.call("double", 1)


def test_a_machine_without_enough_cpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1_000)
    with (
        pytest.raises(UserError, match=r"no machine of .* has 1000 CPUs.*OMP_NUM_THREADS"),
        Workers(refuse),
    ):
        pass


@pytest.mark.parametrize("threads", [1, 1_000], ids=["used", "refused"])
def test_a_cluster_of_the_workers_is_left_with_the_handler_that_ray_replaces(threads, monkeypatch):
    ray_stand_in.install(monkeypatch)
    ray, before, connected = sys.modules["ray"], signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def init(**_):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        connected.append(True)

    monkeypatch.setattr(ray, "init", init, raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: connected.pop(), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    try:
        with Workers(refuse, 1):
            assert connected
            assert signal.getsignal(signal.SIGTERM) != before
    except UserError:
        assert threads > 1
    assert not connected
    assert signal.getsignal(signal.SIGTERM) == before


def test_on_a_cluster_with_gpus_each_worker_has_one(tmp_path, monkeypatch):
    worker_resources = ray_stand_in.install(monkeypatch, GPU=2.0)
    with Workers(functools.partial(Work, tmp_path)) as workers:
        assert dict(workers.map("double", [0, 1, 2, 4])) == {0: 0, 1: 2, 2: 4, 3: 8}
    assert worker_resources == [{"num_gpus": 1}] * 2
    worker_resources = ray_stand_in.install(monkeypatch)
    with Workers(functools.partial(Work, tmp_path), 1) as workers:
        assert workers.call("double", 1) == 2
    assert worker_resources == [{"num_cpus": torch.get_num_threads()}]


def test_what_workers_need_is_checked_without_importing_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("prefdistill.core.lazy.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the engine ray needs ray: pip install"):
        check_ray()
    of_a_repository = type("Tokenizer", (), {"__module__": "transformers_modules.org.model.tokenization"})()
    with pytest.raises(UserError, match="code of its own repository, which workers of Ray do not have"):
        check_tokenizer(of_a_repository)
    check_tokenizer(None)
