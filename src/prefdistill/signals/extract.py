"""Extract the signals of a data set from a model into a store: shard by shard, on any number of processes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.lock import locked_together
from prefdistill.core.options import takes
from prefdistill.core.parts import Parts
from prefdistill.core.paths import check_place
from prefdistill.core.processes import processes
from prefdistill.core.progress import Progress
from prefdistill.data.truncation import Truncation
from prefdistill.signals.artifact import Shards, StoreArtifact, finish, write_part
from prefdistill.signals.options import ExtractRequest
from prefdistill.signals.ray_engine import ray_shards
from prefdistill.signals.request import DEFAULTS, Encoding, Extraction, check_request
from prefdistill.signals.served import ServedExtraction
from prefdistill.signals.store import Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@takes(ExtractRequest)
def extract_signals(
    model: "PreTrainedModel | str",
    dataset: "Dataset | str",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    kinds: tuple[str, ...] = DEFAULTS.kinds,
    out: str | Path = "signals",
    *,
    truncation: Truncation | None = None,
    ids_from: Signals | None = None,
    **options: Any,
) -> Signals:
    r"""Extract a model's signals for the responses of every row into a directory, and open it.

    .. math:: V(s_t) = b \log \sum_a \exp(z(s_t, a) / b), \qquad \log\pi(y|x) = \sum_t \log\pi(a_t|s_t)

    A finished store of the same request is reused; an interrupted one resumes after its last whole shard, and so does
    one whose damaged shards `prefdistill.signals.repair` has removed.
    Under `accelerate launch` or torchrun every process extracts its share of the shards; the number of processes
    changes no byte (the number of a process's CPU threads may, by rounding). A process holds the tokens and signals of
    one shard at a time. With `engine="ray"` workers on the machines of a Ray cluster extract the shards, see
    `prefdistill.signals.ray_engine`.

    Args:
        model: a causal language model, or the Hub name or directory to load one from.
        dataset: preference pairs in TRL's format, or where to load them from.
        tokenizer: the model's tokenizer; default: the one found beside the model.
        kinds: names of `KINDS`: "values", "logps", "topk" and others, see docs/signals.md. In nats.
        out: directory of the store.
        truncation: see `prefdistill.data.truncation.Truncation`.
        ids_from: compute "topk" at the token ids of this teacher's store, so that the two can be compared.
        options: fields of `prefdistill.signals.options.ExtractRequest`, see docs/options.md.

    Raises:
        UserError: on an unknown kind or role, data that cannot be read, a store of another request in `out`, another
            run that works there, ids of a store of other data, or logits that are not finite (with the rows).

    Example:
        >>> extract_signals("my/teacher", "pairs.jsonl", out="signals/teacher")       # doctest: +SKIP
    """
    request = ExtractRequest.checked("extract_signals", kinds=kinds, **options)
    check_request(request, ids_from, model)
    out = Path(out)
    check_place(out)
    if out.is_file():
        raise UserError(f"{out} is not a directory; give another --out")
    with (
        locked_together(out),  # before anything is loaded; it also gives each process its device
        ENGINES[request.engine](
            out, model, dataset, tokenizer, request, truncation or Truncation(), ids_from
        ) as shards,
    ):
        store = StoreArtifact("signals", out, shards.request, alone=shards.alone)
        with store.session(lock=False) as seal:
            if seal is None:
                shards.write(store)
                finish(store)
        signals = Signals.open(out)
        if seal is not None:
            shards.check(signals)
    return signals


@dataclass(frozen=True)
class LocalShards:
    """Writes and checks the shards of this process; the others of its launcher do theirs."""

    extraction: Encoding

    @property
    def request(self) -> dict[str, Any]:
        return self.extraction.request

    @property
    def alone(self) -> bool:
        return processes().num_processes == 1

    def write(self, store: StoreArtifact) -> None:
        """Write the missing shards of a store."""
        extraction = replace(self.extraction, request=store.request)
        rows, numbers = extraction.parts, store.shards(len(extraction.parts)).own()
        total = len(extraction.responses) * sum(len(rows[number]) for number in numbers)
        with Progress(f"signals ({extraction.request['role']})", total, "response") as progress:
            for number in numbers:
                write_part(store, extraction, number, progress)

    def check(self, signals: Signals) -> None:
        """Check the token ids of a finished store."""
        rows = self.extraction.parts
        for number in Parts(Path(), len(rows)).own():
            self.extraction.check(signals, rows[number])


@contextmanager
def local_shards(out: Path, *arguments: Any) -> Iterator[LocalShards]:
    """Load model and data into this process."""
    yield LocalShards(Extraction.load(*arguments))


@contextmanager
def served_shards(out: Path, *arguments: Any) -> Iterator[LocalShards]:
    """Load the data into this process, and ask a server for the signals."""
    yield LocalShards(ServedExtraction.load(*arguments))


ENGINES: dict[str, Callable[..., AbstractContextManager[Shards]]] = {
    "transformers": local_shards,
    "ray": ray_shards,
    "openai": served_shards,
}
