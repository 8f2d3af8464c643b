"""Recipes: what a run is made of, checked before anything starts. Unknown keys and wrong types are errors."""

import copy
import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

from prefdistill.errors import UserError
from prefdistill.text import surrogate

if TYPE_CHECKING:
    from peft import LoraConfig

Options = dict[str, JsonValue]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DIRECTORY_NAME = re.compile(r"\w[\w.+-]*")
UNION_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")  # in pydantic's path to a value, but no key
OPTIMIZERS_OF_A_MODEL = ("galore", "lomo", "adalomo", "apollo")  # they cannot be made without one
RESERVED_NAMES = ("teacher", "start")  # evaluated beside the methods


class _Loader(yaml.SafeLoader):
    """YAML 1.1, and numbers such as 1e-6, which it takes for words. A key that stands twice is an error: it would hide
    what is said first. So is half a character, which no result could be written with."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:  # before merged keys are among them, which may stand there too
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if surrogate(value) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{value!r} holds half a character", node.start_mark)
        return value


def _number(loader: _Loader, node: Any) -> Any:
    """Of YAML 1.1, where 010 is eight and 1:30 ninety: neither is what its writer meant."""
    if re.match(r"[-+]?0[\d_]", node.value) or ":" in node.value:
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.value} is no plain number; quote it if it is none at all", node.start_mark
        )
    kind = node.tag.rpartition(":")[2]
    return getattr(loader, f"construct_yaml_{kind}")(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` would take for numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Lora(Section):
    """Low-rank adapters instead of full fine-tuning."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"

    def config(self) -> "LoraConfig":
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )


class Training(Section):
    """How one model is trained; `arguments` takes anything else `transformers.TrainingArguments` knows."""

    learning_rate: PositiveFloat = 5e-7
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 64  # rows per optimiser step, over all processes and accumulation steps
    micro_batch_size: PositiveInt = 4  # rows per process in memory at once
    warmup: float = Field(0.1, ge=0)  # share of the steps, or steps if 1 or more
    schedule: str = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    bf16: bool = False
    gradient_checkpointing: bool = False
    logging_steps: PositiveInt = 10
    save_steps: PositiveInt = 200
    report_to: list[str] = []
    lora: Lora | None = None
    arguments: Options = {}

    @model_validator(mode="after")
    def _no_keys(self) -> "Training":
        for name, value in self.arguments.items():
            if name.endswith("hub_token") and value is not None:
                raise ValueError(f"arguments.{name} would be in the results; set HF_TOKEN in the environment instead")
        if "resume_from_checkpoint" in self.arguments:
            raise ValueError("arguments.resume_from_checkpoint has no effect: a run goes on from its last checkpoint")
        limit = self.arguments.get("save_total_limit")
        if isinstance(limit, int) and limit < 1:
            raise ValueError(f"arguments.save_total_limit={limit}: one checkpoint is kept at least; give 1 or more")
        if self.arguments.get("save_only_model"):
            raise ValueError("arguments.save_only_model: a run could not go on from such a checkpoint; leave it out")
        return self

    def peft_config(self) -> "LoraConfig | None":
        return self.lora.config() if self.lora else None

    def essence(self) -> Options:
        """What the trained weights depend on: everything but how the training is watched."""
        return self.model_dump(exclude={"report_to", "logging_steps", "save_steps"})

    def to_arguments(self, out: Path, *, seed: int, data_seed: int, kind: type[Any] | None = None, **more: Any) -> Any:
        """The matching `TrainingArguments` (or `kind` of them, such as TRL's SFTConfig)."""
        import torch
        from transformers import TrainingArguments

        from prefdistill.stages import processes

        team = processes().num_processes
        accelerator = torch.accelerator.is_available()
        micro = min(self.micro_batch_size, self.batch_size)
        if self.batch_size % (micro * team):
            raise UserError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size x processes = "
                f"{micro} x {team}; change one of them"
            )
        options: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps or -1,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": self.batch_size // (micro * team),
            "warmup_steps": self.warmup,
            "lr_scheduler_type": self.schedule,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "bf16": self.bf16,
            "use_cpu": not accelerator,  # bf16 on a CPU is refused without
            "gradient_checkpointing": self.gradient_checkpointing,
            "logging_steps": self.logging_steps,
            "save_steps": self.save_steps,
            "report_to": self.report_to or "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": accelerator,
            "seed": seed,
            "data_seed": data_seed,
            **more,
            **self.arguments,
        }
        kind = kind or TrainingArguments
        _check_numbers(kind, self.arguments)
        try:
            arguments = kind(output_dir=str(out), **options)
            _try_optimizer(arguments)
        except (TypeError, ValueError, ImportError) as error:
            raise UserError(f"training arguments: {error}".splitlines()[0]) from error
        return arguments


def _check_numbers(kind: type[Any], arguments: Options) -> None:
    """Whether what `kind`, a dataclass, says to be a number is one: it takes all, and so does the Trainer at first.

    Raises:
        UserError: naming the first that is none.
    """
    numbers = {
        name: hint
        for name, hint in get_type_hints(kind).items()
        if name in arguments and hint in (int, float, int | None, float | None)
    }
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in numbers.items()}
    checked = create_model("Arguments", __base__=Section, **fields)
    validate(checked, {name: arguments[name] for name in numbers}, "training arguments")


def _try_optimizer(arguments: Any) -> None:
    """Make the optimiser and the schedule for one weight: what only they refuse is known before the signals are made.

    Raises:
        TypeError, ValueError, ImportError: whatever they say.
    """
    import torch
    from transformers import Trainer, get_scheduler

    if str(arguments.optim.value).startswith(OPTIMIZERS_OF_A_MODEL):
        return
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    get_scheduler(
        arguments.lr_scheduler_type,
        kind([torch.nn.Parameter(torch.zeros(1))], **options),
        num_warmup_steps=1,
        num_training_steps=2,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )


class DPOTraining(Training):
    beta: PositiveFloat = 0.1


class Synthetic(Section):
    """The built-in task with a known reward, in place of data files."""

    demonstrations: PositiveInt
    teacher_pairs: PositiveInt  # the teacher's DPO sees these prompts,
    pairs: PositiveInt  # the student the first of them: a teacher is worth asking because it has seen more
    test_prompts: PositiveInt
    teacher_label_noise: float = Field(0.0, ge=0, le=1)  # share of the pairs that the teacher's DPO sees turned round


class Data(Section):
    """Pairs to train and test on: a Hub name (`org/name#split`), a directory, or a file."""

    train: str | None = None
    test: str | None = None
    sft: str | None = None  # demonstrations for the SFT stages; default: the chosen responses of `train`
    max_train: PositiveInt | None = None  # use the first rows only
    max_test: PositiveInt | None = None
    max_length: PositiveInt | None = 1024
    max_prompt_length: PositiveInt | None = None  # not in the SFT and DPO stages: TRL knows max_length only
    synthetic: Synthetic | None = None


class Scratch(Section):
    """Models made from random weights: `LlamaConfig` arguments of each, and a tokenizer trained on the data."""

    vocab_size: PositiveInt = 4096
    teacher: Options
    student: Options


class Models(Section):
    """Hub names or directories; a model that is not named is made from `scratch`."""

    teacher: str | None = None
    teacher_reference: str | None = None  # what the named teacher's DPO started from, for methods that compare the two
    student: str | None = None
    scratch: Scratch | None = None
    dtype: Dtype = "float32"  # of the weights in training; with bf16=true they stay float32 and the products are bf16
    trust_remote_code: bool = False


class Teacher(Section):
    """What is done to the teacher before it is asked; null skips a stage (the model named has been through it)."""

    sft: Training | None = None
    dpo: DPOTraining | None = None


class StudentStart(Section):
    sft: Training | None = None


class SignalOptions(Section):
    dtype: Dtype | None = None  # of the teacher's weights while it is read; null: bfloat16 where it is fast, else auto
    quantization: Literal["4bit", "8bit"] | None = None  # of the teacher's weights while it is read
    # of which states values are kept of training pairs where nothing else is read of the teacher; the held-out pairs'
    # are all kept, for the terms they are compared with
    positions: Literal["all", "endpoints"] = "all"
    value_dtype: Literal["float32", "float16"] = "float32"  # not of endpoints
    topk_coding: Literal["packed", "float32"] | None = None  # null: packed, but exact for k: vocab
    value_temperature: PositiveFloat = 1.0
    k: PositiveInt | Literal["vocab"] = 50  # tokens kept of each distribution, the likeliest ones,
    p: float | None = Field(default=None, gt=0, le=1)  # or fewer, where fewer hold this share of the probability
    batch_tokens: PositiveInt = 16_384


class Sampling(Section):
    """How responses are sampled for methods that learn from the teacher's or the student's own."""

    temperature: NonNegativeFloat = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: PositiveInt = 1  # per prompt
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64
    engine: Literal["transformers", "vllm"] = "transformers"

    @model_validator(mode="after")
    def _draws(self) -> "Sampling":
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"sampling.temperature=0 gives the same response {self.n} times; n must be 1 for it")
        return self


class RewardModelOptions(Section):
    """The judge of the responses to the held-out prompts: one that is named, or one trained on prompts of its own."""

    name: str | None = None  # Hub name or directory; null: trained from random weights,
    share: float = Field(0.25, gt=0, lt=1)  # on this share of the training prompts, which nobody else sees
    model: Options | None = None  # its `LlamaConfig` arguments; it reads max_position_embeddings tokens of a text
    training: Training

    @model_validator(mode="after")
    def _somehow(self) -> "RewardModelOptions":
        if self.name is None and self.model is None:
            raise ValueError("reward_model.name must be named, or reward_model.model say how to make one")
        if self.training.lora:
            raise ValueError("reward_model.training.lora: there is nothing to adapt in random weights; leave it out")
        return self


class MethodRun(Section):
    """A method with its hyper-parameters, under the name it has in the results."""

    method: str
    options: Options = {}
    label: str = ""
    control: bool = False  # a placebo, bound or noise floor: shown beside the methods, never the verdict
    on_request: bool = False  # runs only where it is asked for, by name or as one of all
    start: str | None = None  # the method whose student this one starts from; default: the student's start
    rounds: PositiveInt = 1  # of sampling, signals and training; each starts from the student of the one before
    first_order: NonNegativeInt = 0
    training: Training


class Evaluation(Section):
    """What is measured on the held-out data besides pair accuracies."""

    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64
    prompts: NonNegativeInt = 0  # of the test pairs, each answered once at temperature 1; 0: no responses are measured
    samples: NonNegativeInt = 0  # generations kept for the report
    length_ranges: list[PositiveInt] | None = None  # edges in words of the reference response; null: its quartiles


class Recipe(Section):
    name: str
    task: str = ""
    seed: int = Field(0, ge=0, lt=2**32)  # what numpy takes
    seeds: PositiveInt = 1  # the whole pipeline, from models to evaluation, with seed, seed + 1, ...
    orders: PositiveInt = 1  # trainings of each method per seed, on the same pairs in other orders
    threads: int | None = Field(default=None, gt=0, le=1024)  # of the CPU; the smallest models are fastest on one
    baseline: str = "dpo"
    data: Data
    model: Models = Models()
    teacher: Teacher = Teacher()
    student: StudentStart = StudentStart()
    signals: SignalOptions = SignalOptions()
    sampling: Sampling = Sampling()
    training: Options = {}  # defaults of every training below
    reward_model: RewardModelOptions | None = None
    methods: dict[str, MethodRun]
    evaluate: Evaluation = Evaluation()
    fast: dict[str, Any] = {}  # overrides for a quick run, by dotted key

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """Training defaults into every training; a method's own options out of its flat section."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        defaults = _mapping(raw.get("training"), "training")
        for part, stages in (("teacher", ("sft", "dpo")), ("student", ("sft",))):
            section = dict(_mapping(raw.get(part), part))
            for stage in stages:
                if section.get(stage) is not None:
                    section[stage] = _laid_over(defaults, _mapping(section[stage], f"{part}.{stage}"))
            raw[part] = section
        if raw.get("reward_model") is not None:
            judge = dict(_mapping(raw["reward_model"], "reward_model"))
            own = _mapping(judge.get("training"), "reward_model.training")
            judge["training"] = _laid_over({**defaults, "lora": None}, own)
            raw["reward_model"] = judge
        methods = {}
        for name, section in _mapping(raw.get("methods"), "methods").items():
            section = dict(_mapping(section, f"methods.{name}"))
            known = {key: section.pop(key) for key in list(section) if key in MethodRun.model_fields}
            known.setdefault("method", name)
            known["options"] = {**_mapping(known.get("options"), f"methods.{name}.options"), **section}
            known["training"] = _laid_over(defaults, _mapping(known.get("training"), f"methods.{name}.training"))
            methods[name] = known
        raw["methods"] = methods
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.seed + self.seeds > 2**32:
            raise ValueError(f"seed + seeds - 1 must be less than 2**32, got {self.seed} + {self.seeds} - 1")
        if not self.methods:
            raise ValueError("methods is empty; name at least one, e.g. `methods: {dpo: {}, tvkd: {}}`")
        for name in (self.name, *self.methods):
            if not DIRECTORY_NAME.fullmatch(name):
                raise ValueError(f"{name!r} names a directory: use letters, digits and . _ + - only")
        for name in RESERVED_NAMES:
            if name in self.methods:
                raise ValueError(f"methods.{name}: that name is taken in the results; call it something else")
        seen: list[str] = []
        for name, run in self.methods.items():
            if run.start is not None and run.start not in seen:
                raise ValueError(f"methods.{name}.start: {run.start!r} must be a method that stands above it")
            if run.start is not None and self.methods[run.start].first_order != run.first_order:
                raise ValueError(f"methods.{name}.first_order differs from that of {run.start}, which it starts from")
            seen.append(name)
        if self.baseline not in self.methods:
            raise ValueError(f"baseline {self.baseline!r} is not among the methods: {', '.join(self.methods)}")
        if (self.data.train is None) == (self.data.synthetic is None):
            raise ValueError("data needs either `train` (pairs) or `synthetic`; give data.train=FILE_OR_HUB_NAME")
        if self.data.synthetic:
            for key in ("test", "sft", "max_train", "max_test"):
                if getattr(self.data, key) is not None:
                    raise ValueError(f"data.{key} has no part in a synthetic task; leave it out")
            if self.reward_model or self.evaluate.prompts:
                raise ValueError(
                    "a synthetic task knows its reward and its prompts; leave reward_model and evaluate.prompts out"
                )
        elif self.reward_model and not self.evaluate.prompts:
            raise ValueError("reward_model has nothing to judge: give evaluate.prompts, or set reward_model=null")
        if self.model.teacher_reference and (self.teacher.dpo or self.model.teacher is None):
            raise ValueError(
                "model.teacher_reference is for a named teacher that has had its DPO: with teacher.dpo, the reference "
                "is what that starts from; leave one of the two out"
            )
        if (self.model.teacher is None or self.model.student is None) and self.model.scratch is None:
            raise ValueError("model.teacher and model.student must be named, or model.scratch say how to make them")
        return self

    def as_yaml(self) -> str:
        return str(yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True))

    def save(self, path: Path) -> None:
        from prefdistill.files import write_text

        write_text(path, self.as_yaml())


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} must be a mapping of names to values, got {reprlib.repr(value)}")
    return value


@dataclass(frozen=True)
class Override:
    """`key=value` from the command line; the value is read as YAML."""

    key: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Override":
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key or not key.isprintable():
            raise UserError(f"{text!r} is not an override; write key=value, e.g. training.learning_rate=1e-6")
        return cls(key, parse_value(value, key))

    def apply(self, raw: dict[str, Any]) -> None:
        *parents, last = self.key.split(".")
        place = raw
        for part in parents:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = copy.deepcopy(self.value)  # a later override may reach into it


def parse_value(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML's constructors raise what they like, e.g. KeyError for `!!bool x`
        reason = getattr(error, "problem", None)
        raise UserError(f"{where}: {text!r} is not a YAML value{f': {reason}' if reason else ''}") from error


def load_recipe(
    path: str | Path,
    overrides: Sequence["str | Override"] = (),
    *,
    fast: bool = False,
    only: list[str] | None = None,
) -> Recipe:
    """Read a recipe, apply its `fast` profile if asked, then the overrides, and check the result.

    Args:
        path: a YAML file.
        overrides: "key=value" each, e.g. "methods.tvkd.alpha=1.0", or `Override`s; they win over the file.
        fast: the recipe's quick profile.
        only: keep these of its methods (and its baseline, and those they start from); ["all"] keeps all, also those
            that run on request only.

    Raises:
        UserError: on a missing file, broken YAML, an unknown key, a wrong type, or a method that does not exist.
    """
    path = Path(path)
    raw = _read(path)
    try:
        profile = _mapping(raw.get("fast"), "fast") if fast else {}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    refuse_trust([raw, applied(profile)], str(path))
    changes = [Override(key, value) for key, value in profile.items()]
    changes += [Override.parse(change) if isinstance(change, str) else change for change in overrides]
    for change in changes:
        change.apply(raw)
    if isinstance(raw.get("training"), dict):  # on its own first: it is part of every training below
        validate(Training, raw["training"], f"{path}: training")
    recipe = validate(Recipe, raw, str(path))
    recipe = _keep(recipe, only, str(path))
    from prefdistill.methods import make_method

    for name, run in recipe.methods.items():
        try:
            make_method(run.method, run.options)
        except UserError as error:
            raise UserError(f"{path}: methods.{name}: {error}") from error
    return recipe


def applied(changes: dict[str, Any]) -> dict[str, Any]:
    """Overrides by dotted key, as the mapping they make."""
    raw: dict[str, Any] = {}
    for key, value in changes.items():
        Override(key, value).apply(raw)
    return raw


def refuse_trust(files: Iterable[dict[str, Any]], where: str) -> None:
    """A file may come from anyone: that a model's repository runs its code is for the command line to say.

    Raises:
        UserError: if what was read from a file asks for it.
    """
    for raw in files:
        if isinstance(raw.get("model"), dict) and raw["model"].get("trust_remote_code"):
            raise UserError(
                f"{where} asks to run code from the models' repositories: if you trust them, leave it out there and "
                "add model.trust_remote_code=true to the command"
            )


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, laid over the one it `extends`, a file named relative to it."""
    raw = read_yaml(path, "recipe", "the shipped ones are under recipes/", "data, model, methods")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"{path}: extends must name another recipe file, got {base!r}")
    files, below = (*above, path), path.parent / base
    if below.resolve() in {file.resolve() for file in files}:
        circle = " -> ".join(map(str, (*files, below)))
        raise UserError(f"{path}: extends goes in a circle ({circle}); take it out of one of these")
    return _laid_over(_read(below, files), raw)


def read_yaml(path: Path, what: str, where: str, keys: str) -> dict[str, Any]:
    """The mapping in a YAML file that is to be a `what`.

    Raises:
        UserError: if there is no file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"no {what} at {path}; {where}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except Exception as error:  # as in parse_value
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a {what}: it must be a mapping with keys such as {keys}")
    return raw


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        under = below.get(key)
        both[key] = _laid_over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both


def _keep(recipe: Recipe, only: list[str] | None, where: str) -> Recipe:
    """The recipe with the methods asked for, its baseline, and what they start from."""
    if only == ["all"]:
        return recipe
    if only is None:
        only = [name for name, run in recipe.methods.items() if not run.on_request]
    if unknown := [name for name in only if name not in recipe.methods]:
        raise UserError(f"{where} has no method {unknown[0]!r}; it has {', '.join(recipe.methods)} (or all)")
    kept = {*only, recipe.baseline}
    for name in reversed(recipe.methods):  # what a method starts from stands above it
        start = recipe.methods[name].start
        if name in kept and start is not None:
            kept.add(start)
    return recipe.model_copy(update={"methods": {n: run for n, run in recipe.methods.items() if n in kept}})


def validate(kind: type[Any], raw: Any, where: str, also: Iterable[str] = ()) -> Any:
    """`kind(**raw)`, with its complaint as one line that says the fix; `also` are keys known at the top besides."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(kind, error, also)}") from error


def _explain(kind: type[BaseModel], error: ValidationError, also: Iterable[str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not UNION_MEMBER.fullmatch(str(part)))
    got = reprlib.repr(first["input"])
    if first["type"] == "extra_forbidden":
        known = [*_keys_at(kind, first["loc"][:-1]), *also]
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known there: {', '.join(known)}"
        text = f"unknown key {key!r}; {hint}"
    elif first["type"] == "missing":
        text = f"{key} is missing"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
    elif first["type"] in ("model_type", "dict_type"):
        text = f"{key} must be a mapping of names to values, got {got}"
    else:
        text = f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {got}"
    return " ".join(text.split())


def _keys_at(kind: Any, location: tuple[Any, ...]) -> list[str]:
    import typing

    for part in location:
        annotation = kind.model_fields[part].annotation if part in getattr(kind, "model_fields", {}) else kind
        options = [annotation, *typing.get_args(annotation)]
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), kind)
    return list(kind.model_fields)
