"""Change what a run is made from between its calls, cut it off, move it; compare its results with a new directory's.

    python -m benchmarks.histories --calls 200
    python -m benchmarks.histories --calls 50 --seed 7

Before each call one or two things are drawn and changed: an option of the recipe, its methods, seeds or orders, rows or
order of a data file, the weights of a model under the same name, the place or the times of the directory; and half of
the calls are cut off before a random change to the directory. After each call that came to its end, the same recipe is
run in a new directory, and all of both `results.json` but times and sizes must be equal.
"""

import argparse
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.attempts import Fault, Job, attempt
from benchmarks.faults import SHAPE, WORDS, command, make_place, results

MOMENTS = 400  # changes to the directory, of which one is drawn for a fault
RECIPE = {
    "name": "history",
    "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 48},
    "model": {"teacher": "teacher", "student": "model"},
    "sampling": {"max_new_tokens": 4},
    "training": {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.01},
    "methods": {"dpo": {}, "tvkd": {}},
    "evaluate": {"prompts": 4, "max_new_tokens": 4, "samples": 1},
}
JUDGE = {"share": 0.3, "model": SHAPE | {"max_position_embeddings": 64}, "training": {"max_steps": 1}}
# What an option of the recipe is drawn from; None takes it out.
OPTIONS: dict[str, list[Any]] = {
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
}


@dataclass
class Tally:
    calls: Counter[int] = field(default_factory=Counter)  # by exit status
    changes: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    differing: list[str] = field(default_factory=list)


def write_rows(path: Path, seed: int, count: int) -> None:
    from prefdistill.files import write_jsonl

    draw = random.Random(seed)
    lengths = {"prompt": 5, "chosen": 8, "rejected": 4}
    rows = [
        {name: " ".join(draw.choices(WORDS, k=draw.randint(1, most))) for name, most in lengths.items()}
        for _ in range(count)
    ]
    write_jsonl(path, rows)


def change_option(recipe: dict[str, Any], place: Path, draw: random.Random) -> str:
    key = draw.choice(list(OPTIONS))
    value = copy.deepcopy(draw.choice(OPTIONS[key]))
    *sections, last = key.split(".")
    section = recipe
    for name in sections:
        section = section.setdefault(name, {})
    if value is None:
        section.pop(last, None)
    else:
        section[last] = value
    return key


def change_rows(recipe: dict[str, Any], place: Path, draw: random.Random) -> str:
    name, count = draw.choice([("train.jsonl", 14), ("test.jsonl", 8)])
    write_rows(place / name, draw.randrange(3), count)
    return name


def change_order(recipe: dict[str, Any], place: Path, draw: random.Random) -> str:
    lines = (place / "train.jsonl").read_text().splitlines(keepends=True)
    draw.shuffle(lines)
    (place / "train.jsonl").write_text("".join(lines))
    return "order of the rows"


def change_weights(recipe: dict[str, Any], place: Path, draw: random.Random) -> str:
    from prefdistill.models import load_tokenizer, random_model

    name = draw.choice(["model", "teacher"])
    random_model(load_tokenizer(str(place / name)), SHAPE, draw.randrange(3)).save_pretrained(place / name)
    return f"weights of the {'student' if name == 'model' else name}"


def move(recipe: dict[str, Any], place: Path, draw: random.Random) -> str:
    """The directory elsewhere and back: by a rename, or as a copy, with the times of its files or without."""
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
    return "place of the directory"


def touch(recipe: dict[str, Any], place: Path, draw: random.Random) -> str:
    for path in (place / draw.choice(["model", "teacher"])).iterdir():
        os.utime(path)
    return "times of a model's files"


CHANGES: list[Callable[[dict[str, Any], Path, random.Random], str]] = [
    *[change_option] * 6,
    change_rows,
    change_order,
    change_weights,
    move,
    touch,
]


def live(place: Path, calls: int, seed: int) -> Tally:
    """So many calls of `prefdistill run`, in a directory that `make_place` has filled."""
    tally, draw, recipe = Tally(), random.Random(seed), copy.deepcopy(RECIPE)
    write_rows(place / "train.jsonl", 0, 14)
    write_rows(place / "test.jsonl", 1, 8)
    job = Job(command("run", "recipe.yaml", "--out", "out"), _results)
    since: list[str] = []
    for _ in range(calls):
        before = copy.deepcopy(recipe)
        since += [draw.choice(CHANGES)(recipe, place, draw) for _ in range(draw.randint(1, 2))]
        (place / "recipe.yaml").write_text(json.dumps(recipe))
        fault = Fault(draw.choice([signal.SIGKILL, signal.SIGINT]), change=draw.randint(1, MOMENTS))
        tried = attempt(job, place, fault if draw.random() < 0.5 else None, timeout=600)
        tally.calls[tried.status] += 1
        if tried.status == 2:  # two options that do not go together
            recipe = before
        elif tried.status == 1:
            tally.differing.append(f"status 1 after {since}: {tried.said[-500:]}")
        elif tried.status == 0:
            (place / "out").rename(place / "old")
            if attempt(job, place, timeout=600).status == 0:
                told = [*_differences(job.result(place / "old"), job.result(place / "out"))]
                tally.differing += [f"after {since}: {'; '.join(told[:5])}"] if told else []
            else:
                tally.differing.append(f"after {since}: a new directory does not come to its end")
            tally.compared += 1
            tally.changes.update(since)
            since = []
            shutil.rmtree(place / "out")
            (place / "old").rename(place / "out")
    return tally


def _results(out: Path) -> Any:
    found = results(out)
    del found["stages"]  # which of them were made, and which were there
    return found


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, both in enumerate(zip(old, new, strict=True)):
            yield from _differences(*both, f"{where}[{index}]")
    elif old != new:
        yield f"{where[1:]} is {old!r:.60} instead of {new!r:.60}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        tally = live(make_place(Path(made).resolve()), args.calls, args.seed)
    ended = ", ".join(f"{count} with status {status}" for status, count in sorted(tally.calls.items()))
    print(f"{args.calls} calls: {ended}; {sum(tally.changes.values())} changes before those that came to their end")
    print("  " + ", ".join(f"{name} {count}" for name, count in sorted(tally.changes.items())))
    print(f"{tally.compared} results compared, {len(tally.differing)} differ")
    for reason in tally.differing:
        print(f"  {reason}")
    sys.exit(1 if tally.differing else 0)


if __name__ == "__main__":
    main()
