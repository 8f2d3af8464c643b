"""Training steps: this package against TRL on the same pairs, top-k distillation against full distributions.

    python -m benchmarks.training --shape tiny
    python -m benchmarks.training --shape llama-1b --bf16 --batch 2 --max-length 1024 --variants dpo,trl-dpo

All variants train the same random student on the same batches in the same order with the same optimizer. A round is a
call of `trainer.train()`; its first steps are not timed. Losses are compared to check that variants do the same work.

Tokens and FLOP are those of the pairs, with a prompt counted once per response. Padding that a trainer adds, or prompts
that it shares, show in its time; "in batches" is the number of tokens in its batches.

On a CPU, TRL also computes the logits of prompts and padding, which it skips on a GPU; `trl-dpo-compact` skips them on
a CPU too.
"""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.shapes import SHAPES, compile_layers, forward_flops, make_model, peak_flops

if TYPE_CHECKING:
    from transformers import Trainer

BASELINE = "dpo"
# variant -> method, signals
METHODS_OF = {
    "dpo": ("dpo", ("reference",)),
    "tvkd": ("tvkd", ("reference", "teacher")),
    "dckd": ("dckd", ("teacher",)),
    "adpa": ("adpa", ("own", "own_reference")),
}
DENSE = {"dckd-dense": ("chosen", "rejected"), "adpa-dense": ("student_response",)}
VARIANTS = ("dpo", "trl-dpo", "trl-dpo-compact", "tvkd", "dckd", "dckd-dense", "adpa", "adpa-dense")
SKIPPED = 2  # steps before the clock starts: allocation of the optimizer's state and the first batch


def prepare(
    variant: str,
    directory: str,
    shape: dict[str, Any],
    batch: int,
    steps: int,
    max_length: int,
    bf16: bool,
    checkpointing: bool,
    compiled: str | None = None,
) -> harness.Prepared:
    """Prepare a trainer; a round is a number of its steps."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from benchmarks.inputs import make_tokenizer

    tokenizer = make_tokenizer(shape["vocab_size"])
    model = make_model(shape, tokenizer, 0)
    if compiled:
        compile_layers(model, compiled)
    options = {
        "output_dir": str(Path(directory) / variant),
        "per_device_train_batch_size": batch,
        "max_steps": SKIPPED + steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": bf16,
        "gradient_checkpointing": checkpointing,
        "seed": 0,
    }
    start = harness.clock()
    trainer = _trainer(variant, Path(directory), model, options, tokenizer, max_length)
    facts = {"trainer_seconds": harness.clock() - start, "parameters": model.num_parameters()}
    ends: list[float] = []
    work: list[harness.Numbers] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            harness.synchronize()
            ends.append(harness.clock())

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = inner(rows)
        work.append(_work(rows, max_length, shape) | {"batch_tokens": batch["input_ids"].numel()})
        return batch

    inner, trainer.data_collator = trainer.data_collator, collate
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())

    def run() -> harness.Numbers:
        ends.clear()
        work.clear()
        trainer.train()
        timed = work[SKIPPED : SKIPPED + steps]
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        start = harness.clock()
        batches = sum(1 for _ in zip(ends, trainer.get_train_dataloader(), strict=False))
        return {
            "seconds": ends[-1] - ends[SKIPPED - 1],
            "units": steps,
            "data_seconds": (harness.clock() - start) * steps / batches,
            **{name: sum(numbers[name] for numbers in timed) for name in timed[0]},
            "losses": [entry["loss"] for entry in logged],
            "chosen_logps": [entry["logps/chosen"] for entry in logged if "logps/chosen" in entry],
        }

    return run, facts


def _trainer(
    variant: str, directory: Path, model: Any, options: dict[str, Any], tokenizer: Any, max_length: int
) -> "Trainer":
    from transformers import TrainingArguments

    from benchmarks.inputs import load
    from prefdistill import METHODS, PrefDistillTrainer
    from prefdistill.data.truncation import Truncation
    from prefdistill.signals import Signals

    data = load(str(directory))
    if variant in METHODS_OF:
        method, stores = METHODS_OF[variant]
        signals = [Signals.open(directory / store) for store in stores]
        return PrefDistillTrainer(
            model, METHODS[method](), TrainingArguments(**options), data, signals, tokenizer,
            truncation=Truncation(max_length),
        )  # fmt: skip
    if variant in DENSE:
        from benchmarks.dense import DenseTrainer

        method = variant.removesuffix("-dense")
        return DenseTrainer(
            model, method, TrainingArguments(**options), data, tokenizer, Truncation(max_length), directory
        )
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    if variant == "trl-dpo-compact":
        utils._use_triton = lambda device: True  # in TRL this only decides which positions reach the head
    return DPOTrainer(
        model,
        args=DPOConfig(**options, beta=0.1, max_length=max_length, precompute_ref_log_probs=True),
        train_dataset=data.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
    )


def _work(rows: list[dict[str, Any]], max_length: int, shape: dict[str, Any]) -> harness.Numbers:
    """Return the tokens of encoded pairs and of their responses, and the FLOP of training on them."""
    lengths, responses = [], 0
    for row in rows:
        prompt = len(row["prompt_ids"])
        for name in row.keys() - {"prompt_ids"}:
            if name.endswith("_ids"):
                lengths.append(min(max_length, prompt + len(row[name])))
                responses += lengths[-1] - prompt
    return {
        "tokens": sum(lengths),
        "response_tokens": responses,
        "flops": 3 * forward_flops(shape, lengths, responses),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=SHAPES, default="nano", help="of the teacher, with the student's tokens")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated subset of these (default: all)")
    parser.add_argument("--batch", type=int, default=2, help="pairs per step")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per round")
    parser.add_argument("--k", type=int, default=50, help="tokens per state in a top-k signal")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, weights in float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    harness.add_options(parser, shape="tiny", pairs=None, max_length=512)  # as many pairs as a round needs
    args = parser.parse_args()
    requested = args.variants.split(",")
    if unknown := [name for name in requested if name not in VARIANTS]:
        parser.error(f"unknown variant {unknown[0]!r}; known: {', '.join(VARIANTS)}")
    args.variants = [name for name in VARIANTS if name in requested or name == BASELINE]
    args.pairs = args.pairs or (SKIPPED + args.steps) * args.batch
    return args


def main() -> None:
    args = options()
    shape = SHAPES[args.shape]
    stores = {store for name in args.variants for store in METHODS_OF.get(name, ((), ()))[1]}
    common = {"shape": shape, "max_length": args.max_length, "bf16": args.bf16}
    with tempfile.TemporaryDirectory(prefix="prefdistill-benchmark-") as directory:
        inputs = {
            "directory": directory,
            "teacher": SHAPES[args.teacher] | {"vocab_size": shape["vocab_size"]},
            "pairs": args.pairs,
            "source": args.data,
            "k": args.k,
            "signals": sorted(stores),
            "dense": sorted({response for name in args.variants for response in DENSE.get(name, ())}),
        }
        each = {"directory": directory, "batch": args.batch, "steps": args.steps}
        each |= {"checkpointing": args.gradient_checkpointing, **common}
        make = ("benchmarks.inputs:make", {**inputs, **common})
        input_facts = harness.once(*make, threads=args.threads, timed_by=args.clock)
        function = "benchmarks.training:prepare"
        variants = [harness.Variant(name, function, {"variant": name, **each}) for name in args.variants]
        measured = harness.measure_all(args, variants)
    entries = harness.summary(measured, BASELINE)
    device = harness.device_name()
    peak = peak_flops(device) if args.bf16 else None
    for name, entry in entries.items():
        flops, seconds = measured[name].median("flops"), entry["seconds_per_unit"]
        entry["flops_per_second"] = flops / seconds if flops and seconds else None
        entry["mfu"] = entry["flops_per_second"] / peak if peak and entry["flops_per_second"] else None
        data = measured[name].median("data_seconds")
        entry["data_share"] = data / seconds if data is not None and seconds else None
    agreement = _agreement(measured)
    _print(args, device, measured, entries, input_facts, agreement)
    harness.write_report(args, "training", baseline=BASELINE, inputs=input_facts, variants=entries, agreement=agreement)


def _agreement(measured: dict[str, harness.Measured]) -> dict[str, Any]:
    """Return how far losses and log-probabilities of equivalent variants differ, from equal initial weights."""
    first = {name: one.warmup[0] for name, one in measured.items() if one.warmup and one.warmup[0]}
    agreement = {}
    for a, b in (("dpo", "trl-dpo"), ("dpo", "trl-dpo-compact"), ("dckd", "dckd-dense"), ("adpa", "adpa-dense")):
        if a in first and b in first:
            gaps = [abs(x - y) for x, y in zip(first[a]["losses"], first[b]["losses"], strict=True)]
            logps = zip(first[a]["chosen_logps"], first[b]["chosen_logps"], strict=False)
            agreement[f"{b} - {a}"] = {
                "losses": [first[b]["losses"], first[a]["losses"]],
                "first_step": gaps[0],
                "most": max(gaps),
                "chosen_logps": max((abs(x - y) for x, y in logps), default=None),
            }
    return agreement


def _print(
    args: argparse.Namespace,
    device: str,
    measured: dict[str, harness.Measured],
    entries: dict[str, harness.Numbers],
    input_facts: harness.Numbers,
    agreement: dict[str, Any],
) -> None:
    tokens, responses = (measured[BASELINE].median(name) or 0 for name in ("tokens", "response_tokens"))
    print(
        f"{args.shape}{', bf16' if args.bf16 else ''} on {device}: {args.batch} pairs a step, {tokens:.0f} tokens, "
        f"{responses:.0f} of them in responses; {args.rounds} rounds of {args.steps} steps\n"
    )
    header = ["variant", "s / step", f"x {BASELINE} (min..max)", "peak above loaded, GiB", f"x {BASELINE}"]
    header += ["loaded, GiB", "data, % of step", "tokens / s", "in batches", "MFU"]
    rows = [
        [
            name,
            f"{entry['seconds_per_unit']:.3f}",
            harness.ratio_text(entry["ratio"]),
            harness.gib(entry["memory"]["above_loaded"]),
            f"{entry['memory_ratio']:.2f}" if entry["memory_ratio"] else "",
            harness.gib(entry["memory"]["loaded"]),
            f"{100 * entry['data_share']:.2f}",
            f"{(measured[name].median('tokens') or 0) / entry['seconds_per_unit']:.0f}",
            f"{measured[name].median('batch_tokens') or 0:.0f}",
            f"{entry['mfu']:.3f}" if entry["mfu"] else "",
        ]
        if not entry["error"]
        else [name, "failed", *[""] * (len(header) - 2)]
        for name, entry in entries.items()
    ]
    print(harness.table(header, rows))
    state = 12 * measured[BASELINE].facts.get("parameters", 0)
    print(f"\nGradients and the optimizer's two moments of each weight are {harness.gib(state)} GiB of every peak.")
    seconds = {name: entry["facts"].get("trainer_seconds", 0) for name, entry in entries.items()}
    if "trl-dpo" in entries:
        dpo_seconds = input_facts["reference_seconds"] + seconds[BASELINE]
        print(
            f"From pairs to the first step, including the reference: dpo {dpo_seconds:.1f} s, "
            f"trl-dpo {seconds['trl-dpo']:.1f} s."
        )
    for name, gap in agreement.items():
        logps = "" if gap["chosen_logps"] is None else f", log-probabilities {gap['chosen_logps']:.1e}"
        print(f"{name}: losses differ by {gap['first_step']:.1e} at step 1, {gap['most']:.1e} at most{logps}")


if __name__ == "__main__":
    main()
