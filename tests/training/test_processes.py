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
    data = ["--data", "pairs.jsonl"]
    trained = launch("distill", "--student", "model", *data, "--method", "sft", "--out", "out", *options)
    assert trained.returncode == 0, trained.stderr[:3000]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert trained.stderr.count("done in") == 1
    adapter = launch("sft", "--model", "model", *data, "--out", "adapter", *options, "lora.r=4")
    assert adapter.returncode == 0, adapter.stderr[:3000]
    assert (tmp_path / "adapter" / "adapter" / "adapter_config.json").exists()
    verified = [line for line in adapter.stderr.splitlines() if "loaded again, its logits differ by" in line]
    assert len(set(verified)) == len(verified) >= 1  # by one process


def test_signals_of_two_processes_equal_those_of_one_to_the_byte(tmp_path, launch, pairs, monkeypatch):
    """Three shards for two processes, one of them left by an interrupted run on one process."""
    options = {"kinds": ("values", "logps", "topk"), "k": 5, "shard_rows": 10}
    extract = "import sys; from prefdistill import extract_signals; "
    (tmp_path / "extract.py").write_text(f'{extract}extract_signals("model", "pairs.jsonl", out="two", **{options})\n')
    monkeypatch.chdir(tmp_path)
    extract_signals("model", "pairs.jsonl", out="one", **options)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "manifest.json").unlink()
    for number in (0, 2):
        (tmp_path / "two" / "shards" / f"{number:05d}.parquet").unlink()
    both = launch("extract.py", prefix=LAUNCH[:-2])
    assert both.returncode == 0, both.stderr[-3000:]
    for name in ("manifest.json", *(f"shards/{number:05d}.parquet" for number in range(3))):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    output = launch("signals", "--model", "model", "--data", "pairs.jsonl", "--out", "three", "--json")
    assert output.returncode == 0, output.stderr[-3000:]
    assert json.loads(output.stdout)["pairs"] == len(pairs)  # said once
