"""The number of processes does not change what is learnt."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prefdistill.files import write_jsonl
from prefdistill.signals import extract_signals

SCRIPT = Path(__file__).parent / "scripts" / "train_in_processes.py"


def test_two_processes_have_the_trajectory_of_one(tmp_path, make_model, pairs, tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", list(pairs))
    from prefdistill.data import load_pairs

    pairs = load_pairs(str(tmp_path / "pairs.jsonl"))
    extract_signals(make_model(5), pairs, tokenizer, ("values", "topk"), tmp_path / "teacher", k=7)
    extract_signals(make_model(), pairs, tokenizer, ("logps",), tmp_path / "reference", role="reference")
    runs = []
    for processes, micro in ((1, 8), (2, 4)):
        out = tmp_path / f"{processes}.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [sys.executable, *launch, str(SCRIPT), str(tmp_path), str(micro), str(out)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(json.loads(out.read_text()))
    logged = {"tvkd": ("loss", "rewards/margins", "shaping/margins_abs"), "dckd": ("loss", "kl/chosen", "kl/rejected")}
    assert runs[0].keys() == runs[1].keys() == logged.keys()
    for name, keys in logged.items():
        one, two = (run[name] for run in runs)
        for key in keys:
            a, b = ([entry[key] for entry in run["history"] if key in entry] for run in (one, two))
            assert len(a) == len(set(a)) == 5
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f"{name} {key}")
        assert one["weights"] == pytest.approx(two["weights"], abs=1e-3)


def test_the_command_line_trains_on_two_processes_and_refuses_the_rest(tmp_path, make_model, pairs, tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", list(pairs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "prefdistill"]
    data, model = str(tmp_path / "pairs.jsonl"), str(tmp_path / "model")
    options = ["max_steps=2", "batch_size=8", "micro_batch_size=4"]
    trained = subprocess.run(
        [*launch, "distill", "--student", model, "--data", data, "--method", "sft", "--out", "out", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[:3000]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert trained.stderr.count("done in") == 1
    refused = subprocess.run(
        [*launch, "signals", "--model", model, "--data", data, "--out", "s"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "`prefdistill signals` runs in one process" in refused.stderr
    assert not (tmp_path / "s").exists()
