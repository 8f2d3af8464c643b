"""All that needs a GPU, by one command: tests, parity, kernels, tiles, compiling, memory, MFU, and TRL side by side.

    python -m benchmarks.gpu                        # one GPU, a model of the shape of Llama-3.2-1B
    python -m benchmarks.gpu --device cpu --tiny    # the same code at the smallest size

Prints a table for each section, and writes all numbers as JSON. Where a variant fails, its row says why, the others go
on, and the exit status is 1. What is not installed is named and is no failure.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import harness
from benchmarks.harness import Numbers, device_name, table, write_report
from benchmarks.shapes import SHAPES, peak_flops

GIB = 2**30
ROOT = Path(__file__).parents[1]
REASONS = ("not run", "error")  # keys of a row without numbers


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Args:
        shape, parity_shape: of `SHAPES`; of the models whose time is measured, and of those compared with the CPU.
        pairs, max_length, budget: of extraction: pairs, tokens of prompt and response, tokens in a pass.
        batch, wide_batch, steps: of training: pairs in a step, in a step for MFU; timed steps.
        prompt, response: tokens of the pairs for memory.
        rounds: timed, after a first one.
        tiles, training_tiles: logits in a tile.
        backend: of torch.compile; "eager" only traces.
    """

    shape: str
    parity_shape: str
    pairs: int
    max_length: int
    budget: int
    batch: int
    wide_batch: int
    steps: int
    prompt: int
    response: int
    rounds: int
    tiles: tuple[int, ...]
    training_tiles: tuple[int, ...]
    backend: str

    @property
    def passes(self) -> Numbers:
        """Arguments of the functions of passes.py."""
        return {
            "shape": SHAPES[self.shape],
            "pairs": self.pairs,
            "source": None,
            "max_length": self.max_length,
            "dtype": "bfloat16",
            "batch": 16,
            "budget": self.budget,
        }


FULL = Size(
    "llama-1b", "tiny", 256, 1024, 16_384, 8, 32, 6, 128, 256, 3, (2**24, 2**26, 2**28), (2**23, 2**25, 2**27),
    "inductor",
)  # fmt: skip
TINY = Size("nano", "nano", 4, 64, 512, 2, 4, 1, 16, 32, 1, (2**12, 2**14), (2**12, 2**14), "eager")


# ---- Measuring --------------------------------------


def measure(function: Callable[..., harness.Prepared], rounds: int, **arguments: Any) -> Numbers:
    """Return the median seconds of a unit of a variant, of its first round, its other numbers and peak memory."""
    before = harness.settle()
    run, facts = function(**arguments)
    assert run is not None
    harness.settle()
    all_rounds = []
    for _ in range(1 + rounds):
        start = harness.clock()
        numbers = run()
        harness.synchronize()
        all_rounds.append({"seconds": harness.clock() - start, "units": 1} | numbers)
    peak = harness.peak()
    del run
    harness.settle()
    first, *others = all_rounds
    return {
        **facts,
        **others[-1],
        "seconds": statistics.median(one["seconds"] / one["units"] for one in others),
        "first": first["seconds"],
        "first_losses": first.get("losses"),
        "gib": (peak - before) / GIB,
    }


def attempt(name: str, function: Callable[[], Numbers]) -> Numbers:
    """Return a row with this name; where the function fails, one with the error."""
    try:
        return {"variant": name} | function()
    except ImportError as error:
        return {"variant": name, "not run": str(error).splitlines()[0]}
    except Exception as error:  # of any library, out of memory included: the other variants go on
        traceback.print_exc()
        return {"variant": name, "error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]}


def mfu(flops: float, seconds: float) -> float | None:
    peak = peak_flops(device_name())
    return flops / seconds / peak if peak else None


# ---- Sections ---------------------------------------


def tests(size: Size, device: str) -> Iterator[Numbers]:
    """`pytest -m gpu tests/gpu`: numbers of the card against those of the CPU."""

    def row() -> Numbers:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "gpu")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        last = next(reversed(done.stdout.strip().splitlines()), done.stderr[-200:])
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            raise RuntimeError(last)
        return {"result": last}

    if device == "cuda":
        yield attempt("pytest", row)
    else:
        yield {"variant": "pytest", "not run": "`pytest -m slow tests/gpu` runs these tests on a CPU"}


def parity(size: Size, device: str) -> Iterator[Numbers]:
    """Differences from the CPU in float32, in nats; of the gradient: norm of the difference, relative."""
    from benchmarks.parity import Parity

    reference = Parity(SHAPES[size.parity_shape])
    for dtype in ("float32", "bfloat16"):

        def of_signals(dtype: str = dtype) -> Numbers:
            gaps = reference.signal_gaps(reference.signals(reference.on(device, reference.teacher, dtype)))
            return {f"{kind}, {which}": x for kind, gap in gaps.items() for which, x in gap.items()}

        def of_step(dtype: str = dtype) -> Numbers:
            model = reference.on(device, reference.student)
            return reference.step_gaps(reference.step(model, bf16=dtype == "bfloat16"))

        yield attempt(f"signals, weights in {dtype}", of_signals)
        yield attempt(f"training step, {'autocast to ' if dtype == 'bfloat16' else ''}{dtype}", of_step)


def kernels(size: Size, device: str) -> Iterator[Numbers]:
    """Layouts of batches with each attention kernel: tokens a second of a pass of values, and parity in bfloat16."""
    from benchmarks.parity import Parity
    from benchmarks.passes import in_memory
    from prefdistill.data.batches import PADDED, layout_for

    reference = Parity(SHAPES[size.parity_shape])
    for kernel in ("sdpa", "flash_attention_2"):
        for padded in (True, False):

            def row(kernel: str = kernel, padded: bool = padded) -> Numbers:
                model = reference.on(device, reference.teacher, "bfloat16", kernel)
                layout = PADDED if padded else layout_for(model, reference.truncation.max_length)
                gap = reference.signal_gaps(reference.signals(model, layout))["token_logps"]
                del model
                numbers = measure(in_memory, size.rounds, kinds=["values"], kernel=kernel, padded=padded, **size.passes)
                speed = {"layout": layout.kind, "tokens/s": numbers["tokens"] / numbers["seconds"]}
                return speed | {"mean gap": gap["mean"], "max gap": gap["max"], "GiB": numbers["gib"]}

            yield attempt(f"{kernel}, {'padded' if padded else 'chosen layout'}", row)


def extraction(size: Size, device: str) -> Iterator[Numbers]:
    """Tokens a second of passes over pairs, relative to the backbone alone; the first pass compiles."""
    from benchmarks.passes import backbone, in_memory

    variants: dict[str, tuple[Callable[..., harness.Prepared], Numbers]] = {
        "backbone alone": (backbone, {"head": False}),
        "backbone and head": (backbone, {"head": True}),
        "endpoints": (in_memory, {"kinds": ["values"], "positions": "endpoints"}),
        "values": (in_memory, {"kinds": ["values"]}),
        "logps": (in_memory, {"kinds": ["logps"]}),
        "values and logps": (in_memory, {"kinds": ["values", "logps"]}),
        "top-50": (in_memory, {"kinds": ["topk"]}),
        "backbone alone, layers compiled": (backbone, {"head": False, "compiled": size.backend}),
        "values, layers compiled": (in_memory, {"kinds": ["values"], "compiled": size.backend}),
    }
    seconds: dict[str, float] = {}

    def row(name: str, function: Callable[..., harness.Prepared], options: Numbers) -> Numbers:
        numbers = measure(function, size.rounds, **options, **size.passes)
        seconds[name] = numbers["seconds"]
        return {
            "tokens/s": numbers["tokens"] / numbers["seconds"],
            **{f"x {base}": seconds[base] / numbers["seconds"] for base in list(variants)[:2] if base in seconds},
            "MFU": None if "alone" in name or name == "endpoints" else mfu(numbers["flops"], numbers["seconds"]),
            "GiB": numbers["gib"],
            "first pass, s": numbers["first"],
        }

    for name, (function, options) in variants.items():
        yield attempt(name, lambda name=name, f=function, o=options: row(name, f, o))


def reductions(size: Size, device: str) -> Iterator[Numbers]:
    """Milliseconds of making a tile and reducing it, as the library does it and compiled; the first call compiles."""
    from benchmarks.reduction import HEAD, measure_tile

    for elements in size.tiles:
        numbers = measure_tile(SHAPES[size.shape], "bfloat16", elements, 5 * size.rounds, size.backend)
        for name, one in numbers.items():
            speed = numbers[HEAD]["seconds"] / one["seconds"]
            row = {"ms": 1e3 * one["seconds"], "x head alone": speed, "first call, s": one["first"]}
            yield {"variant": f"{name}, {one['states']} states"} | row


def tiles(size: Size, device: str) -> Iterator[Numbers]:
    """Time and memory with other sizes of tiles: of a pass of values, and of a TVKD step."""
    from benchmarks.passes import in_memory
    from benchmarks.training import prepare
    from prefdistill.models import logprobs

    def of_pass(elements: int) -> Numbers:
        with patch.dict(logprobs.TILE_ELEMENTS, {device: elements}):
            numbers = measure(in_memory, size.rounds, kinds=["values"], **size.passes)
        return {"seconds": numbers["seconds"], "GiB": numbers["gib"]}

    for elements in size.tiles:
        yield attempt(f"values, {elements / 2**20:g} Mi logits", lambda n=elements: of_pass(n))
    with _training_inputs(size) as directory:

        def of_step(elements: int) -> Numbers:
            with patch.object(logprobs, "TRAINING_TILE_ELEMENTS", elements):
                numbers = measure(prepare, size.rounds, **_training(size, directory, "tvkd"))
            return {"seconds": numbers["seconds"], "GiB": numbers["gib"]}

        for elements in size.training_tiles:
            yield attempt(f"TVKD step, {elements / 2**20:g} Mi logits", lambda n=elements: of_step(n))


def steps(size: Size, device: str) -> Iterator[Numbers]:
    """Training steps in bf16: MFU, memory, and DPO beside TRL's from the same start; the first round compiles."""
    from benchmarks.training import prepare

    variants: dict[str, tuple[str, Numbers]] = {
        "dpo": ("dpo", {}),
        "TRL's dpo": ("trl-dpo", {}),
        "tvkd": ("tvkd", {}),
        f"tvkd, {size.wide_batch} pairs": ("tvkd", {"batch": size.wide_batch}),
        "tvkd, layers compiled": ("tvkd", {"compiled": size.backend}),
    }
    done: dict[str, Numbers] = {}

    def row(name: str, variant: str, options: Numbers) -> Numbers:
        numbers = done[name] = measure(prepare, size.rounds, **_training(size, directory, variant) | options)
        same, base = options.get("batch", size.batch) == size.batch, done.get("dpo")
        gaps = base and [abs(a - b) for a, b in zip(numbers["first_losses"], base["first_losses"], strict=True)]
        return {
            "s/step": numbers["seconds"],
            "x dpo": numbers["seconds"] / base["seconds"] if same and base else None,
            "tokens/s": numbers["tokens"] / numbers["units"] / numbers["seconds"],
            "MFU": mfu(numbers["flops"] / numbers["units"], numbers["seconds"]),
            "GiB": numbers["gib"],
            "largest gap of losses to dpo": max(gaps) if gaps and variant == "trl-dpo" else None,
            "first round, s": numbers["first"],
        }

    with _training_inputs(size) as directory:
        for name, (variant, options) in variants.items():
            yield attempt(name, lambda name=name, v=variant, o=options: row(name, v, o))


def memory(size: Size, device: str) -> Iterator[Numbers]:
    """Peak memory against what `prefdistill plan` says."""
    import torch

    from benchmarks.plan import read, run

    shape, common = SHAPES[size.shape], (size.prompt, size.response, torch.get_num_threads())

    def row(numbers: Numbers) -> Numbers:
        planned, measured = sum(numbers["planned"].values()) / GIB, numbers["measured"] / GIB
        return {"planned GiB": planned, "measured GiB": measured, "planned / measured": planned / measured}

    cases = {"bf16": {}, "bf16, checkpointing": {"gradient_checkpointing": True}, "bf16, lora": {"lora": {"r": 16}}}
    for name, options in cases.items():
        yield attempt(f"dpo, {name}", lambda o=options: row(run(shape, {"bf16": True, **o}, *common)))
    for kind in ("values", "topk", "sampling"):
        yield attempt(f"{kind}, weights in bfloat16", lambda k=kind: row(read(shape, k, "bfloat16", False, *common)))


def _training(size: Size, directory: str, variant: str) -> Numbers:
    return {
        "variant": variant,
        "directory": directory,
        "shape": SHAPES[size.shape],
        "batch": size.batch,
        "steps": size.steps,
        "max_length": size.max_length,
        "bf16": True,
        "checkpointing": False,
    }


@contextlib.contextmanager
def _training_inputs(size: Size) -> Iterator[str]:
    """Make a directory with pairs, and the signals of a small random teacher and of the student's start."""
    from benchmarks.inputs import make
    from benchmarks.training import SKIPPED

    shape = SHAPES[size.shape]
    teacher = SHAPES["nano"] | {"vocab_size": shape["vocab_size"]}
    pairs = (SKIPPED + size.steps) * size.wide_batch
    with tempfile.TemporaryDirectory(prefix="prefdistill-benchmark-") as directory:
        make(directory, shape, teacher, pairs, None, size.max_length, 8, True, ["reference", "teacher"], [])
        yield directory


SECTIONS: dict[str, Callable[[Size, str], Iterator[Numbers]]] = {
    section.__name__: section for section in (tests, parity, kernels, extraction, reductions, tiles, steps, memory)
}


# ---- Reporting --------------------------------------


def cell(value: Any) -> str:
    """Format a value of a table."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return "" if value is None else str(value)


def section_table(rows: list[Numbers]) -> str:
    """Return the rows as a Markdown table with a column for each number, and below it why some have none."""
    header = list(dict.fromkeys(name for row in rows for name in row if name not in REASONS))
    notes = [f"- {row['variant']}: {why}: {row[why]}" for row in rows for why in REASONS if why in row]
    return "\n".join([table(header, [[cell(row.get(name)) for name in header] for row in rows]), *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: a test of this script")
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="of all numbers (default: %(default)s)")
    args = parser.parse_args()
    if unknown := [name for name in args.only.split(",") if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    import torch
    import transformers

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny runs the same code on the CPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    size = TINY if args.tiny else FULL
    print(
        f"{device_name()}, torch {torch.__version__}, transformers {transformers.__version__}; {size.shape}, bfloat16"
    )
    sections: dict[str, Numbers] = {}
    for name in args.only.split(","):
        start = time.perf_counter()
        rows: list[Numbers] = []
        try:
            rows += SECTIONS[name](size, args.device)
        except Exception as error:  # what a section prepares for all its rows
            traceback.print_exc()
            rows.append({"variant": "the section", "error": f"{type(error).__name__}: {error}"[:200]})
        sections[name] = {"rows": rows, "seconds": time.perf_counter() - start}
        print(f"\n### {name} ({sections[name]['seconds']:.0f} s)\n\n{SECTIONS[name].__doc__}\n\n{section_table(rows)}")
        sys.stdout.flush()
        write_report(args, "gpu", size=asdict(size), sections=sections)
    failed = [f"{name}: {row['variant']}" for name, one in sections.items() for row in one["rows"] if "error" in row]
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
