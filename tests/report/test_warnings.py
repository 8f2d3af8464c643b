"""Warnings of the report: reward models, collapsed log-probs, uninformative signals."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefdistill.report import load_run
from prefdistill.report.warnings import warnings_of
from support.runs import make_results, write_run


@pytest.mark.parametrize(
    ("reward_model", "message"),
    [
        ({"accuracy": {"mean": 0.55, "se": 0.03, "n": 87, "low": 0.49, "high": 0.61}}, "not clearly more than chance"),
        (
            {
                "accuracy": {"mean": 0.63, "se": 0.03, "n": 87, "low": 0.58, "high": 0.69},
                "longer_is_better": {"mean": 0.604, "se": 0.03, "n": 87, "low": 0.55, "high": 0.66},
            },
            "not clearly more than length alone",
        ),
        (
            {
                "accuracy": {"mean": 0.63, "se": 0.03, "n": 87, "low": 0.58, "high": 0.69},
                "longer_is_better": {"mean": 0.83, "se": 0.03, "n": 87},
                "length_controlled": {"mean": 0.6, "se": 0.03, "n": 87, "low": 0.54, "high": 0.66},
            },
            "its win rates may only measure length; read the length-controlled ones",
        ),
        (
            {
                "accuracy": {"mean": 0.9, "se": 0.01, "n": 87, "low": 0.88, "high": 0.92},
                "longer_is_better": {"mean": 0.83, "se": 0.03, "n": 87},
                "length_controlled": {"mean": 0.55, "se": 0.03, "n": 87, "low": 0.49, "high": 0.61},
            },
            "but 0.550 ± 0.030 where length says nothing, not clearly more than chance",
        ),
        ({"accuracy": {"mean": 0.71, "se": 0.03, "n": 87, "low": 0.65, "high": 0.77}}, None),
        ({}, None),
    ],
)
def test_an_unreliable_reward_model_is_warned_of(
    tmp_path: Path, reward_model: dict[str, Any], message: str | None
) -> None:
    text = " ".join(warnings_of(load_run(write_run(tmp_path / "run", make_results() | {"reward_model": reward_model}))))
    assert (message in text) if message else ("reward model" not in text)


def test_rejected_log_probs_that_collapse_are_warned_of(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_results(seeds=1, orders=1))
    for stage, rejected, chosen in (("tvkd", -200.0, -130.0), ("dpo", -140.0, -70.0)):
        lines = [
            {
                "step": s,
                "logps/rejected": -80 + (rejected + 80) * s / 100,
                "logps/chosen": -70 + (chosen + 70) * s / 100,
            }
            for s in range(0, 101, 10)
        ]
        log = path / "seed-0" / f"distill-{stage}-0" / "metrics.jsonl"
        log.write_text("\n".join(map(json.dumps, lines)))
    (text,) = [w for w in warnings_of(load_run(path)) if "rejected" in w]
    assert text.startswith("tvkd: the log-prob of the rejected responses fell from -80 to -200, and that of the chosen")


@pytest.mark.parametrize(("low", "warned"), [(0.49, True), (0.53, False)])
def test_a_shaping_return_at_chance_is_warned_of(tmp_path: Path, low: float, warned: bool) -> None:
    term = {"mean": 0.56, "se": 0.03, "n": 87, "low": low, "high": 0.63, "shaping": True}
    results = make_results() | {"margin_accuracy": {"shaping return": term}}
    text = " ".join(warnings_of(load_run(write_run(tmp_path / "run", results))))
    assert ("not distinguishable from chance" in text) is warned


@pytest.mark.parametrize(("high", "warned"), [(0.42, True), (0.53, False)])
def test_a_student_worse_than_chance_on_held_out_pairs_is_warned_of(tmp_path: Path, high: float, warned: bool) -> None:
    accuracy = {"mean": 0.35, "se": 0.03, "n": 50, "over": "test prompts", "low": 0.28, "high": high}
    results = make_results()
    results["methods"]["dpo"]["reward_accuracy"] = accuracy
    texts = [w for w in warnings_of(load_run(write_run(tmp_path / "run", results))) if "less than chance" in w]
    assert bool(texts) is warned
    assert all(text.startswith("dpo: its implicit reward orders 0.350") and "data.sft" in text for text in texts)
