"""Kill every stage at random moments, resume it, and compare the result with that of an undisturbed run.

    python -m benchmarks.faults --kills 200
    python -m benchmarks.faults --kills 40 --stages run,distill --seed 7
    python -m benchmarks.faults --kills 40 --ranks 2
    python -m benchmarks.faults --kills 40 --disk

A moment is a change that a run makes to its directory (a file opened for writing, renamed or removed, a directory
created: the process ends just before the n-th change, n uniform), or a point in time, which also covers writes outside
Python and computation. The fault is SIGKILL, Ctrl-C, or a disk that is full from that change on. After each fault the
same command runs again, and may fail again; when it finishes, its result is compared with that of an undisturbed run,
and the directory is removed, until all faults are used.

With `--ranks` the job runs on several processes as under torchrun; SIGKILL or the full disk hits one of them, uniform.
With `--disk` the directory is a file system of its own (needs the right to mount one), and every fault is that it fills
up, at a size between what is in it and the peak of an undisturbed run.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import quiet
from benchmarks.attempts import PAGE, Attempt, Disk, Fault, Job, attempt
from prefdistill import cli

quiet(OMP_NUM_THREADS="1")  # before torch is imported

WORDS = ["the", "small", "teacher", "reads", "a", "prompt", "and", "answers", "with", "care", "what", "it", "says"]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FEW = ["max_steps=4", "batch_size=4", "micro_batch_size=2", "save_steps=2", "logging_steps=1"]
TINY = [
    "data.synthetic={demonstrations: 32, teacher_pairs: 24, pairs: 16, test_prompts: 8}",
    "teacher.sft.max_steps=12",
    "teacher.dpo.max_steps=2",
    "student.sft.max_steps=12",
    "teacher.sft.save_steps=6",
    "training.max_steps=2",
    "model.scratch.teacher={hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "model.scratch.student={hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "orders=1",
]
IMPORTED_LATE = (
    *("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "rouge_score.rouge_scorer", "scipy.stats", "scipy.ndimage"),
    *("matplotlib.pyplot", "prefdistill.experiment.run", "prefdistill.report.figures"),
)
PASSING = (".tmp", ".lock")
CLOCKS = ("seconds", "tokens_per_second", "peak_memory", "bytes", "reused")  # differ between any two runs


# -- the work ----------------------------------------------------------------------------------------------------------


def make_place(place: Path) -> Path:
    """Fill a directory with a tiny model, a teacher, pairs and signals of both."""
    from prefdistill.core.files import write_jsonl
    from prefdistill.models.scratch import random_model, train_tokenizer
    from prefdistill.signals import extract_signals

    def sentence(n: int, start: int) -> str:
        return " ".join(WORDS[(start * 7 + 3 * i) % len(WORDS)] for i in range(n))

    place.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([sentence(20, k) for k in range(50)], vocab_size=320)
    for seed, name in enumerate(("model", "teacher")):
        random_model(tokenizer, SHAPE, seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    rows = [
        {"prompt": sentence(2 + i % 5, i), "chosen": sentence(1 + i % 9, i + 1), "rejected": sentence(1 + i % 4, i + 2)}
        for i in range(12)
    ]
    write_jsonl(place / "pairs.jsonl", rows)
    for module in IMPORTED_LATE:  # once, instead of in every fork
        import_module(module)
    pairs = str(place / "pairs.jsonl")
    extract_signals(str(place / "teacher"), pairs, out=place / "signals-teacher")
    extract_signals(str(place / "model"), pairs, kinds=("logps",), out=place / "signals-start", role="reference")
    return place


def make_store(place: Path) -> Path:
    """Add a store of two shards with every kind of signal."""
    from prefdistill.signals import extract_signals

    make_place(place)
    kinds = ("values", "logps", "q", "topk")
    extract_signals(
        str(place / "teacher"), str(place / "pairs.jsonl"), kinds=kinds, out=place / "store", k=3, shard_rows=6
    )
    return place / "store"


def command(*arguments: str) -> Callable[[], int]:
    return lambda: cli.main(list(arguments))


def in_small_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does its work in several parts of few rows, whatever the verb asks for."""
    return lambda *arguments, **options: function(*arguments, **options | {"shard_rows": 2})


def _signals() -> int:
    import prefdistill.signals

    prefdistill.signals.extract_signals = in_small_parts(prefdistill.signals.extract_signals)
    kinds = ("--kind", "values,logps,topk", "--k", "3")
    return cli.main(["signals", "--model", "teacher", *PAIRS, *kinds, "--out", "out"])


def _sample() -> int:
    import prefdistill.sampling.files

    prefdistill.sampling.files.sample_responses = in_small_parts(prefdistill.sampling.files.sample_responses)
    few = ("--max-new-tokens", "4", "--batch-size", "2")
    return cli.main(["sample", "--model", "model", *PAIRS, *few, "--out", "out/rows.jsonl"])


def all_bytes(out: Path) -> Any:
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and not path.name.endswith(PASSING)]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def weights(out: Path) -> Any:
    return (out / "model.safetensors").read_bytes()


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(part) for key, part in value.items() if key not in CLOCKS}
    return [without_clocks(part) for part in value] if isinstance(value, list) else value


def rows_and_meta(out: Path) -> Any:
    meta = json.loads((out / "rows.jsonl.meta.json").read_text())
    return (out / "rows.jsonl").read_bytes(), without_clocks(meta)


def results(out: Path) -> Any:
    return without_clocks(json.loads((out / "results.json").read_text()))


RECIPE = Path(__file__).parents[1] / "src" / "prefdistill" / "experiment" / "recipes" / "quickstart.yaml"
PAIRS = ("--data", "pairs.jsonl")
STORES = ("--signals", "signals-teacher", "--signals", "signals-start")
FROM = (*PAIRS, *STORES)
TESTED = ("--reference", "signals-start", "--teacher", "signals-teacher")
GENERATED = ("--generate", "--max-new-tokens", "4")
JOBS = {
    "signals": Job(_signals, all_bytes, "manifest.json"),
    "sample": Job(_sample, rows_and_meta, "rows.jsonl"),
    "sft": Job(command("sft", "--model", "model", *PAIRS, "--out", "out", *FEW), weights, "stage.json"),
    "dpo": Job(command("dpo", "--model", "model", *PAIRS, "--out", "out", *FEW), weights, "stage.json"),
    "distill": Job(
        command("distill", "--student", "model", *PAIRS, *STORES, "--out", "out", *FEW), weights, "stage.json"
    ),
    "evaluate": Job(
        command("evaluate", "--model", "teacher", *PAIRS, *TESTED, *GENERATED, "--out", "out/results.json"),
        results,
        "results.json",
    ),
    "run": Job(command("run", str(RECIPE), "--out", "out", "--methods", "tvkd", *TINY), results, "results.json"),
}
ON_SEVERAL = ("signals", "sft", "dpo", "distill")  # processes; the others refuse them


# -- the faults --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Results of the faults of one stage."""

    injected: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    lost: list[str] = field(default_factory=list)
    changes: int = 0
    seconds: float = 0.0


def disturb(
    job: Job,
    place: Path,
    kills: int,
    seed: int,
    *,
    ranks: int = 1,
    disk: Disk | None = None,
    alone: bool = False,
    timeout: float = 120,
) -> Tally:
    """Inject faults into a job, and compare every result with that of an undisturbed run.

    Args:
        ranks: processes of the job; a fault hits one of them.
        disk: file system of `out`; every fault is then that it fills up below the size of the undisturbed run.
        alone: whether one process must give the same result as several.
    """
    draw, tally, out = random.Random(seed), Tally(), (disk.at if disk else place) / "out"
    go = partial(attempt, job, place, disk=disk, timeout=timeout)
    shutil.rmtree(out, ignore_errors=True)
    whole = go(ranks=ranks)
    expected = _result(job, out, whole)
    tally.changes, tally.seconds = sum(whole.changes), whole.seconds
    shutil.rmtree(out)
    if alone and ranks > 1:
        one = _result(job, out, go(ranks=1))
        shutil.rmtree(out)
        if one != expected:
            tally.lost.append(f"{ranks} processes give another result than one")
    while True:
        spent = tally.injected.total()
        fault = _fault(spent, whole, draw) if disk is None else _full(disk, draw)
        if spent == kills or (disk and draw.random() < 0.3):  # else it would mostly be close to its end
            fault = None
        if disk:
            disk.resize(fault.room if fault else None)
        left = set(out.rglob(".*.tmp"))  # of earlier kills: a disk that is full at once prevents their removal
        tried = go(fault, ranks=ranks)
        if disk:
            disk.resize(None)
        hit = fault is not None and fault.hit(tried)
        if fault and hit:
            tally.injected[str(fault)] += 1
            if fault.signal is None:
                tally.lost += [f"{fault}: {what}" for what in _half_full(tried, out, left)]
        elif tried.status:
            tally.lost.append(f"{fault}: ended with {tried.ranks}: {tried.said[-1500:]}")
        else:  # no fault, or the run ended before it
            tally.compared += 1
            if leftover := [str(path.relative_to(out)) for path in out.rglob("*") if path.name.endswith(PASSING)]:
                tally.lost.append(f"left behind: {leftover}")
        if (not tried.status or (job.mark and (out / job.mark).exists())) and _differs(job, out, expected):
            tally.lost.append(f"another result after {dict(tally.injected)}, and {fault}")
        if not hit:
            shutil.rmtree(out, ignore_errors=True)
        if spent == kills or len(tally.lost) > 5:
            return tally


def _result(job: Job, out: Path, tried: Attempt) -> Any:
    if tried.status:
        raise RuntimeError(f"the undisturbed run ended with {tried.status}: {tried.said[-3000:]}")
    return job.result(out)


def _differs(job: Job, out: Path, expected: Any) -> bool:
    try:
        return bool(job.result(out) != expected)
    except (OSError, ValueError):  # missing or torn
        return True


def _half_full(tried: Attempt, out: Path, left: set[Path]) -> list[str]:
    """Return what is wrong with a job on a full disk: it should print one line and leave nothing half written."""
    wrong = []
    messages = [line for line in tried.said.splitlines() if line.startswith("prefdistill: ")]
    full = [line for line in messages if line.startswith("prefdistill: no room on the disk")]
    if not full or (len(tried.ranks) == 1 and len(messages) > 1) or "Traceback" in tried.said:
        wrong.append(f"unexpected output: {tried.said[-1500:]}")
    if len(tried.ranks) == 1 and (half := set(out.rglob(".*.tmp")) - left):  # of several, some are killed
        wrong.append(f"half written: {half}")
    return wrong


def _fault(number: int, whole: Attempt, draw: random.Random) -> Fault:
    rank = draw.randrange(len(whole.ranks))
    at = partial(Fault, rank=rank, notice=draw.uniform(0, 0.1))
    changes = whole.changes[rank]
    if number % 5 == 2 and changes:
        return at(None, change=draw.randint(1, changes))
    kind = signal.SIGINT if number % 5 == 4 else signal.SIGKILL
    if number % 4 == 3 or not changes:
        return at(kind, seconds=draw.uniform(0, whole.seconds))
    return at(kind, change=draw.randint(1, changes))


def _full(disk: Disk, draw: random.Random) -> Fault:
    used = disk.used()
    return Fault(None, room=used + PAGE * draw.randint(1, max(1, (disk.peak - used) // PAGE)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=200, help="faults of each stage")
    parser.add_argument("--stages", help=f"comma-separated; default: {','.join(JOBS)}")
    parser.add_argument("--ranks", type=int, default=1, help=f"processes; stages: {', '.join(ON_SEVERAL)}")
    parser.add_argument("--disk", action="store_true", help="all faults are a small file system that fills up")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    stages = args.stages.split(",") if args.stages else list(JOBS if args.ranks == 1 else ON_SEVERAL)
    lost = 0
    with tempfile.TemporaryDirectory() as made:
        place = make_place(Path(made).resolve())
        for name in stages:
            with Disk(place) if args.disk else nullcontext() as disk:
                alone = name == "signals"  # the same bytes on any number of processes
                tally = disturb(JOBS[name], place, args.kills, args.seed, ranks=args.ranks, disk=disk, alone=alone)
            lost += len(tally.lost)
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.injected.items()))
            print(
                f"{name:10} {tally.changes:4} changes, {tally.seconds:5.1f} s undisturbed: {kinds}; "
                f"{tally.compared} results compared, {len(tally.lost)} lost",
                flush=True,
            )
            for reason in tally.lost:
                print(f"  {reason}", flush=True)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
