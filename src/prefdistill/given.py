"""What recipes are given: the user's data and models, which are the same for all that is made from them."""

import functools
from typing import Any

from prefdistill.data import load_messages, load_pairs
from prefdistill.errors import UserError
from prefdistill.models import model_key


class Given:
    """Data and models by name, for the seeds of a run and the cells of a study.

    Data is read once. Models are loaded again by every stage that needs them: `check` says whether one has changed
    since it was first asked for, so that no result speaks of two.
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

    def check(self) -> None:
        """Raises a UserError if a model is not what it was."""
        for name, key in self._models.items():
            if model_key(name) != key:
                raise UserError(f"{name} has been changed while it was in use; start the same command again")
