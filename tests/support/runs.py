"""Run directories and results as the pipeline writes them, and a checker of HTML pages, for tests of the report."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

NAN, INF = float("nan"), float("inf")
EVIL = "<script>alert(1)</script></style></pre></title><img src=https://evil.example/x onerror=alert(1)>"

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
ROLES: dict[str, Any] = {
    "teacher": {"kind": "teacher", "of": None},
    "start": {"kind": "start", "of": None},
    "sft-chosen": {"kind": "method", "of": None},
    "dpo": {"kind": "baseline", "of": None},
    "tvkd": {"kind": "method", "of": None},
    "tvkd-shuffled": {"kind": "placebo", "of": "tvkd"},
    "oracle-margin": {"kind": "bound", "of": "tvkd"},
    "dpo-other-order": {"kind": "noise_floor", "of": "dpo"},
}
REWARD = {
    "teacher": (3.41, None), "start": (1.62, None), "sft-chosen": (2.14, -0.889), "dpo": (3.03, None),
    "tvkd": (3.069, 0.039), "tvkd-shuffled": (2.981, -0.049), "oracle-margin": (3.068, 0.038),
    "dpo-other-order": (3.041, 0.011),
}  # fmt: skip


TRAINED = ("sft-chosen", "dpo", "tvkd", "tvkd-shuffled", "oracle-margin", "dpo-other-order")
EARLY = [
    ("data", 0.4, "data"), ("teacher-sft", 31.2, "sft"), ("teacher-dpo", 24.8, "dpo"), ("student-sft", 11.1, "sft"),
    ("signals-values", 3.9, "signals"),
]  # fmt: skip


def distill_stage(name: str, order: int = 0, **more: Any) -> dict[str, Any]:
    """Return the stage that trains a method, as results.json lists it."""
    stage = {"name": f"distill-{name}-{order}", "seconds": 6.5 + 0.3 * order, "kind": "distill", "method": name}
    return stage | {"order": order, "round": 1} | more


READ = {
    "data": "train", "responses": ["chosen", "rejected"], "rows": 1200, "kept": 1190,
    "dropped": {"the prompt leaves no room": 9, "chosen and rejected are equal": 1}, "truncated_prompts": 0,
    "truncated_responses": 31, "ids": "7d6db3152625",
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
        "roles": ROLES,
        "headline": {"metric": "reward_t1", "method": "tvkd"},
        "display_names": {"dpo": "DPO", "tvkd": "TVKD", "sft-chosen": "sft-chosen"},
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
            "shaping return (last)": {"mean": 0.657, "se": 0.012, "n": 3, "shaping": True},
            "shaping return (bootstrap)": {"mean": 0.640, "se": 0.012, "n": 3},
            "shorter is better": {"mean": 0.603, "se": 0.010, "n": 3},
            "V of the prompt": {"mean": 0.5, "se": 0.0, "n": 3},
        },
        "shaping": {"tvkd": cloud(0.35), "tvkd-shuffled": cloud(0.0), "oracle-margin": cloud(0.8)},
        "reward_model": {
            "name": "reward-model", "pairs": 625,
            "accuracy": {"mean": 0.71, "se": 0.03, "n": 87, "over": "test prompts", "low": 0.652, "high": 0.769},
            "longer_is_better": {"mean": 0.604, "se": 0.03, "n": 87, "over": "test prompts", "low": 0.55, "high": 0.66},
        },
        "responses": {
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
        "read": {
            "data": [{"name": "train", "source": "pairs.jsonl", "rows": 1200, "unread": ["source", "margin"]}],
            "template": {"tokenizer": "my/student", "sha256": "0123456789abcdef", "start": "{% for m in messages %}"},
            "max_length": 2048, "max_prompt_length": None,
        },
        "stages": [
            {
                **stage, "read": READ if stage["kind"] in ("dpo", "distill") else {},
                "reused": seed == 0 and stage["kind"] in ("sft", "dpo"), "seed": seed,
                "directory": f"seed-{seed}/{stage['name']}", "peak_memory": 900 * 2**20,
                "bytes": 1_500_000 * stage["seconds"],
            }
            for seed in range(seeds)
            for stage in [
                *({"name": name, "seconds": seconds, "kind": kind} for name, seconds, kind in EARLY),
                *(distill_stage(name, order) for name in TRAINED for order in range(orders)),
                {"name": "evaluate-all", "seconds": 4.4, "kind": "evaluate"},
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
    for seed in results.get("seeds", [0]):
        for stage, start in (("teacher-sft", 3.4), ("teacher-dpo", 0.69), ("student-sft", 3.5)):
            losses = {s: start * math.exp(-s / 90) + rng.random() * 0.1 for s in range(10, steps, 10)}
            log(path, seed, stage, [{"step": s, "loss": loss} for s, loss in losses.items()])
        for i, name in enumerate(names or TRAINED):
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


def small(
    differences: dict[str, Any],
    *,
    controls: dict[str, tuple[str, str]] | None = None,
    headline: str | None = None,
    higher: bool | None = True,
    over: str = "seeds",
    seeds: int = 10,
    **more: Any,
) -> dict[str, Any]:
    """Return results with one metric "r" and the baseline "dpo".

    Args:
        differences: (mean, se, n) of each run, or None where nothing was paired.
        controls: (kind, of) of the runs that are no methods.
    """
    names = ["dpo", *differences]
    declared = {"dpo": ("baseline", None)} | (controls or {})
    roles = {name: dict(zip(("kind", "of"), declared.get(name, ("method", None)), strict=True)) for name in names}
    table = {
        name: {"r": {"mean": d[0], "se": d[1], "n": d[2], "over": over}}
        for name, d in differences.items()
        if d is not None
    }
    shown = {"dpo": "DPO", "tvkd": "TVKD", "dckd": "DCKD", "adpa": "ADPA", "seqkd": "SeqKD", "sft": "SFT"}
    results = {
        "seeds": list(range(seeds)), "methods": {name: {"r": 1.0} for name in names}, "differences": table,
        "roles": roles, "headline": {"metric": "r", "method": headline}, "display_names": shown,
        "metrics": {"r": {"label": "reward", "higher_is_better": higher, "format": ".3f"}},
    }  # fmt: skip
    return {**results, **more}


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
