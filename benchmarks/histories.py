"""Change inputs between calls, interrupt calls, move the directory; compare its results with those of a new directory.

    python -m benchmarks.histories --calls 200
    python -m benchmarks.histories --calls 50 --seed 7 --verb study

Before each call of `run` or `study` one or two random changes are made: an option of the recipe or the study, its
methods, seeds, orders or cells, rows or order of a data file, weights or tokens of a model under its name (and with
its timestamps), the path or timestamps of a model or of the directory. Half of the calls are interrupted before a
random change to the directory. After each call that finishes, the same command runs in a new directory, and both
`results.json` must be equal, except times and sizes; so must the curves of a run's report, or the table of a study.
"""

import argparse
import copy
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.attempts import Fault, Job, attempt
from benchmarks.faults import SHAPE, WORDS, command, make_place, results
from prefdistill.core.differences import compare, listed

Files = dict[str, dict[str, Any]]  # recipe and study, by the name of the file

MOMENTS = 400  # changes to the directory; a fault comes before one of them, uniform
RECIPE: dict[str, Any] = {
    "name": "history",
    "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 48},
    "model": {"teacher": "teacher", "student": "model", "teacher_reference": "reference"},
    "sampling": {"max_new_tokens": 4},
    "training": {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1},
    "methods": {"dpo": {}, "tvkd": {}},
    "evaluate": {"prompts": 4, "max_new_tokens": 4, "samples": 1},
}
STUDY: dict[str, Any] = {
    "name": "history",
    "question": "Do results depend on the history of the directory?",
    "recipe": "recipe.yaml",
    "methods": ["tvkd"],
    "metric": "reward_accuracy",
    "cells": {"as it is": {}, "short": {"data.max_train": 7}},
    "seeds": 1,
}
JUDGE = {"share": 0.3, "model": SHAPE | {"max_position_embeddings": 64}, "training": {"max_steps": 1}}
# Values of each option; None removes it.
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "recipe.yaml": {
        "methods.dpo.beta": [0.1, 0.3],
        "methods.tvkd.alpha": [0.7, -0.7],
        "methods.dckd": [None, {}],
        "methods.seqkd": [None, {}],
        "methods.vanillakd": [None, {"training": {"max_steps": 1}}],
        "methods.wpo": [None, {}],
        "methods.distillm2": [None, {"rounds": 2}],
        "methods.second": [None, {"method": "tvkd", "start": "dpo"}, {"method": "dpo", "start": "tvkd"}],
        "seeds": [1, 2],
        "orders": [1, 2],
        "training.max_steps": [2, 3],
        "training.learning_rate": [0.01, 0.02],
        "training.bf16": [False, True],
        "training.lora": [None, {"r": 2}],
        "teacher.sft": [None, {"max_steps": 1}],
        "teacher.dpo": [None, {"max_steps": 1}],
        "student.sft": [None, {"max_steps": 1}],
        "signals.k": [5, 50],
        "signals.positions": ["all", "endpoints"],
        "sampling.temperature": [1.0, 0.7],
        "data.max_length": [24, 48],
        "data.max_train": [None, 9],
        "evaluate.prompts": [3, 4],
        "reward_model": [None, JUDGE],
    },
    "study.yaml": {
        "seeds": [1, 2],
        "seed": [1, 2],
        "metric": ["reward_accuracy", "chosen_logp"],
        "overrides": [None, {"training.max_steps": 3}, {"methods.dpo.beta": 0.2}],
        "cells": [STUDY["cells"], {"judged": {"reward_model": JUDGE}, "as it is": {}}, {"as it is": {"orders": 2}}],
        "grid": [None, {"methods.tvkd.alpha": [0.7, -0.7]}, {"methods.tvkd.alpha": [0.3, 0.7]}],
    },
}


@dataclass
class Tally:
    calls: Counter[int] = field(default_factory=Counter)  # by exit status
    changes: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    differing: list[str] = field(default_factory=list)


def write_rows(path: Path, seed: int, count: int) -> None:
    from prefdistill.core.files import write_jsonl

    draw = random.Random(seed)
    lengths = {"prompt": 5, "chosen": 8, "rejected": 4}
    rows = [
        {name: " ".join(draw.choices(WORDS, k=draw.randint(1, most))) for name, most in lengths.items()}
        for _ in range(count)
    ]
    write_jsonl(path, rows)


def change_option(files: Files, place: Path, draw: random.Random) -> str:
    file = draw.choice(list(files))
    key = draw.choice(list(OPTIONS[file]))
    value = copy.deepcopy(draw.choice(OPTIONS[file][key]))
    *sections, last = key.split(".")
    section = files[file]
    for name in sections:
        section = section.setdefault(name, {})
    if value is None:
        section.pop(last, None)
    else:
        section[last] = value
    return f"{file.removesuffix('.yaml')}: {key}"


def change_rows(files: Files, place: Path, draw: random.Random) -> str:
    name, count = draw.choice([("train.jsonl", 14), ("test.jsonl", 8)])
    write_rows(place / name, draw.randrange(3), count)
    return name


def change_order(files: Files, place: Path, draw: random.Random) -> str:
    lines = (place / "train.jsonl").read_text().splitlines(keepends=True)
    draw.shuffle(lines)
    (place / "train.jsonl").write_text("".join(lines))
    return "order of the rows"


def change_weights(files: Files, place: Path, draw: random.Random) -> str:
    """Write other weights of the same size; half of the time with the old timestamps, as a copy may have."""
    from prefdistill.models.load import load_tokenizer
    from prefdistill.models.scratch import random_model

    role = draw.choice(list(files["recipe.yaml"]["model"]))
    at = place / files["recipe.yaml"]["model"][role]
    before = {path: path.stat() for path in at.iterdir()}
    random_model(load_tokenizer(str(at)), SHAPE, draw.randrange(3)).save_pretrained(at)
    if draw.random() < 0.5:
        for path, state in before.items():
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    return f"weights of the {role}"


def change_tokens(files: Files, place: Path, draw: random.Random) -> str:
    """Exchange the ids of two words, in both models, which must have the same vocabulary."""
    one, other = (f'"\u0120{word}"' for word in draw.sample(["small", "teacher", "reads", "prompt"], 2))
    for name in files["recipe.yaml"]["model"].values():
        file = place / name / "tokenizer.json"
        vocabulary = file.read_text(encoding="utf-8")
        for old, new in ((f"{one}:", "\0"), (f"{other}:", f"{one}:"), ("\0", f"{other}:")):
            vocabulary = vocabulary.replace(old, new)
        file.write_text(vocabulary, encoding="utf-8")
    return "tokens"


def change_template(files: Files, place: Path, draw: random.Random) -> str:
    """Put another word before every conversation."""
    start, word = "{{ bos_token }}", draw.choice(WORDS)
    for name in files["recipe.yaml"]["model"].values():
        file = place / name / "chat_template.jinja"
        rest = re.sub(rf"^{re.escape(start)}(\w+ )?", "", file.read_text(encoding="utf-8"))
        file.write_text(f"{start}{word} {rest}", encoding="utf-8")
    return "chat template"


def move_model(files: Files, place: Path, draw: random.Random) -> str:
    role = draw.choice(list(files["recipe.yaml"]["model"]))
    before = files["recipe.yaml"]["model"][role]
    after = before.removesuffix("-moved") if before.endswith("-moved") else f"{before}-moved"
    (place / before).rename(place / after)
    files["recipe.yaml"]["model"][role] = after
    return f"path of the {role}"


def move(files: Files, place: Path, draw: random.Random) -> str:
    """Move the directory away and back: by a rename, or as a copy, with or without the timestamps of its files."""
    out, away = place / "out", place / "away"
    if not out.exists():
        return "nothing"
    out.rename(away)
    copied = draw.choice([None, shutil.copy, shutil.copy2])
    if copied is None:
        away.rename(out)
    else:
        shutil.copytree(away, out, copy_function=copied)
        shutil.rmtree(away)
    return "path of the directory"


def touch(files: Files, place: Path, draw: random.Random) -> str:
    for path in (place / draw.choice([*files["recipe.yaml"]["model"].values()])).iterdir():
        os.utime(path)
    return "timestamps of a model"


CHANGES: list[Callable[[Files, Path, random.Random], str]] = [
    *[change_option] * 7,
    change_rows,
    change_order,
    change_weights,
    change_tokens,
    change_template,
    move_model,
    move,
    touch,
]


def live(place: Path, calls: int, seed: int, verb: str = "run") -> Tally:
    """Make calls of `run` or `study` in a directory that `make_place` has filled."""
    tally, draw = Tally(), random.Random(seed)
    files = {"recipe.yaml": copy.deepcopy(RECIPE)}
    if verb == "study":
        files["study.yaml"] = copy.deepcopy(STUDY)
    write_rows(place / "train.jsonl", 0, 14)
    write_rows(place / "test.jsonl", 1, 8)
    shutil.copytree(place / "model", place / "reference")
    job = JOBS[verb]
    since: list[str] = []
    for _ in range(calls):
        before = copy.deepcopy(files)
        now = [draw.choice(CHANGES)(files, place, draw) for _ in range(draw.randint(1, 2))]
        for name, content in files.items():
            (place / name).write_text(json.dumps(content))
        fault = Fault(draw.choice([signal.SIGKILL, signal.SIGINT]), change=draw.randint(1, MOMENTS))
        tried = attempt(job, place, fault if draw.random() < 0.5 else None, timeout=600)
        tally.calls[tried.status] += 1
        if tried.status == 2:  # two options that conflict
            before["recipe.yaml"]["model"] = files["recipe.yaml"]["model"]  # which may have been moved
            files, now = before, [change for change in now if ": " not in change]
        since += now
        if tried.status == 1:
            tally.differing.append(f"status 1 after {since}: {tried.said[-500:]}")
        elif tried.status == 0:
            (place / "out").rename(place / "old")
            if attempt(job, place, timeout=600).status == 0:
                new, old = (job.result(place / name) for name in ("out", "old"))
                changes = [str(change) for change in compare(new, old, ignored=())]
                tally.differing += [f"after {since}: {listed(changes)}"] if changes else []
            else:
                tally.differing.append(f"after {since}: a new directory does not finish")
            tally.compared += 1
            tally.changes.update(since)
            since = []
            shutil.rmtree(place / "out")
            (place / "old").rename(place / "out")
    return tally


def _run(out: Path) -> Any:
    from prefdistill.report.load import load_run

    found = results(out)
    del found["stages"]  # which were reused
    run = load_run(out)
    return found | {name: run[name] for name in ("curves", "early", "problems")}


def _study(out: Path) -> Any:
    return results(out) | {"table": (out / "table.md").read_text(), "drawn": (out / "plot.svg").exists()}


JOBS = {
    "run": Job(command("run", "recipe.yaml", "--out", "out"), _run),
    "study": Job(command("study", "study.yaml", "--out", "out"), _study),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", choices=sorted(JOBS), default="run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        tally = live(make_place(Path(made).resolve()), args.calls, args.seed, args.verb)
    ended = ", ".join(f"{count} with status {status}" for status, count in sorted(tally.calls.items()))
    print(f"{args.calls} calls: {ended}; {sum(tally.changes.values())} changes before the calls that finished")
    print("  " + ", ".join(f"{name} {count}" for name, count in sorted(tally.changes.items())))
    print(f"{tally.compared} results compared, {len(tally.differing)} differ")
    for reason in tally.differing:
        print(f"  {reason}")
    sys.exit(1 if tally.differing else 0)


if __name__ == "__main__":
    main()
