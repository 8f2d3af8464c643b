"""A recipe, stage by stage: data -> teacher -> student's start -> signals -> methods -> evaluation."""

import dataclasses
import functools
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from trl import DPOConfig, RewardConfig, SFTConfig

from prefdistill.core.artifact import State
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json, value_digest, write_json, write_jsonl
from prefdistill.core.progress import say
from prefdistill.core.stages import inspect_stage, run_stage
from prefdistill.data import synthetic
from prefdistill.data.columns import SIDES
from prefdistill.data.fingerprint import data_fingerprint, demonstrations_fingerprint
from prefdistill.data.load import first_rows, load_messages, load_pairs
from prefdistill.data.messages import prompt_text
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.measure import Measured
from prefdistill.experiment.inputs import Given
from prefdistill.experiment.measuring import Measuring, as_messages
from prefdistill.experiment.recipe import MethodRun, Recipe
from prefdistill.experiment.reward_stage import Judge, split_prompts, without_prompts
from prefdistill.experiment.supply import Start, Supply
from prefdistill.methods import Method, make_method, sampled
from prefdistill.models.identity import tokenizer_identity
from prefdistill.models.load import check_model, check_reward_model, load_model, load_tokenizer, ready
from prefdistill.models.scratch import check_shape, random_model, texts_of, train_tokenizer
from prefdistill.models.vocabulary import check_same_tokens
from prefdistill.sampling.sampler import Response, sample
from prefdistill.training.arguments import training_arguments
from prefdistill.training.factory import arguments_class, make_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import Training
from prefdistill.training.trl import train_dpo, train_sft

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Evaluated beside the methods, before any of them: who they learn from, and where they start.
TEACHER, START = "teacher", "start"


def remove_results(out: Path) -> None:
    """Results of what is being made anew: they would be taken for those of what is there now."""
    for name in ("report.html", "results.json"):
        (out / name).unlink(missing_ok=True)


@dataclass
class SeedRun:
    """One pass through the whole recipe with one seed, in `OUT/seed-N`."""

    recipe: Recipe
    out: Path
    seed: int
    stages: list[dict[str, Any]] = field(default_factory=list)  # as in results.json
    warnings: list[str] = field(default_factory=list)
    keys: dict[str, Any] = field(default_factory=dict)  # what later stages are made from: keys of stages, digests
    uses: dict[str, set[str]] = field(default_factory=dict)  # the models that are named, by what is made of them
    teacher: str = field(default="", init=False)  # this and the start are set by `prepare`
    start: str = field(default="", init=False)
    starts: dict[str, Start] = field(default_factory=dict)  # the models that students start from, by method and order
    pool: Path | None = None  # finished stages that several runs share, see `run_stage`
    given: Given = field(default_factory=Given)

    @functools.cached_property
    def measuring(self) -> Measuring:
        return Measuring(self)

    @property
    def root(self) -> Path:
        return self.out / f"seed-{self.seed}"

    def run(self) -> dict[str, list[Measured]]:
        """Every stage; returns what was measured, by method: one entry per data order."""
        if self.recipe.seeds > 1:
            say(f"seed {self.seed}")
        measured: dict[str, list[Measured]] = {}
        self.prepare()
        if self.recipe.data.synthetic or (self.test is not None and self.measuring.answers):
            measured[TEACHER] = [self.measuring.evaluate(TEACHER, self.teacher)]
            measured[START] = [self.measuring.evaluate(START, self.start)]
        for name, run in self.recipe.methods.items():
            measured[name] = []
            for order in range(run.first_order, run.first_order + self.recipe.orders):
                student = self.distill(name, run, order)
                measured[name].append(self.measuring.evaluate(f"{name}-{order}", student, name, order))
        return measured

    def check(self) -> None:
        """Find what the user got wrong before anything is written: data, names of models, training arguments."""
        recipe = self.recipe
        if not recipe.data.synthetic:
            _ = self.train, self.test
            if recipe.reward_model and self.judge is None:
                say("note: without data.test there is nothing to judge: no reward model, no pairs set aside for it")
        named = bool(recipe.model.teacher or recipe.model.student)
        if named:
            _ = self.tokenizer
        _ = self.truncation
        self._check_samples()
        if recipe.model.scratch:
            check_shape(recipe.model.scratch.teacher)
            check_shape(recipe.model.scratch.student)
        if recipe.reward_model and recipe.reward_model.name:
            check_reward_model(recipe.reward_model.name, trust_remote_code=recipe.model.trust_remote_code)
            if self.judge:
                self.judge.check(self.tokenizer if named else None)
        elif recipe.reward_model:
            check_shape(recipe.reward_model.model or {}, {"num_labels": 1})
        self.check_trainings()
        for name, method in self.methods.items():
            self._check_method(f"methods.{name}", method)
        if len(self.reference_bf16()) > 1:
            raise UserError("training.bf16 differs between methods, which share one reference that is read alike")
        for name, run in recipe.methods.items():
            if run.rounds > 1 and "student_response" not in self.methods[name].responses:
                raise UserError(f"methods.{name}.rounds: {run.method} does not learn from the student's own responses")

    def check_trainings(self) -> None:
        """Of `check`, what needs neither data nor models: whether the arguments of every training are taken."""
        recipe = self.recipe
        trainings: list[tuple[Training, type[Any]]] = [
            (run.training, arguments_class(self.methods[name])) for name, run in recipe.methods.items()
        ]
        trainings += [(sft, SFTConfig) for sft in (recipe.teacher.sft, recipe.student.sft) if sft]
        trainings += [(dpo, DPOConfig) for dpo in (recipe.teacher.dpo,) if dpo]
        if recipe.reward_model and not recipe.reward_model.name:
            trainings.append((recipe.reward_model.training, RewardConfig))
        for training, kind in trainings:
            training_arguments(training, self.root, seed=0, data_seed=0, kind=kind)

    def check_models(self) -> None:
        """Whether the models that are named can be loaded; this fetches those of the Hub."""
        names = self.recipe.model
        for name in filter(None, (names.teacher, names.teacher_reference, names.student)):
            check_model(name, trust_remote_code=names.trust_remote_code)

    def _check_samples(self) -> None:
        asked = {response for method in self.methods.values() for response in sampled(method)}
        if asked and self.recipe.sampling.engine == "vllm" and find_spec("vllm") is None:
            raise UserError("sampling.engine=vllm: vLLM is not installed; `pip install vllm`, or leave it out")
        if not self.recipe.data.synthetic and (there := sorted(asked.intersection(self.train.column_names))):
            say(f"note: the data's own {', '.join(there)} is not used; a recipe samples what its methods learn from")

    def _check_method(self, where: str, method: Method) -> None:
        """Whether this recipe will make the signals that a method needs."""
        names = self.recipe.model
        for need in method.needs:
            for name, value in need.settings.items():
                if (made := getattr(self.recipe.signals, name)) != value:
                    raise UserError(f"{where} needs signals.{name}={value}, but it is {made}; change one of them")
            if need.role == "teacher_reference" and self.recipe.teacher.dpo is None and names.teacher_reference is None:
                raise UserError(
                    f"{where} needs the model the teacher's DPO started from: name it as model.teacher_reference, or "
                    "let the recipe do teacher.dpo"
                )
            if need.role == "data" and not self.recipe.data.synthetic:
                self._check_scores(where, need.kind)
            if self.recipe.sampling.n > 1 and sampled(method) and not set(SIDES).isdisjoint(need.responses):
                raise UserError(f"{where} needs signals of the pairs beside samples: sampling.n must be 1 for it")

    def _check_scores(self, where: str, column: str) -> None:
        if column not in self.train.column_names:
            raise UserError(f"{where} needs a column {column!r}, a score for every pair; the data has none")
        for part, pairs in (("train", self.train), ("test", self.test)):
            if pairs is None or column not in pairs.column_names:
                continue
            lacking = np.flatnonzero(~np.isfinite(np.array(pairs[column][:], dtype=np.float64)))
            if len(lacking):
                prompt = prompt_text(pairs["prompt"][int(lacking[0])])
                raise UserError(
                    f"{where} needs a number in {column!r} for every pair; {len(lacking)} of data.{part} have none, "
                    f"the first of them with the prompt {reprlib.repr(prompt)}; give it, or leave these pairs out"
                )

    def prepare(self) -> None:
        """Data, teacher, the student's start and the signals."""
        recipe = self.recipe
        if recipe.data.synthetic:
            # what of the pairs each model is trained on is said where they are
            language = recipe.data.synthetic.model_dump(exclude={"pairs", "teacher_label_noise"})
            self.stage("data", {"synthetic": language}, self._make_language, kind="data")
        else:
            self.keys["train"] = data_fingerprint(self.train)
        self._prepare_models()
        self.keys["demonstrations"] = self.keys.get("data") or self.keys["train"]
        if recipe.data.sft and (recipe.teacher.sft or recipe.student.sft):
            self.keys["demonstrations"] = demonstrations_fingerprint(self.demonstrations)

        if recipe.teacher.sft:
            self.teacher = self._teach(
                "teacher-sft",
                train_sft,
                "demonstrations",
                self.teacher,
                recipe.teacher.sft,
                "teacher-base",
                "demonstrations",
            )
        self.teacher_stage = self.teacher_reference_stage = "teacher-sft" if recipe.teacher.sft else "teacher-base"
        self.teacher_reference = self.teacher
        if recipe.teacher.dpo is None and recipe.model.teacher_reference:
            self.teacher_reference, self.teacher_reference_stage = recipe.model.teacher_reference, "teacher-reference"
            self.name_model(self.teacher_reference_stage, self.teacher_reference)
        if recipe.data.synthetic:
            size, sampling = recipe.data.synthetic, recipe.evaluate.model_dump(include={"max_new_tokens", "batch_size"})
            request = {**sampling, "dtype": recipe.model.dtype}
            self.stage("pairs", request, self._make_pairs, "data", self.teacher_reference_stage, kind="pairs")
            self.keys["train"] = value_digest([self.keys["pairs"], size.pairs])
            self.keys["teacher_pairs"] = value_digest([self.keys["pairs"], size.teacher_label_noise])
            self.uses["train"] = self.uses["teacher_pairs"] = self.uses["pairs"]
        else:
            self.keys["teacher_pairs"] = self.keys["train"]
        if recipe.teacher.dpo:
            self.teacher = self._teach(
                "teacher-dpo",
                train_dpo,
                "teacher_pairs",
                self.teacher,
                recipe.teacher.dpo,
                "teacher_pairs",
                self.teacher_stage,
            )
            self.teacher_stage = "teacher-dpo"
        self.start_stage = "student-base"
        if recipe.student.sft:
            self.start = self._teach(
                "student-sft",
                train_sft,
                "demonstrations",
                self.start,
                recipe.student.sft,
                "student-base",
                "demonstrations",
            )
            self.start_stage = "student-sft"
        self.starts["start"] = Start("start", self.start, self.start_stage, self._starting_from(None))
        if self.test is not None:
            self.keys["test"] = data_fingerprint(self.test)
        self.supply = Supply(self)
        self.test_stores = self.supply.test()
        if self.judge:
            self.judge.prepare()

    def _prepare_models(self) -> None:
        """What teacher and student are before any training; neither depends on the shape of the other."""
        model = self.recipe.model
        named = {role: getattr(model, role) for role in ("teacher", "student")}
        for role, name in named.items():
            if name:
                self.name_model(f"{role}-base", name)
        if not all(named.values()):
            scratch = model.scratch.model_dump() if model.scratch else {}
            # with the tokens of the one that is named, or of the data
            tokens = self.tokens if any(named.values()) else None
            source = () if tokens else ("data" if self.recipe.data.synthetic else "train",)
            made = [role for role, name in named.items() if name is None]
            self.stage(
                "init", {"scratch": scratch, "made": made, "tokens": tokens}, self._make_models, *source, kind="init"
            )
            for role in made:
                shape = {key: value for key, value in scratch.items() if key not in named or key == role}
                parts = {"shape": shape, "tokens": tokens, "source": [self.keys[key] for key in source]}
                self.keys[f"{role}-base"] = value_digest(parts)
        self.teacher = model.teacher or str(self.root / "init" / "teacher")
        self.start = model.student or str(self.root / "init" / "student")

    # -- data and models ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def train(self) -> "Dataset":
        if self.recipe.data.synthetic:
            return self._pairs(None, "train", self.recipe.data.synthetic.pairs)
        return self._train_and_judge[0]

    @property
    def judge_pairs(self) -> "Dataset":
        """What the run's own reward model is trained on: other prompts than `train`."""
        return self._train_and_judge[1]

    @functools.cached_property
    def _train_and_judge(self) -> "tuple[Dataset, Dataset]":
        pairs = self._pairs(self.recipe.data.train, "train", self.recipe.data.max_train)
        if self.judge is None or self.judge.options.name:
            return pairs, pairs.select([])
        return split_prompts(pairs, self.judge.options.share, self.seed)

    @functools.cached_property
    def judge(self) -> Judge | None:
        options = self.recipe.reward_model
        return Judge(self, options) if options and self.recipe.data.test else None

    @functools.cached_property
    def teacher_pairs(self) -> "Dataset":
        """What the teacher's DPO is trained on."""
        size = self.recipe.data.synthetic
        if size is None:
            return self.train
        pairs = self._pairs(None, "train", None)
        if not size.teacher_label_noise:
            return pairs
        turned = synthetic.turned_labels(pairs.to_list(), size.teacher_label_noise, seed=self.seed)
        return pairs.from_list(turned, features=pairs.features)

    @functools.cached_property
    def test(self) -> "Dataset | None":
        if self.recipe.data.test is None and self.recipe.data.synthetic is None:
            return None
        return self._pairs(self.recipe.data.test, "test", self.recipe.data.max_test)

    def _pairs(self, source: str | None, split: str, limit: int | None) -> "Dataset":
        pairs = self.given.pairs(source) if source else load_pairs(str(self.root / "pairs" / f"{split}.jsonl"))
        return first_rows(pairs, limit)

    @functools.cached_property
    def demonstrations(self) -> "Dataset":
        if self.recipe.data.synthetic:
            return load_messages(str(self.root / "data" / "demonstrations.jsonl"))
        if self.recipe.data.sft:
            return without_prompts(self.given.messages(self.recipe.data.sft), self.judge_pairs)
        return self.train.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The student's; the teacher must have the same tokens, and lends its chat template to a base model."""
        names = self.recipe.model
        load = functools.partial(load_tokenizer, trust_remote_code=names.trust_remote_code)
        if names.student is None and names.teacher is None:
            return load(str(self.root / "init" / "tokenizer"))
        tokenizer = load(str(names.student or names.teacher))
        if names.student and names.teacher:
            theirs = load(names.teacher)
            check_same_tokens(tokenizer, theirs)
            if tokenizer.chat_template is None:
                tokenizer.chat_template = theirs.chat_template
        if names.teacher_reference:
            check_same_tokens(tokenizer, load(names.teacher_reference))
        return tokenizer

    @functools.cached_property
    def tokens(self) -> list[str]:
        """Digests of the tokenizer and its chat template, through which every text of this run goes."""
        identity = tokenizer_identity(self.tokenizer)
        return [identity["sha256"], identity["template_sha256"]]

    def name_model(self, key: str, name: str) -> None:
        """Have stages made from a model that is named, as it is read here."""
        parts = {"model": self.given.model(name), "code": self.recipe.model.trust_remote_code, "tokens": self.tokens}
        self.keys[key], self.uses[key] = value_digest(parts), {name}

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.recipe.data.max_length, self.recipe.data.max_prompt_length)

    def _make_language(self, out: Path) -> None:
        size = self.recipe.data.synthetic
        assert size is not None
        test = synthetic.sample_prompts(size.test_prompts, seed=self.seed + 1_000_003)
        write_json(
            out / "prompts.json",
            {"train": synthetic.sample_prompts(size.teacher_pairs, seed=self.seed, exclude=test), "test": test},
        )
        write_jsonl(
            out / "demonstrations.jsonl", synthetic.demonstrations(size.demonstrations, seed=self.seed, exclude=test)
        )
        synthetic.build_tokenizer().save_pretrained(out / "tokenizer")

    def _make_models(self, out: Path) -> None:
        names, scratch = self.recipe.model, self.recipe.model.scratch
        assert scratch is not None
        if names.student or names.teacher:
            tokenizer = self.tokenizer
        elif self.recipe.data.synthetic:
            tokenizer = load_tokenizer(str(self.root / "data" / "tokenizer"))
        else:
            tokenizer = train_tokenizer(texts_of(self.train), scratch.vocab_size)
        tokenizer.save_pretrained(out / "tokenizer")
        for role, name, shape in (
            ("teacher", names.teacher, scratch.teacher),
            ("student", names.student, scratch.student),
        ):
            if name is None:
                model = random_model(tokenizer, shape, seed=self.seed)
                model.save_pretrained(out / role)
                tokenizer.save_pretrained(out / role)
                say(f"init: {role} of {model.num_parameters():,} parameters, {len(tokenizer)} tokens")

    def _make_pairs(self, out: Path) -> None:
        """Two samples of the teacher's SFT model per prompt, labelled by the known reward with Bradley-Terry noise."""
        model = ready(self.load(self.teacher_reference))
        for split, prompts in read_json(self.root / "data" / "prompts.json").items():
            asked = as_messages(prompts)
            first, second = (
                self.sample(model, asked, temperature=1.0, seed=self.seed + shift, what=f"{split} pairs")
                for shift in (0, 1)
            )
            # a response that never ended would get an end token from the chat template: not what was sampled
            whole = [a.ended and b.ended for a, b in zip(first, second, strict=True)]
            kept = [[x for x, ok in zip(xs, whole, strict=True) if ok] for xs in (prompts, first, second)]
            rows = synthetic.preference_pairs(
                kept[0], [a.text for a in kept[1]], [b.text for b in kept[2]], seed=self.seed
            )
            write_jsonl(out / f"{split}.jsonl", rows)

    # -- stages -------------------------------------------------------------------------------------------------------

    def stage(
        self, name: str, request: dict[str, Any], make: Callable[[Path], None], *after: str, **labels: Any
    ) -> None:
        """`run_stage` in this run's directory. What it is made from is known by keys and not by where it lies, so that
        the directory and the models may be moved."""
        self.uses[name] = set().union(*(self.uses.get(key, set()) for key in after))
        request = {**request, "seed": self.seed, "after": {key: self.keys[key] for key in after}}
        if inspect_stage(self.root / name, request).state is not State.FINISHED:
            remove_results(self.out)
        make = self.given.kept(self.uses[name], make)
        stage = run_stage(name, self.root / name, request, make, replace=True, pool=self.pool)
        self.keys[name] = stage.key
        told = {"name": name, "seconds": stage.seconds, "reused": stage.reused}
        told |= {"peak_memory": stage.peak_memory, "bytes": stage.bytes, "seed": self.seed}
        told |= {"kind": None, "role": None, "method": None, "order": None, "round": None, **labels}
        self.stages.append({**told, "directory": (self.root / name).relative_to(self.out).as_posix()})

    def _request(self, training: Training) -> dict[str, Any]:
        model = self.recipe.model
        return {
            "training": training.cache_key(),
            "truncation": [self.truncation.max_length, self.truncation.max_prompt_length],
            "dtype": model.dtype,
        }

    def _teach(
        self, name: str, train: Callable[..., None], rows: str, model: str, training: Training, *after: str
    ) -> str:
        """A stage of TRL's on `self.ROWS`, which are read only if it is not reused."""

        def make(out: Path) -> None:
            train(
                model,
                getattr(self, rows),
                self.tokenizer,
                training,
                out,
                truncation=self.truncation,
                dtype=self.recipe.model.dtype,
                trust_remote_code=self.recipe.model.trust_remote_code,
                seed=self.seed,
                what=name,
            )

        role, kind = name.split("-")
        self.stage(name, self._request(training), make, *after, kind=kind, role=role)
        return str(self.root / name)

    # -- methods and evaluation ---------------------------------------------------------------------------------------

    @functools.cached_property
    def methods(self) -> dict[str, Method]:
        return {name: make_method(run.method, run.options) for name, run in self.recipe.methods.items()}

    def reference_bf16(self) -> set[bool]:
        """The precisions in which the methods that have a reference train."""
        return {
            self.recipe.methods[name].training.bf16
            for name, method in self.methods.items()
            if any(need.role == "reference" for need in method.needs)
        }

    def distill(self, name: str, run: MethodRun, order: int) -> str:
        """Train the student with one method and one order of the data, in as many rounds as the recipe says."""
        start = self.starts[f"{run.start}-{order}" if run.start else "start"]
        for number in range(1, run.rounds + 1):
            made = f"{name}-{order}" + (f"-round-{number}" if number < run.rounds else "")
            stage = f"distill-{made}"
            self._distill_round(stage, name, run, order, start, number)
            start = Start(made, str(self.root / stage), stage, frozenset({name}), number + 1)
        self.starts[f"{name}-{order}"] = dataclasses.replace(start, users=self._starting_from(name), round=1)
        return start.model

    def _starting_from(self, name: str | None) -> frozenset[str]:
        return frozenset(method for method, run in self.recipe.methods.items() if run.start == name)

    def _distill_round(self, stage: str, name: str, run: MethodRun, order: int, start: Start, number: int) -> None:
        method = self.methods[name]
        rows, stores, made_from = self.supply.of(method, start)

        def make(out: Path) -> None:
            trainer = make_trainer(
                method,
                functools.partial(self.load, start.model),
                rows,
                self.tokenizer,
                run.training,
                out,
                signals=stores,
                truncation=self.truncation,
                seed=self.seed,
                data_seed=self.seed * 1_000 + order,
            )
            fit(trainer, out, stage)

        request = {"method": run.method, "options": run.options, "order": order, **self._request(run.training)}
        labels = {"kind": "distill", "role": "student", "method": name, "order": order, "round": number}
        self.stage(stage, request, make, "train", start.stage, *made_from, **labels)

    def load(self, name: str) -> Any:
        names = self.recipe.model
        return load_model(name, dtype=names.dtype, trust_remote_code=names.trust_remote_code)

    def sample(self, model: Any, prompts: list[Any], *, temperature: float, seed: int, what: str) -> list[Response]:
        return sample(
            model,
            self.tokenizer,
            prompts,
            temperature=temperature,
            max_new_tokens=self.recipe.evaluate.max_new_tokens,
            batch_size=self.recipe.evaluate.batch_size,
            seed=seed,
            what=what,
        )
