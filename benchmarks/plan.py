"""What `prefdistill plan` says of steps against real ones: peak memory, and operations per second.

    MALLOC_MMAP_THRESHOLD_=1048576 python -m benchmarks.plan --shape tiny --threads 1

Every case trains, reads signals or samples in a process of its own, on pairs of one length, so that the longest row is
every row. Seconds are CPU time, on a GPU wall time. The allocator setting makes glibc return freed tiles, which would
count as used.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import quiet
from benchmarks.shapes import SHAPES

TRAINING: dict[str, dict[str, Any]] = {
    "float32": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": {"r": 16}},
    "bf16": {"bf16": True},
}
ONE = {"batch_size": 2}  # pairs in a step: one micro-batch
TRAINING |= {f"{name} one-micro-batch": options | ONE for name, options in TRAINING.items()}
TRL = {"trl-dpo": {}, "trl-dpo lora": {"lora": {"r": 16}}}  # the teacher's DPO
TRAINING |= TRL
# kind of signals or "sampling", dtype of the weights, and whether bf16 autocast is on
READING = {
    f"{kind} {name}": (kind, dtype, autocast)
    for kind in ("values", "logps", "topk", "sampling")
    for name, dtype, autocast in (
        ("float32", "float32", False),
        ("bfloat16", "bfloat16", False),
        ("autocast", "float32", True),
    )
    if kind == "logps" or not autocast
}
CASES = (*TRAINING, *READING)
STEPS, PAIRS = 3, 2  # steps of a run, the first of which is not timed; pairs in a micro-batch, of which a step has
# two unless the case says otherwise
READ_PAIRS, SAMPLED = 6, 16  # pairs and responses in a batch


def run(
    shape: dict[str, Any], training: dict[str, Any], prompt: int, response: int, threads: int, *, trl: bool = False
) -> dict[str, Any]:
    """Train in this process; return planned and measured bytes, operations, and the seconds of a step: of CPU time, or
    on a GPU of wall time.

    Args:
        trl: train DPO with TRL, beside a reference unless it trains an adapter.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.kernels import chunked_logprob

    from benchmarks import harness
    from benchmarks.inputs import make_tokenizer
    from benchmarks.shapes import empty_model, make_model
    from prefdistill.data.encode import encode_pairs
    from prefdistill.data.truncation import Truncation
    from prefdistill.experiment.flops import Text, forward_flops, training_flops
    from prefdistill.experiment.memory import training_memory
    from prefdistill.methods import METHODS
    from prefdistill.signals.live import LiveTeacher
    from prefdistill.training.arguments import adapter_config, training_arguments
    from prefdistill.training.factory import trl_trainer
    from prefdistill.training.options import Training
    from prefdistill.training.trainer import PrefDistillTrainer

    torch.set_num_threads(threads)
    options = Training.model_validate(
        {"max_steps": STEPS, "batch_size": 2 * PAIRS, "micro_batch_size": PAIRS, "save_steps": 1000} | training
    )
    tokenizer = make_tokenizer(shape["vocab_size"])
    rows = Dataset.from_list([_pair(prompt, response)] * (options.batch_size * STEPS))
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

    def with_trl(out: str) -> Any:
        reference = None if options.lora else make_model(shape, tokenizer, 0).requires_grad_(False)
        models = {"model": model, "ref_model": reference}
        trainer = trl_trainer(
            (DPOConfig, DPOTrainer),
            lambda: models,
            rows.select([0]),
            tokenizer,
            options,
            Path(out),
            seed=0,
            data_seed=0,
            max_length=None,
        )
        trainer.train_dataset = encode_pairs(rows, tokenizer, Truncation())[0].select_columns(
            ["prompt_ids", "chosen_ids", "rejected_ids"]
        )
        trainer.add_callback(Clock())
        return trainer

    def with_own(out: str) -> Any:
        return PrefDistillTrainer(
            model,
            METHODS["dpo"](),
            training_arguments(options, Path(out), seed=0, data_seed=0),
            rows,
            [LiveTeacher(model, "reference")],
            tokenizer,
            peft_config=adapter_config(options),
            callbacks=[Clock()],
        )

    # on CPUs TRL holds about eight copies of a tile of logits, on GPUs one
    tiles = patch.object(chunked_logprob, "TOKEN_CHUNK_SIZE", chunked_logprob.TOKEN_CHUNK_SIZE // 8)
    with tempfile.TemporaryDirectory() as out, tiles if trl and not torch.cuda.is_available() else nullcontext():
        trainer = (with_trl if trl else with_own)(out)
        encoded = trainer.train_dataset[0]
        lengths = [len(encoded[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")]
        trainer.train()
        peak = harness.peak() - before
    empty, text = empty_model(shape), Text(lengths[0], lengths[1], 2, shared=not trl)
    held = training_memory(
        empty,
        options,
        "float32",
        sum(lengths[:2]) if trl else sum(lengths),
        scored=sum(lengths[1:]) / text.tokens,
        sequences=2 if trl else 1,
        reference=trl and not options.lora,
    )
    of_reference = sum(forward_flops(empty, text)) if trl else 0
    flops = options.batch_size * (training_flops(empty, options, text) + of_reference)
    step = (seconds[-1] - seconds[1]) / (STEPS - 1)
    return {"planned": held.parts(), "measured": peak, "flops": flops, "seconds": step}


def read(
    shape: dict[str, Any], kind: str, dtype: str, bf16: bool, prompt: int, response: int, threads: int
) -> dict[str, Any]:
    """Read signals of a kind in this process, or sample; return what `run` does, and the operations that PyTorch
    counts, with those that are planned of the same: without attention, which its counter does not see when it is fused.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import harness
    from benchmarks.inputs import make_tokenizer
    from benchmarks.shapes import make_model
    from prefdistill.experiment.flops import attention_flops, forward_flops
    from prefdistill.models import logprobs

    torch.set_num_threads(threads)
    clock = harness.CLOCKS["wall" if torch.cuda.is_available() else "cpu"]

    def of(shape: dict[str, Any], prompt: int, response: int) -> dict[str, Any]:
        tokenizer = make_tokenizer(shape["vocab_size"])
        before = harness.settle()
        model = make_model(shape, tokenizer, 0, getattr(torch, dtype)).eval()
        if kind == "sampling":
            once, held, text, rows = _sampling(model, tokenizer, dtype, prompt, response)
        else:
            once, held, text, rows = _reading(model, tokenizer, kind, dtype, bf16, prompt, response)
        with FlopCounterMode(display=False) as counter:
            once()
        harness.settle()
        start = clock()
        once()
        harness.synchronize()
        seconds = clock() - start
        flops = rows * sum(forward_flops(model, text))
        return {
            "planned": held.parts(),
            "measured": harness.peak() - before,
            "flops": flops,
            "seconds": seconds,
            "counted": (flops - rows * attention_flops(model, text)) / counter.get_total_flops(),
        }

    tiles = {"cpu": logprobs.TILE_ELEMENTS["other"], "other": logprobs.TILE_ELEMENTS["other"]}
    with patch.multiple(logprobs, TILE_ELEMENTS=tiles, ROWS_ELEMENTS=2**40):  # as on a GPU, which is planned
        of(SHAPES["nano"], 8, 8)  # loads the code and the tables of libraries
        return of(shape, prompt, response)


def _reading(
    model: Any, tokenizer: Any, kind: str, dtype: str, bf16: bool, prompt: int, response: int
) -> tuple[Callable[[], Any], Any, Any, int]:
    """Return what reads a batch of pairs of one length, the memory that is planned, and the text and number of rows."""
    from datasets import Dataset

    from prefdistill.data.batches import layout_for
    from prefdistill.data.encode import encode_pairs
    from prefdistill.data.truncation import Truncation
    from prefdistill.experiment.flops import Text
    from prefdistill.experiment.memory import reading_memory, weight_bytes
    from prefdistill.signals.scoring import score_pairs

    encoded, _ = encode_pairs(Dataset.from_list([_pair(prompt, response)] * READ_PAIRS), tokenizer, Truncation())
    text = Text(*(len(encoded[0][f"{part}_ids"]) for part in ("prompt", "chosen")), 2)
    row, layout = round(text.tokens), layout_for(model)
    held = reading_memory(
        model,
        weight_bytes(model, dtype),
        READ_PAIRS * row,
        row,
        dtype,
        scored=text.responses * text.response / row,
        bf16=bf16,
        k=50 if kind == "topk" else 0,
    )

    def once() -> None:
        score_pairs(model, encoded, tokenizer, (kind,), bf16=bf16, batch_tokens=READ_PAIRS * row, layout=layout)

    return once, held, text, READ_PAIRS


def _sampling(
    model: Any, tokenizer: Any, dtype: str, prompt: int, response: int
) -> tuple[Callable[[], Any], Any, Any, int]:
    """Return the same of sampling a batch of responses to prompts of one length."""
    from prefdistill.core.progress import Progress
    from prefdistill.experiment.flops import Text
    from prefdistill.experiment.memory import sampling_memory, weight_bytes
    from prefdistill.sampling.engines import TransformersEngine
    from prefdistill.sampling.options import Sampling

    engine = TransformersEngine(model, tokenizer, Sampling(batch_size=SAMPLED, max_new_tokens=response))
    ids = [[tokenizer.convert_tokens_to_ids("w1")] * prompt] * SAMPLED

    def once() -> None:
        engine.generate(ids, [response] * SAMPLED, 0, Progress("sampling", 0, shown=False))

    held = sampling_memory(model, weight_bytes(model, dtype), SAMPLED, prompt, response, dtype)
    return once, held, Text(prompt, response), SAMPLED


def _pair(prompt: int, response: int) -> dict[str, Any]:
    columns = {"prompt": ("user", prompt), "chosen": ("assistant", response), "rejected": ("assistant", response)}
    return {name: [{"role": role, "content": " ".join(["w1"] * n)}] for name, (role, n) in columns.items()}


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one case in this process."""
    common = (args.prompt, args.response, args.threads)
    if case in TRAINING:
        return run(SHAPES[args.shape], TRAINING[case], *common, trl=case in TRL)
    return read(SHAPES[args.shape], *READING[case], *common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas (default: all)")
    parser.add_argument("--json", action="store_true", help="run one case in this process, and print JSON")
    args = parser.parse_args()
    if args.json:
        quiet()
        print(json.dumps(measure(args.cases, args)))
        return
    print("case                     planned MiB  measured MiB  planned/measured  GFLOP/s  operations planned/counted")
    for case in args.cases.split(","):
        command = [sys.executable, "-m", "benchmarks.plan", *sys.argv[1:], "--cases", case, "--json"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        result = json.loads(lines[-1])
        planned, measured = sum(result["planned"].values()), result["measured"]
        speed = result["flops"] / result["seconds"] / 1e9
        counted = f"{result['counted']:27.3f}" if "counted" in result else ""
        print(
            f"{case:24} {planned / 2**20:11,.0f}  {measured / 2**20:12,.0f}  {planned / measured:16.2f}  {speed:7.1f}"
            f" {counted}",
            flush=True,
        )


if __name__ == "__main__":
    main()
