"""The report: numbers, words, escaping, and that the page stands alone."""

import json
import math
import random
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from prefdistill.core.errors import UserError
from prefdistill.report import load_run, method_table, render_html, render_markdown, verdict, write_report
from prefdistill.report import table as report_table

NAN, INF = float("nan"), float("inf")
EVIL = "<script>alert(1)</script></style></pre></title><img src=https://evil.example/x onerror=alert(1)>"


# ---------------------------------------------------------------------------------------------------------------------
# A run directory as the pipeline writes it
# ---------------------------------------------------------------------------------------------------------------------

LABELS = {
    "teacher": "the 0.5 M teacher after SFT and DPO",
    "start": "the student before any method",
    "sft-chosen": "supervised training on the chosen responses",
    "dpo": "plain DPO on the pairs",
    "tvkd": "DPO with the teacher's value as shaping term",
    "tvkd-shuffled": "placebo: the value of another row",
    "oracle-margin": "the true reward's margin in place of the teacher's",
    "dpo-other-order": "DPO once more, other data order",
}
REWARD = {
    "teacher": (3.41, None), "start": (1.62, None), "sft-chosen": (2.14, -0.889), "dpo": (3.03, None),
    "tvkd": (3.069, 0.039), "tvkd-shuffled": (2.981, -0.049), "oracle-margin": (3.068, 0.038),
    "dpo-other-order": (3.041, 0.011),
}  # fmt: skip


def make_results(seeds: int = 3, orders: int = 3, recipe: str = "quickstart") -> dict[str, Any]:
    methods: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    n, over = (seeds, "seeds") if seeds > 1 else (orders, "data orders")
    for i, (name, (reward, diff)) in enumerate(REWARD.items()):
        methods[name] = {
            "reward_t1": {"mean": reward, "se": 0.11 + 0.01 * i, "n": n},
            "reward_greedy": {"mean": reward + 0.21, "se": 0.09, "n": n},
            "reward_accuracy": {"mean": 0.6 + 0.02 * i, "se": 0.008, "n": n},
            "length": {"mean": 6.8 - 0.1 * i, "se": 0.2, "n": n},
        }
        if diff is not None:
            differences[name] = {
                "reward_t1": {"mean": diff, "se": 0.007 + 0.002 * i / 3, "n": n, "over": over},
                "reward_accuracy": {"mean": 0.01 * i - 0.02, "se": 0.006, "n": n, "over": over},
            }
    differences["sft-chosen"]["reward_t1"]["se"] = 0.06
    rng = random.Random(0)

    def cloud(slope: float) -> dict[str, Any]:
        points = []
        for _ in range(400):
            x = rng.gauss(0.6, 1.5)
            points.append([round(x, 3), round(slope * x + rng.gauss(0, 1.1), 3)])
        return {"mean": 0.21, "std": 1.16, "dpo_margin_std": 1.52, "points": points}

    return {
        "recipe": recipe,
        "seed": 0,
        "seeds": list(range(seeds)),
        "orders": orders,
        "baseline": "dpo",
        "task": "list operations with a known reward: 1,000 pairs, a student of 23 k parameters",
        "methods": methods,
        "differences": differences,
        "labels": LABELS,
        "metrics": {
            "reward_t1": {"label": "true reward, T=1", "higher_is_better": True, "format": ".3f"},
            "reward_greedy": {"label": "true reward, greedy", "higher_is_better": True, "format": ".3f"},
            "reward_accuracy": {"label": "reward accuracy", "higher_is_better": True, "format": ".3f"},
            "length": {"label": "response tokens", "higher_is_better": None, "format": ".1f"},
        },
        "margin_accuracy": {
            "teacher log-prob": {"mean": 0.881, "se": 0.006, "n": 3},
            "implicit reward": {"mean": 0.842, "se": 0.007, "n": 3},
            "raw logit Q": {"mean": 0.783, "se": 0.008, "n": 3},
            "shaping return (last)": {"mean": 0.657, "se": 0.012, "n": 3},
            "shaping return (bootstrap)": {"mean": 0.640, "se": 0.012, "n": 3},
            "shorter is better": {"mean": 0.603, "se": 0.010, "n": 3},
            "V of the prompt": {"mean": 0.5, "se": 0.0, "n": 3},
        },
        "shaping": {"tvkd": cloud(0.35), "tvkd-shuffled": cloud(0.0), "oracle-margin": cloud(0.8)},
        "judge": {
            "kind": "reward_model", "name": "reward-model", "pairs": 625,
            "accuracy": {"mean": 0.71, "se": 0.03, "n": 87, "over": "test prompts", "low": 0.652, "high": 0.769},
            "longer_is_better": {"mean": 0.604, "se": 0.03, "n": 87, "over": "test prompts", "low": 0.55, "high": 0.66},
        },
        "generations": {
            name: {"points": [[rng.randint(4, 14), round(rng.gauss(reward, 0.7), 3)] for _ in range(200)]}
            for name, (reward, _) in REWARD.items()
        },
        "by_length": {
            "reward_t1": [
                {"low": low, "high": high, "n": 50, "methods": {
                    name: {"mean": reward - i / 9, "se": 0.05, "n": 50, "over": "test prompts",
                           "low": reward - i / 9 - 0.11, "high": reward - i / 9 + 0.09}
                    for name, (reward, _) in REWARD.items()
                }}
                for i, (low, high) in enumerate([(0, 5), (6, 9), (10, None)])
            ],
        },
        "samples": [
            {
                "prompt": f"inc reverse [ {i} 4 7 {i + 1} ]",
                "responses": {
                    "teacher": f"< {i + 2} 8 5 {i + 1} >", "start": f"< {i + 2} 8 um 5",
                    "dpo": f"< {i + 2} 8 5 {i + 1}", "tvkd": f"< {i + 2} 8 5 {i + 1} >",
                    "tvkd-shuffled": "" if i == 1 else f"< {i + 2} 8 5 >",
                },
                "scores": {"teacher": 4.0, "start": 1.5, "dpo": 3.5, "tvkd": 4.0, "tvkd-shuffled": 2.75},
            }
            for i in range(6)
        ],
        "stages": [
            {
                "name": name, "seconds": seconds, "reused": reused, "seed": seed,
                "peak_memory": 900 * 2**20, "bytes": 1_500_000 * seconds,
            }
            for seed in range(seeds)
            for name, seconds, reused in [
                ("data", 0.4, False), ("teacher-sft", 31.2, seed == 0), ("teacher-dpo", 24.8, seed == 0),
                ("student-sft", 11.1, True), ("signals-values", 3.9, False),
                *[(f"distill-{m}-{o}", 6.5 + 0.3 * o, False) for m in list(REWARD)[3:6] for o in range(orders)],
                ("evaluate-all", 4.4, False),
            ]
        ],
        "warnings": ["the shaping margin is correlated with length (r = 0.41): read the discount section of the docs"],
        "notes": ["pairs are labelled by Bradley-Terry from the true reward; about 80 % agree with it"],
    }  # fmt: skip


def write_run(
    path: Path, results: dict[str, Any] | None = None, *, steps: int = 180, names: tuple[str, ...] = ()
) -> Path:
    results = make_results() if results is None else results
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.json").write_text(json.dumps(results))
    (path / "recipe.yaml").write_text(
        "name: quickstart\nseed: 0\nmethods:\n  tvkd: {alpha: 0.7, beta: 0.3}\n  dpo: {beta: 0.3}\n"
    )
    environment = {
        "python": "3.11.9", "packages": {"torch": "2.11.0", "trl": "1.16.0"}, "device": "cpu",
        "git": {"commit": "0123abcd", "dirty": False}, "started": "2026-07-01T12:00:00Z",
    }  # fmt: skip
    (path / "environment.json").write_text(json.dumps(environment))
    rng = random.Random(1)
    trained = names or ("sft-chosen", "dpo", "tvkd", "tvkd-shuffled", "oracle-margin", "dpo-other-order")
    for seed in results.get("seeds", [0]):
        for stage, start in (("teacher-sft", 3.4), ("teacher-dpo", 0.69), ("student-sft", 3.5)):
            log(
                path,
                seed,
                stage,
                [{"step": s, "loss": start * math.exp(-s / 90) + rng.random() * 0.1} for s in range(10, steps, 10)],
            )
        for i, name in enumerate(trained):
            for order in range(int(results.get("orders", 1))):
                lines = []
                for s in range(5, steps + 1, 5):
                    gain = (1 - math.exp(-s / 70)) * (1 + 0.06 * i)
                    lines.append(
                        {
                            "step": s,
                            "loss": 0.69 - 0.3 * gain + rng.gauss(0, 0.03),
                            "learning_rate": 1e-4,
                            "rewards/margins": 1.4 * gain + rng.gauss(0, 0.1),
                            "rewards/accuracies": min(1.0, 0.5 + 0.33 * gain + rng.gauss(0, 0.03)),
                            "logps/chosen": -9 - 2 * gain + rng.gauss(0, 0.3),
                            "logps/rejected": -11 - 7 * gain + rng.gauss(0, 0.3),
                        }
                    )
                    if "tvkd" in name:
                        lines[-1]["shaping/margins_abs"] = 1.1 + rng.gauss(0, 0.05)
                log(path, seed, f"distill-{name}-{order}", lines)
    return path


def log(path: Path, seed: int, stage: str, lines: list[dict[str, Any]]) -> None:
    folder = path / f"seed-{seed}" / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def small_run(tmp_path: Path, results: dict[str, Any] | None = None) -> Path:
    """Only a results.json, quick to render."""
    (tmp_path / "results.json").write_text(json.dumps(results or {"methods": {"tvkd": {"r": 1.5}}}))
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "quick")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return render_html([run])


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile text in every place that text can come from, and numbers that are not finite."""
    results = make_results(seeds=1, orders=2)
    results.update(recipe=EVIL, task=EVIL, warnings=[EVIL], notes=[EVIL])
    results["labels"] = {"tvkd": EVIL}
    results["metrics"]["length"]["label"] = EVIL
    results["methods"][EVIL] = {"reward_t1": {"mean": NAN, "se": None}, "reward_greedy": INF}
    results["differences"][EVIL] = {"reward_t1": {"mean": NAN, "se": None, "n": 1, "over": EVIL}}
    results["margin_accuracy"][EVIL] = {"mean": NAN}
    results["shaping"] = {EVIL: {"mean": 1, "std": NAN, "points": [[1, 2], [NAN, 1], [2, 2], "x"]}}
    results["samples"][0] = {
        "prompt": EVIL,
        "responses": {"tvkd": f"{EVIL}\x00\x1b[31m\ud800", "dpo": "```\n<script>alert(2)</script>\n````", EVIL: EVIL},
        "scores": {"tvkd": NAN, "dpo": EVIL},
    }
    results["stages"].append({"name": EVIL, "seconds": 4000, "reused": True})
    path = write_run(tmp_path_factory.mktemp("runs") / "evil", results, steps=20, names=("dpo", "tvkd"))
    log(path, 0, "distill-tvkd-7", [{"step": 5, "loss": NAN}])
    (path / "recipe.yaml").write_text(EVIL)
    (path / "environment.json").write_text(json.dumps({EVIL: {EVIL: [EVIL]}}))
    return path


@pytest.fixture(scope="module")
def evil_page(evil_run: Path) -> str:
    return render_html([evil_run])


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------


def small(
    differences: dict[str, Any], *, higher: bool | None = True, over: str = "seeds", seeds: int = 10, **more: Any
) -> dict[str, Any]:
    """Results with one metric "r"; differences as (mean, se, n)."""
    methods = {name: {"r": 1.0} for name in ["dpo", *differences]}
    table = {
        name: {"r": {"mean": d[0], "se": d[1], "n": d[2], "over": over}}
        for name, d in differences.items()
        if d is not None
    }
    results = {
        "baseline": "dpo", "seeds": list(range(seeds)), "methods": methods, "differences": table,
        "metrics": {"r": {"label": "reward", "higher_is_better": higher, "format": ".3f"}},
    }  # fmt: skip
    return {**results, **more}


REFERENCES = {"teacher": None, "start": None}  # measured, but with nothing paired
VERDICTS = {
    "win": (
        small({"tvkd": (0.039, 0.012, 10)}),
        "TVKD beat DPO by 0.039 ± 0.012 on reward (mean ± s.e. over 10 seeds).",
    ),
    "loss, said as plainly": (
        small({"tvkd": (-0.114, 0.021, 10)}),
        "TVKD lost to DPO by 0.114 ± 0.021 on reward (mean ± s.e. over 10 seeds).",
    ),
    "lower is better: a negative difference wins": (
        small({"tvkd": (-0.2, 0.03, 10)}, higher=False),
        "TVKD beat DPO by 0.200 ± 0.030 on reward (mean ± s.e. over 10 seeds).",
    ),
    "lower is better: a positive difference loses": (
        small({"tvkd": (0.2, 0.03, 10)}, higher=False),
        "TVKD lost to DPO by 0.200 ± 0.030 on reward (mean ± s.e. over 10 seeds).",
    ),
    "no direction: neither wins": (
        small({"tvkd": (0.2, 0.03, 10)}, higher=None),
        "TVKD came out above DPO by 0.200 ± 0.030 on reward (mean ± s.e. over 10 seeds).",
    ),
    "within two standard errors": (
        small({"tvkd": (0.02, 0.012, 10)}),
        "No difference between TVKD and DPO could be told apart from noise on reward: +0.020 ± 0.012 "
        "(mean ± s.e. over 10 seeds).",
    ),
    "exactly two standard errors is not more than two": (
        small({"tvkd": (0.5, 0.25, 10)}),
        "No difference between TVKD and DPO could be told apart from noise on reward: +0.500 ± 0.250 "
        "(mean ± s.e. over 10 seeds).",
    ),
    "below the noise floor": (
        small({"tvkd": (0.03, 0.01, 10), "dpo-other-order": (0.04, 0.01, 10)}),
        "No difference between TVKD and DPO could be told apart from noise on reward: +0.030 ± 0.010 "
        "(mean ± s.e. over 10 seeds), no more than DPO moves by itself with another data order (0.040).",
    ),
    "a noise floor of either sign, at least two of its standard errors": (
        small({"tvkd": (-0.03, 0.01, 10), "dpo-other-order": (0.001, 0.02, 10)}),
        "No difference between TVKD and DPO could be told apart from noise on reward: -0.030 ± 0.010 "
        "(mean ± s.e. over 10 seeds), no more than DPO moves by itself with another data order (0.040).",
    ),
    "above the noise floor": (
        small({"tvkd": (0.05, 0.01, 10), "dpo-other-order": (-0.01, 0.01, 10)}),
        "TVKD beat DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds).",
    ),
    "three seeds: two s.e. but an interval that includes zero": (
        small({"tvkd": (0.039, 0.012, 3)}, seeds=3),
        "TVKD came out ahead of DPO by 0.039 ± 0.012 on reward (mean ± s.e. over 3 seeds), but with so few repeats "
        "the 95 % interval (-0.013 to +0.091) still includes zero.",
    ),
    "two seeds": (
        small({"tvkd": (0.5, 0.01, 2)}, seeds=2),
        "TVKD beat DPO by 0.500 ± 0.010 on reward (mean ± s.e. over 2 seeds); 2 seeds are too few to cover much more "
        "than training-order noise.",
    ),
    "data orders of one seed": (
        small({"tvkd": (-0.5, 0.01, 3)}, over="data orders", seeds=1),
        "TVKD lost to DPO by 0.500 ± 0.010 on reward (mean ± s.e. over 3 data orders); this covers training-order "
        "noise only, another seed may differ.",
    ),
    "what it was repeated over is inferred": (
        small({"tvkd": (0.0, 0.01, 3)}, over="", seeds=1),
        "No difference between TVKD and DPO could be told apart from noise on reward: 0.000 ± 0.010 (mean ± s.e. over "
        "3 data orders); this covers training-order noise only, another seed may differ.",
    ),
    "one run": (
        small({"tvkd": (0.5, None, 1)}),
        "TVKD came out 0.500 better than DPO on reward in a single run; without repeats nothing says whether that is "
        "more than noise.",
    ),
    "one run with a standard error of zero": (
        small({"tvkd": (-0.5, 0.0, 1)}),
        "TVKD came out 0.500 worse than DPO on reward in a single run; without repeats nothing says whether that is "
        "more than noise.",
    ),
    "several runs without a standard error": (
        small({"tvkd": (0.5, None, 3)}),
        "TVKD came out 0.500 better than DPO on reward over 3 seeds; without a standard error it may be noise.",
    ),
    "placebo did as well as a win": (
        small({"tvkd": (0.05, 0.01, 10), "tvkd-shuffled": (0.045, 0.01, 10)}),
        "TVKD beat DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds); the placebo with shuffled values "
        "(+0.045 ± 0.010) did as well, so the gain cannot be credited to the teacher's values.",
    ),
    "placebo did less well than a win": (
        small({"tvkd": (0.05, 0.01, 10), "tvkd-shuffled": (-0.045, 0.01, 10)}),
        "TVKD beat DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds); the placebo with shuffled values "
        "(-0.045 ± 0.010) did less well.",
    ),
    "placebo did no worse than a loss": (
        small({"tvkd": (-0.05, 0.01, 10), "tvkd-shuffled": (-0.01, 0.01, 10)}),
        "TVKD lost to DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds); the placebo with shuffled values "
        "(-0.010 ± 0.010) did no worse.",
    ),
    "placebo where lower is better": (
        small({"tvkd": (-0.05, 0.01, 10), "tvkd-shuffled": (-0.06, 0.01, 10)}, higher=False),
        "TVKD beat DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds); the placebo with shuffled values "
        "(-0.060 ± 0.010) did as well, so the gain cannot be credited to the teacher's values.",
    ),
    "not finite": (
        small({"tvkd": (NAN, 0.1, 3)}),
        "The difference between TVKD and DPO on reward is not a finite number: a run failed or diverged.",
    ),
    "no paired difference": (
        small({"tvkd": None}),
        "TVKD scored 1.000 and DPO 1.000 on reward, but no paired difference was recorded, so neither can be called "
        "better.",
    ),
    "another TVKD came out ahead": (
        small({"tvkd": (-0.114, 0.021, 10), "tvkd-reversed": (0.093, 0.019, 10), "tvkd-shuffled": (0.2, 0.01, 10)}),
        "TVKD lost to DPO by 0.114 ± 0.021 on reward (mean ± s.e. over 10 seeds); the placebo with shuffled values "
        "(+0.200 ± 0.010) did no worse. tvkd-reversed came out ahead of DPO by 0.093 ± 0.019.",
    ),
    "another TVKD came out ahead of few seeds": (
        small({"tvkd": (0.0, 0.01, 3), "tvkd-reversed": (-0.093, 0.03, 3)}, seeds=3, higher=False),
        "No difference between TVKD and DPO could be told apart from noise on reward: 0.000 ± 0.010 (mean ± s.e. over "
        "3 seeds). tvkd-reversed came out ahead of DPO by 0.093 ± 0.030, but its 95 % interval includes zero.",
    ),
    "of many methods, those ahead are named, and how many there were": (
        small(
            {
                "tvkd": (0.0, 0.01, 10),
                "dckd": (0.1, 0.01, 10),
                **dict.fromkeys(("adpa", "dpkd", "seqkd", "wpo"), (-0.1, 0.01, 10)),
                "distillm2": (0.2, 0.01, 10),
                **REFERENCES,
            }
        ),
        "No difference between TVKD and DPO could be told apart from noise on reward: 0.000 ± 0.010 (mean ± s.e. over "
        "10 seeds). DCKD came out ahead of DPO by 0.100 ± 0.010; DistiLLM-2 came out ahead of DPO by 0.200 ± 0.010 "
        "(6 other methods were compared).",
    ),
    "another TVKD behind, within noise or in one run is not mentioned": (
        small({"tvkd": (0.1, 0.01, 9), "tvkd-a": (-1, 0.1, 9), "tvkd-b": (0.1, 0.1, 9), "tvkd-c": (1, None, 1)}),
        "TVKD beat DPO by 0.100 ± 0.010 on reward (mean ± s.e. over 9 seeds).",
    ),
    "no TVKD: every other method, no control": (
        small({"dckd": (0.14, 0.02, 10), "adpa": (-0.2, 0.02, 10), "seqkd": (0.01, 0.02, 10), "oracle": (1, 0.1, 10)}),
        "Against DPO on reward: DCKD ahead (+0.140 ± 0.020), ADPA behind (-0.200 ± 0.020), SeqKD within noise "
        "(+0.010 ± 0.020) (mean ± s.e. over 10 seeds).",
    ),
    "no TVKD, one run each": (
        small({"dckd": (0.14, None, 1), "adpa": (NAN, None, 1)}),
        "Against DPO on reward: DCKD +0.140 in a single run, ADPA not finite; without repeats nothing says whether "
        "that is more than noise.",
    ),
    "one other method": (
        small({"dckd": (0.14, 0.02, 10), **REFERENCES}),
        "DCKD beat DPO by 0.140 ± 0.020 on reward (mean ± s.e. over 10 seeds).",
    ),
    "SFT is a method": (
        small({"sft": (-0.5, 0.1, 10), **REFERENCES}),
        "SFT lost to DPO by 0.500 ± 0.100 on reward (mean ± s.e. over 10 seeds).",
    ),
    "a method may be named after the student it is of": (
        small({"student-a": (0.5, 0.1, 10), "base": (-0.5, 0.1, 10), **REFERENCES}),
        "Against DPO on reward: student-a ahead (+0.500 ± 0.100), base behind (-0.500 ± 0.100) (mean ± s.e. over 10 "
        "seeds).",
    ),
    "no baseline": (
        {"methods": {"tvkd": {"r": 1.0}}, "baseline": "dpo"},
        "The baseline, DPO, was not run, so nothing can be said about which method is better.",
    ),
    "controls only": (
        small({"oracle-margin": (1, 0.1, 10), **REFERENCES}),
        "Only baselines and controls were run, so there is nothing to compare.",
    ),
    "nothing measured": ({"methods": {"tvkd": {}}}, "Nothing was measured, so there is nothing to compare."),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(case: str) -> None:
    results, sentence = VERDICTS[case]
    assert verdict(results) == sentence


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict_is_one_line_that_a_terminal_can_print(case: str) -> None:
    sentence = verdict(VERDICTS[case][0])
    assert "\n" not in sentence
    assert sentence.endswith(".")
    sentence.encode("cp1252")


def test_interval_uses_students_t() -> None:
    for df, quantile in [
        (1, 12.7062),
        (2, 4.3027),
        (10, 2.2281),
        (30, 2.0423),
        (31, 2.0395),
        (60, 2.0003),
        (999, 1.9623),
    ]:
        assert report_table.t975(df) == pytest.approx(quantile, abs=6e-4)
    assert report_table.Estimate(1.0, 0.5, 3).interval() == pytest.approx((-1.1513, 3.1513), abs=1e-3)
    assert report_table.Estimate(1.0, 0.5, 1).interval() is None
    assert report_table.Estimate(1.0, None, 3).interval() is None


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def test_table_as_plain_text() -> None:
    results = small({"tvkd": (0.039, 0.012, 3), "tvkd-shuffled": (-0.05, 0.01, 3), "adpa": (NAN, None, 1)}, seeds=3)
    results["methods"]["tvkd"] = {"r": {"mean": 3.069, "se": 0.15, "n": 3}, "length": {"mean": 12, "se": None}}
    results["methods"]["adpa"] = {"r": {"mean": NAN, "se": None, "n": 3}}
    results["metrics"]["length"] = {"label": "tokens", "format": ".1f"}
    expected = """\
                                   difference to
    method                reward             DPO  tokens
    -------------  -------------  --------------  ------
    dpo            1.000                baseline       -
    tvkd           3.069 ± 0.150  +0.039 ± 0.012    12.0
    tvkd-shuffled  1.000          -0.050 ± 0.010       -
    adpa              not finite      not finite       -

    ± is the standard error of the mean over 3 seeds; differences are paired.
    """
    assert method_table(results) == textwrap.dedent(expected).rstrip()


def test_table_fits_a_terminal_and_its_columns_line_up() -> None:
    results = make_results()
    for i in range(9):
        results["metrics"][f"extra{i}"] = {"label": f"one more metric with a long name {i}", "format": ".2f"}
        for scores in results["methods"].values():
            scores[f"extra{i}"] = {"mean": 10.0**i, "se": 0.5, "n": 3}
    text = method_table(results)
    assert max(map(len, text.splitlines())) <= 100
    assert all(text.count(f"name {i}") == 1 or f"{i}" in text for i in range(9))
    for block in text.split("\n\n")[:-1]:
        rows = [line for line in block.splitlines() if "±" in line]
        assert len(rows) == len(results["methods"])
        columns = {tuple(m.start() for m in re.finditer("±", row)) for row in rows if "baseline" not in row}
        assert len({max(c) for c in columns}) == 1


def test_table_as_markdown() -> None:
    results = small({"tvkd": (0.039, 0.012, 3), "a|b<i>": (0.1, 0.1, 3)})
    assert method_table(results, markdown=True).splitlines() == [
        "| method | reward | difference to DPO |",
        "| :-- | --: | --: |",
        "| **dpo** | 1.000 | baseline |",
        "| tvkd | 1.000 | +0.039 ± 0.012 |",
        r"| a\|b&lt;i&gt; | 1.000 | +0.100 ± 0.100 |",
    ]


def test_table_of_very_little() -> None:
    assert method_table({"methods": {"dpo": {"x": 1}, "tvkd": {}}}).splitlines()[-2:] == [
        "dpo     1.000",
        "tvkd        -",
    ]
    assert "dpo" in method_table({"methods": {"dpo": {}}})


def test_terminal_escapes_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in method_table({"methods": {"dpo\x1b[31m": {"x\x1b]0;": 1.0}}})


@pytest.mark.parametrize(
    ("value", "text"),
    [(NAN, "not finite"), (INF, "not finite"), (-INF, "not finite"), ("NaN", "not finite"), (None, "-"), (True, "-"),
     ({"mean": None}, "-"), ({"mean": 1.0, "se": NAN}, "1.000 ± not finite"), (-0.0001, "0.000"), (-2, "-2.000"),
     ({"mean": 1.0, "se": 0.25}, "1.000 ± 0.250")],
)  # fmt: skip
def test_numbers_are_shown_as_they_are(value: Any, text: str) -> None:
    last = method_table({"methods": {"tvkd": {"x": value}}}).splitlines()[-1]
    assert last.split(maxsplit=1)[1] == text


# ---------------------------------------------------------------------------------------------------------------------
# Reading a run directory
# ---------------------------------------------------------------------------------------------------------------------


def test_load_run(run: Path) -> None:
    loaded = load_run(run)
    assert loaded["name"] == "quickstart"
    assert loaded["results"]["methods"].keys() == REWARD.keys()
    assert loaded["recipe"].startswith("name: quickstart")
    assert loaded["environment"]["packages"]["trl"] == "1.16.0"
    assert len(loaded["curves"]["distill-tvkd-0"]["loss"]) == 3  # one line per seed
    assert loaded["curves"]["distill-tvkd-0"]["loss"][0][0][0] == 5
    assert "learning_rate" not in loaded["curves"]["distill-tvkd-0"]
    assert loaded["problems"] == []
    assert load_run(run / "results.json")["name"] == "quickstart"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results.json"),
        ("{", "not valid JSON"),
        ("[]", 'no "methods"'),
        ('{"methods": {}}', 'no "methods"'),
        ('{"methods": {"dpo": 3}}', '"dpo" must be'),
    ],
)
def test_load_run_says_what_is_wrong(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_run(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_unfinished_run_is_told_from_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no results\.json of a run: give a directory"):
        load_run(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match="the run has not finished"):
        load_run(tmp_path)


def test_load_run_of_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"):
        load_run(tmp_path / "file")
    with pytest.raises(UserError, match="no run directory given"):
        render_html([])


def test_what_an_earlier_run_has_left_is_not_drawn(tmp_path: Path) -> None:
    stages = [{"name": "distill-dpo-0", "seed": 0}, {"name": ["of a stranger"], "seed": {}}, 7]
    (tmp_path / "results.json").write_text(json.dumps({"methods": {"dpo": {"r": 1}}, "stages": stages}))
    log(tmp_path, 0, "distill-dpo-0", [{"step": 1, "loss": 1}])
    log(tmp_path, 1, "distill-dpo-0", [{"step": 1, "loss": 9}])  # of another seed, order, method
    log(tmp_path, 0, "distill-dpo-1", [{"step": 1, "loss": 9}])
    log(tmp_path, 0, "distill-tvkd-0", [{"step": 1, "loss": NAN}])
    loaded = load_run(tmp_path)
    assert loaded["curves"] == {"distill-dpo-0": {"loss": [[(1, 1)]]}}
    assert loaded["problems"] == []


def test_logs_of_interrupted_and_diverged_runs(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"methods": {"dpo": {"r": 1}}}')
    log(tmp_path, 0, "distill-dpo-0", [{"step": 1, "loss": 9}, {"step": 2, "loss": 5}, {"step": 1, "loss": 7}])
    log(tmp_path, 10, "distill-dpo-0", [{"step": 1, "loss": 3}, {"step": 2, "loss": NAN}, {"train_runtime": 3}])
    log(tmp_path, 2, "distill-dpo-0", [{"step": 1, "loss": 4}])
    with (tmp_path / "seed-2/distill-dpo-0/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    loaded = load_run(tmp_path)
    first, second, third = loaded["curves"]["distill-dpo-0"]["loss"]
    assert first == [(1, 7), (2, 5)]  # a resumed run logs a step again: the last one counts
    assert second == [(1, 4)]  # seed 2 before seed 10
    assert third[0] == (1, 3)
    assert any("1 line is not valid JSON" in p for p in loaded["problems"])
    assert any("not finite at 1 logged step, the first at step 2" in p for p in loaded["problems"])
    assert "not finite at 1 logged step" in render_html([tmp_path])


def test_a_measured_interval_is_taken_as_it_is() -> None:
    measured = report_table.Estimate.parse({"mean": 0.7, "se": 0.1, "n": 9, "low": 0.55, "high": 0.81})
    assert measured is not None
    assert measured.interval() == (0.55, 0.81)
    upside_down = report_table.Estimate.parse({"mean": 0.7, "se": 0.1, "n": 9, "low": 0.81, "high": 0.55})
    assert upside_down is not None
    assert upside_down.interval() == pytest.approx((0.7 - 0.2306, 0.7 + 0.2306), abs=1e-4)  # t of 8 degrees of freedom


def test_a_verdict_over_test_prompts_says_what_it_does_not_cover() -> None:
    results = make_results()
    estimate = {"mean": 0.2, "se": 0.02, "n": 87, "over": "test prompts", "low": 0.16, "high": 0.24}
    results["differences"] = {"tvkd": {"reward_t1": estimate}}
    assert "over 87 test prompts" in verdict(results)
    assert "another training or seed may differ" in verdict(results)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"accuracy": {"mean": 0.55, "se": 0.03, "n": 87, "low": 0.49, "high": 0.61}}, "not clearly more than chance"),
        (
            {
                "accuracy": {"mean": 0.63, "se": 0.03, "n": 87, "low": 0.58, "high": 0.69},
                "longer_is_better": {"mean": 0.604, "se": 0.03, "n": 87, "low": 0.55, "high": 0.66},
            },
            "not clearly more than length alone",
        ),
        ({"accuracy": {"mean": 0.71, "se": 0.03, "n": 87, "low": 0.65, "high": 0.77}}, None),
        ({}, None),
    ],
)
def test_a_judge_that_is_worth_little_is_warned_of(tmp_path: Path, judge: dict[str, Any], message: str | None) -> None:
    from prefdistill.report.warnings import warnings_of

    found = " ".join(warnings_of(load_run(write_run(tmp_path / "run", make_results() | {"judge": judge}))))
    assert (message in found) if message else ("judge" not in found)


def test_rejected_log_probs_that_collapse_are_warned_of(tmp_path: Path) -> None:
    from prefdistill.report.warnings import warnings_of

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
    (found,) = [w for w in warnings_of(load_run(path)) if "rejected" in w]
    assert found.startswith(
        "tvkd: the log-prob of the rejected responses fell from -80 to -200, and that of the chosen"
    )


@pytest.mark.parametrize(("low", "warned"), [(0.49, True), (0.53, False)])
def test_a_shaping_return_at_chance_is_warned_of(tmp_path: Path, low: float, warned: bool) -> None:
    from prefdistill.report.warnings import warnings_of

    term = {"mean": 0.56, "se": 0.03, "n": 87, "low": low, "high": 0.63}
    results = make_results() | {"margin_accuracy": {"shaping return": term}}
    found = " ".join(warnings_of(load_run(write_run(tmp_path / "run", results))))
    assert ("not told from chance" in found) is warned


def test_responses_by_length_on_the_page(page: str, run: Path) -> None:
    assert (
        "scores the better response higher in 0.710 ± 0.030 (95 % interval 0.652 to 0.769) of 625 held-out pairs"
        in (page.replace("\u00a0", " "))
    )
    for label in ("up to 5", "6 to 9", "10 and more"):
        assert page.count(label) >= 3  # the figure, its words, the table
    assert "200 responses of tvkd: score against length in tokens" in page
    text = render_markdown([run])
    assert "| true reward, T=1, by words of the reference | up to 5 | 6 to 9 | 10 and more |" in text
    assert "| tvkd | 3.069 ± 0.050 | 2.958 ± 0.050 | 2.847 ± 0.050 |" in text
    assert "900 MiB" in page
    assert "900 MiB" in text


def test_stage_names() -> None:
    from prefdistill.report.warnings import method_of

    names = ["dpo", "tvkd", "tvkd-shuffled", "dpo-other-order", "tvkd-2"]
    assert method_of("distill-tvkd-0", names) == "tvkd"
    assert method_of("distill-tvkd-shuffled-11", names) == "tvkd-shuffled"
    assert method_of("distill-dpo-other-order-1", names) == "dpo-other-order"
    assert method_of("distill-tvkd-2-0", names) == "tvkd-2"
    assert method_of("distill-unknown-0", names) == "unknown"
    assert method_of("teacher-dpo", names) is None


def test_average_takes_the_steps_that_all_runs_share() -> None:
    from prefdistill.report import figures
    from prefdistill.report.run import average

    assert average([[(1, 1.0), (2, 2.0), (3, 9.0)], [(1, 3.0), (2, 4.0)]]) == [(1, 2.0), (2, 3.0)]
    assert average([[(1, 1.0)], [(2, 1.0)]]) == []
    thinned = figures.thin([(float(x), float(x)) for x in range(1000)], 80)
    assert len(thinned) == 80
    assert thinned[0] == (5.5, 5.5)
    assert math.isnan(figures.thin([(0, NAN), (1, 1), (2, 2), (3, 3)], 2)[0][1])


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "line", "rect", "circle"}


class Page(HTMLParser):
    """All elements of a page with their attributes; fails on a tag that is closed where it was not opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "desc", "title"} & set(self.open):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


def check_page(html: str) -> Page:
    """What holds for every page: it is well formed, stands alone and can be read without seeing the figures."""
    page = Page(html)
    for _, attrs in page.elements:
        for key, value in attrs.items():
            assert not key.startswith("on"), f"script in {key}"
            if key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert value is not None
                assert value.startswith("#") or value == "data:,", f"loads {value}"
            if value and "url(" in value:
                assert "url(#" in value
    for tag in ("script", "img", "iframe", "object", "embed", "base", "form"):
        assert page.all(tag) == []
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]

    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.elements:
        for target in (attrs.get("aria-labelledby") or "").split():
            assert target in ids
        if (attrs.get("href") or "").startswith("#"):
            assert (attrs["href"] or "")[1:] in ids
    plots = [a for a in page.all("svg") if a.get("class") == "plot"]
    assert all(a.get("role") == "img" and len((a.get("aria-labelledby") or "").split()) == 2 for a in plots)
    assert len(
        re.findall(r'<svg class="plot"[^>]*><title id="[^"]+">[^<]+</title><desc id="[^"]+">[^<]+</desc>', html)
    ) == len(plots)
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert len(html.encode()) < 1_000_000
    return page


def test_page_stands_alone_and_is_accessible(page: str) -> None:
    parsed = check_page(page)
    assert len([a for a in parsed.all("svg") if a.get("class") == "plot"]) == 6 + 3 + 1 + 1 + 3 + 1 + 8
    assert "https://" not in page
    assert re.findall("http://[^\"' <]*", page) == []
    assert parsed.all("html") == [{"lang": "en"}]


def test_page_shows_the_numbers(page: str) -> None:
    text = Page(page).text
    assert "+0.039 ± 0.010" in text
    assert "−0.889 ± 0.060" in text
    assert "leans ahead" in text
    assert "0.657 ± 0.012" in text  # margin accuracy, text inside the figure
    assert "TVKD came out ahead of DPO by 0.039 ± 0.010 on true reward, T=1" in text
    assert "the shaping margin is correlated with length" in text
    assert "1 min 34 s" in text  # 3 x 31.2 s
    assert "1 of 3 reused" in text
    assert "tvkd: {alpha: 0.7, beta: 0.3}" in text
    assert "packages.trl 1.16.0" in text
    for heading in (
        "Methods",
        "Difference to DPO",
        "Training",
        "Samples",
        "Time, memory, disk",
        "How to read this",
        "Provenance",
    ):
        assert f">{heading}</h2>" in page


def test_figures_carry_their_numbers_in_words(page: str) -> None:
    forest = re.search(r'<desc id="run1-forest-alt">(.*?)</desc>', page)
    assert forest
    assert "tvkd +0.039 ± 0.010, 95 % interval -0.003 to 0.081" in forest[1]
    assert "Noise floor: 0.023" in forest[1]
    assert re.search(r'<desc id="run1-curve0-alt">loss by optimiser step. At the last step: .*tvkd 0\.\d+', page)


def test_figures_follow_the_theme_of_the_page(page: str) -> None:
    plots = re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)
    assert plots
    for plot in plots:
        assert "currentColor" in plot
        colours = re.findall(r"(?:fill|stroke|color): (#\w+)", plot)
        assert colours == []  # every colour is the page's
        assert "<style" not in plot
        assert "<metadata" not in plot
        assert "DejaVu" not in plot
    assert "prefers-color-scheme: dark" in page


def test_of_all_models_the_references_alone_are_grey() -> None:
    from prefdistill.report import figures

    drawn = figures.styles(["teacher", "start", "dpo", "sft", "dckd"], "dpo")
    assert [name for name, style in drawn.items() if style.colour == figures.MUTED] == ["teacher", "start"]


def test_rendering_is_repeatable_and_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    results = small({"tvkd": (0.1, 0.01, 3)})
    results["shaping"] = {"tvkd": {"points": [[0, 1], [1, 2], [2, 2]]}}
    path = small_run(tmp_path, results)
    with matplotlib.rc_context({"font.size": 40, "axes.titlecolor": "red"}):  # the reader's own settings do not matter
        before = dict(matplotlib.rcParams)
        page = render_html([path])
        assert dict(matplotlib.rcParams) == before
    assert render_html([path]) == page


def test_hostile_text_stays_text(evil_page: str) -> None:
    parsed = check_page(evil_page)
    assert "<script" not in evil_page
    assert evil_page.count("</style>") == 1
    assert parsed.text.count(" ".join(EVIL.split())) >= 12
    assert "\x00" not in evil_page
    assert "\x1b" not in evil_page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 380])
def test_the_page_in_a_browser(evil_page: str, tmp_path: Path, open_page: Any, scheme: str, width: int) -> None:
    """No error, no dialog, no request (`open_page` sees to that), nothing wider than the window, and it can be read."""
    (tmp_path / "report.html").write_text(evil_page)
    page = open_page(tmp_path / "report.html", color_scheme=scheme, viewport={"width": width, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light = {name: sum(map(int, re.findall(r"\d+", colour)[:3])) for name, colour in (("ink", ink), ("paper", paper))}
    assert (light["ink"] < light["paper"]) is (scheme == "light")
    assert abs(light["ink"] - light["paper"]) > 450  # of 765
    assert page.locator("svg.plot").count() > 5


def test_not_finite_is_never_zero(evil_page: str) -> None:
    row = re.search(r'<tr class="method"><th scope="row">(?:(?!</code>).)*alert.*?</tr>', evil_page, re.DOTALL)
    assert row
    assert row[0].count('<span class="num bad">not finite</span>') == 3
    assert "0.000" not in row[0]
    assert "reward_t1, reward_greedy not finite" in evil_page
    assert "score not finite" in evil_page


@pytest.mark.parametrize("key", [k for k in make_results() if k != "methods"])
@pytest.mark.parametrize("value", ["missing", 7, "text", [1, None, {}], {"tvkd": 1, "x": [None]}])
def test_optional_parts_may_be_missing_or_malformed(tmp_path: Path, key: str, value: Any, monkeypatch: Any) -> None:
    from prefdistill.report import figures

    monkeypatch.setattr(figures, "svg", lambda *_, **__: "")  # 75 pages: the figures themselves are tested elsewhere
    results = make_results(seeds=1, orders=1)
    results["samples"] = results["samples"][:1]
    for other in ("margin_accuracy", "shaping"):
        results[other] = {"tvkd": {"mean": 0.5, "points": [[0, 1]]}}
    if value == "missing":
        del results[key]
    else:
        results[key] = value
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "tvkd" in render_html([tmp_path])
    assert "tvkd" in render_markdown([tmp_path])
    assert method_table(results)
    assert verdict(results)


def test_smallest_run(tmp_path: Path) -> None:
    page = check_page(render_html([small_run(tmp_path)]))
    assert tmp_path.name in page.text
    assert "1.500" in page.text
    for absent in ("Training", "Samples", "Time", "warning", "Noise floor", "Difference to"):
        assert absent not in page.text


def test_figures_of_odd_numbers(tmp_path: Path) -> None:
    """One method, one step, identical points, an enormous interval: drawn without an error."""
    results = small({"tvkd": (1e9, 1e9, 2), "adpa": (0.0, 0.0, 3), "dckd": (NAN, NAN, 3), "$x_{$": (0.1, None, 1)})
    results["shaping"] = {"tvkd": {"points": [[1, 1]] * 5}}
    results["margin_accuracy"] = {"日本語 $\\frac": {"mean": 1.5, "se": NAN}}
    path = write_run(tmp_path / "odd", results, steps=5, names=("tvkd", "$x_{$"))
    check_page(render_html([path]))


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    results, other = make_results(seeds=1, orders=1), make_results(seeds=1, orders=1, recipe="other")
    results["shaping"] = other["shaping"] = {}
    first = write_run(tmp_path / "first", results, steps=20, names=("dpo",))
    del other["methods"]["oracle-margin"]
    del other["metrics"]["length"]
    for scores in other["methods"].values():
        del scores["length"]
    second = write_run(tmp_path / "second", other, steps=20, names=("dpo",))
    html = render_html([first, second])
    page = check_page(html)
    assert "2 runs compared" in page.text
    captions = re.findall(r"<caption>(.*?)</caption>", html)
    assert captions == ["true reward, T=1", "true reward, greedy", "reward accuracy"]  # length is not shared
    table = html[html.index("<caption>true reward, T=1") :]
    oracle = re.search(r'<th scope="row"><code>oracle-margin</code></th>(.*?)</tr>', table, re.DOTALL)
    assert oracle
    assert oracle[1].count("<td>") == 2
    assert "–" in oracle[1]
    markdown = render_markdown([first, second])
    assert "| oracle-margin | 3.068 ± 0.170 (+0.038 ± 0.011) | – |" in markdown


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text('{"recipe": "r", "methods": {"dpo": {"x": 1}}}')
        paths.append(tmp_path / name)
    text = check_page(render_html(paths)).text
    assert f"r ({tmp_path / 'a'})" in text
    assert f"r ({tmp_path / 'b'})" in text


def test_long_samples_are_cut_and_say_so(tmp_path: Path) -> None:
    results = {
        "methods": {f"m{i}": {"r": 1} for i in range(8)},
        "samples": [{"prompt": "p", "responses": {f"m{i}": "word " * 20_000 for i in range(8)}} for _ in range(40)],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = check_page(render_html([tmp_path]))
    assert "cut here: 100,000 characters in all" in page.text


# ---------------------------------------------------------------------------------------------------------------------
# Markdown and files
# ---------------------------------------------------------------------------------------------------------------------


def test_markdown(run: Path) -> None:
    text = render_markdown([run])
    assert text.startswith("# quickstart\n\n**TVKD came out ahead of DPO")
    assert "| tvkd | 3.069 ± 0.150 | +0.039 ± 0.010 |" in text
    assert "> [!WARNING]" in text
    assert "| teacher-sft | 3 | 1 min 34 s | 900 MiB | 134 MiB | 1 of 3 reused |" in text
    assert "```yaml\nname: quickstart" in text


def test_markdown_of_hostile_text(evil_run: Path) -> None:
    text = render_markdown([evil_run])
    prose = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in prose
    assert "<img" not in prose
    assert "alert(2)" not in prose  # a response that holds a fence stays inside its own
    assert "![" not in prose.replace("[!WARNING]", "")


def test_write_report(evil_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert write_report([evil_run], out.with_suffix(".md"), format="md")  # a lone surrogate does not stop it
    assert "Samples" in out.with_suffix(".md").read_text(encoding="utf-8")
    for run in (evil_run, small_run(tmp_path)):  # the second takes the place of the first
        assert write_report([run], out) == out
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in out.parent.iterdir()) == ["report.html", "report.md"]
    with pytest.raises(UserError, match='unknown report format "pdf"'):
        write_report([evil_run], out, format="pdf")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be written"):
        write_report([evil_run], out / "below-a-file.html", format="md")


def test_importing_the_report_is_cheap() -> None:
    code = (
        "import sys, prefdistill.report; "
        "print([m for m in ('matplotlib', 'jinja2', 'torch', 'numpy', 'yaml', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
