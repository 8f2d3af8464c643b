"""What `prefdistill plan` says of a training against a real one: peak memory, and operations per second.

    MALLOC_MMAP_THRESHOLD_=1048576 python -m benchmarks.plan --shape tiny --threads 1

Every case trains in a process of its own, on pairs of one length, so that the longest row is every row. Seconds are CPU
time, on a GPU wall time. The allocator setting makes glibc return freed tiles, which would count as used.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import quiet
from benchmarks.shapes import SHAPES

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": {"r": 16}},
    "bf16": {"bf16": True},
}
STEPS, PAIRS = 3, 2  # steps of a run, the first of which is not timed; pairs in a micro-batch, of which a step has two


def run(shape: dict[str, Any], training: dict[str, Any], prompt: int, response: int, threads: int) -> dict[str, Any]:
    """Train in this process; return planned and measured bytes, operations, and the seconds of a step: of CPU time, or
    on a GPU of wall time."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from benchmarks import harness
    from benchmarks.inputs import make_tokenizer
    from benchmarks.shapes import empty_model, make_model
    from prefdistill.experiment.flops import Text, training_flops
    from prefdistill.experiment.memory import training_memory
    from prefdistill.methods import METHODS
    from prefdistill.signals.live import LiveTeacher
    from prefdistill.training.arguments import adapter_config, training_arguments
    from prefdistill.training.options import Training
    from prefdistill.training.trainer import PrefDistillTrainer

    torch.set_num_threads(threads)
    options = Training.model_validate(
        {"max_steps": STEPS, "batch_size": 2 * PAIRS, "micro_batch_size": PAIRS, "save_steps": 1000} | training
    )
    tokenizer = make_tokenizer(shape["vocab_size"])
    columns = {"prompt": ("user", prompt), "chosen": ("assistant", response), "rejected": ("assistant", response)}
    row = {name: [{"role": role, "content": " ".join(["w1"] * n)}] for name, (role, n) in columns.items()}
    rows = Dataset.from_list([row] * (2 * PAIRS * STEPS))
    before = harness.settle()
    clock = harness.CLOCKS["wall" if torch.cuda.is_available() else "cpu"]
    model = make_model(shape, tokenizer, 0)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not seconds:  # the reference has been read
                harness.settle()
            harness.synchronize()
            seconds.append(clock())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            harness.synchronize()
            seconds.append(clock())

    with tempfile.TemporaryDirectory() as out:
        trainer = PrefDistillTrainer(
            model,
            METHODS["dpo"](),
            training_arguments(options, Path(out), seed=0, data_seed=0),
            rows,
            [LiveTeacher(model, "reference")],
            tokenizer,
            peft_config=adapter_config(options),
            callbacks=[Clock()],
        )
        encoded = trainer.train_dataset[0]
        lengths = [len(encoded[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")]
        trainer.train()
        peak = harness.peak() - before
    empty = empty_model(shape)
    held = training_memory(empty, options, "float32", sum(lengths), scored=sum(lengths[1:]) / sum(lengths))
    flops = 2 * PAIRS * training_flops(empty, options, Text(lengths[0], lengths[1], 2))
    step = (seconds[-1] - seconds[1]) / (STEPS - 1)
    return {"planned": held.parts(), "measured": peak, "flops": flops, "seconds": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, help="run one case and print JSON")
    args = parser.parse_args()
    if args.case:
        quiet()
        print(json.dumps(run(SHAPES[args.shape], CASES[args.case], args.prompt, args.response, args.threads)))
        return
    print("case           planned MiB  measured MiB  planned/measured  GFLOP/s")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.plan", *sys.argv[1:], "--case", case]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        result = json.loads(lines[-1])
        planned, measured = sum(result["planned"].values()), result["measured"]
        speed = result["flops"] / result["seconds"] / 1e9
        print(
            f"{case:14} {planned / 2**20:11,.0f}  {measured / 2**20:12,.0f}  {planned / measured:16.2f}  {speed:7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
