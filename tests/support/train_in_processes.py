"""Train methods with each way to cut a batch, and write the results; test_processes.py runs it with torchrun."""

import itertools
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from prefdistill import METHODS, PrefDistillTrainer, Signals, load_pairs

torch.set_num_threads(1)
root, out = Path(sys.argv[1]), Path(sys.argv[2])
splits = [tuple(map(int, split.split("x"))) for split in sys.argv[3:]]  # rows of a micro-batch x accumulation
SIGNALS = [Signals.open(root / "teacher"), Signals.open(root / "reference")]


def trained(name, split, signals, *, steps=5, resume=False, **more):
    """Train a method, from its last checkpoint if asked."""
    micro, accumulation = split
    trainer = PrefDistillTrainer(
        model=AutoModelForCausalLM.from_pretrained(root / "model"),
        method=METHODS[name](),
        args=TrainingArguments(
            f"{out}-{micro}x{accumulation}",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=micro,
            max_steps=steps,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            seed=3,
            **{"save_strategy": "no"} | more,
        ),
        train_dataset=load_pairs(str(root / "pairs.jsonl")),
        signals=signals,
        processing_class=AutoTokenizer.from_pretrained(root / "model"),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


results = {}
for split, name in itertools.product(splits, ("tvkd", "dckd", "simpo")):
    if name == "simpo":  # resumed at the start of the epoch, whatever its step
        trained(name, split, [], steps=1, save_strategy="steps", save_steps=1)
        trainer = trained(name, split, [], resume=True, ignore_data_skip=True)
    else:
        trainer = trained(name, split, SIGNALS)
    evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    weights = {name: p.detach().double().sum().item() for name, p in trainer.model.named_parameters()}
    result = {"history": trainer.state.log_history, "weights": weights, "evaluated": evaluated}
    results.setdefault("x".join(map(str, split)), {})[name] = result
if trainer.is_world_process_zero():
    out.write_text(json.dumps(results))
