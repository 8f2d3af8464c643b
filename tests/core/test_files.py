"""Files are complete or not there."""

import json
import os
from pathlib import Path

import pytest

from prefdistill.core.files import (
    atomic_path,
    file_digest,
    read_json,
    value_digest,
    write_json,
    write_jsonl,
    write_text,
)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def fail_half_way(path, error):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_no_file(tmp_path, error):
    path = tmp_path / "new" / "results.json"
    with pytest.raises(error):
        fail_half_way(path, error)
    assert names(path.parent) == []


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        fail_half_way(path, RuntimeError)
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename within one file system is atomic
    assert path.read_text() == "new"
    assert names(tmp_path) == ["results.json"]


def test_a_file_is_synced_before_its_rename_and_the_directory_after(tmp_path, monkeypatch):
    """A power failure leaves neither an empty file nor, once the write has returned, the old one."""
    order, fsync, replace = [], os.fsync, Path.replace

    def record_fsync(descriptor):
        order.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_replace(path, target):
        order.append(("replace", path, target))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    with atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert order == [("fsync", temporary), ("replace", temporary, tmp_path / "a.json"), ("fsync", tmp_path)]


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    assert names(tmp_path) == ["a.json"]


def test_json_lines(tmp_path):
    rows = [{"text": "one\ntwo"}, {"text": "ü"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_digests(tmp_path):
    write_text(tmp_path / "a", "abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert value_digest({"a": 1, "b": 2}) == value_digest({"b": 2, "a": 1})
    assert len({value_digest(value) for value in (1, "1", [1], {"1": 1}, None, 1.5, True)}) == 7
