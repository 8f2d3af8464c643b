"""Is damage to a signal store found when it is opened? Bits flipped in every part of every file, files cut short.

    python -m benchmarks.corruption

Makes a small store with every kind of signal, and tries every bit of every byte.
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
    """Every byte of a Parquet file, by what it is part of: (name, places)."""
    size, found = path.stat().st_size, [("magic", range(4))]
    metadata = pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            name, data = column.path_in_schema.split(".")[0], column.data_page_offset
            start = column.dictionary_page_offset if column.has_dictionary_page else data
            if start < data:
                found.append((f"dictionary page of {name}", range(start, data)))
            found.append((f"data pages of {name}", range(data, start + column.total_compressed_size)))
    footer = size - 8 - int.from_bytes(path.read_bytes()[-8:-4], "little")
    end = max(places.stop for _, places in found)
    if end < footer:
        found.append(("between pages and footer", range(end, footer)))
    return [
        *found,
        ("footer", range(footer, size - 8)),
        ("footer length", range(size - 8, size - 4)),
        ("magic", range(size - 4, size)),
    ]


def parts_of_manifest(path: Path) -> list[tuple[str, range]]:
    """Every byte of a manifest, by the field it is in."""
    text = path.read_bytes()
    starts = [match.start() for match in re.finditer(rb'^  "\w+":', text, re.MULTILINE)]
    names = [json.loads(re.match(rb'  ("\w+")', text[start:])[1]) for start in starts]  # type: ignore[index]
    ends = [*starts[1:], text.rindex(b"}")]
    fields = [(f"manifest: {name}", range(a, b)) for name, a, b in zip(names, starts, ends, strict=True)]
    return [("manifest: braces", range(starts[0])), *fields, ("manifest: braces", range(ends[-1], len(text)))]


def flips(parts: list[tuple[str, range]], *, bits: int, stride: int = 1) -> Iterator[tuple[str, int, int]]:
    """(part, place, mask): `bits` of the eight at every `stride`th byte of a part, and at its first and last one."""
    for name, places in parts:
        for place in sorted({*places[::stride], *places[-1:]}):
            for n in range(bits):
                yield name, place, 1 << ((place + n) % 8)


def is_found(directory: Path) -> bool:
    """Whether opening the store is refused with a message for the user, which names the file."""
    try:
        Signals.open(directory)
    except UserError as error:
        return ".parquet" in str(error) or ".json" in str(error)
    return False


def try_flips(
    directory: Path, path: Path, parts: list[tuple[str, range]], *, bits: int = 8, stride: int = 1
) -> tuple[Counter[str], Counter[str]]:
    """Flip bits of a file of a store, one at a time; how many were tried, and how many were found, by part."""
    tried: Counter[str] = Counter()
    found: Counter[str] = Counter()
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for name, place, mask in flips(parts, bits=bits, stride=stride):
            file.seek(place)
            file.write(bytes([whole[place] ^ mask]))
            tried[name] += 1
            found[name] += is_found(directory)
            file.seek(place)
            file.write(whole[place : place + 1])
    assert path.read_bytes() == whole
    return tried, found


def try_cuts(directory: Path, path: Path, *, stride: int = 1) -> tuple[int, int]:
    """Cut a file short at every `stride`th length, and let it grow by a byte; how many were tried and found."""
    whole, tried, found = path.read_bytes(), 0, 0
    for length in [*range(0, len(whole), stride), len(whole) + 1]:
        path.write_bytes((whole + b"\0")[:length])
        tried += 1
        found += is_found(directory)
    path.write_bytes(whole)
    return tried, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=8, help="of each byte that are flipped")
    parser.add_argument("--stride", type=int, default=1, help="try every n-th byte of each part only")
    args = parser.parse_args()
    from benchmarks.faults import make_store

    with tempfile.TemporaryDirectory() as place:
        store = make_store(Path(place))
        shards = sorted((store / "shards").iterdir())
        tried: Counter[str] = Counter()
        found: Counter[str] = Counter()
        for path in shards:
            counts = try_flips(store, path, parts_of_shard(path), bits=args.bits, stride=args.stride)
            tried, found = tried + counts[0], found + counts[1]
        manifest = store / "manifest.json"
        counts = try_flips(store, manifest, parts_of_manifest(manifest), bits=args.bits, stride=args.stride)
        tried, found = tried + counts[0], found + counts[1]
        for path in (*shards, manifest):
            some = try_cuts(store, path, stride=args.stride)
            tried[f"{path.name} cut short"], found[f"{path.name} cut short"] = some
        size = sum(path.stat().st_size for path in shards)
        print(f"{len(shards)} shards of {size:,} bytes, a manifest of {manifest.stat().st_size:,} bytes")
    for name in tried:
        print(f"{found[name]:7,} of {tried[name]:7,}  {name}")
    print(f"{found.total():7,} of {tried.total():7,}  found ({len(tried)} classes)")


if __name__ == "__main__":
    main()
