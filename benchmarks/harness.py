"""Ways to do the same work, each in a process of its own, timed in turns on one machine.

A way is a function `module:function` that prepares everything and returns `(run, facts)`: `run()` does one round and
returns its numbers. The processes stay alive and take turns, A B C A B C: what slows the machine down for a while slows
all of them down, and the ratios within a round keep still where seconds wander. Memory is each process's own.
"""

import argparse
import ctypes
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # options that both trainers' versions still know

# A server that has imported what is slow to import forks the processes: they start at once, from the same state.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["trl.trainer.dpo_trainer", "prefdistill.training.factory", "prefdistill.signals.extract"]
)
PACKAGES = ("prefdistill", "torch", "transformers", "trl", "accelerate", "datasets", "numpy", "pyarrow")

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter  # the one that this process measures by

Numbers = dict[str, Any]
Prepared = tuple[Callable[[], Numbers] | None, Numbers]


@dataclass(frozen=True)
class Variant:
    """A way to do the work.

    Args:
        name: what the table calls it.
        function: `module:function`, called in the process as `function(**arguments)`. Returns `(run, facts)`: `run()`
            does a round and returns numbers of it, and `facts` are numbers of the preparation. A round's "seconds" are
            those of the call, or what `run` itself says; its "units" (1) are the steps, or passes, they were spent on.
        arguments: whatever JSON can say.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """What came of a variant: its facts, numbers of each round after the warm-up, bytes of memory, or why it failed."""

    facts: Numbers = field(default_factory=dict)
    warmup: list[Numbers] = field(default_factory=list)
    rounds: list[Numbers] = field(default_factory=list)
    memory: Numbers = field(default_factory=dict)
    error: str | None = None

    def median(self, name: str) -> float | None:
        """Of a number of the rounds, per unit; None if no round has it."""
        found = [r[name] / r["units"] for r in self.rounds if r.get(name) is not None]
        return statistics.median(found) if found else None


def measure(
    variants: Sequence[Variant],
    *,
    rounds: int,
    warmup: int = 1,
    together: bool = True,
    threads: int | None = None,
    timed_by: str = "wall",
) -> dict[str, Measured]:
    """Run all variants, `warmup` and then `rounds` times in turns. One that fails is left out from then on.

    Args:
        together: keep all processes alive and interleave them. Else one after another: the ratios then see whatever the
            machine does meanwhile, but only one has to fit into memory.
        threads: of torch, in each process.
        timed_by: one of `CLOCKS`.
    """
    if not together:
        found = (measure([v], rounds=rounds, warmup=warmup, threads=threads, timed_by=timed_by) for v in variants)
        return {name: one for part in found for name, one in part.items()}
    workers = []
    try:
        for variant in variants:  # one at a time, so that one's preparation does not slow down another's
            workers.append(_Worker(variant, threads, timed_by))
        for number in range(warmup + rounds):
            for worker in workers:
                worker.round(keep=number >= warmup)
            done = f"round {number + 1 - warmup} of {rounds}" if number >= warmup else "warm-up"
            print(f"{', '.join(w.variant.name for w in workers)}: {done}", file=sys.stderr, flush=True)
        for worker in workers:
            worker.finish()
    finally:
        for worker in workers:
            worker.process.kill()
    return {worker.variant.name: worker.measured for worker in workers}


def once(function: str, arguments: dict[str, Any], *, threads: int | None = None, timed_by: str = "wall") -> Numbers:
    """Call a variant's function in a process that ends with it; returns its facts."""
    worker = _Worker(Variant(function, function, arguments), threads, timed_by)
    worker.finish()
    if worker.measured.error:
        raise SystemExit(f"{function} failed: {worker.measured.error}")
    return worker.measured.facts


class _Worker:
    """Our end of a variant's process."""

    def __init__(self, variant: Variant, threads: int | None, timed_by: str) -> None:
        self.variant, self.measured = variant, Measured()
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, variant, threads, timed_by), daemon=True)
        self.process.start()
        theirs.close()
        self.measured.facts = self._answer()

    def _answer(self) -> Numbers:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            answer = {"error": f"the process died with status {self.process.exitcode} (out of memory?)"}
        if isinstance(answer, dict) and "error" in answer:
            self.measured.error = answer["error"]
            print(f"{self.variant.name}: {self.measured.error}", file=sys.stderr, flush=True)
            return {}
        return answer

    def round(self, *, keep: bool) -> None:
        if self.measured.error is None:
            self.pipe.send("round")
            (self.measured.rounds if keep else self.measured.warmup).append(self._answer())

    def finish(self) -> None:
        if self.measured.error is None:
            self.pipe.send("finish")
            self.measured.memory = self._answer()
            self.process.join()


def _serve(pipe: Any, variant: Variant, threads: int | None, timed_by: str) -> None:
    """The variant's end: prepare, then a round whenever asked for."""
    global clock
    import torch

    clock = CLOCKS[timed_by]
    os.dup2(2, 1)  # what libraries print must not mix with the table
    if threads:
        torch.set_num_threads(threads)
    try:
        module, _, function = variant.function.partition(":")
        run, facts = getattr(importlib.import_module(module), function)(**variant.arguments)
        loaded = _settle()
        pipe.send(facts)
        while pipe.recv() == "round":
            start = clock()
            numbers = run()
            synchronize()
            pipe.send({"seconds": clock() - start, "units": 1} | numbers)
        pipe.send({"loaded": loaded, "peak": _peak(), "of": "cuda" if torch.cuda.is_available() else "resident set"})
    except Exception as error:
        traceback.print_exc()
        first_line = next(iter(str(error).splitlines()), "")
        pipe.send({"error": f"{type(error).__name__}: {first_line}"[:200]})


def synchronize() -> None:
    """Wait for what the device still has to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _settle() -> int:
    """Bytes in use now that everything is loaded; forgets the peak of loading it.

    A resident set holds pages of libraries too, which come and go: tens of megabytes are no difference.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        return _peak()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is not what the model holds
    Path("/proc/self/clear_refs").write_text("5")
    return _proc_status("VmRSS")


def _peak() -> int:
    """Most bytes in use since `_settle`: CUDA's where there is CUDA, else of the resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # not ru_maxrss: it starts from what the process was forked from
        return _proc_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _proc_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# ---- What is said of it ----------------------------------------


def ratios(measured: dict[str, Measured], name: str, baseline: str, number: str = "seconds") -> Numbers | None:
    """A number of a variant over the baseline's, round by round: median, least and most; None if one has failed."""
    pairs = zip(measured[name].rounds, measured[baseline].rounds, strict=False)
    found = [(a[number] / a["units"]) / (b[number] / b["units"]) for a, b in pairs if a and b]
    if not found or measured[name].error or measured[baseline].error:
        return None
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def summary(measured: dict[str, Measured], baseline: str) -> dict[str, Numbers]:
    """What the JSON says of each variant: everything measured, and how it compares with the baseline."""
    found: dict[str, Numbers] = {}
    for name, one in measured.items():
        memory = dict(one.memory)
        if memory:
            memory["above_loaded"] = memory["peak"] - memory["loaded"]
        found[name] = {
            "seconds_per_unit": one.median("seconds"),
            "ratio": ratios(measured, name, baseline),
            "memory": memory,
            "facts": one.facts,
            "warmup": one.warmup,
            "rounds": one.rounds,
            "error": one.error,
        }
    base = found[baseline]["memory"].get("above_loaded")
    for entry in found.values():
        above = entry["memory"].get("above_loaded")
        entry["memory_ratio"] = above / base if above is not None and base else None
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that can be read as it is: the first column to the left, numbers to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in cells]  # fmt: skip
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def ratio_text(ratio: Numbers | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})"


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    models = [line for line in cpus.read_text().splitlines() if line.startswith("model name")] if cpus.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each variant, after one to warm up")
    parser.add_argument("--threads", type=int, help="CPU threads of each process; default: torch's")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: CPU seconds, which others on the machine disturb less; with --threads 1, and without a GPU",
    )
    parser.add_argument("--sequential", action="store_true", help="one variant after another: less memory, more noise")
    parser.add_argument("--out", type=Path, help="write everything that was measured to this JSON file")


def write_report(args: argparse.Namespace, benchmark: str, **found: Any) -> None:
    """The JSON of a benchmark, if asked for: where and how it was run, and what was found."""
    if args.out is None:
        return
    import torch

    report = {
        "benchmark": benchmark,
        "command": f"python -m benchmarks.{benchmark} {' '.join(sys.argv[1:])}".strip(),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "hardware": {
            "device": device_name(),
            "cores": os.cpu_count(),
            "threads": args.threads or torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        **found,
    }
    args.out.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
