"""A signal store: Parquet shards and a manifest that says where they came from. Written last, the manifest is the proof
that the store is whole.

    DIR/manifest.json        provenance, row counts, a checksum per shard
    DIR/request.json         what was asked for; an interrupted extraction goes on only if it is asked for the same
    DIR/shards/00000.parquet one line per pair: row, and for chosen_ and rejected_ each: tokens, ended, offsets, kinds
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.data import RESPONSES as SIDES
from prefdistill.errors import UserError
from prefdistill.files import file_digest, read_json
from prefdistill.models import tokenizer_identity

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SCHEMA = 1
# Whose word a signal is: the teacher's, that of the SFT model the teacher's DPO started from, or that of the student's
# own starting point, the reference of the DPO margin.
ROLES = ("teacher", "teacher_reference", "reference")


def same(a: Any, b: Any) -> bool:
    """Whether two parts of a manifest agree in everything but what the thing is called: directories may be moved."""
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = ({key: value for key, value in x.items() if key != "name"} for x in (a, b))
    return a == b


class Signals:
    """One model's signals for one preference data set.

    Open a directory with `Signals.open`. `len(signals)` counts the rows of the data; rows that tokenisation dropped
    have no signals (`signals.rows` lists those that do).

    Example:
        >>> signals = Signals.open("signals/teacher")                       # doctest: +SKIP
        >>> signals.row(0)["chosen"]["values"].shape                        # doctest: +SKIP
        (27,)
    """

    def __init__(self, manifest: dict[str, Any], table: "Dataset") -> None:
        self.manifest = manifest
        self.table = table.with_format("numpy")
        self.rows = np.asarray(self.table["row"][:], dtype=np.int64)
        self._place = {int(row): place for place, row in enumerate(self.rows)}

    @classmethod
    def open(cls, directory: str | Path) -> "Signals":
        """Read a store after checking it against its manifest.

        Raises:
            UserError: if it is missing, unfinished, of another schema, has a gap, or a shard fails its checksum.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq
        from datasets import Dataset

        directory = Path(directory)
        if not (directory / "manifest.json").is_file():
            if (directory / "request.json").is_file():
                raise UserError(f"the signals in {directory} are unfinished; run the same `prefdistill signals` again")
            raise UserError(f"no signals in {directory}: make them with `prefdistill signals --out {directory} ...`")
        manifest = read_json(directory / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            raise UserError(f"{directory}/manifest.json is not a signal manifest of schema {SCHEMA}; make it again")
        tables = []
        for shard in manifest["shards"]:
            path = directory / "shards" / Path(shard["file"]).name
            if not path.is_file():
                raise UserError(f"{path} is missing; delete {directory} and make the signals again")
            if file_digest(path) != shard["sha256"]:
                raise UserError(f"{path} is damaged (its checksum differs); delete {directory} and make it again")
            tables.append(pq.read_table(path))
        signals = cls(manifest, Dataset(pa.concat_tables(tables)))
        if sorted([*signals.rows.tolist(), *manifest["dropped"]["rows"]]) != list(range(manifest["data"]["rows"])):
            raise UserError(f"the signals in {directory} do not cover every row of the data; delete and make it again")
        return signals

    @property
    def role(self) -> str:
        return self.manifest["role"]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.manifest["kinds"])

    def __len__(self) -> int:
        return self.manifest["data"]["rows"]

    def row(self, i: int) -> dict[str, dict[str, Any]]:
        """Signals of row i of the data: `{"chosen": {"tokens": T, "ended": bool, ...}, "rejected": {...}}`."""
        if i not in self._place:
            dropped = self.manifest["dropped"]
            why = f"dropped ({', '.join(dropped['reasons'])})" if i in dropped["rows"] else f"of {len(self)} rows"
            raise IndexError(f"row {i} has no signals: {why}")
        line = self.table[self._place[i]]
        found: dict[str, dict[str, Any]] = {side: {} for side in SIDES}
        for column, value in line.items():
            side, _, name = column.partition("_")
            if side in found:
                found[side][name] = value.item() if np.ndim(value) == 0 else np.asarray(value)
        return found

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises a UserError if the signals were made with another tokenizer than the student's."""
        made, ours = self.manifest["tokenizer"], tokenizer_identity(tokenizer)
        if not same(made, ours):
            differ = ", ".join(k for k in ours if k != "name" and made.get(k) != ours[k])
            raise UserError(
                f"the {self.role} signals were made with another tokenizer ({made['name']}, "
                f"other {differ}): make them again with the student's"
            )

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where the lines of some data rows stand in the store.

        Raises:
            UserError: if a row has no signals.
        """
        missing = [int(row) for row in rows if int(row) not in self._place]
        if missing:
            raise UserError(f"the {self.role} signals have a gap: {len(missing)} rows, the first is row {missing[0]}")
        return np.array([self._place[int(row)] for row in rows], dtype=np.int64)

    def scalar(self, column: str, rows: np.ndarray) -> np.ndarray:
        """One number per row, e.g. `scalar("chosen_logps", rows)` -> [n]."""
        return np.asarray(self.table.data.column(column).to_numpy())[self.places(rows)]

    def ragged(self, column: str, rows: np.ndarray) -> list[np.ndarray]:
        """One array per row, e.g. `ragged("chosen_values", rows)` -> n arrays [T + 1]."""
        chunk = self.table.data.column(column).combine_chunks()
        flat, ends = chunk.flatten().to_numpy().copy(), chunk.offsets.to_numpy()
        start = ends[0]
        return [flat[ends[place] - start : ends[place + 1] - start] for place in self.places(rows)]


@dataclass(frozen=True)
class SignalSet:
    """The signals a method may draw on, by role, with the score columns of the data, for some rows of it."""

    stores: dict[str, Signals]
    data: "Dataset"
    rows: np.ndarray

    @classmethod
    def of(cls, signals: "list[Signals]", data: "Dataset", fingerprint: str) -> "SignalSet":
        """Gather stores by role and check that they speak of this data, in the same way.

        Raises:
            UserError: if two have one role, or one was made from other data, another tokenizer or other truncation.
        """
        stores: dict[str, Signals] = {}
        for store in signals:
            if store.role in stores:
                raise UserError(f"two signal stores have the role {store.role}; give one of each")
            stores[store.role] = store
        for role, store in stores.items():
            made_from = store.manifest["data"]
            if made_from["fingerprint"] != fingerprint:
                raise UserError(
                    f"the {role} signals were made from other data ({made_from['name']}, {made_from['rows']} rows; "
                    f"this has {len(data)}): make them again with `prefdistill signals --data` and this data"
                )
        if not stores:
            return cls({}, data, np.arange(len(data)))
        first = next(iter(stores.values()))
        for role, store in stores.items():
            for part in ("truncation", "tokenizer"):
                ours, theirs = store.manifest[part], first.manifest[part]
                if not same(ours, theirs):
                    raise UserError(f"the {role} and {first.role} signals differ in {part}: {ours} and {theirs}")
        return cls(stores, data, first.rows)

    def at(self, rows: np.ndarray) -> "SignalSet":
        return SignalSet(self.stores, self.data, rows)

    def missing(self, needs: tuple[str, ...]) -> list[str]:
        """Those of `needs` ("role.kind", or "data.column") that are not here."""
        lacking = []
        for need in needs:
            role, _, kind = need.partition(".")
            there = kind in self.data.column_names if role == "data" else kind in self._kinds(role)
            if not there:
                lacking.append(need)
        return lacking

    def _kinds(self, role: str) -> tuple[str, ...]:
        return self.stores[role].kinds if role in self.stores else ()

    def scalar(self, role: str, name: str, side: str) -> np.ndarray:
        return self.stores[role].scalar(f"{side}_{name}", self.rows)

    def ragged(self, role: str, name: str, side: str) -> list[np.ndarray]:
        return self.stores[role].ragged(f"{side}_{name}", self.rows)

    def column(self, name: str) -> np.ndarray:
        """A numeric column of the data, e.g. `score_chosen`, for these rows."""
        return np.asarray(self.data.with_format("numpy")[name][:], dtype=np.float64)[self.rows]
