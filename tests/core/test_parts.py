"""Parts of unfinished work: files with checksums shared by rank, and the rows of a log."""

import os
from types import SimpleNamespace

import pytest

from prefdistill.core import parts as module
from prefdistill.core.errors import UserError
from prefdistill.core.files import file_digest, write_text
from prefdistill.core.parts import Parts, RowLog, checksum_file, write_checksum


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path / "shards", 4, ".txt", checksums=True)


def write(parts, *numbers):
    for number in numbers:
        write_text(parts.path(number), str(number))
        write_checksum(parts.path(number), file_digest(parts.path(number)))


def test_missing_and_damaged_parts_are_found(parts):
    write(parts, 0, 1, 2)
    assert parts.missing() == [3]
    assert [path.name for path in parts.paths[:2]] == ["00000.txt", "00001.txt"]
    checksum = checksum_file(parts.path(0)).read_text()
    assert checksum.endswith("  shards/00000.txt\n")  # as sha256sum writes it
    parts.path(0).write_text("other")
    parts.path(1).unlink()
    checksum_file(parts.path(2)).write_text("no checksum")
    assert parts.missing() == [0, 1, 2, 3]
    write(parts, *parts.missing())
    assert parts.missing() == []
    assert checksum_file(parts.path(0)).read_text() == checksum


def test_without_checksums_a_file_is_whole(tmp_path):
    parts = Parts(tmp_path, 2)
    parts.path(1).write_text("{}")
    assert parts.missing() == [0]


def test_processes_share_the_parts_by_rank(parts, monkeypatch):
    write(parts, 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(module, "processes", lambda rank=rank: SimpleNamespace(process_index=rank, num_processes=2))
        shares.append(parts.missing())
    assert shares == [[0], [1, 3]]


# -- logs --------------------------------------------------------------------------------------------------------------


def test_a_row_is_on_the_disk_when_it_is_appended(tmp_path, monkeypatch):
    synced, log = [], RowLog(tmp_path / "new" / "rows.jsonl")
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with log.appending() as append:
        append({"key": "a", "text": "ü"})
        append({"key": "a", "text": "v"})
    assert len(synced) == 2
    assert synced[-1] == log.path.stat().st_size
    assert RowLog(log.path).rows == {"a": {"key": "a", "text": "v"}}  # the last row of a key counts


def test_a_torn_last_line_is_cut_off_and_another_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for torn in ('{"key": "b"', '{"key": "b"}', '{"k": "b"}\n'):
        path.write_text('{"key": "a"}\n' + torn)
        assert set(RowLog(path).rows) == {"a"}
        assert path.read_text() == '{"key": "a"}\n'
    path.write_text('{"key"\n{"key": "b"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: damaged"):
        RowLog(path)
