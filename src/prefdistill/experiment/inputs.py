"""Cache the user's data and models for the seeds of a run and the cells of a study, and detect changes during a run."""

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import value_digest
from prefdistill.core.processes import processes
from prefdistill.core.stages import Make, empty_stage
from prefdistill.data.fingerprint import data_fingerprint, demonstrations_fingerprint
from prefdistill.data.load import first_rows, load_messages, load_pairs
from prefdistill.experiment.recipe import Recipe
from prefdistill.models.form import form_key
from prefdistill.models.identity import model_key
from prefdistill.models.load import check_model
from prefdistill.models.options import Form

if TYPE_CHECKING:
    from datasets import Dataset


class ModelChanged(UserError):
    """A model's files changed after the run began."""


class Sources:
    """The user's data and models by name. Each is read once.

    Every step that needs a model loads it again: `check` detects whether its files changed since its key was taken, so
    that no result mixes two versions. A model on the Hub is read at one commit, see
    `pinned_revision`, and so it stays as it is.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Dataset] = {}
        self._first: dict[tuple[int, int | None], Dataset] = {}
        self.reads: set[str] = set()  # the columns that the methods of the plans read
        self.model_key = functools.cache(model_key)  # as of the first call
        self.check_model = functools.cache(check_model)

    def pairs(self, name: str, limit: int | None = None, **options: Any) -> "Dataset":
        """Return the preference pairs of a file, directory or Hub name: all, or the first `limit`.

        Args:
            options: of `Columns`.
        """
        rows = self._load(load_pairs, name, options | {"reads": sorted(self.reads)})
        return self._first.setdefault((id(rows), limit), first_rows(rows, limit))

    def messages(self, name: str, **options: Any) -> "Dataset":
        """Return the demonstrations of a file, directory or Hub name."""
        return self._load(load_messages, name, options)

    def _load(self, load: "Callable[..., Dataset]", name: str, options: dict[str, Any]) -> "Dataset":
        key = value_digest([load.__name__, name, options])
        if key not in self._loaded:
            self._loaded[key] = load(name, **options)
        return self._loaded[key]

    def unchanged(self, names: Collection[str], make: Make) -> Make:
        """Wrap the work of a step so that it raises ModelChanged, and leaves no output, if these models change."""

        def checked(out: Path) -> int | None:
            self.check(names)
            peak_memory = make(out)
            processes().wait_for_everyone()
            try:
                self.check(names)
            except ModelChanged:
                if processes().is_main_process:
                    empty_stage(out)
                raise
            return peak_memory

        return checked

    def check(self, names: Collection[str]) -> None:
        """Raise ModelChanged if the files of one of these models changed since its key was taken."""
        for name in names:
            if model_key(name) != self.model_key(name):
                raise ModelChanged(f"{name} was changed during the run; run the same command again")


def source_fingerprints(recipe: Recipe, sources: Sources) -> dict[str, Any]:
    """Return digests of the data and the models that a recipe names; everything else follows from the recipe."""
    prints: dict[str, Any] = {}
    data, names = recipe.data, recipe.model
    # all rows, whichever of them a seed sets aside for its reward model
    for part, name, limit in (("train", data.train, data.max_train), ("test", data.test, data.max_test)):
        if name:
            prints[part] = data_fingerprint(sources.pairs(name, limit, **data.read_as))
    if data.sft:
        prints["sft"] = demonstrations_fingerprint(sources.messages(data.sft, **data.sft_read_as))
    for role in ("teacher", "teacher_reference", "student", "teacher_tokenizer"):
        if name := names.name_of(role):
            prints[role] = sources.model_key(name)
    if names.chat_template:
        prints["chat_template"] = form_key(Form(chat_template=names.chat_template))
    if names.teacher_form:
        prints["teacher_form"] = form_key(names.teacher_form)
    if recipe.reward_model and (name := recipe.reward_model.source):
        prints["reward_model"] = sources.model_key(name)
    return prints
