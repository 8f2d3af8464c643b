"""Train methods in any number of processes and write their results; test_processes.py runs it with torchrun."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from prefdistill import METHODS, PrefDistillTrainer, Signals, load_pairs

torch.set_num_threads(1)
root, micro, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
results = {}
for name in ("tvkd", "dckd"):
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
    results[name] = {"history": trainer.state.log_history, "weights": weights, "evaluated": evaluated}
if trainer.is_world_process_zero():
    Path(sys.argv[3]).write_text(json.dumps(results))
