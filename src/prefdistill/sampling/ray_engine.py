"""Sample responses on the workers of a Ray cluster.

Each worker loads the model once and draws responses to one part of the prompts at a time; this process writes them.
Parts, seeds and draws are those of the engine transformers, so either engine resumes what the other has begun. The
part of a worker that dies is drawn again by another one.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.core.workers import Workers, check_ray, check_tokenizer
from prefdistill.models.hub import pin_commits, pinned_commits
from prefdistill.models.identity import model_key
from prefdistill.sampling.engines import Drawn, Engine, Part, TransformersEngine
from prefdistill.sampling.options import SampleRequest


@dataclass(frozen=True)
class SampleWorker:
    """What a worker has loaded."""

    engine: TransformersEngine

    def draw(self, part: Part) -> Drawn:
        """Return responses to a part."""
        return self.engine.draw(part, Progress("sampling", 0, shown=False))


def load_worker(
    model: str, key: Any, commits: list[list[str | None]], tokenizer: Any, options: SampleRequest
) -> SampleWorker:
    """Load the model in a worker; a model on the Hub at the commit that the machine reads that started the workers.

    Raises:
        UserError: if it has another cache key here than on the machine that started the workers.
    """
    pin_commits(commits)
    if model_key(model) != key:
        raise UserError(f"{model} is not the model that the other machines have under this name; give all the same")
    return SampleWorker(TransformersEngine.open(model, tokenizer, options))


class RayEngine(Engine):
    """The engine transformers, on workers.

    Args:
        load: makes a `SampleWorker`, in each worker.
        count: the most workers at a time; None: as many as the cluster has room for.
    """

    same_draws_as = "transformers"

    def __init__(self, load: Callable[[], SampleWorker], count: int | None) -> None:
        self.load, self.count = load, count

    @classmethod
    def check(cls, model: Any, options: SampleRequest) -> None:
        if not isinstance(model, str):
            raise UserError("the workers of the engine ray load the model themselves: give its Hub name or directory")
        check_ray()

    @classmethod
    def open(cls, model: Any, tokenizer: Any, options: SampleRequest) -> Self:
        check_tokenizer(tokenizer)
        key = model_key(model)
        return cls(partial(load_worker, model, key, pinned_commits(), tokenizer, options), options.workers)

    def generate(self, prompts: list[list[int]], limits: list[int], seed: int, progress: Progress) -> list[list[int]]:
        ((_, drawn),) = self.draw_all([Part(prompts, limits, range(len(prompts)), seed)], progress)
        return drawn.tokens

    def draw_all(self, parts: Sequence[Part], progress: Progress) -> Generator[tuple[int, Drawn], None, None]:
        before = time.monotonic()
        with Workers(self.load, self.count) as workers:
            for index, drawn in workers.map("draw", parts):
                progress.update(len(drawn.tokens))
                now = time.monotonic()
                yield index, drawn._replace(seconds=round(now - before, 3))  # workers draw at the same time
                before = now
