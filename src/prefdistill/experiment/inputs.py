"""What recipes are given: the user's data and models, which are the same for all that is made from them."""

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.core.processes import processes
from prefdistill.core.stages import empty_stage
from prefdistill.data.load import load_messages, load_pairs
from prefdistill.models.identity import model_key


class ModelChanged(UserError):
    """A model is not what it was when the run began."""


class Given:
    """Data and models by name, for the seeds of a run and the cells of a study.

    Data is read once. Models are loaded again by every stage that needs them: `check` says whether one has changed
    since it was first asked for, so that no result mixes two versions.
    """

    def __init__(self) -> None:
        self.pairs = functools.cache(load_pairs)
        self.messages = functools.cache(load_messages)
        self._models: dict[str, Any] = {}

    def model(self, name: str) -> Any:
        """The key of a model, see `model_key`."""
        if name not in self._models:
            self._models[name] = model_key(name)
        return self._models[name]

    def kept(self, names: Collection[str], make: Callable[[Path], None]) -> Callable[[Path], None]:
        """The making of a stage from these models as they were: if one has changed meanwhile, nothing of it is left."""

        def checked(out: Path) -> None:
            self.check(names)
            make(out)
            processes().wait_for_everyone()
            try:
                self.check(names)
            except ModelChanged:
                if processes().is_main_process:
                    empty_stage(out)
                raise

        return checked

    def check(self, names: Collection[str]) -> None:
        """Raises ModelChanged if one of these models is not what it was."""
        for name in names:
            if model_key(name) != self._models[name]:
                raise ModelChanged(f"{name} has been changed while it was in use; start the same command again")
