"""`prefdistill sft`, `dpo` and `distill`: trainings on their own."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from prefdistill.cli.flags import key_values
from prefdistill.cli.output import show
from prefdistill.cli.verbs.common import PAIRS, Overridable
from prefdistill.core.errors import UserError
from prefdistill.core.options import REPEATED, Seeded, validate
from prefdistill.data.options import Columns, Lengths
from prefdistill.models.options import Dtype, Loading
from prefdistill.training.options import DPOTraining, Training

WHERE = "command line"


class TrainFlags(Overridable, Loading, Seeded, Columns):
    data: str = Field(description=PAIRS)
    out: Path = Field(description="Directory for the trained model.")
    dtype: Dtype = Loading.redefault("dtype", "float32")
    verify: bool = Training.redefault("verify", True)

    def training_options(self, *more: str) -> dict[str, Any]:
        """The options of the training, and of its method, on the command line."""
        return key_values(self.overrides, "training", *more) | ({} if self.verify else {"verify": False})


class SFTFlags(TrainFlags):
    model: str = Field(description="Hub name or directory to start from.")
    data: str = Field(description="Rows with messages, prompt and completion, or pairs (the chosen).")
    max_length: PositiveInt = Lengths.redefault("max_length", 1024)


class DPOFlags(TrainFlags):
    model: str = Field(description="Hub name or directory to start from; also the reference.")
    max_length: PositiveInt = Lengths.redefault("max_length", 1024)


class DistillFlags(TrainFlags):
    student: str = Field(description="Hub name or directory of the student's start.")
    method: str = Field(
        "tvkd", description="A method, see docs/methods.md, or the dotted name of one of another package."
    )
    signals: Annotated[tuple[Path, ...], REPEATED] = Field((), description="Signal store; repeat for each.")
    max_length: PositiveInt | None = Field(
        None, description="Only for methods without signals (1024); others truncate as their signals did."
    )
    max_prompt_length: PositiveInt | None = Lengths.redefault("max_prompt_length", None)


def sft(options: SFTFlags) -> dict[str, Any]:
    """Fine-tune a model through TRL: a teacher's or a student's start. KEY=VALUE sets training options.

    Example: prefdistill sft --model my/base --data sft.jsonl --out models/sft training.learning_rate=2e-5 epochs=3
    """
    training = validate(Training, options.training_options(), WHERE)
    from prefdistill.data.fingerprint import demonstrations_fingerprint
    from prefdistill.data.load import load_messages

    rows = load_messages(options.data, **options.part(Columns))
    return _teach("sft", options, rows, demonstrations_fingerprint(rows), training)


def dpo(options: DPOFlags) -> dict[str, Any]:
    """Train a teacher with DPO through TRL. KEY=VALUE sets training options.

    Example: prefdistill dpo --model models/teacher-sft --data pairs.jsonl --out models/teacher beta=0.01
    training.learning_rate=1e-6
    """
    training = validate(DPOTraining, options.training_options(), WHERE)
    from prefdistill.data.fingerprint import data_fingerprint
    from prefdistill.data.load import load_pairs

    pairs = load_pairs(options.data, **options.part(Columns))
    return _teach("dpo", options, pairs, data_fingerprint(pairs), training)


def distill(options: DistillFlags) -> dict[str, Any]:
    """Train the student with a method. KEY=VALUE sets the method's options and the training's.

    Example: prefdistill distill --student my/student --data pairs.jsonl --signals signals/teacher --signals
    signals/reference --method tvkd --out models/tvkd alpha=-0.4 standardize=true beta=0.1
    training.learning_rate=1e-6
    """
    name, method, training = method_and_training(options)
    from prefdistill.core.files import file_digest
    from prefdistill.core.progress import say
    from prefdistill.data.fingerprint import data_fingerprint
    from prefdistill.data.load import load_pairs
    from prefdistill.data.numbers import columns_digest
    from prefdistill.data.truncation import Truncation
    from prefdistill.evaluation.shaping import outweighing
    from prefdistill.models.adapters import check_start
    from prefdistill.models.load import load_model, load_tokenizer
    from prefdistill.signals import Signals
    from prefdistill.training.factory import check_training, make_trainer
    from prefdistill.training.loop import fit

    check_training(training)
    check_start(options.student, options.dtype)
    lengths = (options.max_length, options.max_prompt_length)
    truncation = Truncation(lengths[0] or 1024, lengths[1]) if any(lengths) else None
    pairs = load_pairs(options.data, responses=method.responses, reads=method.columns, **options.part(Columns))
    stores = [Signals.open(path) for path in options.signals]
    tokenizer = load_tokenizer(options.student, trust_remote_code=options.trust_remote_code)

    def make(directory: Path) -> None:
        trainer = make_trainer(
            method,
            lambda: load_model(options.student, **options.part(Loading)),
            pairs,
            tokenizer,
            training,
            directory,
            signals=stores,
            truncation=truncation,
            seed=options.seed,
        )
        fit(trainer, directory, name, verify=training.verify)
        if text := outweighing(name, trainer.state.log_history):
            say(f"warning: {text}")

    request = {
        "trust_remote_code": options.trust_remote_code,
        "data": data_fingerprint(pairs, method.responses),
        **({"columns": columns_digest(pairs, method.columns)} if method.columns else {}),
        "method": name,
        "options": repr(method),
        "training": training.cache_key(),
        "signals": [file_digest(path / "manifest.json") for path in options.signals],
        "truncation": str(truncation),
        "seed": options.seed,
        "dtype": options.dtype,
    }
    return _stage(f"distill {name}", options.out, options.student, request, make)


def method_and_training(options: DistillFlags) -> tuple[str, Any, Training]:
    """The name of the method, the method and the training; every mistake in either is named at once."""
    from prefdistill.methods import METHODS, make_method, method_options

    raw = options.training_options("method")
    name, known = METHODS.canonical(options.method), method_options(options.method)
    messages: list[str] = []
    method = training = None
    try:
        method = make_method(name, {key: value for key, value in raw.items() if key in known})
    except UserError as error:
        messages += error.messages
    try:
        training = validate(Training, {key: value for key, value in raw.items() if key not in known}, "", known)
    except UserError as error:
        messages += error.messages
    if messages:
        raise UserError(*messages, where=WHERE)
    assert training is not None
    return name, method, training


def _teach(kind: str, options: Any, rows: Any, fingerprint: str, training: Training) -> dict[str, Any]:
    """Run one of TRL's trainings as a stage."""
    from prefdistill.data.truncation import Truncation
    from prefdistill.models.adapters import check_start
    from prefdistill.models.load import load_tokenizer
    from prefdistill.training.trl import check_trl_training, train_with_trl

    check_trl_training(training)
    check_start(options.model, options.dtype)
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    loading = {**options.part(Loading), "seed": options.seed}
    request = {"data": fingerprint, "training": training.cache_key(), **loading, "max_length": options.max_length}

    def make(directory: Path) -> None:
        truncation = Truncation(options.max_length)
        train_with_trl(options.model, rows, tokenizer, training, directory, truncation=truncation, what=kind, **loading)

    return _stage(kind, options.out, options.model, request, make)


def _stage(name: str, out: Path, model: str, request: dict[str, Any], make: Any) -> dict[str, Any]:
    """Run a training of `model` as a stage: reused if finished, resumed if interrupted."""
    from prefdistill.core.lock import locked_together
    from prefdistill.core.stages import run_stage
    from prefdistill.experiment.inputs import Sources

    sources = Sources()
    with locked_together(out):
        stage = run_stage(name, out, {"model": sources.model_key(model), **request}, sources.unchanged([model], make))
    show(f"{name}: {out}")
    return {"out": str(out), "seconds": stage.seconds, "reused": stage.reused}
