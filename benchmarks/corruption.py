"""Check that damage to a signal store is detected at open: bits flipped in every part of every file, files truncated.

    python -m benchmarks.corruption

Extracts a small store with every kind of signal and tries every bit of every byte.
"""

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from prefdistill.core.errors import UserError
from prefdistill.signals import Signals


def parts_of_shard(path: Path) -> list[tuple[str, range]]:
    """Partition the bytes of a Parquet file into its parts: (name, offsets)."""
    size, parts = path.stat().st_size, [("magic", range(4))]
    metadata = pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            name, data = column.path_in_schema.split(".")[0], column.data_page_offset
            start = column.dictionary_page_offset if column.has_dictionary_page else data
            if start < data:
                parts.append((f"dictionary page of {name}", range(start, data)))
            parts.append((f"data pages of {name}", range(data, start + column.total_compressed_size)))
    footer = size - 8 - int.from_bytes(path.read_bytes()[-8:-4], "little")
    end = max(offsets.stop for _, offsets in parts)
    if end < footer:
        parts.append(("between pages and footer", range(end, footer)))
    return [
        *parts,
        ("footer", range(footer, size - 8)),
        ("footer length", range(size - 8, size - 4)),
        ("magic", range(size - 4, size)),
    ]


def parts_of_manifest(path: Path) -> list[tuple[str, range]]:
    """Partition the bytes of a manifest by field."""
    text = path.read_bytes()
    starts = [match.start() for match in re.finditer(rb'^  "\w+":', text, re.MULTILINE)]
    names = [json.loads(re.match(rb'  ("\w+")', text[start:])[1]) for start in starts]  # type: ignore[index]
    ends = [*starts[1:], text.rindex(b"}")]
    fields = [(f"manifest: {name}", range(a, b)) for name, a, b in zip(names, starts, ends, strict=True)]
    return [("manifest: braces", range(starts[0])), *fields, ("manifest: braces", range(ends[-1], len(text)))]


def flips(parts: list[tuple[str, range]], *, bits: int, stride: int = 1) -> Iterator[tuple[str, int, int]]:
    """Yield (part, offset, mask): `bits` of the eight at every `stride`th byte of a part, and at its first and last."""
    for name, offsets in parts:
        for offset in sorted({*offsets[::stride], *offsets[-1:]}):
            for n in range(bits):
                yield name, offset, 1 << ((offset + n) % 8)


def is_detected(directory: Path) -> bool:
    """Return whether opening the store raises a UserError that names a file."""
    try:
        Signals.open(directory)
    except UserError as error:
        return ".parquet" in str(error) or ".json" in str(error)
    return False


def try_flips(
    directory: Path, path: Path, parts: list[tuple[str, range]], *, bits: int = 8, stride: int = 1
) -> tuple[Counter[str], Counter[str]]:
    """Flip bits of a file of a store, one at a time; return how many were tried and detected, by part."""
    tried: Counter[str] = Counter()
    detected: Counter[str] = Counter()
    original = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for name, offset, mask in flips(parts, bits=bits, stride=stride):
            file.seek(offset)
            file.write(bytes([original[offset] ^ mask]))
            tried[name] += 1
            detected[name] += is_detected(directory)
            file.seek(offset)
            file.write(original[offset : offset + 1])
    assert path.read_bytes() == original
    return tried, detected


def try_truncations(directory: Path, path: Path, *, stride: int = 1) -> tuple[int, int]:
    """Truncate a file to every `stride`th length, and extend it by a byte; return how many were tried and detected."""
    original, tried, detected = path.read_bytes(), 0, 0
    for length in [*range(0, len(original), stride), len(original) + 1]:
        path.write_bytes((original + b"\0")[:length])
        tried += 1
        detected += is_detected(directory)
    path.write_bytes(original)
    return tried, detected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=8, help="bits to flip in each byte")
    parser.add_argument("--stride", type=int, default=1, help="only every n-th byte of each part")
    args = parser.parse_args()
    from benchmarks.faults import make_store

    with tempfile.TemporaryDirectory() as place:
        store = make_store(Path(place))
        shards = sorted((store / "shards").iterdir())
        tried: Counter[str] = Counter()
        detected: Counter[str] = Counter()
        manifest = store / "manifest.json"
        for path in (*shards, manifest):
            parts = parts_of_manifest(path) if path == manifest else parts_of_shard(path)
            counts = try_flips(store, path, parts, bits=args.bits, stride=args.stride)
            tried, detected = tried + counts[0], detected + counts[1]
            part = f"{path.name} truncated"
            tried[part], detected[part] = try_truncations(store, path, stride=args.stride)
        size = sum(path.stat().st_size for path in shards)
        print(f"{len(shards)} shards of {size:,} bytes, a manifest of {manifest.stat().st_size:,} bytes")
    for name in tried:
        print(f"{detected[name]:7,} of {tried[name]:7,}  {name}")
    print(f"{detected.total():7,} of {tried.total():7,}  detected ({len(tried)} classes)")


if __name__ == "__main__":
    main()
