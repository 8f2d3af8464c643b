"""A signal store: Parquet shards and a manifest with their provenance. The manifest is written last: a store that has
one is complete.

    DIR/manifest.json        provenance, row counts, a checksum per shard and of itself
    DIR/request.json         the request; an interrupted extraction resumes only for the same one
    DIR/checksums/*.sha256   of each shard as it was written, for resuming and repairing
    DIR/shards/00000.parquet one line per row of the data: row, and for each response (chosen_, rejected_, ...): tokens,
                             ids_crc32, ended, offsets (where each token ends), text_start and text_end (where the
                             response's own text stands), and the columns of the kinds, see `signals.kinds`
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.core.differences import compare, differences, listed
from prefdistill.core.errors import UserError
from prefdistill.core.files import file_digest, read_sealed, value_digest
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.numbers import numeric_column
from prefdistill.models.identity import tokenizer_identity
from prefdistill.signals.kinds import Settings, make_kinds
from prefdistill.signals.manifest import check_manifest
from prefdistill.signals.needs import Need
from prefdistill.signals.shards import IDS_CHECK, Shard, open_shards
from prefdistill.signals.topk import TopK, TopKKind

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SCHEMA = 7
READABLE = (5, 6, SCHEMA)  # 5: without digests of the token ids; 6: without places in the text


class DamagedSignals(UserError):
    """A store that is not as it was written; `prefdistill.signals.repair` rebuilds the damaged parts."""

    def __init__(self, what: str, directory: Path) -> None:
        super().__init__(f"{what}; `prefdistill signals --repair --out {directory}` rebuilds that part")


class Signals:
    """One model's signals for one preference data set.

    Open a directory with `Signals.open`. `len(signals)` counts the rows of the data; rows that tokenisation dropped
    have no signals (`signals.rows` lists those that do).

    Example:
        >>> signals = Signals.open("signals/teacher")                       # doctest: +SKIP
        >>> signals.row(0)["chosen"]["values"].shape                        # doctest: +SKIP
        (27,)
    """

    def __init__(self, manifest: dict[str, Any], shards: Sequence[Shard], place: str = "in memory") -> None:
        self.manifest, self.place = manifest, place
        self.tokenizer: PreTrainedTokenizerBase | None = None  # that they were made with, where it is loaded
        self.shards = tuple(shards)
        rows = [shard.column("row").to_numpy() for shard in self.shards]
        self.rows = np.concatenate(rows).astype(np.int64)
        self._starts = np.cumsum([0, *map(len, rows)])
        self._place = {int(row): place for place, row in enumerate(self.rows)}
        self._scalars: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, directory: str | Path) -> "Signals":
        """Open a store after checking it against its manifest.

        Raises:
            UserError: if it is missing, unfinished or of another schema.
            DamagedSignals: if the manifest or a shard fails its checksum, a shard is missing, or there is a gap.
        """
        directory = Path(directory)
        if not (directory / "manifest.json").is_file():
            if (directory / "request.json").is_file():
                raise UserError(
                    f"the signals in {directory} are unfinished; run the same `prefdistill signals` again to resume"
                )
            if (directory / "shards").is_dir():
                raise UserError(f"{directory} has lost manifest.json and request.json; delete it and extract it again")
            raise UserError(f"no signals in {directory}: extract them with `prefdistill signals --out {directory} ...`")
        manifest = read_sealed(directory / "manifest.json")
        if manifest is None and _older(directory / "manifest.json"):
            raise UserError(f"{directory} was written by an older version; delete it and extract the signals again")
        if manifest is None:
            raise DamagedSignals(f"{directory}/manifest.json is damaged (its checksum differs)", directory)
        if manifest.get("schema") not in READABLE:
            raise UserError(f"{directory}/manifest.json is not a signal manifest of schema {SCHEMA}; extract it again")
        check_manifest(manifest, directory)
        paths = []
        for shard in manifest["shards"]:
            path = directory / "shards" / Path(shard["file"]).name
            if not path.is_file():
                raise DamagedSignals(f"{path} is missing", directory)
            if file_digest(path) != shard["sha256"]:
                raise DamagedSignals(f"{path} is damaged (its checksum differs)", directory)
            paths.append(path)
        signals = cls(manifest, open_shards(paths), str(directory))
        known = sorted([*signals.rows.tolist(), *manifest["dropped"]["rows"]])
        if len(known) != manifest["data"]["rows"] or known != list(range(len(known))):
            raise UserError(f"the signals in {directory} lack rows of the data; delete it and extract it again")
        return signals

    @property
    def role(self) -> str:
        return self.manifest["role"]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.manifest["kinds"])

    @property
    def responses(self) -> tuple[str, ...]:
        return tuple(self.manifest["responses"])

    @cached_property
    def digest(self) -> str:
        """Checksum of all shards."""
        return value_digest([shard["sha256"] for shard in self.manifest["shards"]])

    def __len__(self) -> int:
        return self.manifest["data"]["rows"]

    @cached_property
    def settings(self) -> Settings:
        """How the signals were extracted."""
        return Settings.of(self.manifest)

    def row(self, i: int) -> dict[str, dict[str, Any]]:
        """Return the signals of row i of the data: `{"chosen": {"tokens": T, "ended": bool, ...}, "rejected": ...}`."""
        if i not in self._place:
            dropped = self.manifest["dropped"]
            why = f"dropped ({', '.join(dropped['reasons'])})" if i in dropped["rows"] else f"of {len(self)} rows"
            raise IndexError(f"row {i} has no signals: {why}")
        signals: dict[str, dict[str, Any]] = {}
        for response in self.responses:
            names = [name for name in ("tokens", "ended", "offsets") if f"{response}_{name}" in self.columns]
            signals[response] = {name: self.value(f"{response}_{name}", i) for name in names}
            for kind in make_kinds(self.kinds, self.settings):
                signals[response] |= kind.read(self, response, i)
        return signals

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.shards[0].names)

    def is_read_with(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Return whether the signals were made with this tokenizer and its chat template."""
        return not differences(self.manifest["tokenizer"], tokenizer_identity(tokenizer))

    def has_tokens_of(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Return whether the signals were made with the tokens and rules of this tokenizer, whatever the template."""
        return bool(self.manifest["tokenizer"]["sha256"] == tokenizer_identity(tokenizer)["sha256"])

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise a UserError if the signals were made with another tokenizer than the student's."""
        stored, own = self.manifest["tokenizer"], tokenizer_identity(tokenizer)
        if changed := differences(stored, own):
            raise UserError(
                f"the {self.role} signals were made with another tokenizer ({stored['name']}: {'; '.join(changed)}); "
                f"extract them again with `prefdistill signals --tokenizer {own['name'] or 'STUDENT'}`"
            )

    def check_same_ids(self, other: "Signals") -> None:
        """Raise a UserError if another store of the same data was computed from other token ids."""
        rows = np.intersect1d(self.rows, other.rows)
        for response in set(self.responses) & set(other.responses):
            for column in (f"{response}_tokens", f"{response}_{IDS_CHECK}"):
                if column in self.columns and column in other.columns:
                    differs = self.scalar(column, rows) != other.scalar(column, rows)
                    if differs.any():
                        raise UserError(
                            f"the {self.role} signals ({self.place}) and the {other.role} signals ({other.place}) were "
                            f"computed from other token ids, first in row {rows[np.argmax(differs)]} ({response}): the "
                            "chat template or transformers has changed in between; extract both again"
                        )

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Return the places of some data rows in the store.

        Raises:
            UserError: if a row has no signals.
        """
        missing = [int(row) for row in rows if int(row) not in self._place]
        if missing:
            raise UserError(f"the {self.role} signals have a gap: {len(missing)} rows, the first is row {missing[0]}")
        return np.array([self._place[int(row)] for row in rows], dtype=np.int64)

    def scalar(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Return one number per row, e.g. `scalar("chosen_logps", rows)` -> [n]."""
        if column not in self._scalars:
            self._scalars[column] = np.concatenate([shard.column(column).to_numpy() for shard in self.shards])
        return self._scalars[column][self.places(rows)]

    def ragged(self, column: str, rows: np.ndarray) -> list[np.ndarray]:
        """Return one array per row, e.g. `ragged("chosen_values", rows)` -> n arrays [T + 1]."""
        flat: list[np.ndarray] = []
        for shard in self.shards:
            for chunk in shard.column(column).chunks:
                values, ends = chunk.values.to_numpy(), chunk.offsets.to_numpy()
                flat += [values[a:b] for a, b in itertools.pairwise(ends)]
        return [flat[place] for place in self.places(rows)]

    def topk(self, response: str, rows: np.ndarray, ids_from: "Signals | None" = None) -> TopK:
        """Return the token distributions at s_0 .. s_{T-1} of each row in turn, as [states, k].

        Args:
            response: of which response.
            rows: rows of the data.
            ids_from: the store that holds the ids, for one that was scored at another store's ids.
        """
        return TopKKind(self.settings).topk(self, response, rows, ids_from)

    def value(self, column: str, row: int) -> Any:
        """Return one row's value of a column: a number, or an array."""
        values = self.table(np.array([row]), (column,)).column(column)
        return self.flat(column, np.array([row])) if _is_list(values.type) else values[0].as_py()

    def flat(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Return a ragged column of some rows as one array, one row after another."""
        return self.table(rows, (column,)).column(column).combine_chunks().flatten().to_numpy()

    def table(self, rows: np.ndarray, columns: tuple[str, ...]) -> "pa.Table":
        """Return some columns of some rows; only the row groups that hold them are read."""
        import pyarrow as pa

        places = self.places(rows)
        shards = np.searchsorted(self._starts, places, side="right") - 1
        return pa.concat_tables(
            self.shards[shard].rows([place - self._starts[shard]], columns)
            for shard, place in zip(shards, places, strict=True)
        )


def _older(manifest: Path) -> bool:
    """Return whether a manifest is from before manifests had a checksum."""
    try:
        value = json.loads(manifest.read_bytes())
    except ValueError:
        return False
    return isinstance(value, dict) and "sha256" not in value and value.get("schema") in range(1, 4)


def _is_list(type_: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_list(type_)


@dataclass(frozen=True)
class SignalSet:
    """The signals a method may use, with the score columns of the data, for some rows of it."""

    stores: tuple[Signals, ...]
    data: "Dataset"
    rows: np.ndarray

    @classmethod
    def of(cls, signals: Iterable[Signals], data: "Dataset") -> "SignalSet":
        """Join stores after checking that they fit this data and each other. `rows` are those they all have.

        Raises:
            UserError: if two hold the same signals, or one is from other data, another tokenizer, another truncation or
                the ids of another teacher.
        """
        stores = tuple(signals)
        joined = cls(stores, data, np.arange(len(data)))
        fingerprints: dict[tuple[str, ...], str] = {}
        for store in stores:
            for response in store.responses:
                for kind in store.kinds:
                    if len(joined._holding(store.role, kind, response)) > 1:
                        raise UserError(f"two signal stores have {store.role}.{kind} of {response}; give one of each")
            data_of_store = store.manifest["data"]
            if store.responses not in fingerprints:
                there = set(store.responses) <= set(data.column_names)
                fingerprints[store.responses] = data_fingerprint(data, store.responses) if there else ""
            if data_of_store["fingerprint"] != fingerprints[store.responses]:
                how = " too, in another order or with other text" if data_of_store["rows"] == len(data) else ""
                raise UserError(
                    f"the {store.role} signals were made from other data ({data_of_store['name']}, "
                    f"{data_of_store['rows']} rows, {', '.join(store.responses)}; this has {len(data)}{how}): extract "
                    "them again with `prefdistill signals --data` and this data"
                )
            for part in ("truncation", "tokenizer"):
                if changed := compare(stores[0].manifest[part], store.manifest[part], path=part):
                    raise UserError(
                        f"the {stores[0].role} signals ({stores[0].place}) and the {store.role} signals "
                        f"({store.place}) differ in {listed([c.side_by_side() for c in changed])}; extract one again"
                        + (" with the student's tokenizer, `--tokenizer STUDENT`" if part == "tokenizer" else "")
                    )
            stores[0].check_same_ids(store)
            if "topk" in store.kinds and store.role != "teacher":
                for response in store.responses:
                    for teacher in joined._holding("teacher", "topk", response):
                        if store.manifest["topk"].get("ids_from") != teacher.digest:
                            raise UserError(
                                f"the {store.role} signals were not scored at the token ids of this teacher store: "
                                "extract them again with `--ids-from` and the teacher's directory"
                            )
        rows = [store.rows for store in stores]
        shared = set(range(len(data))).intersection(*(part.tolist() for part in rows))
        return joined.at(np.array(sorted(shared), dtype=np.int64))

    def at(self, rows: np.ndarray) -> "SignalSet":
        return SignalSet(self.stores, self.data, rows)

    def missing(self, needs: Iterable[Need]) -> list[Need]:
        """Return those of `needs` that are not here, each with the responses that lack it."""
        lacking = []
        for need in needs:
            if need.role == "data":
                if need.kind not in self.data.column_names:
                    lacking.append(need)
            elif without := tuple(r for r in need.responses if not self._holding(need.role, need.kind, r)):
                lacking.append(replace(need, responses=without))
        return lacking

    def check_settings(self, needs: Iterable[Need]) -> None:
        """Raise a UserError if signals that are needed were extracted with other settings than the method's."""
        for need in needs:
            for response in need.responses if need.settings else ():
                manifest = self.store(need.role, need.kind, response).manifest
                for name, value in need.settings.items():
                    if manifest[name] != value:
                        raise UserError(
                            f"the {need.role} signals ({need.kind}) have {name}={manifest[name]}, the method needs "
                            f"{value}; extract them again with `--{name.replace('_', '-')} {value}`"
                        )

    def _holding(self, role: str, kind: str, response: str) -> list[Signals]:
        return [s for s in self.stores if s.role == role and kind in s.kinds and response in s.responses]

    def store(self, role: str, kind: str, response: str) -> Signals:
        """Return the store that holds a kind of signal of one response.

        Raises:
            UserError: if none does.
        """
        stores = self._holding(role, kind, response)
        if not stores:
            raise UserError(f"no store holds {Need(role, kind, (response,))}")
        return stores[0]

    def scalar(self, role: str, kind: str, response: str, name: str | None = None) -> np.ndarray:
        """Return one number per row: the kind itself, or another column of its store, such as "tokens"."""
        return self.store(role, kind, response).scalar(f"{response}_{name or kind}", self.rows)

    def ragged(self, role: str, kind: str, response: str, name: str | None = None) -> list[np.ndarray]:
        return self.store(role, kind, response).ragged(f"{response}_{name or kind}", self.rows)

    def topk(self, role: str, response: str) -> TopK:
        store = self.store(role, "topk", response)
        ids_from = self.store("teacher", "topk", response) if store.manifest["topk"].get("ids_from") else None
        return store.topk(response, self.rows, ids_from)

    def batch(self, role: str, kind: str, response: str) -> dict[str, np.ndarray]:
        """Return a kind's numbers of every state of these rows, one row after another, by the names methods use."""
        return make_kinds([kind], self.store(role, kind, response).settings)[0].batch(self, role, response)

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column of the data, e.g. `score_chosen`, for these rows."""
        numbers = numeric_column(self.data, name)[self.rows]
        if not np.isfinite(numbers).all():
            row = self.rows[int(np.argmin(np.isfinite(numbers)))]
            raise UserError(f"column {name!r} has no number in row {row} of the data; give every pair one there")
        return numbers
