"""The benchmarks run at their smallest size, time and measure memory correctly, and count FLOP like PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu  # noqa: E402
from benchmarks.harness import Measured, ratios, summary  # noqa: E402
from benchmarks.inputs import LENGTHS, fitted_lengths, make_pairs, make_tokenizer  # noqa: E402
from benchmarks.reduction import HEAD, measure_tile  # noqa: E402
from benchmarks.shapes import SHAPES, forward_flops, make_model, peak_flops  # noqa: E402


def run(*command, timeout=120):
    """Run Python in the root of the repository and return its stdout."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["adpa", "adpa-dense"]])
def test_training(tmp_path, more):
    out = tmp_path / "training.json"
    options = "--shape nano --batch 1 --steps 1 --rounds 2 --max-length 64 --k 512 --threads 1"
    variants = ["dpo", "trl-dpo", "dckd", "dckd-dense", *more]
    printed = run("-m", "benchmarks.training", *options.split(), "--variants", ",".join(variants), "--out", str(out))
    report = json.loads(out.read_text())
    assert list(report["variants"]) == variants
    assert {"benchmark", "command", "arguments", "hardware", "versions", "agreement"} <= report.keys()
    assert str(tmp_path) not in json.dumps(report["arguments"])
    for name, entry in report["variants"].items():
        assert f"| {name}" in printed
        assert entry["error"] is None
        assert len(entry["rounds"]) == 2
        assert entry["seconds_per_unit"] > 0
        assert 0.01 < entry["ratio"]["min"] <= entry["ratio"]["median"] <= entry["ratio"]["max"] < 100
        assert 0 < entry["memory"]["loaded"] < entry["memory"]["peak"]
        assert 0 < entry["data_share"] < 1
    work = {name: report["variants"][name]["rounds"][0] for name in ("dpo", "trl-dpo", "dckd")}
    for number in ("tokens", "response_tokens", "flops"):
        assert len({numbers[number] for numbers in work.values()}) == 1
    # with k = vocabulary, top-k and full distributions agree; DPO equals TRL's
    assert set(report["agreement"]) == {"trl-dpo - dpo", "dckd-dense - dckd", *(["adpa-dense - adpa"] if more else [])}
    for gap in report["agreement"].values():
        assert gap["most"] < 1e-3
    assert report["agreement"]["trl-dpo - dpo"]["chosen_logps"] < 1e-2


@pytest.mark.slow
def test_extraction(tmp_path):
    out = tmp_path / "extraction.json"
    options = "--shape nano --pairs 6 --rounds 1 --max-length 64 --threads 1"
    variants = ["bare forward, padded", "naive top-50 as JSON", "backbone alone", "endpoints", "values, stored"]
    printed = run(
        "-m", "benchmarks.extraction", *options.split(), "--variants", *["|".join(variants)], "--out", str(out)
    )
    entries = json.loads(out.read_text())["variants"]
    assert list(entries) == variants
    for name in variants:
        assert f"| {name}" in printed
        assert entries[name]["error"] is None
        assert 0.001 < entries[name]["ratio"]["median"] < 1000
        assert entries[name]["memory"]["above_loaded"] >= 0
    work = [entries[name]["facts"] for name in variants]
    assert all(facts == work[0] for facts in work)
    assert entries["naive top-50 as JSON"]["rounds"][0]["disk"] > entries["values, stored"]["rounds"][0]["disk"]


def test_reductions_are_timed_eagerly_and_compiled():
    numbers = measure_tile(SHAPES["nano"], "bfloat16", 2**12, rounds=1, backend="eager")
    assert {HEAD, "values", "top-50", "values, compiled", "token log-probs and gradient, compiled"} <= numbers.keys()
    for one in numbers.values():
        assert one["states"] == 2**12 // 512
        assert 0 < one["least"] <= one["seconds"]


def test_parity_of_a_gpu_script_on_the_cpu():
    """In float32 the CPU agrees with itself to the bit; in bfloat16 it does not."""
    rows = {row.pop("variant"): row for row in gpu.parity(gpu.TINY, "cpu")}
    assert list(rows) == [
        "signals, weights in float32",
        "training step, float32",
        "signals, weights in bfloat16",
        "training step, autocast to bfloat16",
    ]
    assert not any("error" in row for row in rows.values()), rows
    exact, step, rounded, rounded_step = rows.values()
    assert set(exact.values()) | set(step.values()) == {0.0}
    assert 0 < rounded["token_logps, mean"] < 0.1
    assert 0 < rounded_step["gradient"] < 0.1


@pytest.mark.slow
def test_the_gpu_script_runs_on_the_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    printed = run("-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--threads", "1", "--out", str(out), timeout=900)
    report = json.loads(out.read_text())
    assert list(report["sections"]) == list(gpu.SECTIONS)
    for name, section in report["sections"].items():
        assert f"### {name}" in printed
        assert not any("error" in row for row in section["rows"]), section
    steps = {row["variant"]: row for row in report["sections"]["steps"]["rows"]}
    assert steps["TRL's dpo"]["largest gap of losses to dpo"] < 0.05  # in bfloat16
    kernels = {row["variant"]: row for row in report["sections"]["kernels"]["rows"]}
    assert kernels["sdpa, chosen layout"]["layout"] == "masked"


@pytest.mark.parametrize("function", ["nothing", "broken"])
def test_a_failed_variant_is_a_row_that_says_why(function):
    def nothing():
        return {"seconds": 1.0}

    def broken():
        raise RuntimeError("no memory\nleft")

    row = gpu.attempt("variant", {"nothing": nothing, "broken": broken}[function])
    assert row == {"variant": "variant"} | (
        {"seconds": 1.0} if function == "nothing" else {"error": "RuntimeError: no memory"}
    )
    assert "| variant" in gpu.section_table([row])


@pytest.mark.slow
def test_growth(tmp_path):
    out = tmp_path / "growth.json"
    options = "--shape nano --pairs 4 --rounds 1 --max-length 64 --threads 1"
    printed = run("-m", "benchmarks.growth", *options.split(), "--out", str(out))
    entries = json.loads(out.read_text())["variants"]
    tokens = [entries[name]["facts"]["tokens"] for name in ("1x", "4x data", "16x data", "4x vocabulary")]
    assert tokens[0] < tokens[1] / 2 < tokens[2] / 4
    assert all(entry["error"] is None for entry in entries.values())
    assert "| 4x vocabulary" in printed


MEASURE = """
import json, sys
sys.path.insert(0, {here!r})
from benchmarks.harness import Variant, measure, summary
if __name__ == "__main__":
    variants = [
        Variant("short", "test_benchmarks:holding", {{"seconds": 0.2, "megabytes": 100}}),
        Variant("long", "test_benchmarks:holding", {{"seconds": 0.8, "megabytes": 400}}),
        Variant("broken", "test_benchmarks:holding", {{"seconds": -1, "megabytes": 0}}),
    ]
    print(json.dumps([summary(measure(variants, rounds=2, together=x), "short") for x in (True, False)]))
"""


def holding(seconds, megabytes):
    """Prepare a variant that takes this time and holds this memory."""
    import time

    preparation = bytearray(300 * 2**20)  # preparing takes more memory than a round
    del preparation

    def round_():
        if seconds < 0:
            raise MemoryError("no more\nof it")
        held = bytearray(b"x") * (megabytes * 2**20)
        time.sleep(seconds)
        return {"units": 2, "held": len(held)}

    return round_, {"megabytes": megabytes}


@pytest.mark.slow
def test_processes_are_timed_in_turns_and_memory_is_measured_per_process(tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE.format(here=str(Path(__file__).parent)))
    for entries in json.loads(run(str(script))):  # interleaved, then one after another
        assert entries["short"]["facts"] == {"megabytes": 100}
        for name, least in (("short", 0.2), ("long", 0.8)):  # a lower bound, since the machine may be busy
            assert all(numbers["seconds"] >= least for numbers in entries[name]["rounds"])
            assert entries[name]["seconds_per_unit"] >= least / 2  # two units a round
        assert entries["long"]["ratio"]["max"] > 1
        assert entries["short"]["ratio"] == {"median": 1, "min": 1, "max": 1}
        assert [len(entries[name]["rounds"]) for name in ("short", "long")] == [2, 2]
        for name, size in (("short", 100), ("long", 400)):
            assert entries[name]["memory"]["above_loaded"] / 2**20 == pytest.approx(size, abs=60)
        assert entries["broken"]["error"] == "MemoryError: no more"
        assert entries["broken"]["ratio"] is None


def test_ratios_are_taken_round_by_round():
    """A machine that is three times slower in the second round does not change the ratio."""
    slow, fast = ([{"seconds": s, "units": 1} for s in seconds] for seconds in ((2, 6, 2.2), (1, 3, 1)))
    measured = {"slow": Measured(rounds=slow), "fast": Measured(rounds=fast)}
    assert ratios(measured, "slow", "fast") == {"median": 2, "min": 2, "max": pytest.approx(2.2)}
    assert summary(measured, "fast")["slow"]["seconds_per_unit"] == pytest.approx(2.2)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_equal_the_count_of_pytorch(kv_heads, tied):
    from torch.utils.flop_counter import FlopCounterMode

    shape = SHAPES["nano"] | {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    model = make_model(shape, make_tokenizer(512), 0)
    model.set_attn_implementation("eager")  # the counter does not support the CPU's fused attention
    ids = torch.randint(6, 512, (3, 17), device=model.device)
    with FlopCounterMode(display=False) as forward:
        logits = model(ids).logits
    not_causal = 3 * 2 * shape["num_hidden_layers"] * shape["hidden_size"] * 17**2  # the half that a mask hides
    expected = forward_flops(shape, [17] * 3, 3 * 17) + not_causal
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() + backward.get_total_flops() == 3 * expected


def test_lengths_of_synthetic_pairs_have_the_requested_percentiles():
    import numpy as np

    lengths = fitted_lengths(20_000, np.random.default_rng(0))
    for column, name in enumerate(("prompt", "chosen", "rejected")):
        assert np.percentile(lengths[:, column], [50, 95]) == pytest.approx(LENGTHS[name], rel=0.05)
    tokenizer = make_tokenizer(512)
    assert len(tokenizer) == 512
    (pair,) = make_pairs(1, 512)
    for messages in pair.values():
        text = messages[0]["content"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.split())
        assert min(ids) >= 6


def test_lengths_of_real_pairs(tmp_path, data_dir):
    """Responses are as long as those of the file, and contain none of its text."""
    source = data_dir / "alpacaeval_pairs" / "test.jsonl.gz"
    pairs = make_pairs(200, 512, source=str(source))
    words = [len(pair["chosen"][0]["content"].split()) for pair in pairs]
    assert sum(words) / len(words) == pytest.approx(260, rel=0.3)
    assert all(word.startswith("w") for pair in pairs for word in pair["chosen"][0]["content"].split())


def test_the_peak_of_a_gpu_is_found_by_whole_words():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100-PCIE-40GB": 312,
        "NVIDIA L4": 121,
        "NVIDIA L40S": 362,
        "NVIDIA L40": None,
        "NVIDIA A10": 125,
        "NVIDIA A10G": None,
        "NVIDIA GB200": None,
        "AMD Instinct MI300X": 1307,
        "NVIDIA GeForce RTX 5090": 209,
        "NVIDIA GeForce RTX 3090": 71,
        "AMD EPYC 9654 96-Core Processor": None,
    }
    assert {name: peak_flops(name) for name in peaks} == {name: tera and tera * 1e12 for name, tera in peaks.items()}


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_with_other_tokens():
    printed = run("-m", "benchmarks.other_tokens", "--seeds", "1")
    costs = {name.strip(): float(cost) for name, cost in (line.rsplit(maxsplit=1) for line in printed.splitlines())}
    own, others = costs["vanillakd, own tokens"], costs["vanillakd, other tokens"]
    assert max(costs["teacher, own tokens"], costs["teacher, other tokens"]) < own < others < costs["sft"] - 0.03
