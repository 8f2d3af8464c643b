"""Data formats: adding one from outside, and the fingerprint that does not depend on the format."""

import csv
import importlib.metadata

import pytest
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.data import fingerprint
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.formats import FORMATS
from prefdistill.data.load import load_messages, load_pairs, load_prompts
from prefdistill.data.sources import read_rows

ROWS = [
    {"prompt": "p", "chosen": "c", "rejected": "r"},
    {"prompt": "q", "chosen": "c, and\nmore", "rejected": "r"},
]


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(autouse=True)
def formats(monkeypatch):
    """The registry, with its contents restored afterwards."""
    monkeypatch.setattr(FORMATS, "_things", {**FORMATS._things})
    return FORMATS


def test_a_registered_format_is_read_by_every_loader(tmp_path, formats):
    path = str(write_csv(tmp_path / "pairs.new", ROWS))
    with pytest.raises(
        UserError, match=r"unknown file type. Give a \.jsonl, \.jsonl\.gz, \.parquet, \.csv, \.json file"
    ):
        load_pairs(path)
    formats.register("new", read_csv)
    assert list(load_pairs(path)) == list(read_rows(path)) == ROWS
    assert load_prompts(path)["prompt"][:] == ["p", "q"]
    assert load_messages(path)["completion"][:] == ["c", "c, and\nmore"]
    assert list(load_pairs(f"{tmp_path}#pairs")) == ROWS  # a directory with a file for each split
    assert data_fingerprint(load_pairs(path)) == data_fingerprint(Dataset.from_list(ROWS))
    with pytest.raises(
        UserError, match=r"unknown file type. Give a \.jsonl, \.jsonl\.gz, \.parquet, \.csv, \.json, \.new file"
    ):
        load_pairs(str(write_csv(tmp_path / "pairs.tsv", ROWS)))


def test_a_format_may_be_an_entry_point_of_another_package(tmp_path, monkeypatch, formats):
    point = importlib.metadata.EntryPoint("new", f"{__name__}:read_csv", "prefdistill.formats")
    monkeypatch.setattr("prefdistill.core.registry.entry_points", lambda group: [point] * (group == point.group))
    monkeypatch.setattr(formats, "_entry_points_read", False)
    assert list(load_pairs(str(write_csv(tmp_path / "pairs.new", ROWS)))) == ROWS


def test_an_error_of_a_reader_names_the_file(tmp_path, formats):
    def broken(path):
        yield ROWS[0]
        raise KeyError("no such key")

    formats.register("broken", broken)
    path = tmp_path / "pairs.broken"
    path.touch()
    for read in (load_pairs, lambda source: list(read_rows(source))):
        with pytest.raises(
            UserError, match=r"pairs\.broken: cannot be read\. Write it again \(KeyError: 'no such key'"
        ):
            read(str(path))


# ---- Fingerprint


def test_a_fingerprint_is_computed_once_for_each_data_set_object(monkeypatch):
    calls = []
    digest = fingerprint._digest
    monkeypatch.setattr(fingerprint, "_digest", lambda *args: calls.append(args) or digest(*args))
    dataset = Dataset.from_list(ROWS)
    first = data_fingerprint(dataset)
    assert {data_fingerprint(dataset) for _ in range(3)} == {first}
    assert len(calls) == 1
    assert data_fingerprint(dataset, ("chosen",)) != first
    assert data_fingerprint(dataset.select([0, 1])) == first
    assert len(calls) == 3


def test_a_data_set_that_changes_in_place_gets_a_new_fingerprint():
    dataset = Dataset.from_list(ROWS)
    before = data_fingerprint(dataset)
    dataset.set_transform(lambda batch: {name: [value.upper() for value in batch[name]] for name in batch})
    after = data_fingerprint(dataset)
    assert after == data_fingerprint(Dataset.from_list([{k: v.upper() for k, v in row.items()} for row in ROWS]))
    assert after != before
    dataset.reset_format()
    assert data_fingerprint(dataset) == before


def test_the_fingerprint_is_the_one_that_stored_work_depends_on():
    plain = Dataset.from_list(ROWS)
    scored = [{**row, "score_chosen": 1, "score_rejected": 0.5, "chosen_ended": False} for row in ROWS]
    scored = Dataset.from_list(scored)
    fingerprints = [data_fingerprint(plain), data_fingerprint(scored), data_fingerprint(scored, ("chosen",))]
    assert fingerprints == [
        "aba0b43620e9151d480b34a6e501590afc5124021861b31a5363c5d9446c5ecd",
        "08652ebc9a289d17c303d02c4d11af3862d6df9802648cc8948879c32e851eb0",
        "513603aa34c0522e3d2453eed19fa76c966883281848cfade4c055affa5f03b7",
    ]
