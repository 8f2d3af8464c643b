"""Validate a signal manifest before the store is read: it may come from anywhere, and anything may be in it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from prefdistill.core.errors import UserError
from prefdistill.signals.kinds import KINDS


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)  # keys that nothing here reads are left alone


class _Data(_Part):
    name: str
    rows: PositiveInt
    fingerprint: str
    read_as: dict[str, Any] = {}


class _Tokenizer(_Part):
    name: str


class _Truncation(_Part):
    model_config = ConfigDict(strict=True, extra="forbid")
    max_length: PositiveInt | None
    max_prompt_length: PositiveInt | None


class _Dropped(_Part):
    reasons: dict[str, int]
    rows: list[NonNegativeInt]


class _Shard(_Part):
    file: str
    rows: NonNegativeInt
    sha256: str
    ids_sha256: str | None = None  # of schema 6


class _Manifest(_Part):
    role: Literal["teacher", "teacher_reference", "reference", "student"]
    kinds: list[str] = Field(min_length=1)
    responses: list[str] = Field(min_length=1)
    positions: Literal["all", "endpoints"]
    value_temperature: PositiveFloat
    topk: dict[str, Any]
    model: dict[str, Any]
    tokenizer: _Tokenizer
    data: _Data
    truncation: _Truncation
    dropped: _Dropped
    truncated: dict[str, NonNegativeInt] | None = None
    shards: list[_Shard] = Field(min_length=1)


def check_manifest(manifest: dict[str, Any], directory: Path) -> None:
    """Raise a UserError if a manifest lacks what is read of it, or names a shard outside of its directory."""
    where = f"{directory}/manifest.json"
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where} is damaged ({key}: {first['msg']}); extract the signals again") from error
    if unknown := [kind for kind in manifest["kinds"] if kind not in KINDS]:
        raise UserError(f"{where} has the signal kind {unknown[0]!r}, which no installed package registers")
    shards = directory / "shards"
    for shard in manifest["shards"]:
        name = shard["file"]
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise UserError(f"{where} names the shard {name!r}, which is no file of the store; extract it again")
        if not (shards / name).resolve().is_relative_to(directory.resolve()):
            raise UserError(f"{shards / name} is a link that leads out of the store; put the file itself there")
