"""Train methods with `fit`, whatever the launcher has set up; test_sharded.py runs it on one process and with torchrun.

Arguments: the directory with model, pairs and signals; where to write; a JSON object of name -> settings of a training.
"""

import json
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from prefdistill import METHODS, Signals, load_pairs
from prefdistill.core.processes import processes
from prefdistill.models.load import load_model, load_tokenizer
from prefdistill.models.sharded import is_sharded, local_part
from prefdistill.training.engines import engine_of
from prefdistill.training.factory import make_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import Training

OPTIONS = {
    "batch_size": 12,
    "micro_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "warmup": 0,
    "schedule": "constant",
    "logging_steps": 1,
    "save_steps": 100,
}


class Parts(TrainerCallback):
    """Note what this process holds of the weights when training begins; interrupt it after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weights = list(model.parameters())
        self.sharded = is_sharded(model)
        self.local = sum(local_part(weight).numel() for weight in weights)
        self.kinds = sorted({type(weight.data).__name__ for weight in weights})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_after and processes().is_main_process:
            signal.raise_signal(signal.SIGINT)


def train(root: Path, out: Path, method: str, *, stop_after=None, model="model", stores=None, **options) -> dict:
    """Train one method; return its log, the engine, and the numbers of weights of each process."""
    names = sorted(path.name for path in (root / "signals").iterdir()) if stores is None else stores
    options, loss = OPTIONS | options, METHODS[method]()
    trainer = make_trainer(
        loss,
        lambda: load_model(str(root / model), dtype="float32"),
        load_pairs(str(root / "pairs.jsonl"), responses=loss.responses, reads=loss.columns),
        load_tokenizer(str(root / model)),
        Training.model_validate(options),
        out,
        signals=[Signals.open(root / "signals" / name) for name in names],
        seed=3,
    )
    parts = Parts(stop_after)
    trainer.add_callback(parts)
    try:
        fit(trainer, out, method)
    except KeyboardInterrupt:
        assert stop_after is not None
    return {"history": trainer.state.log_history, "engine": engine_of(trainer)} | {
        name: getattr(parts, name) for name in ("sharded", "local", "kinds") if hasattr(parts, name)
    }


def main() -> None:
    torch.set_num_threads(1)
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    results = {
        name: train(root, out / settings.pop("out", name), **settings)
        for name, settings in json.loads(sys.argv[3]).items()
    }
    (out / f"results-{processes().process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
