"""The benchmarks run at their smallest size, measure what they say, and count FLOP as PyTorch does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import Measured, ratios, summary  # noqa: E402
from benchmarks.inputs import LENGTHS, fitted_lengths, make_pairs, make_tokenizer  # noqa: E402
from benchmarks.shapes import SHAPES, forward_flops, make_model  # noqa: E402


def run(*command):
    """Run Python in the root of the repository; returns what it printed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_training(tmp_path):
    out = tmp_path / "training.json"
    options = "--shape nano --batch 1 --steps 1 --rounds 2 --max-length 64 --k 512 --threads 1"
    variants = ["dpo", "trl-dpo", "dckd", "dckd-dense", "adpa", "adpa-dense"]
    printed = run("-m", "benchmarks.training", *options.split(), "--variants", ",".join(variants), "--out", str(out))
    report = json.loads(out.read_text())
    assert list(report["variants"]) == variants
    assert {"benchmark", "command", "arguments", "hardware", "versions", "agreement"} <= report.keys()
    assert str(tmp_path) not in json.dumps(report["arguments"])
    for name, found in report["variants"].items():
        assert f"| {name}" in printed
        assert found["error"] is None
        assert len(found["rounds"]) == 2
        assert found["seconds_per_unit"] > 0
        assert 0.01 < found["ratio"]["min"] <= found["ratio"]["median"] <= found["ratio"]["max"] < 100
        assert 0 < found["memory"]["loaded"] < found["memory"]["peak"]
        assert 0 < found["data_share"] < 1
    work = {name: report["variants"][name]["rounds"][0] for name in ("dpo", "trl-dpo", "dckd")}
    for number in ("tokens", "response_tokens", "flops"):
        assert len({numbers[number] for numbers in work.values()}) == 1
    # with all tokens kept, whole distributions and ours are the same; DPO is TRL's
    assert set(report["agreement"]) == {"trl-dpo - dpo", "dckd-dense - dckd", "adpa-dense - adpa"}
    for gap in report["agreement"].values():
        assert gap["most"] < 1e-3
    assert report["agreement"]["trl-dpo - dpo"]["chosen_logps"] < 1e-2


def test_extraction(tmp_path):
    out = tmp_path / "extraction.json"
    options = "--shape nano --pairs 6 --rounds 1 --max-length 64 --threads 1"
    ways = ["bare forward, padded", "naive top-50 as JSON", "backbone alone", "endpoints", "values, stored"]
    printed = run("-m", "benchmarks.extraction", *options.split(), "--variants", *["|".join(ways)], "--out", str(out))
    found = json.loads(out.read_text())["variants"]
    assert list(found) == ways
    for name in ways:
        assert f"| {name}" in printed
        assert found[name]["error"] is None
        assert 0.001 < found[name]["ratio"]["median"] < 1000
        assert found[name]["memory"]["above_loaded"] >= 0
    work = [found[name]["facts"] for name in ways]
    assert all(facts == work[0] for facts in work)
    assert found["naive top-50 as JSON"]["rounds"][0]["disk"] > found["values, stored"]["rounds"][0]["disk"]


def test_growth(tmp_path):
    out = tmp_path / "growth.json"
    options = "--shape nano --pairs 4 --rounds 1 --max-length 64 --threads 1"
    printed = run("-m", "benchmarks.growth", *options.split(), "--out", str(out))
    found = json.loads(out.read_text())["variants"]
    tokens = [found[name]["facts"]["tokens"] for name in ("1x", "4x data", "16x data", "4x vocabulary")]
    assert tokens[0] < tokens[1] / 2 < tokens[2] / 4
    assert all(entry["error"] is None for entry in found.values())
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
    """A variant that takes so long and holds so much."""
    import time

    held = bytearray(300 * 2**20)  # preparing takes more than a round
    del held

    def round_():
        if seconds < 0:
            raise MemoryError("no more\nof it")
        kept = bytearray(b"x") * (megabytes * 2**20)
        time.sleep(seconds)
        return {"units": 2, "held": len(kept)}

    return round_, {"asked": megabytes}


def test_processes_are_timed_in_turns_and_their_memory_is_their_own(tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE.format(here=str(Path(__file__).parent)))
    for found in json.loads(run(str(script))):  # alive together, and one after another
        assert found["short"]["facts"] == {"asked": 100}
        for name, least in (("short", 0.2), ("long", 0.8)):  # on a busy machine it may be any more
            assert all(numbers["seconds"] >= least for numbers in found[name]["rounds"])
            assert found[name]["seconds_per_unit"] >= least / 2  # two units a round
        assert found["long"]["ratio"]["max"] > 1
        assert found["short"]["ratio"] == {"median": 1, "min": 1, "max": 1}
        assert [len(found[name]["rounds"]) for name in ("short", "long")] == [2, 2]
        for name, size in (("short", 100), ("long", 400)):
            assert found[name]["memory"]["above_loaded"] / 2**20 == pytest.approx(size, abs=60)
        assert found["broken"]["error"] == "MemoryError: no more"
        assert found["broken"]["ratio"] is None


def test_ratios_are_taken_round_by_round():
    """The machine was three times slower in the second round; the ratio does not see it."""
    slow, fast = ([{"seconds": s, "units": 1} for s in seconds] for seconds in ((2, 6, 2.2), (1, 3, 1)))
    found = {"slow": Measured(rounds=slow), "fast": Measured(rounds=fast)}
    assert ratios(found, "slow", "fast") == {"median": 2, "min": 2, "max": pytest.approx(2.2)}
    assert summary(found, "fast")["slow"]["seconds_per_unit"] == pytest.approx(2.2)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(kv_heads, tied):
    from torch.utils.flop_counter import FlopCounterMode

    shape = SHAPES["nano"] | {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    model = make_model(shape, make_tokenizer(512), 0)
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    ids = torch.randint(6, 512, (3, 17), device=model.device)
    with FlopCounterMode(display=False) as forward:
        logits = model(ids).logits
    expected = forward_flops(shape, [17] * 3, 3 * 17)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() + backward.get_total_flops() == 3 * expected


def test_lengths_of_made_up_pairs_are_those_that_were_asked_for():
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
    """A response is as long as one of the file's; nothing of the text is in what is made."""
    source = data_dir / "alpacaeval_pairs" / "test.jsonl.gz"
    pairs = make_pairs(200, 512, source=str(source))
    words = [len(pair["chosen"][0]["content"].split()) for pair in pairs]
    assert sum(words) / len(words) == pytest.approx(260, rel=0.3)
    assert all(word.startswith("w") for pair in pairs for word in pair["chosen"][0]["content"].split())
