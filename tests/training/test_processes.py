"""The number of processes does not change what is learnt."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prefdistill.core.files import write_jsonl
from prefdistill.signals import extract_signals

SCRIPT = Path(__file__).parents[1] / "support" / "train_in_processes.py"


@pytest.mark.slow
def test_any_split_of_a_batch_has_one_trajectory(tmp_path, make_model, pairs, tokenizer):
    """21 rows in batches of 8: the last one has 5, which neither micro-batches nor processes divide. SimPO is resumed
    after its first step with `ignore_data_skip`, which starts the epoch again."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", list(pairs)[:21])
    from prefdistill.data.load import load_pairs

    pairs = load_pairs(str(tmp_path / "pairs.jsonl"))
    extract_signals(make_model(5), pairs, tokenizer, ("values", "topk"), tmp_path / "teacher", k=7)
    extract_signals(make_model(), pairs, tokenizer, ("logps",), tmp_path / "reference", role="reference")
    runs = []
    for processes, splits in ((1, ("8x1", "2x4")), (2, ("2x2", "4x1"))):
        out = tmp_path / f"{processes}.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), str(tmp_path), str(out), *splits],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads(out.read_text())
        runs += [results[split] for split in splits]
    logged = {
        "tvkd": ("loss", "rewards/margins", "shaping/margins_abs"),
        "dckd": ("loss", "kl/chosen", "kl/rejected"),
        "simpo": ("loss", "rewards/margins"),
    }
    assert runs[0].keys() == runs[1].keys() == logged.keys()
    for name, other in itertools.product(logged, runs[1:]):
        keys, one, two = logged[name], runs[0][name], other[name]
        for key in keys:
            a, b = ([entry[key] for entry in run["history"] if key in entry] for run in (one, two))
            assert len(a) == len(set(a)) == 5
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f"{name} {key}")
        assert one["evaluated"] == pytest.approx(two["evaluated"], abs=2e-5)
        assert one["weights"] == pytest.approx(two["weights"], abs=1e-3)


DATA = ["--data", "pairs.jsonl"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "prefdistill"]


@pytest.fixture
def launch(tmp_path, make_model, pairs, tokenizer):
    """Call a verb on two processes, beside a model and pairs."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", list(pairs))

    def call(*arguments, prefix=LAUNCH):
        # torchrun gives each process one thread; another number of them rounds otherwise
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*prefix, *arguments], cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=300
        )

    return call


def test_training_runs_on_two_processes(tmp_path, launch):
    options = ["max_steps=2", "batch_size=8", "micro_batch_size=4"]
    trained = launch("distill", "--student", "model", *DATA, "--method", "sft", "--out", "out", *options)
    assert trained.returncode == 0, trained.stderr[:3000]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert trained.stderr.count("done in") == 1


EXTRACT_AND_CALL = """
import contextlib, json, os, sys
from prefdistill import extract_signals
from prefdistill.cli import main
options, calls = map(json.loads, sys.argv[1:])
extract_signals("model", "pairs.jsonl", out="two", **options)
for name, arguments in calls.items():
    said = f"{name}-{os.environ['RANK']}"
    with open(f"{said}.out", "w") as out, open(f"{said}.err", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
    if status:
        sys.exit(open(f"{said}.err").read())
"""


def test_signals_of_two_processes_equal_those_of_one_to_the_byte_and_an_adapter_is_verified_once(
    tmp_path, launch, pairs, monkeypatch
):
    """Three shards for two processes, one of them left by an interrupted run on one process. Then two verbs, in the
    same two processes because they take long to start."""
    options = {"kinds": ("values", "logps", "topk"), "k": 5, "shard_rows": 10}
    calls = {
        "signals": ["signals", "--model", "model", *DATA, "--out", "three", "--json"],
        "sft": ["sft", "--model", "model", *DATA, "--out", "adapter", "max_steps=2", "batch_size=8", "lora.r=4"],
    }
    (tmp_path / "extract.py").write_text(EXTRACT_AND_CALL)
    monkeypatch.chdir(tmp_path)
    extract_signals("model", "pairs.jsonl", out="one", **options)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "manifest.json").unlink()
    for number in (0, 2):
        (tmp_path / "two" / "shards" / f"{number:05d}.parquet").unlink()
    both = launch("extract.py", json.dumps(options), json.dumps(calls), prefix=LAUNCH[:-2])
    assert both.returncode == 0, both.stderr[-3000:]
    for name in ("manifest.json", *(f"shards/{number:05d}.parquet" for number in range(3))):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    printed = "".join((tmp_path / f"signals-{rank}.out").read_text() for rank in range(2))
    assert json.loads(printed)["pairs"] == len(pairs)  # said once
    assert (tmp_path / "adapter" / "adapter" / "adapter_config.json").exists()
    said = [line for rank in range(2) for line in (tmp_path / f"sft-{rank}.err").read_text().splitlines()]
    verified = [line for line in said if "loaded again, its logits differ by" in line]
    assert len(set(verified)) == len(verified) >= 1  # by one process
