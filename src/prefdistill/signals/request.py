"""An extraction: the model, the data, and the request with everything that the signals depend on."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prefdistill import __version__
from prefdistill.core.errors import UserError
from prefdistill.core.progress import Progress
from prefdistill.data.batches import Layout, layout_for
from prefdistill.data.encode import encode_pairs, reading_of
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.load import check_pairs, load_pairs
from prefdistill.data.spans import Spans, read_spans
from prefdistill.data.truncation import Dropped, Reading, Truncation, nothing_left
from prefdistill.models.device import default_dtype
from prefdistill.models.identity import model_identity, tokenizer_identity
from prefdistill.models.load import load_model, load_tokenizer, ready
from prefdistill.signals.ids import Ids, check_ids, example_ids
from prefdistill.signals.kinds import Kind, Settings, make_kinds
from prefdistill.signals.needs import Need
from prefdistill.signals.options import SignalRequest
from prefdistill.signals.scoring import score_pairs, topk_manifest
from prefdistill.signals.shards import ROW, Shard, ShardColumns, response_columns
from prefdistill.signals.store import SCHEMA, Signals, SignalSet
from prefdistill.signals.topk import TopKRequest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Numbers of one shard that are in memory before it is written: 2^24 pairs of id and log-probability are 128 MiB.
SHARD_NUMBERS = 2**24
IN_MEMORY = "a data set in memory"
TOKENS_AT_MOST = 4096  # of a response, where truncation sets no limit

DEFAULTS = SignalRequest()


def check_request(options: SignalRequest, ids_from: Signals | None, model: "PreTrainedModel | str") -> None:
    """Raise a UserError if the options do not fit each other; nothing is loaded for it."""
    if ids_from is not None and "topk" not in options.kinds:
        raise UserError(f"ids_from applies to the kind topk, not to {', '.join(options.kinds)}; leave it out")
    if ids_from is not None and (options.k, options.p) != (DEFAULTS.k, DEFAULTS.p):
        raise UserError("with ids_from, the other store defines which tokens are kept; leave k and p out")
    if options.quantization is not None and not isinstance(model, str):
        raise UserError("quantization applies to a model that is loaded by name; leave it out for one in memory")
    if options.device_map is not None and not isinstance(model, str):
        raise UserError("device_map applies to a model that is loaded by name; leave it out for one in memory")


@dataclass(frozen=True)
class Source:
    """The data of an extraction, their name, and the options that they were read with."""

    data: "Dataset"
    name: str
    read_as: dict[str, Any]


def read_data(data: "Dataset | str", options: SignalRequest) -> Source:
    """Load the data, and check them.

    Raises:
        UserError: if they cannot be read.
    """
    read_as = {name: value for name, value in options.loader_options(data).items() if value}
    if isinstance(data, str):
        return Source(load_pairs(data, responses=options.responses, **read_as), data, read_as)
    check_pairs(data, "The data set", options.responses)
    return Source(data, IN_MEMORY, read_as)


def request_of(
    options: SignalRequest,
    settings: Settings,
    model: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    source: Source,
    truncation: Truncation,
) -> dict[str, Any]:
    """Return the request of an extraction from a model with this identity."""
    numbers = 1 + sum(kind.numbers_per_state for kind in make_kinds(options.kinds, settings))
    return {
        "schema": SCHEMA,
        "role": options.role,
        "kinds": sorted(options.kinds),
        "responses": list(options.responses),
        "positions": settings.positions,
        "value_dtype": settings.value_dtype,
        "value_temperature": settings.value_temperature,
        "topk": settings.topk,
        "model": model,
        "tokenizer": tokenizer_identity(tokenizer),
        "data": {
            "name": source.name,
            "rows": len(source.data),
            "fingerprint": data_fingerprint(source.data, options.responses),
            **({"read_as": source.read_as} if source.read_as else {}),
        },
        "truncation": {"max_length": truncation.max_length, "max_prompt_length": truncation.max_prompt_length},
        "shard_rows": min(options.shard_rows, _rows_in_memory(truncation, len(options.responses), numbers)),
    }


@dataclass(frozen=True)
class Encoding(ABC):
    """An extraction without the model: how rows become token ids, and what is stored of their scores."""

    tokenizer: "PreTrainedTokenizerBase"
    data: "Dataset"
    truncation: Truncation
    settings: Settings
    ids_from: Signals | None
    request: dict[str, Any]

    @property
    def responses(self) -> tuple[str, ...]:
        return tuple(self.request["responses"])

    @property
    def kinds(self) -> list[Kind]:
        return make_kinds(self.request["kinds"], self.settings)

    @property
    def parts(self) -> list[range]:
        """The rows of the data in each shard."""
        return parts_of(self.request)

    def check(self, store: Signals, part: range) -> None:
        """Raise a UserError if rows of a store are not of the ids that they are encoded into now."""
        rows, _ = encode_pairs(self.data, self.tokenizer, self.truncation, responses=self.responses, rows=part)
        check_ids(store, rows, self.tokenizer, within=part)

    @abstractmethod
    def scores(self, rows: "Dataset", progress: Progress) -> dict[str, list[Any]]:
        """Return the signals of encoded rows, see `score_pairs`."""

    def shard(self, part: range, progress: Progress) -> tuple[ShardColumns, dict[str, Any]]:
        """Extract one shard: its columns, and notes on rows that were dropped and on packing."""
        rows, dropped = encode_pairs(self.data, self.tokenizer, self.truncation, responses=self.responses, rows=part)
        ids = Ids.of(rows, self.responses)
        if self.ids_from is not None:
            check_ids(self.ids_from, rows, self.tokenizer, ids)
        scores = self.scores(rows, progress)
        progress.update(len(self.responses) * len(dropped))
        spans = read_spans(rows, self.data, self.tokenizer, self.responses)
        columns, errors = shard_columns(rows, ids, spans, scores, self.kinds)
        reading = reading_of(rows, dropped)
        notes = {
            "kept": len(rows),
            "truncated": {"prompts": reading.prompts, "responses": reading.responses},
            "rows": sorted(set(part).difference(rows["row"][:])),
            "dropped": dropped.counts,
            "first_rows": dropped.first_rows,
            "ids_sha256": ids.sha256,
            "example": example_ids(rows, self.responses),
            "kl_error": {"sum": sum(errors), "max": max(errors, default=0.0), "states": len(errors)},
        }
        return columns, notes


@dataclass(frozen=True)
class Extraction(Encoding):
    """Everything that is loaded to extract signals, and the request that goes into the manifest."""

    model: "PreTrainedModel"
    layout: Layout

    @classmethod
    def load(
        cls,
        model: "PreTrainedModel | str",
        data: "Dataset | str",
        tokenizer: "PreTrainedTokenizerBase | None",
        options: SignalRequest,
        truncation: Truncation,
        ids_from: Signals | None,
    ) -> "Extraction":
        """Load what is given by name, and build the request.

        Raises:
            UserError: on data or a model that cannot be loaded, or ids of a store of other states.
        """
        responses, model_name = options.responses, model if isinstance(model, str) else ""
        source = read_data(data, options)
        if tokenizer is None:
            place = model if isinstance(model, str) else model.name_or_path
            tokenizer = load_tokenizer(str(place), trust_remote_code=options.trust_remote_code)
        if isinstance(model, str):
            model = load_model(
                model,
                dtype=options.dtype or default_dtype(options.role),
                quantization=options.quantization,
                **options.placement,
                trust_remote_code=options.trust_remote_code,
            )
        model = ready(model)
        if ids_from is not None:
            _check_ids(ids_from, options.role, source.data, tokenizer, truncation, responses)
        encode_pairs(
            source.data, tokenizer, truncation, responses=responses, rows=range(1)
        )  # fails early on unusable data
        topk = TopKRequest(options.k, options.p, ids_from, options.topk_coding)
        settings = Settings(
            options.positions,
            options.value_dtype,
            options.value_temperature,
            topk_manifest(topk, model, tokenizer) if "topk" in options.kinds else {},
            ids_from,
        )
        layout = layout_for(model, truncation.max_length)
        identity = {
            **model_identity(model, model_name),
            "bf16": options.bf16,
            **({"read_in": options.quantization} if options.quantization else {}),
        }
        request = request_of(options, settings, identity, tokenizer, source, truncation)
        request |= {"batch_tokens": options.batch_tokens, "layout": layout.kind}
        return cls(tokenizer, source.data, truncation, settings, ids_from, request, model, layout)

    def scores(self, rows: "Dataset", progress: Progress) -> dict[str, list[Any]]:
        return score_pairs(
            self.model,
            rows,
            self.tokenizer,
            self.request["kinds"],
            responses=self.responses,
            settings=self.settings,
            bf16=self.request["model"]["bf16"],
            batch_tokens=self.request["batch_tokens"],
            layout=self.layout,
            progress=progress,
        )


def shard_columns(
    rows: "Dataset", ids: Ids, spans: Mapping[str, Spans], scores: dict[str, list[Any]], kinds: Sequence[Kind]
) -> tuple[ShardColumns, list[float]]:
    """Return the columns of a shard, and the divergence that packing put into each distribution."""
    row_numbers = ids.rows.tolist()
    columns: dict[str, Any] = {"row": (ROW, row_numbers)}
    errors: list[float] = []
    for name in ids.checks:
        every_state = not all(kind.settings.endpoints for kind in kinds)
        columns |= response_columns(name, rows, ids.lengths[name], ids.checks[name], spans[name], offsets=every_state)
        main: dict[str, Any] = {}  # the columns named as their kind come first
        others: dict[str, Any] = {}
        for kind in kinds:
            packed, kind_errors = kind.pack({c: scores[f"{name}_{c}"] for c in kind.collected}, row_numbers)
            errors += kind_errors
            for column, values in packed.items():
                group = main if column == kind.name else others
                group[kind.column_name(column, name)] = (kind.columns[column], values)
        columns |= {key: part for key, part in (main | others).items() if key not in columns}
    return columns, errors


def finished_manifest(request: dict[str, Any], shards: Sequence[Shard]) -> tuple[dict[str, Any], Reading]:
    """Return the manifest of a store, from its request and its shards, and how its rows were read.

    Raises:
        UserError: if every row was dropped.
    """
    notes = [shard.notes for shard in shards]
    reasons: Counter[str] = Counter()
    truncated = Counter({"prompts": 0, "responses": 0})
    first_rows: dict[str, int] = {}
    for note in notes:
        reasons.update(note["dropped"])
        truncated.update(note["truncated"])
        first_rows = note["first_rows"] | first_rows
    dropped = Dropped(dict(reasons.most_common()), first_rows)
    if len(dropped) == request["data"]["rows"]:
        raise UserError(nothing_left(dropped))
    errors = [note["kl_error"] for note in notes]
    states = sum(error["states"] for error in errors)
    topk = dict(request["topk"])
    if states:
        mean = sum(error["sum"] for error in errors) / states
        topk["kl_error"] = {"mean": mean, "max": max(error["max"] for error in errors), "states": states}
    files = [
        {"file": shard.name, "rows": note["kept"], "sha256": shard.digest, "ids_sha256": note["ids_sha256"]}
        for shard, note in zip(shards, notes, strict=True)
    ]
    gone = {"reasons": dropped.counts, "rows": [row for note in notes for row in note["rows"]]}
    reading = Reading(sum(note["kept"] for note in notes), dropped, truncated["prompts"], truncated["responses"])
    manifest = {
        **request,
        "topk": topk,
        "dropped": gone,
        "truncated": dict(truncated),
        "shards": files,
        "versions": versions(),
    }
    return manifest, reading


def parts_of(request: Mapping[str, Any]) -> list[range]:
    """Return the rows of the data in each shard of a store."""
    count, size = request["data"]["rows"], request["shard_rows"]
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def versions() -> dict[str, str]:
    """Return the versions that a manifest names."""
    import transformers

    return {"prefdistill": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _rows_in_memory(truncation: Truncation, responses: int, numbers_per_state: int) -> int:
    numbers = (truncation.max_length or TOKENS_AT_MOST) * responses * numbers_per_state
    return max(1, SHARD_NUMBERS // numbers)


def _check_ids(
    ids_from: Signals,
    role: str,
    data: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    truncation: Truncation,
    responses: tuple[str, ...],
) -> None:
    """Raise a UserError if another store's ids are not of the very states that are to be scored."""
    if role == "teacher" or ids_from.role != "teacher":
        raise UserError(
            f"ids_from must be a teacher's store: a {role} cannot be scored at the ids of a {ids_from.role}"
        )
    available = SignalSet.of([ids_from], data)
    if missing := available.missing([Need(ids_from.role, "topk", responses)]):
        raise UserError(f"the store of ids_from has no {missing[0]}; extract it with --kind topk")
    ids_from.check_tokenizer(tokenizer)
    if Truncation(**ids_from.manifest["truncation"]) != truncation:
        raise UserError(f"the store of ids_from has another truncation: {ids_from.manifest['truncation']}")
    # rows that were dropped there because of another response
    lacking: list[int] = []
    if gone := ids_from.manifest["dropped"]["rows"] if set(responses) != set(ids_from.responses) else []:
        kept, _ = encode_pairs(data.select(gone), tokenizer, truncation, responses=responses, rows=range(len(gone)))
        lacking = [gone[i] for i in kept["row"][:]]
    if lacking:
        raise UserError(
            f"the store of ids_from has no row {min(lacking)} ({len(lacking)} such rows), because another response of "
            f"it was dropped there; score --responses {','.join(ids_from.responses)}, as that store does"
        )
