"""Repair a damaged signal store: remove the damaged files and extract them again with the store's own request."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import read_sealed, write_sealed
from prefdistill.core.lock import locked
from prefdistill.core.parts import is_whole, read_checksum, write_checksum
from prefdistill.core.processes import processes
from prefdistill.core.progress import say
from prefdistill.data.formats import suffixes
from prefdistill.data.truncation import Truncation
from prefdistill.models.options import Placement
from prefdistill.models.vocabulary import stored_tokenizer
from prefdistill.signals.extract import extract_signals
from prefdistill.signals.request import IN_MEMORY
from prefdistill.signals.store import READABLE, SCHEMA, Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def repair_signals(
    out: str | Path,
    model: "PreTrainedModel | str | None" = None,
    dataset: "Dataset | str | None" = None,
    tokenizer: "PreTrainedTokenizerBase | str | None" = None,
    *,
    chat_template: str | None = None,
    ids_from: Signals | None = None,
    base_url: str | None = None,
    trust_remote_code: bool = False,
    placement: Placement | None = None,
) -> tuple[Signals, list[str]]:
    """Rebuild the damaged files of a store, and no others, to the bytes they had.

    Every option is the store's own. A whole shard is not scored again, even if the manifest that lists it is lost: the
    checksum beside it identifies it.

    Args:
        out: directory of the store.
        model, dataset, tokenizer: if those that the store names have moved, or were in memory.
        chat_template: the file of the store's chat template, if that has moved.
        ids_from: the teacher's store, if this one was scored at its token ids.
        base_url: of the server, if the store is of a served teacher. What it computes now may be rounded otherwise.
        trust_remote_code: let the model's repository run its own code.
        placement: of a model that is larger than one device.

    Returns:
        The store, and the files that were damaged, relative to `out`.

    Raises:
        UserError: if there is no store, neither manifest nor request can be read, or model and data are not those it
            was extracted from.

    Example:
        >>> repair_signals("signals/teacher")                                   # doctest: +SKIP
    """
    out = Path(out)
    if not any((out / name).exists() for name in ("manifest.json", "request.json", "shards")):
        raise UserError(f"no signals in {out} to repair")
    request = _request(out)
    teacher = request["topk"].get("ids_from")
    if teacher and ids_from is None:
        raise UserError(f"{out} was scored at the token ids of a teacher's store: give that one as --ids-from")
    if teacher and ids_from and ids_from.digest != teacher:
        raise UserError(f"{out} was scored at the token ids of another store than --ids-from; give the teacher's")
    if dataset is None and request["data"]["name"] == IN_MEMORY:
        raise UserError(f"{out} was extracted from {IN_MEMORY}: give it as --data")
    if model is None and not request["model"]["name"]:
        raise UserError(f"{out} was extracted from a model in memory: give it as --model")
    served = "served" in request["model"]
    if served and base_url is None:
        raise UserError(f"{out} was extracted from a served model: give --base-url")
    if base_url is not None and not served:
        raise UserError(f"{out} was not extracted from a served model; leave --base-url out")
    team = processes()
    with team.main_process_first():  # it removes what is damaged; the others then find nothing damaged
        damaged = remove_damaged(out) if team.is_main_process else []
    if team.is_main_process:
        say(f"repair: {', '.join(damaged)}" if damaged else f"repair: nothing in {out} is damaged")
    if (out / "manifest.json").is_file():
        return Signals.open(out), damaged
    if dataset is None and _moved(request["data"]["name"]):
        raise UserError(
            f"{out} was extracted from {request['data']['name']}, which is missing; give its place with --data"
        )
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = _tokenizer(request, model, tokenizer, chat_template, trust_remote_code)
    topk: dict[str, Any] = request["topk"]
    options = {name: topk[name] for name in ("k", "p") if name in topk} | (
        {"topk_coding": topk["coding"]} if topk else {}
    )
    if served:
        options |= {"engine": "openai", "base_url": base_url}
    else:
        options |= {
            "dtype": request["model"]["dtype"],
            "quantization": request["model"].get("read_in"),
            "bf16": request["model"]["bf16"],
            "batch_tokens": request["batch_tokens"],
        }
    store = extract_signals(
        model if model is not None else request["model"]["name"],
        dataset if dataset is not None else request["data"]["name"],
        tokenizer,
        tuple(request["kinds"]),
        out,
        role=request["role"],
        responses=tuple(request["responses"]),
        truncation=Truncation(**request["truncation"]),
        positions=request["positions"],
        value_dtype=request["value_dtype"],
        value_temperature=request["value_temperature"],
        ids_from=ids_from,
        shard_rows=request["shard_rows"],
        trust_remote_code=trust_remote_code,
        **(placement or Placement()).placement,
        **options,
        **(request["data"].get("read_as", {}) if dataset is None or isinstance(dataset, str) else {}),
    )
    return store, damaged


def _tokenizer(
    request: dict[str, Any], model: Any, name: str | None, chat_template: str | None, trust_remote_code: bool
) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a store in the store's form, from its place now; None for the model's own."""
    stored = request["tokenizer"]
    is_own = stored["name"] in ("", request["model"]["name"])
    if name is None and is_own and "form" not in stored:
        return None
    if is_own and model is not None:
        name = name or str(getattr(model, "name_or_path", model))
    return stored_tokenizer(stored, name=name, chat_template=chat_template, trust_remote_code=trust_remote_code)


def remove_damaged(out: Path) -> list[str]:
    """Remove the damaged files of a store, so that `extract_signals` resumes it as it resumes an interrupted one.

    Returns:
        Their names, relative to `out`; none for a whole store, which stays as it is.
    """
    with locked(out, shared=True):
        request, manifest = (
            _request(out),
            read_sealed(out / "manifest.json") if (out / "manifest.json").exists() else None,
        )
        damaged = [] if manifest else ["manifest.json"]
        if not (out / "request.json").is_file() or read_sealed(out / "request.json") is None:
            damaged.append("request.json")
            write_sealed(out / "request.json", request)
        listed = {shard["file"]: shard["sha256"] for shard in manifest["shards"]} if manifest else {}
        broken = False
        for number in range(-(-request["data"]["rows"] // request["shard_rows"])):
            shard = out / "shards" / f"{number:05d}.parquet"
            digest = listed.get(shard.name)
            if digest and read_checksum(shard) != digest:
                damaged.append(f"checksums/{shard.stem}.sha256")
                write_checksum(shard, digest)
            if not is_whole(shard):
                damaged.append(f"shards/{shard.name}")
                shard.unlink(missing_ok=True)
                broken = True
        if broken or not manifest:
            (out / "manifest.json").unlink(missing_ok=True)
        return damaged


def _moved(name: str) -> bool:
    """Return whether data is named by a file or directory that is missing; a Hub name is neither."""
    path = Path(name.partition("#")[0]).expanduser()
    return (path.is_absolute() or name.endswith(suffixes())) and not path.exists()


def _request(out: Path) -> dict[str, Any]:
    """Return the request of a store, from its manifest or from the note written before it."""
    for name in ("manifest.json", "request.json"):
        record = read_sealed(out / name) if (out / name).is_file() else None
        if record is not None and record.get("schema") == SCHEMA:
            request = {
                key: value for key, value in record.items() if key not in ("dropped", "truncated", "shards", "versions")
            }
            return request | {"topk": {key: value for key, value in request["topk"].items() if key != "kl_error"}}
        if record is not None and record.get("schema") in READABLE:
            raise UserError(f"{out} was written by an older version; delete it and extract the signals again")
    raise UserError(
        f"neither manifest.json nor request.json of {out} can be read: delete it and extract the signals again"
    )
