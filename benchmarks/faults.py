"""Kill every stage at random moments, let it go on, and compare what it ends with.

    python -m benchmarks.faults --kills 200
    python -m benchmarks.faults --kills 40 --stages run,distill --seed 7

A moment is one of the changes a run makes to its directory (a file opened to be written, renamed or removed, a
directory made: the process ends just before the n-th of them, n drawn evenly), or a point in time, which also falls
into what is written without Python and into what is computed. The signal is SIGKILL, or Ctrl-C; or there is none, and
from that change on the disk is full. After each fault the same command is started again, and may fail again; when it
ends, its result is compared with that of a run that nothing disturbed, and it begins anew, until all faults are spent.

Every attempt is a fork of a process that has imported everything: no kill waits for PyTorch to be loaded.
"""

import argparse
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from prefdistill.cli import _call

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
WORDS = ["the", "small", "teacher", "reads", "a", "prompt", "and", "answers", "with", "care", "what", "it", "says"]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FEW = ["max_steps=4", "batch_size=4", "micro_batch_size=4", "save_steps=2", "logging_steps=1"]
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
    *("matplotlib.pyplot", "prefdistill.results", "prefdistill.report.figures"),
)
CLOCKS = ("seconds", "tokens_per_second", "peak_memory", "bytes", "reused")  # what no two runs have alike


# -- the work ----------------------------------------------------------------------------------------------------------


def make_place(place: Path) -> Path:
    """A directory with a tiny model, a teacher, pairs and signals of both."""
    from prefdistill.files import write_jsonl
    from prefdistill.models import random_model, train_tokenizer
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
    for module in IMPORTED_LATE:  # once, not in every fork
        import_module(module)
    pairs = str(place / "pairs.jsonl")
    extract_signals(str(place / "teacher"), pairs, out=place / "signals-teacher")
    extract_signals(str(place / "model"), pairs, kinds=("logps",), out=place / "signals-start", role="reference")
    return place


def make_store(place: Path) -> Path:
    """A store of two shards with every kind of signal."""
    from prefdistill.signals import extract_signals

    make_place(place)
    kinds = ("values", "logps", "q", "topk")
    extract_signals(
        str(place / "teacher"), str(place / "pairs.jsonl"), kinds=kinds, out=place / "store", k=3, shard_rows=6
    )
    return place / "store"


def command(*arguments: str) -> Callable[[], int]:
    return lambda: _call(list(arguments))


def _signals() -> int:
    from prefdistill.signals import extract_signals

    extract_signals("teacher", "pairs.jsonl", kinds=("values", "logps", "topk"), out="out", k=3, shard_rows=2)
    return 0


def _sample() -> int:
    from prefdistill.sample import sample_responses

    sample_responses("model", "pairs.jsonl", out="out/rows.jsonl", max_new_tokens=4, shard_rows=2, batch_size=2)
    return 0


def all_bytes(out: Path) -> Any:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


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


@dataclass(frozen=True)
class Job:
    """A stage: what is called in the place, and what of `out` is compared."""

    call: Callable[[], int]
    result: Callable[[Path], Any]


RECIPE = "src/prefdistill/recipes/quickstart.yaml"
PAIRS = ("--data", "pairs.jsonl")
STORES = ("--signals", "signals-teacher", "--signals", "signals-start")
TESTED = ("--reference", "signals-start", "--teacher", "signals-teacher")
JOBS = {
    "signals": Job(_signals, all_bytes),
    "sample": Job(_sample, rows_and_meta),
    "sft": Job(command("sft", "--model", "model", *PAIRS, "--out", "out", *FEW), weights),
    "dpo": Job(command("dpo", "--model", "model", *PAIRS, "--out", "out", *FEW), weights),
    "distill": Job(command("distill", "--student", "model", *PAIRS, *STORES, "--out", "out", *FEW), weights),
    "evaluate": Job(
        command(
            *("evaluate", "--model", "teacher", *PAIRS, *TESTED, "--generate", "--max-new-tokens", "4"),
            *("--out", "out/results.json"),
        ),
        results,
    ),
    "run": Job(
        command("run", str(Path(__file__).parents[1] / RECIPE), "--out", "out", "--methods", "tvkd", *TINY), results
    ),
}


# -- the faults --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A signal, sent before the n-th change to the directory or after some seconds; None: the disk is full then."""

    signal: int | None
    change: int | None = None
    seconds: float | None = None

    @property
    def status(self) -> int:
        """What the process must end with."""
        return 1 if self.signal is None else 130 if self.signal == signal.SIGINT else -self.signal

    def __str__(self) -> str:
        name = {None: "full disk", signal.SIGKILL: "kill -9", signal.SIGINT: "Ctrl-C"}[self.signal]
        return f"{name} {'at a change' if self.change else 'in time'}"


@dataclass
class Attempt:
    status: int  # of the process; negative: the signal that ended it
    changes: int
    seconds: float
    said: str


def attempt(
    job: Job, place: Path, fault: Fault | None = None, *, largest: int | None = None, timeout: float = 120
) -> Attempt:
    """Do a job in a fork of this process, with a fault in it, or with files of some bytes at most."""
    read, write = os.pipe()
    log = place / "log.txt"
    start = time.monotonic()
    child = os.fork()
    if child == 0:  # never returns
        status = 1
        try:
            os.close(read)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            os.chdir(place)
            if largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            count = _watch(place / "out", fault)
            status = job.call()
            os.write(write, str(count[0]).encode())
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    due = start + fault.seconds if fault and fault.seconds is not None else None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        now = time.monotonic()
        if due is not None and now >= due:
            os.kill(child, fault.signal)  # type: ignore[union-attr,arg-type]
            due = None
        if now > start + timeout:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"hangs after {fault}: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.002)
    _, ended = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        changes = int(pipe.read() or 0)
    status = os.waitstatus_to_exitcode(ended)
    return Attempt(status, changes, time.monotonic() - start, log.read_text(errors="replace"))


def _watch(out: Path, fault: Fault | None) -> list[int]:
    """Count the changes to a directory from now on, and send the fault's signal before the one it names."""
    count, root = [0], f"{out}{os.sep}"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            changing = not set(mode or "").isdisjoint("wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
        elif event in CHANGES:
            path, changing = arguments[0], True
        else:
            return
        if not changing or not isinstance(path, str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(root):
            return
        count[0] += 1
        if fault is None or fault.change is None:
            return
        if fault.signal is None:
            if count[0] >= fault.change and event in ("open", "os.mkdir", "os.link"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))
        elif count[0] == fault.change:
            os.kill(os.getpid(), fault.signal)

    sys.addaudithook(hook)
    return count


@dataclass
class Tally:
    """What came of the faults put into one stage."""

    injected: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    lost: list[str] = field(default_factory=list)
    changes: int = 0
    seconds: float = 0.0


def disturb(job: Job, place: Path, kills: int, seed: int, *, timeout: float = 120) -> Tally:
    """Kill a job that many times, and compare every result it comes to with that of an undisturbed run."""
    draw, tally, out = random.Random(seed), Tally(), place / "out"
    shutil.rmtree(out, ignore_errors=True)
    whole = attempt(job, place, timeout=timeout)
    if whole.status:
        raise RuntimeError(f"the undisturbed run ended with {whole.status}: {whole.said[-3000:]}")
    expected, tally.changes, tally.seconds = job.result(out), whole.changes, whole.seconds
    shutil.rmtree(out)
    while True:
        spent = tally.injected.total()
        fault = None if spent == kills else _fault(spent, whole, draw)
        left = set(out.rglob(".*.tmp"))  # of kills before: a disk that is full at once keeps them from being swept
        tried = attempt(job, place, fault, timeout=timeout)
        if fault is not None and tried.status == fault.status:
            tally.injected[str(fault)] += 1
            if fault.signal is None:
                if os.strerror(errno.ENOSPC) not in tried.said:
                    tally.lost.append(f"{fault}: {tried.said[-1500:]}")
                if half := set(out.rglob(".*.tmp")) - left:
                    tally.lost.append(f"half written on a full disk: {half}")
            continue
        if tried.status:
            tally.lost.append(f"{fault}: ended with {tried.status}: {tried.said[-1500:]}")
        else:  # the moment came too late, for the rest was shorter; or there was none
            tally.compared += 1
            if job.result(out) != expected:
                tally.lost.append(f"another result after {dict(tally.injected)}")
            if left := [str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".tmp", ".lock")]:
                tally.lost.append(f"left behind: {left}")
        shutil.rmtree(out, ignore_errors=True)
        if fault is None or len(tally.lost) > 5:
            return tally


def _fault(number: int, whole: Attempt, draw: random.Random) -> Fault:
    if number % 5 == 2:
        return Fault(None, change=draw.randint(1, whole.changes))
    kind = signal.SIGINT if number % 5 == 4 else signal.SIGKILL
    if number % 4 == 3:
        return Fault(kind, seconds=draw.uniform(0, whole.seconds))
    return Fault(kind, change=draw.randint(1, whole.changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=200, help="of each stage")
    parser.add_argument("--stages", default=",".join(JOBS), help="with commas")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    lost = 0
    with tempfile.TemporaryDirectory() as made:
        place = make_place(Path(made).resolve())
        for name in args.stages.split(","):
            tally = disturb(JOBS[name], place, args.kills, args.seed)
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
