"""Train methods with `fit`, whatever the launcher has set up; test_sharded.py runs it on one process and with torchrun.

Arguments: the directory with model, pairs and signals; where to write; a JSON object of name -> settings of a training.
"""

import json
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import TrainerCallback

from prefdistill import METHODS, Signals, load_pairs
from prefdistill.core.processes import processes
from prefdistill.data.truncation import Truncation
from prefdistill.models.load import load_model, load_tokenizer
from prefdistill.models.sharded import is_sharded, local_part
from prefdistill.training import trl
from prefdistill.training.engines import engine_of
from prefdistill.training.factory import make_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import DPOTraining, Training

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
        self.keeps_copies = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.get_decoder().layers[-1].register_forward_pre_hook(self.before_layer)
        weights = list(model.parameters())
        self.sharded = is_sharded(model)
        self.local = sum(local_part(weight).numel() for weight in weights)
        self.kinds = sorted({type(weight.data).__name__ for weight in weights})

    def before_layer(self, *_):
        """Note whether the copies in 16 bits of the weights of all layers are kept until the pass ends."""
        self.keeps_copies |= torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()

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
        name: getattr(parts, name) for name in ("sharded", "local", "kinds", "keeps_copies") if hasattr(parts, name)
    }


def reference_of_trl(root: Path, out: Path) -> dict:
    """Return the classes of the layers of the reference of TRL's DPO, and how many of its weights are trainable."""
    reference_about = {}

    def note(trainer, *_, **__):
        reference = trainer.ref_model
        reference_about["layers"] = [type(layer).__name__ for layer in reference.model.layers]
        reference_about["trainable"] = sum(weight.requires_grad for weight in reference.parameters())

    model, rows = str(root / "model"), load_pairs(str(root / "pairs.jsonl"))
    training = DPOTraining.model_validate(OPTIONS)
    with patch.object(trl, "fit", note):
        trl.train_with_trl(model, rows, load_tokenizer(model), training, out, truncation=Truncation(), what="dpo")
    return reference_about


def main() -> None:
    torch.set_num_threads(1)
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    results = {
        name: (
            reference_of_trl(root, out / name)
            if settings["method"] == "dpo of TRL"
            else train(root, out / settings.pop("out", name), **settings)
        )
        for name, settings in json.loads(sys.argv[3]).items()
    }
    (out / f"results-{processes().process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
