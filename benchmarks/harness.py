"""Time variants of the same work in turns, each in its own process.

A variant is a function `module:function` that prepares everything and returns `(run, facts)`: `run()` does one round
and returns its numbers. The processes stay alive and take turns, A B C A B C: a temporary slowdown of the machine
affects all of them, so ratios within a round are stable where seconds vary. Memory is measured per process.
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

from benchmarks import quiet
from benchmarks.shapes import SHAPES

quiet(PYTHONWARNINGS="ignore::FutureWarning")  # deprecated options that both versions of the trainers accept

# The fork server imports the slow modules once, so processes start quickly and from the same state.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["trl.trainer.dpo_trainer", "prefdistill.training.factory", "prefdistill.signals.extract"]
)
PACKAGES = ("prefdistill", "torch", "transformers", "trl", "accelerate", "datasets", "numpy", "pyarrow")

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter  # the clock of this process

Numbers = dict[str, Any]
Prepared = tuple[Callable[[], Numbers] | None, Numbers]


@dataclass(frozen=True)
class Variant:
    """One variant of the work.

    Args:
        name: its name in the table.
        function: `module:function`, called in the process as `function(**arguments)`. Returns `(run, facts)`: `run()`
            does a round and returns its numbers, and `facts` are numbers of the preparation. A round's "seconds" are
            those of the call, unless `run` returns them; its "units" (1) are the steps or passes in that time.
        arguments: JSON-serializable keyword arguments.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """The measurements of a variant: facts, numbers of each round after the warm-up, bytes of memory, or the error."""

    facts: Numbers = field(default_factory=dict)
    warmup: list[Numbers] = field(default_factory=list)
    rounds: list[Numbers] = field(default_factory=list)
    memory: Numbers = field(default_factory=dict)
    error: str | None = None

    def median(self, name: str) -> float | None:
        """Return the median of a number over the rounds, per unit; None if no round has it."""
        values = [r[name] / r["units"] for r in self.rounds if r.get(name) is not None]
        return statistics.median(values) if values else None


def measure(
    variants: Sequence[Variant],
    *,
    rounds: int,
    warmup: int = 1,
    together: bool = True,
    threads: int | None = None,
    timed_by: str = "wall",
) -> dict[str, Measured]:
    """Run all variants in turns, `warmup` and then `rounds` times. A variant that fails is skipped from then on.

    Args:
        together: keep all processes alive and interleave them. Else run one after another: ratios are then affected by
            other load on the machine, but only one variant has to fit into memory.
        threads: torch's threads in each process.
        timed_by: one of `CLOCKS`.
    """
    if not together:
        parts = (measure([v], rounds=rounds, warmup=warmup, threads=threads, timed_by=timed_by) for v in variants)
        return {name: measured for part in parts for name, measured in part.items()}
    workers = []
    try:
        for variant in variants:  # one at a time, so that preparations do not slow each other down
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


def measure_all(args: argparse.Namespace, variants: Sequence[Variant], **options: Any) -> dict[str, Measured]:
    """Run variants as the options of the command line say; `options` of `measure` win."""
    how = {"rounds": args.rounds, "threads": args.threads, "timed_by": args.clock, "together": not args.sequential}
    return measure(variants, **how | options)


def once(function: str, arguments: dict[str, Any], *, threads: int | None = None, timed_by: str = "wall") -> Numbers:
    """Call a variant's function in its own process and return the facts."""
    worker = _Worker(Variant(function, function, arguments), threads, timed_by)
    worker.finish()
    if worker.measured.error:
        raise SystemExit(f"{function} failed: {worker.measured.error}")
    return worker.measured.facts


class _Worker:
    """The parent's side of a variant's process."""

    def __init__(self, variant: Variant, threads: int | None, timed_by: str) -> None:
        self.variant, self.measured = variant, Measured()
        self.pipe, child_pipe = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(child_pipe, variant, threads, timed_by), daemon=True)
        self.process.start()
        child_pipe.close()
        self.measured.facts = self._receive()

    def _receive(self) -> Numbers:
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            message = {"error": f"the process died with status {self.process.exitcode} (out of memory?)"}
        if isinstance(message, dict) and "error" in message:
            self.measured.error = message["error"]
            print(f"{self.variant.name}: {self.measured.error}", file=sys.stderr, flush=True)
            return {}
        return message

    def round(self, *, keep: bool) -> None:
        if self.measured.error is None:
            self.pipe.send("round")
            (self.measured.rounds if keep else self.measured.warmup).append(self._receive())

    def finish(self) -> None:
        if self.measured.error is None:
            self.pipe.send("finish")
            self.measured.memory = self._receive()
            self.process.join()


def _serve(pipe: Any, variant: Variant, threads: int | None, timed_by: str) -> None:
    """The child's side: prepare, then run one round per request."""
    global clock
    import torch

    clock = CLOCKS[timed_by]
    os.dup2(2, 1)  # output of libraries goes to stderr, away from the table
    if threads:
        torch.set_num_threads(threads)
    try:
        module, _, function = variant.function.partition(":")
        run, facts = getattr(importlib.import_module(module), function)(**variant.arguments)
        loaded = settle()
        pipe.send(facts)
        while pipe.recv() == "round":
            start = clock()
            numbers = run()
            synchronize()
            pipe.send({"seconds": clock() - start, "units": 1} | numbers)
        pipe.send({"loaded": loaded, "peak": peak(), "of": "cuda" if torch.cuda.is_available() else "resident set"})
    except Exception as error:
        traceback.print_exc()
        first_line = next(iter(str(error).splitlines()), "")
        pipe.send({"error": f"{type(error).__name__}: {first_line}"[:200]})


def synchronize() -> None:
    """Wait until the device has finished its queued work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def settle() -> int:
    """Return the bytes in use after loading, and reset the peak.

    A resident set includes pages of libraries, so differences of tens of megabytes mean nothing.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        return peak()
    ctypes.CDLL(None).malloc_trim(0)  # return memory freed after loading
    Path("/proc/self/clear_refs").write_text("5")
    return _proc_status("VmRSS")


def peak() -> int:
    """Return the peak of bytes in use since `settle`: of CUDA if available, else of the resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # not ru_maxrss, which starts at the peak of the forking process
        return _proc_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _proc_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# ---- Reporting -------------------------------------------------


def ratios(measured: dict[str, Measured], name: str, baseline: str, number: str = "seconds") -> Numbers | None:
    """Return a number of a variant relative to the baseline by round: median, min, max; None if either failed."""
    pairs = zip(measured[name].rounds, measured[baseline].rounds, strict=False)
    values = [(a[number] / a["units"]) / (b[number] / b["units"]) for a, b in pairs if a and b]
    if not values or measured[name].error or measured[baseline].error:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(measured: dict[str, Measured], baseline: str) -> dict[str, Numbers]:
    """Return the JSON entry of each variant: its measurements, and its ratios to the baseline."""
    entries: dict[str, Numbers] = {}
    for name, one in measured.items():
        memory = dict(one.memory)
        if memory:
            memory["above_loaded"] = memory["peak"] - memory["loaded"]
        entries[name] = {
            "seconds_per_unit": one.median("seconds"),
            "ratio": ratios(measured, name, baseline),
            "memory": memory,
            "facts": one.facts,
            "warmup": one.warmup,
            "rounds": one.rounds,
            "error": one.error,
        }
    base = entries[baseline]["memory"].get("above_loaded")
    for entry in entries.values():
        above = entry["memory"].get("above_loaded")
        entry["memory_ratio"] = above / base if above is not None and base else None
    return entries


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format an aligned Markdown table: the first column left-aligned, the others right-aligned."""
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


def add_options(parser: argparse.ArgumentParser, *, shape: str, pairs: int | None, max_length: int = 1024) -> None:
    """Add the options that all benchmarks share, with these defaults."""
    parser.add_argument("--shape", choices=SHAPES, default=shape, help="of the model (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=pairs, help="in the data (default: %(default)s)")
    parser.add_argument(
        "--data", help="a .jsonl(.gz) file of real pairs to take the lengths from; default: a fitted distribution"
    )
    parser.add_argument("--max-length", type=int, default=max_length, help="tokens of prompt and response")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each variant, after one warm-up round")
    parser.add_argument("--threads", type=int, help="CPU threads of each process; default: torch's")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: CPU seconds, less affected by other load on the machine; use with --threads 1 and without a GPU",
    )
    parser.add_argument("--sequential", action="store_true", help="one variant after another: less memory, more noise")
    parser.add_argument("--out", type=Path, help="write all measurements to this JSON file")


def write_report(args: argparse.Namespace, benchmark: str, **measurements: Any) -> None:
    """Write the JSON of a benchmark if --out is given: hardware, versions, command and measurements."""
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
        **measurements,
    }
    args.out.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
