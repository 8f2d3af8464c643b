"""Extract the signals of a data set from a model into a store: shard by shard, on any number of processes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.artifact import DirectoryArtifact
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_sealed, write_sealed
from prefdistill.core.lock import locked
from prefdistill.core.options import takes
from prefdistill.core.parts import Parts, read_checksum
from prefdistill.core.paths import check_place
from prefdistill.core.processes import processes
from prefdistill.core.progress import Progress, say
from prefdistill.data.truncation import Truncation
from prefdistill.signals.options import SignalRequest
from prefdistill.signals.request import DEFAULTS, Extraction, check_request, finished_manifest
from prefdistill.signals.shards import Shard, write_shard
from prefdistill.signals.store import DamagedSignals, Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@takes(SignalRequest)
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
    one shard at a time.

    Args:
        model: a causal language model, or the Hub name or directory to load one from.
        dataset: preference pairs in TRL's format, or where to load them from.
        tokenizer: the model's tokenizer; default: the one found beside the model.
        kinds: names of `KINDS`: "values", "logps", "topk" and others, see docs/signals.md. In nats.
        out: directory of the store.
        truncation: see `prefdistill.data.truncation.Truncation`.
        ids_from: compute "topk" at the token ids of this teacher's store, so that the two can be compared.
        options: fields of `prefdistill.signals.options.SignalRequest`, see docs/options.md.

    Raises:
        UserError: on an unknown kind or role, data that cannot be read, a store of another request in `out`, another
            run that works there, ids of a store of other data, or logits that are not finite (with the rows).

    Example:
        >>> extract_signals("my/teacher", "pairs.jsonl", out="signals/teacher")       # doctest: +SKIP
    """
    request = SignalRequest.checked("extract_signals", kinds=kinds, **options)
    check_request(request, ids_from, model)
    out = Path(out)
    check_place(out)
    if out.is_file():
        raise UserError(f"{out} is not a directory; give another --out")
    with locked(out, shared=True):  # before anything is loaded; it also gives each process its device
        extraction = Extraction.load(model, dataset, tokenizer, request, truncation or Truncation(), ids_from)
        store = StoreArtifact("signals", out, extraction.request)
        with store.session(lock=False) as seal:
            if seal is None:
                _write_shards(store, replace(extraction, request=store.request))
        signals = Signals.open(out)
        for number in store.shards(len(extraction.parts)).own() if seal is not None else ():
            extraction.check(signals, extraction.parts[number])
    return signals


class StoreArtifact(DirectoryArtifact):
    """A signal store as work that is done once: `request.json`, shards with their checksums, `manifest.json`."""

    SEAL = "manifest.json"
    repair = "prefdistill signals --repair"

    def read_note(self) -> dict[str, Any] | None:
        if not (self.place / self.NOTE).is_file():
            return None
        if (request := read_sealed(self.place / self.NOTE)) is None:
            raise self.damaged(f"{self.place / self.NOTE} is damaged (its checksum differs)")
        return {"request": request}

    def write_note(self, note: dict[str, Any]) -> None:
        if not note:
            write_sealed(self.place / self.NOTE, self.request)

    def read_seal(self) -> dict[str, Any] | None:
        if not (self.place / self.SEAL).is_file():
            return None
        if not (self.place / self.NOTE).is_file():
            raise self.damaged(f"{self.place / self.NOTE} is missing")
        return self.read_note()  # whether the manifest and the shards are whole is checked when the store is opened

    def damaged(self, reason: str) -> UserError:
        return DamagedSignals(reason, self.place)

    def shards(self, count: int) -> Parts:
        return Parts(self.place / "shards", count, ".parquet", checksums=True)

    def withdraw(self) -> None:
        if not any((self.place / "shards").glob("*.parquet")):
            shutil.rmtree(self.place, ignore_errors=True)

    def seal(self, about: dict[str, Any]) -> None:
        write_sealed(self.place / self.SEAL, about)  # every shard is synced already


def _write_shards(store: StoreArtifact, extraction: Extraction) -> None:
    """Write this process's missing shards, then the manifest over all."""
    rows = extraction.parts
    shards, responses = store.shards(len(rows)), len(extraction.responses)
    total = responses * sum(len(rows[number]) for number in shards.own())
    with Progress(f"signals ({extraction.request['role']})", total, "response") as progress:
        for number in shards.own():
            path = shards.path(number)
            if shards.is_whole(number):
                whole = Signals(extraction.request, [Shard(path)], str(store.place))
                extraction.check(whole, rows[number])
                progress.update(responses * len(rows[number]))
                continue
            earlier = read_checksum(path)
            write_shard(path, *extraction.shard(rows[number], progress))
            if earlier not in (None, read_checksum(path)):
                say(f"warning: {path} differs from the shard that it replaces: other versions or hardware wrote that")
    processes().wait_for_everyone()
    _finish(store, [Shard(path) for path in shards.paths])


def _finish(store: StoreArtifact, shards: list[Shard]) -> None:
    """Write the manifest over the shards; if no pair is left in any of them, remove them and say why."""
    team = processes()
    try:
        manifest, reading = finished_manifest(store.request, shards)
    except UserError:
        team.wait_for_everyone()
        if team.is_main_process:
            shutil.rmtree(store.place)
        raise
    if team.is_main_process:
        if not reading.complete:
            say(f"signals: {reading}")
        store.seal(manifest)
    team.wait_for_everyone()
