"""A damaged signal store made whole: what is damaged is set aside, and made again by what the store says of itself."""

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
from prefdistill.signals.extract import extract_signals
from prefdistill.signals.request import IN_MEMORY
from prefdistill.signals.store import SCHEMA, Signals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def repair_signals(
    out: str | Path,
    model: "PreTrainedModel | str | None" = None,
    dataset: "Dataset | str | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    ids_from: Signals | None = None,
    trust_remote_code: bool = False,
) -> tuple[Signals, list[str]]:
    """Make the damaged files of a store again, and no others; it ends in the bytes it had.

    Every option is the store's own. A shard that is whole is not read by the model again, even if the manifest that
    lists it is lost: it is known by the checksum beside it.

    Args:
        out: directory of the store.
        model, dataset, tokenizer: where those that the store names lie elsewhere now, or were in memory.
        ids_from: the teacher's store, if this one was read at its token ids.
        trust_remote_code: let the model's repository run its own code.

    Returns:
        The store, and the files that were damaged, relative to `out`.

    Raises:
        UserError: if there is no store, neither manifest nor request can be read, or model and data are not those it
            was made from.

    Example:
        >>> repair_signals("signals/teacher")                                   # doctest: +SKIP
    """
    out = Path(out)
    if not any((out / name).exists() for name in ("manifest.json", "request.json", "shards")):
        raise UserError(f"no signals in {out} to repair")
    request = _request(out)
    made_at = request["topk"].get("ids_from")
    if made_at and ids_from is None:
        raise UserError(f"{out} was read at the token ids of a teacher's store: give that one as --ids-from")
    if made_at and ids_from and ids_from.digest != made_at:
        raise UserError(f"{out} was read at the token ids of another store than that of --ids-from; give the teacher's")
    if dataset is None and request["data"]["name"] == IN_MEMORY:
        raise UserError(f"{out} was made from {IN_MEMORY}: give it as --data")
    if model is None and not request["model"]["name"]:
        raise UserError(f"{out} was made by a model in memory: give it as --model")
    team = processes()
    with team.main_process_first():  # it sets aside, the others find nothing left to set aside
        damaged = set_aside(out) if team.is_main_process else []
    if team.is_main_process:
        say(f"repair: {', '.join(damaged)}" if damaged else f"repair: nothing in {out} is damaged")
    if (out / "manifest.json").is_file():
        return Signals.open(out), damaged
    if dataset is None and _moved(request["data"]["name"]):
        raise UserError(f"{out} was made from {request['data']['name']}, which is not there; say where with --data")
    topk: dict[str, Any] = request["topk"]
    asked = {name: topk[name] for name in ("k", "p") if name in topk} | (
        {"topk_coding": topk["coding"]} if topk else {}
    )
    found = extract_signals(
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
        dtype=request["model"]["dtype"],
        quantization=request["model"].get("read_in"),
        bf16=request["model"]["bf16"],
        batch_tokens=request["batch_tokens"],
        shard_rows=request["shard_rows"],
        trust_remote_code=trust_remote_code,
        **asked,
    )
    return found, damaged


def set_aside(out: Path) -> list[str]:
    """Remove the damaged files of a store, so that `extract_signals` goes on with it as with an interrupted one.

    Returns:
        Their names, relative to `out`; none of a store that is whole, which stays as it is.
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
    """Whether the name of data is that of a file or directory which is not there: a name of the Hub is no such name."""
    path = Path(name.partition("#")[0]).expanduser()
    return (path.is_absolute() or name.endswith(suffixes())) and not path.exists()


def _request(out: Path) -> dict[str, Any]:
    """What a store was asked for, by its manifest or by the note made before it."""
    for name in ("manifest.json", "request.json"):
        found = read_sealed(out / name) if (out / name).is_file() else None
        if found is not None and found.get("schema") == SCHEMA:
            kept = {key: value for key, value in found.items() if key not in ("dropped", "shards", "versions")}
            return kept | {"topk": {key: value for key, value in kept["topk"].items() if key != "kl_error"}}
    raise UserError(
        f"neither manifest.json nor request.json of {out} can be read: delete it and make the signals again"
    )
