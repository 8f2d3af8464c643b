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
results = {}
for (micro, accumulation), name in itertools.product(splits, ("tvkd", "dckd")):
    trainer = PrefDistillTrainer(
        model=AutoModelForCausalLM.from_pretrained(root / "model"),
        method=METHODS[name](),
        args=TrainingArguments(
            str(root / "out"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=micro,
            max_steps=5,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=3,
        ),
        train_dataset=load_pairs(str(root / "pairs.jsonl")),
        signals=[Signals.open(root / "teacher"), Signals.open(root / "reference")],
        processing_class=AutoTokenizer.from_pretrained(root / "model"),
    )
    trainer.train()
    evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    weights = {name: p.detach().double().sum().item() for name, p in trainer.model.named_parameters()}
    result = {"history": trainer.state.log_history, "weights": weights, "evaluated": evaluated}
    results.setdefault(f"{micro}x{accumulation}", {})[name] = result
if trainer.is_world_process_zero():
    out.write_text(json.dumps(results))
