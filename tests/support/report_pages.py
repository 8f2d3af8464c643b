"""Fixtures: run directories and their pages, rendered once for all tests of the report."""

import json
from pathlib import Path

import pytest

from support.runs import EVIL, INF, NAN, distill_stage, log, make_results, write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "quick")


@pytest.fixture(scope="session")
def page(run: Path) -> str:
    from prefdistill.report import render_html

    return render_html([run])


@pytest.fixture(scope="session")
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
    results["roles"] = results["roles"] | {EVIL: {"kind": "method", "of": None}}
    results["stages"].append({"name": EVIL, "seconds": 4000, "reused": True, "directory": EVIL})
    results["stages"].append({"name": EVIL, "read": {"data": EVIL, "rows": NAN, "dropped": {EVIL: EVIL}, "ids": EVIL}})
    results["read"] = {
        "data": [{"name": EVIL, "source": EVIL, "rows": INF, "unread": [EVIL]}],
        "template": {"tokenizer": EVIL, "sha256": EVIL, "start": EVIL * 40},
    }
    results["stages"].append(distill_stage("tvkd", 7, seed=0, directory="seed-0/distill-tvkd-7"))
    path = write_run(tmp_path_factory.mktemp("runs") / "evil", results, steps=20, names=("dpo", "tvkd"))
    log(path, 0, "distill-tvkd-7", [{"step": 5, "loss": NAN}])
    (path / "recipe.yaml").write_text(EVIL)
    (path / "environment.json").write_text(json.dumps({EVIL: {EVIL: [EVIL]}}))
    return path


@pytest.fixture(scope="session")
def evil_page(evil_run: Path) -> str:
    from prefdistill.report import render_html

    return render_html([evil_run])
