"""Extract the shards of a store on the workers of a Ray cluster.

Each worker loads model and data once and writes whole shards into the directory of the store, which lies on storage
that all machines share. The shards, their bytes and the request are those of an extraction without Ray, so either
resumes the other. The shard of a worker that dies is written again by another one.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.differences import compare, listed
from prefdistill.core.errors import UserError
from prefdistill.core.lock import LOCK, appears, not_shared
from prefdistill.core.parts import read_checksum
from prefdistill.core.processes import processes, require_one_process
from prefdistill.core.progress import Progress
from prefdistill.core.workers import Workers, check_tokenizer
from prefdistill.data.truncation import Truncation
from prefdistill.models.hub import pin_commits, pinned_commits, pinned_revision
from prefdistill.signals.artifact import StoreArtifact, write_part
from prefdistill.signals.options import ExtractRequest
from prefdistill.signals.request import Extraction, parts_of
from prefdistill.signals.store import Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ShardWorker:
    """What a worker has loaded."""

    extraction: Extraction
    out: Path

    def request(self, _: None) -> dict[str, Any]:
        """Return the request of model and data as this worker reads them."""
        return self.extraction.request

    def write(self, task: tuple[int, dict[str, Any]]) -> str | None:
        """Write the shard of this number of the store of a request; return its checksum."""
        number, request = task
        if differences := compare(request, self.extraction.request):
            raise UserError(
                f"model, data or options are not those of the other workers ({listed([*map(str, differences)])}); give "
                "all machines the same files and the same kind of device"
            )
        store = StoreArtifact("signals", self.out, request)
        write_part(store, replace(self.extraction, request=request), number, Progress("signals", 0, shown=False))
        return read_checksum(store.shards(number + 1).path(number))

    def check(self, number: int) -> None:
        """Check the token ids of a shard of a finished store."""
        self.extraction.check(self.finished, self.extraction.parts[number])

    @cached_property
    def finished(self) -> Signals:
        return Signals.open(self.out)


def load_worker(
    out: Path,
    model: str,
    data: "Dataset | str",
    tokenizer: "PreTrainedTokenizerBase | None",
    options: ExtractRequest,
    truncation: Truncation,
    ids_from: str | None,
    commits: list[list[str | None]],
) -> ShardWorker:
    """Load model and data in a worker, see `Extraction.load`; `ids_from` is the directory of a store, and `commits` are
    those of models on the Hub."""
    pin_commits(commits)
    if not appears(out / LOCK):
        raise not_shared(out)
    other = Signals.open(ids_from) if ids_from else None
    return ShardWorker(Extraction.load(model, data, tokenizer, options, truncation, other), out)


@dataclass(frozen=True)
class RayShards:
    """Has workers write and check the shards."""

    workers: Workers
    request: dict[str, Any]
    alone: bool = False

    def write(self, store: StoreArtifact) -> None:
        """Write the missing shards of a store."""
        rows, responses = parts_of(store.request), len(store.request["responses"])
        shards = store.shards(len(rows))
        tasks = [(number, store.request) for number in range(len(rows))]
        with Progress(
            f"signals ({store.request['role']})", responses * store.request["data"]["rows"], "response"
        ) as progress:
            for number, checksum in self.workers.map("write", tasks):
                if not shards.path(number).is_file() or read_checksum(shards.path(number)) != checksum:
                    raise not_shared(store.place)
                progress.update(responses * len(rows[number]))
        store.sweep()  # what workers that were killed have left; nobody writes now

    def check(self, signals: Signals) -> None:
        """Check the token ids of a finished store."""
        for _ in self.workers.map("check", range(len(parts_of(self.request)))):
            pass


@contextmanager
def ray_shards(
    out: Path,
    model: "PreTrainedModel | str",
    dataset: "Dataset | str",
    tokenizer: "PreTrainedTokenizerBase | None",
    options: ExtractRequest,
    truncation: Truncation,
    ids_from: Signals | None,
) -> Iterator[RayShards]:
    """Start workers that load the model, and the data unless these are in memory: then they are sent.

    Raises:
        UserError: if the model or the store of `ids_from` is in memory, where other machines cannot read it, the
            launcher has several processes, or Ray is missing.
    """
    require_one_process("the engine ray", processes().num_processes)
    if not isinstance(model, str):
        raise UserError("the workers of the engine ray load the model themselves: give its Hub name or directory")
    if not isinstance(dataset, str):
        dataset = type(dataset)(dataset.with_format("arrow")[:])  # its rows, not the files that they are mapped from
    if ids_from is not None and not Path(ids_from.place).is_dir():
        raise UserError("the workers of the engine ray open the store of ids_from themselves: give one on disk")
    check_tokenizer(tokenizer)
    place = str(Path(ids_from.place).absolute()) if ids_from else None
    pinned_revision(model)  # so that all workers read one commit
    load = functools.partial(
        load_worker, out.absolute(), model, dataset, tokenizer, options, truncation, place, pinned_commits()
    )
    with Workers(load, options.workers) as workers:
        yield RayShards(workers, workers.call("request"))
