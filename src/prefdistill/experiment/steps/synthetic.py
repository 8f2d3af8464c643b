"""Steps of the built-in task: its prompts and demonstrations, and preference pairs sampled from the teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prefdistill.core.files import read_json, value_digest, write_json, write_jsonl
from prefdistill.data import synthetic
from prefdistill.data.load import first_rows, load_messages, load_pairs
from prefdistill.data.options import Synthetic
from prefdistill.experiment.step import Context, Model, Rows, Step
from prefdistill.models.load import load_model, ready
from prefdistill.sampling.sampler import Response, sample

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(eq=False, kw_only=True)
class Language(Step):
    """Draw the prompts and the demonstrations of the built-in task, and write its tokenizer."""

    kind: ClassVar[str] = "data"
    task: Synthetic

    @property
    def options(self) -> dict[str, Any]:
        return {"synthetic": self.task.model_dump(exclude={"pairs", "teacher_label_noise", "teacher_tokenizer"})}

    @property
    def tokenizer_directory(self) -> Path:
        return self.directory / "tokenizer"

    def make(self, out: Path) -> None:
        task, seed = self.task, self.context.seed
        test = synthetic.sample_prompts(task.test_prompts, seed=seed + 1_000_003)
        train = synthetic.sample_prompts(task.teacher_pairs, seed=seed, exclude=test)
        write_json(out / "prompts.json", {"train": train, "test": test})
        write_jsonl(
            out / "demonstrations.jsonl", synthetic.demonstrations(task.demonstrations, seed=seed, exclude=test)
        )
        synthetic.build_tokenizer().save_pretrained(out / "tokenizer")

    def prompts(self) -> dict[str, list[str]]:
        """Return the prompts of "train" and "test"."""
        prompts: dict[str, list[str]] = read_json(self.directory / "prompts.json")
        return prompts

    def demonstrations(self) -> Rows:
        file = str(self.directory / "demonstrations.jsonl")
        return Rows(name="demonstrations", compute_key=lambda: self.key, made_by=self, read=lambda: load_messages(file))


@dataclass(eq=False, kw_only=True)
class Pairs(Step):
    """Sample two responses of the teacher's SFT model per prompt and label them by the known reward with Bradley-Terry
    noise."""

    kind: ClassVar[str] = "pairs"
    language: Language
    model: Model

    @property
    def options(self) -> dict[str, Any]:
        recipe = self.context.recipe
        sampling = recipe.evaluate.model_dump(include={"max_new_tokens", "batch_size"})
        return {**sampling, "dtype": recipe.model.dtype}

    def make(self, out: Path) -> None:
        seed = self.context.seed
        model = load_student(self.context, self.model)
        for split, prompts in self.language.prompts().items():
            first, second = (respond(self, model, prompts, 1.0, seed + shift, f"{split} pairs") for shift in (0, 1))
            # the chat template would add an end token to a response that has none: not what was sampled
            ended = [a.ended and b.ended for a, b in zip(first, second, strict=True)]
            # pieces of words that a teacher with another tokenizer joins to no word are unknown to the student
            known = [
                self._student_reads(a.text) and self._student_reads(b.text) for a, b in zip(first, second, strict=True)
            ]
            rows = [place for place in range(len(prompts)) if ended[place] and known[place]]
            pairs = synthetic.preference_pairs(
                [prompts[row] for row in rows],
                [first[row].text for row in rows],
                [second[row].text for row in rows],
                seed=seed,
            )
            write_jsonl(out / f"{split}.jsonl", pairs)

    def _student_reads(self, text: str) -> bool:
        """Whether the student's tokens give a response back."""
        tokenizer = self.context.tokenizer.tokenizer
        return bool(tokenizer.decode(tokenizer(text)["input_ids"]) == text)

    def part(self, name: str, split: str, *, limit: int | None = None, label_noise: float = 0.0) -> Rows:
        """Return the pairs of a split as an input of other steps: the first `limit`, a share of them with the labels
        flipped."""

        def read() -> "Dataset":
            pairs = first_rows(load_pairs(str(self.directory / f"{split}.jsonl")), limit)
            if not label_noise:
                return pairs
            flipped = synthetic.flip_labels(pairs.to_list(), label_noise, seed=self.context.seed)
            return pairs.from_list(flipped, features=pairs.features)

        return Rows(
            name=name,
            compute_key=lambda: value_digest([self.key, split, limit, label_noise]),
            made_by=self,
            read=read,
        )


def load_student(context: Context, model: Model) -> Any:
    """Load a model in the dtype of training, ready to be read."""
    loading = context.load_options("student", model)
    return ready(load_model(model.place, **loading, trust_remote_code=context.recipe.model.trust_remote_code))


def respond(step: Step, model: Any, prompts: list[str], temperature: float, seed: int, what: str) -> list[Response]:
    """Sample one response to each prompt of the built-in task, with the loaded model of a step."""
    options = step.context.recipe.evaluate
    return sample(
        model,
        step.reads_with.tokenizer,
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        temperature=temperature,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=seed,
        what=what,
    )
