"""Every user of the protocol for work done once: reuse, resume, rebuild or refuse with the difference, damage."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefdistill.core.errors import UserError
from prefdistill.core.options import Override
from prefdistill.core.stages import run_stage
from prefdistill.evaluation.judges import answers
from prefdistill.evaluation.judges.client import Endpoint, Reply
from prefdistill.evaluation.judges.mt_bench import PROMPTS, judge_mt_bench
from prefdistill.experiment.study.load import load_study
from prefdistill.experiment.study.run import SYNTHETIC_FILES, StudyRun
from prefdistill.sampling.engines import TransformersEngine
from prefdistill.sampling.files import sample_responses
from prefdistill.signals import extract_signals
from support.judges import answers as write_answers
from support.judges import jsonl

UNITS = 2  # of expensive work in each user


@dataclass
class Units:
    """Counts units of expensive work; the unit with the number `stop` is interrupted."""

    done: int = 0
    stop: int | None = None

    def __call__(self, *_: Any, **__: Any) -> None:
        if self.done == self.stop:
            raise KeyboardInterrupt
        self.done += 1


@dataclass
class User:
    """One user of the protocol.

    Args:
        run: does the work, with changed options.
        changed: an option, changed.
        difference: what the message says of it: path and both values.
        rebuilds: whether a changed request rebuilds; else it is refused.
        damage: damages finished work.
        damaged: what is said then.
        repairs: whether damaged work is rebuilt; else it is refused.
        reused: what is said of finished work.
    """

    units: Units
    run: Callable[..., Any]
    changed: dict[str, Any]
    difference: str
    damage: Callable[[], Any]
    damaged: str
    rebuilds: bool = False
    repairs: bool = False
    reused: str = ": reused"
    out: Path = field(default_factory=Path)


def counted(monkeypatch, units, owner, name):
    """Count the calls of a function."""
    function = getattr(owner, name)

    def count(*args, **kwargs):
        units()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)


def append(path, text="\n"):
    path.write_text(path.read_text() + text)


def stage(tmp_path, units, **_):
    out = tmp_path / "stage"

    def make(directory):
        for name in ("part-1", "model.safetensors"):
            if not (directory / name).exists():
                units()
                (directory / name).write_text("weights")

    return User(
        units,
        lambda alpha=0.1: run_stage("distill", out, {"methods": {"tvkd": {"alpha": alpha}}}, make, replace=True),
        {"alpha": 0.2},
        "methods.tvkd.alpha is 0.2, was 0.1",
        (out / "model.safetensors").unlink,
        "distill: rebuilding: model.safetensors is missing or damaged",
        rebuilds=True,
        repairs=True,
    )


def samples(tmp_path, units, monkeypatch, make_model, tokenizer, pairs, **_):
    out, model = tmp_path / "sampled.jsonl", make_model()
    counted(monkeypatch, units, model, "generate")
    options = {"column": "own", "max_new_tokens": 3, "shard_rows": 2}
    return User(
        units,
        lambda **changed: sample_responses(model, pairs.select(range(4)), tokenizer, out, **(options | changed)),
        {"temperature": 0.5},
        "temperature is 0.5, was 1.0",
        lambda: append(out),
        "sampled.jsonl is not as `prefdistill sample` wrote it; delete it or give another --out",
    )


def judge_answers(tmp_path, units, monkeypatch, make_model, tokenizer, **_):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question_id": n, "category": c, "turns": ["a"]} for n, c in enumerate(("math", "writing"))]
    questions, out = jsonl(tmp_path / "question.jsonl", rows), tmp_path / "answers.jsonl"
    counted(monkeypatch, units, TransformersEngine, "generate")
    return User(
        units,
        lambda seed=0: answers.answer_questions(str(tmp_path / "model"), questions, out, max_new_tokens=2, seed=seed),
        {"seed": 1},
        "seed is 1, was 0",
        lambda: append(out),
        "answers.jsonl is not as `prefdistill judge answers` wrote it; delete it or give another --out",
    )


def verdicts(tmp_path, units, monkeypatch, **_):
    def ask_all(endpoint, questions, record):
        for question in questions:
            units()
            record(question, Reply(reply="[[5]]", tokens_in=1, tokens_out=1))

    monkeypatch.setattr("prefdistill.evaluation.judges.ledger.ask_all", ask_all)
    prompts = [
        {"name": name, "prompt_template": " ".join(f"{{{field}}}" for field in fields)}
        for name, fields in PROMPTS.values()
    ]
    files = {
        "questions": jsonl(tmp_path / "q.jsonl", [{"question_id": 1, "category": "writing", "turns": ["a", "b"]}]),
        "prompts": jsonl(tmp_path / "prompts.jsonl", prompts),
        "references": write_answers(tmp_path / "reference.jsonl", {}),
        "answers": write_answers(tmp_path / "ours.jsonl", {1: ["c", "d"]}),
    }
    out = tmp_path / "judged"
    return User(
        units,
        lambda judge="a": judge_mt_bench(Endpoint("http://localhost:1/v1", judge), out, **files),
        {"judge": "b"},
        "judge.model is 'b', was 'a'",
        lambda: (out / "verdicts.jsonl").write_text("{\n" + (out / "verdicts.jsonl").read_text()),
        "verdicts.jsonl, line 1: damaged",
        rebuilds=True,
        reused="",
    )


def study_cells(tmp_path, units, monkeypatch, **_):
    path, out = tmp_path / "study.yaml", tmp_path / "study"
    text = {"name": "tiny", "question": "Small?", "methods": ["tvkd"], "grid": {"methods.tvkd.alpha": [0.1, 0.2]}}
    path.write_text(yaml.safe_dump({**text, "seeds": 1, "overrides": {"teacher.dpo.max_steps": 2}}))

    def run_recipe(recipe, work, **_):
        units()
        for name in SYNTHETIC_FILES:
            (work / f"seed-{recipe.seed}" / name).parent.mkdir(parents=True, exist_ok=True)
            (work / f"seed-{recipe.seed}" / name).touch()
        return {"shaping": {}, "warnings": [], "stages": []}

    monkeypatch.setattr("prefdistill.experiment.run.run_recipe", run_recipe)
    monkeypatch.setattr("prefdistill.report.study.write_study", lambda *_: None)
    monkeypatch.setattr(StudyRun, "summary", lambda *_: {})

    def run(steps=None):
        overrides = [] if steps is None else [Override("teacher.dpo.max_steps", steps)]
        study = StudyRun(load_study(path), path, out, out / "stages", overrides)
        study.check()
        assert study.run("command") == []

    return User(
        units,
        run,
        {"steps": 3},
        "recipe.teacher.dpo.max_steps is 3, was 2",
        lambda: (out / "cells" / "alpha=0.1-seed-1.json").write_text('{"key": "'),
        "alpha=0.1-seed-1.json is missing or damaged",
        rebuilds=True,
        repairs=True,
        reused="study tiny: 0 of 2 cells to run",
    )


def signals(tmp_path, units, monkeypatch, make_model, tokenizer, pairs, **_):
    import prefdistill.signals.artifact as module

    out, rows = tmp_path / "store", pairs.select(range(4))
    counted(monkeypatch, units, module, "write_shard")
    return User(
        units,
        lambda **changed: extract_signals(make_model(), rows, tokenizer, out=out, shard_rows=2, **changed),
        {"value_temperature": 2.0},
        "value_temperature is 2.0, was 1.0",
        lambda: (out / "shards" / "00001.parquet").write_bytes(b"damaged"),
        "00001.parquet is damaged (its checksum differs); `prefdistill signals --repair",
    )


USERS = [stage, samples, judge_answers, verdicts, study_cells, signals]


@pytest.fixture(params=USERS, ids=lambda user: user.__name__)
def user(request, tmp_path, monkeypatch, make_model, tokenizer, pairs):
    return request.param(
        tmp_path, Units(), monkeypatch=monkeypatch, make_model=make_model, tokenizer=tokenizer, pairs=pairs
    )


def files(directory):
    """The files of a directory, without those of locks."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in paths}


def test_finished_work_is_reused(user, capsys):
    user.run()
    assert user.units.done == UNITS
    capsys.readouterr()
    user.run()
    assert user.units.done == UNITS
    assert user.reused in capsys.readouterr().err


def test_interrupted_work_is_resumed(user, capsys):
    user.units.stop = 1
    with pytest.raises(KeyboardInterrupt):
        user.run()
    user.units.stop = None
    user.run()
    assert user.units.done == UNITS  # the first unit was not done again
    user.run()
    assert user.units.done == UNITS


def test_a_changed_request_is_rebuilt_or_refused_with_path_and_both_values(user, tmp_path, capsys):
    user.run()
    before = files(tmp_path)
    capsys.readouterr()
    if user.rebuilds:
        user.run(**user.changed)
        said = capsys.readouterr().err
        assert user.units.done == 2 * UNITS
        assert f": rebuilding: its inputs changed ({user.difference})" in said
    else:
        message = f"holds work of another request ({user.difference}); delete it or give another --out"
        with pytest.raises(UserError, match=re.escape(message)):
            user.run(**user.changed)
        assert user.units.done == UNITS
        assert files(tmp_path) == before


def test_a_changed_request_does_not_resume_unfinished_work(user, tmp_path):
    user.units.stop = 1
    with pytest.raises(KeyboardInterrupt):
        user.run()
    user.units.stop = None
    if user.rebuilds:
        user.run(**user.changed)
        assert user.units.done == 1 + UNITS
    else:
        with pytest.raises(UserError, match=re.escape(f"another request ({user.difference})")):
            user.run(**user.changed)
        user.run()
        assert user.units.done == UNITS


def test_damage_is_found(user, capsys):
    user.run()
    user.damage()
    capsys.readouterr()
    if user.repairs:
        user.run()
        assert user.damaged in capsys.readouterr().err
        assert user.units.done > UNITS
        user.run()
    else:
        with pytest.raises(UserError, match=re.escape(user.damaged)):
            user.run()
        assert user.units.done == UNITS


def test_the_records_of_earlier_versions_are_read(tmp_path, monkeypatch):
    """A cell without its request, which then had only its key."""
    units = Units()
    cells = study_cells(tmp_path, units, monkeypatch)
    cells.run()
    for path in (tmp_path / "study" / "cells").iterdir():
        record = json.loads(path.read_text())
        del record["request"]
        path.write_text(json.dumps(record))
    cells.run()
    assert units.done == UNITS
