"""The user's data and models, as a recipe names them."""

import copy
import functools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefdistill.core.errors import UserError
from prefdistill.core.files import value_digest
from prefdistill.core.progress import say_once
from prefdistill.data.fingerprint import data_fingerprint, demonstrations_fingerprint
from prefdistill.data.load import demonstrations_of
from prefdistill.data.prompts import prompt_text, prompts_of
from prefdistill.experiment.inputs import Sources
from prefdistill.experiment.recipe import Recipe
from prefdistill.experiment.step import Model, ModelRole, Rows, Tokenizer
from prefdistill.models.form import apply_form
from prefdistill.models.identity import tokenizer_identity
from prefdistill.models.load import load_tokenizer
from prefdistill.models.options import Form, Models
from prefdistill.models.vocabulary import check_same_tokens, token_conflicts, tokenizer_for

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class UserData:
    """The pairs of one seed: `train` and `test`, those set aside to train a reward model on, and demonstrations."""

    def __init__(self, recipe: Recipe, seed: int, sources: Sources) -> None:
        self.recipe = recipe
        self.seed = seed
        self.sources = sources

    @property
    def splits_prompts(self) -> bool:
        """Whether a share of the training prompts is set aside for the reward model."""
        section = self.recipe.reward_model
        return section is not None and section.name is None and self.recipe.data.test is not None

    @functools.cached_property
    def _split(self) -> "tuple[Dataset, Dataset]":
        assert self.recipe.reward_model is not None
        return split_prompts(self._all_pairs, self.recipe.reward_model.share, self.seed)

    @property
    def _all_pairs(self) -> "Dataset":
        assert self.recipe.data.train is not None
        return self.sources.pairs(self.recipe.data.train, self.recipe.data.max_train, **self.recipe.data.read_as)

    @property
    def train(self) -> "Dataset":
        return self._split[0] if self.splits_prompts else self._all_pairs

    @property
    def reward_pairs(self) -> "Dataset":
        """What the run's own reward model is trained on: prompts that are not in `train`."""
        return self._split[1]

    @property
    def test(self) -> "Dataset":
        assert self.recipe.data.test is not None
        return self.sources.pairs(self.recipe.data.test, self.recipe.data.max_test, **self.recipe.data.read_as)

    @functools.cached_property
    def demonstrations(self) -> "Dataset":
        if self.recipe.data.sft is None:
            return demonstrations_of(self.train, "chosen")
        rows = self.sources.messages(self.recipe.data.sft, **self.recipe.data.sft_read_as)
        if not self.splits_prompts:
            return rows
        excluded = {prompt_text(prompt) for prompt in prompts_of(self.reward_pairs)}
        return rows.select([row for row, prompt in enumerate(prompts_of(rows)) if prompt_text(prompt) not in excluded])

    def demonstrations_key(self) -> str:
        """Return the key of the demonstrations: that of the pairs if they are the chosen responses."""
        if self.recipe.data.sft is None:
            return data_fingerprint(self.train)
        return demonstrations_fingerprint(self.demonstrations)


def split_prompts(pairs: "Dataset", share: float, seed: int) -> "tuple[Dataset, Dataset]":
    """Split pairs into those of the students and, for a random share of the prompts, those of the reward model. No
    prompt is in both.

    Raises:
        UserError: if there are too few prompts for two parts.
    """
    texts = [prompt_text(prompt) for prompt in prompts_of(pairs)]
    prompts = list(dict.fromkeys(texts))
    count = round(share * len(prompts))
    if not 0 < count < len(prompts):
        raise UserError(
            f"reward_model.share={share} of {len(prompts)} training prompts leaves none for one side; change it, or "
            "turn the reward model off with reward_model=null"
        )
    drawn = set(random.Random(f"reward model {seed}").sample(prompts, count))
    rows: tuple[list[int], list[int]] = ([], [])
    for row, text in enumerate(texts):
        rows[text in drawn].append(row)
    return pairs.select(rows[0]), pairs.select(rows[1])


def user_rows(name: str, read: "Callable[[], Dataset]") -> Rows:
    """Return rows of the user's data as an input of steps."""
    return Rows(name=name, compute_key=lambda: data_fingerprint(read()), read=read)


class UserModels:
    """The models that a recipe names, and their tokenizers, as inputs of steps."""

    def __init__(self, recipe: Recipe, sources: Sources) -> None:
        self.recipe, self.sources = recipe, sources

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the student that the recipe names, or else of the teacher."""
        return tokenizer_input("tokenizer", lambda: named_tokenizer(self.recipe))

    @functools.cached_property
    def teacher_tokenizer(self) -> Tokenizer:
        """The tokenizer that the teacher is read with."""
        return tokenizer_input(
            "teacher-tokenizer",
            lambda: named_teacher_tokenizer(self.recipe.model, self.tokenizer.tokenizer),
            self.recipe.model.teacher_tokenizer,
        )

    def model(self, name: str, place: str, role: ModelRole, tokenizer: Tokenizer) -> Model:
        """Return a model of the user's in a role; its key is that of its files and of the tokenizer it is read with."""

        def key() -> str:
            code = self.recipe.model.trust_remote_code
            return value_digest({"model": self.sources.model_key(place), "code": code, "tokens": tokenizer.key})

        named = frozenset({place}) | tokenizer.named_models
        return Model(name=name, compute_key=key, named_models=named, role=role, place=place)


def tokenizer_input(name: str, read: "Callable[[], PreTrainedTokenizerBase]", place: str | None = None) -> Tokenizer:
    """Return a tokenizer as an input of steps; its key is that of its tokens, rules and chat template.

    Args:
        name: of the input.
        read: returns the tokenizer.
        place: its directory or Hub name, where the user names it apart from a model.
    """

    def key() -> str:
        identity = tokenizer_identity(tokenizer.tokenizer)
        return value_digest([identity["sha256"], identity["template_sha256"]])

    tokenizer = Tokenizer(name=name, compute_key=key, named_models=frozenset(filter(None, [place])), read=read)
    return tokenizer


def named_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of the student that the recipe names, or else of the teacher.

    A student without a chat template gets that of the recipe, or else of a teacher with the same tokens.

    Raises:
        UserError: if the recipe's chat template cannot be read, or refuses a plain question.
    """
    names = recipe.model
    load = functools.partial(load_tokenizer, trust_remote_code=names.trust_remote_code)
    of_teacher = names.teacher_tokenizer or names.teacher
    tokenizer = apply_form(load(str(names.name_of("student") or of_teacher)), Form(chat_template=names.chat_template))
    if tokenizer.chat_template is None and names.student and of_teacher:
        teacher = load(of_teacher)
        if not token_conflicts(tokenizer, teacher):
            tokenizer.chat_template = teacher.chat_template
    return tokenizer


def named_teacher_tokenizer(names: Models, student: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Return the tokenizer that a recipe names for its teacher; else the student's, or the teacher's own if its
    tokens are others. With the chat template of the teacher's form, if it has one.

    Raises:
        UserError: if the teacher, its reference or the tokenizer that is named for them have other tokens, or the form
            does not fit the chat template.
    """
    trust = names.trust_remote_code
    if names.teacher and names.teacher_tokenizer:
        tokenizer = tokenizer_for(names.teacher, names.teacher_tokenizer, trust_remote_code=trust)
    else:
        tokenizer = load_tokenizer(str(names.teacher_tokenizer or names.teacher), trust_remote_code=trust)
    apply_form(tokenizer, Form(chat_template=names.chat_template))
    if names.teacher_tokenizer is None and token_conflicts(student, tokenizer):
        say_once(
            f"{names.teacher} and {student.name_or_path} have different tokenizers: the teacher is read with "
            "its own tokenizer and chat template"
        )
    elif names.teacher_tokenizer is None:
        check_same_tokens(student, tokenizer)  # reports a token that one of them lacks
        tokenizer = student
    if names.teacher_reference:
        check_same_tokens(tokenizer, load_tokenizer(names.teacher_reference, trust_remote_code=trust))
    return apply_form(copy.deepcopy(tokenizer), names.teacher_form) if names.teacher_form else tokenizer
