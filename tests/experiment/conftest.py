"""Finished runs and named models, shared by the tests of runs."""

import json
import os
import shutil

import pytest

from prefdistill.data.load import load_pairs
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from support.tiny_runs import QUICKSTART, TINY


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_flushed():
    """A tiny run flushes 1,200 files and directories, and waits for the disk each time; what is read back is the same.

    Tests of tests/core and tests/training look at what is flushed, and when.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A tiny quickstart that has run once."""
    out = tmp_path_factory.mktemp("quickstart")
    return out, run_recipe(load_recipe(QUICKSTART, TINY), out)


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run", dirs_exist_ok=True)
    return tmp_path / "run"


@pytest.fixture(scope="session")
def named(finished, tmp_path_factory):
    """Models by name, as a user has them, and pairs with what else real data hold: a date, responses of another run."""
    from datetime import datetime

    from datasets import Dataset

    root = finished[0] / "seed-0"
    place = tmp_path_factory.mktemp("named")
    pairs = load_pairs(str(root / "pairs" / "train.jsonl"))
    rows = [{**row, "when": datetime(2020, 1, 1), "student_response": row["chosen"]} for row in pairs]
    Dataset.from_list(rows).to_parquet(str(place / "pairs.parquet"))
    for name in ("teacher-dpo", "teacher-sft", "student-sft"):
        shutil.copytree(root / name, place / name)
    recipe = {
        "name": "named",
        "data": {"train": str(place / "pairs.parquet"), "test": str(place / "pairs.parquet"), "max_length": 48},
        "model": {
            "teacher": str(place / "teacher-dpo"),
            "teacher_reference": str(place / "teacher-sft"),
            "student": str(place / "student-sft"),
        },
        "sampling": {"max_new_tokens": 8},
        "training": {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8},
        "methods": {"dpo": {}, "adpa": {}},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return place


@pytest.fixture
def mine(named, tmp_path):
    """Copies of the named models and a recipe of short work with them."""
    place = shutil.copytree(named, tmp_path / "mine")
    text = (named / "recipe.yaml").read_text().replace(str(named), str(place))
    recipe = {**json.loads(text), "methods": {"dpo": {}, "tvkd": {}}}
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return place
