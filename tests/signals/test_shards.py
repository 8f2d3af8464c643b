"""What of a store is open and in memory at a time, and in which processes."""

import os
import pickle
import resource
import shutil
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from prefdistill.core.files import read_sealed
from prefdistill.data.truncation import Truncation
from prefdistill.signals import Signals, extract_signals, shards
from prefdistill.signals.aligned import EncodedTexts, align
from prefdistill.signals.artifact import StoreArtifact, finish
from prefdistill.signals.kinds import Column
from prefdistill.signals.shards import ROW, open_shards, write_shard
from support.stores import random_store
from support.tokenizer_styles import make_tokenizer


@contextmanager
def room_for_files(count):
    """Let this process open only so many files more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]  # the lowest numbers that are not in use
    for number in free:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_store_of_more_shards_than_a_process_may_open_files(tmp_path, make_model, pairs, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "FILES_KEPT", 4, raising=False)
    store, again = tmp_path / "store", tmp_path / "again"
    extract_signals(make_model(), pairs, tokenizer, ("logps",), store, shard_rows=1)
    shutil.copytree(store, again, ignore=shutil.ignore_patterns("manifest.json"))
    with room_for_files(12):
        finish(StoreArtifact("signals", again, read_sealed(store / "request.json")))
        opened = Signals.open(again)
        rows = opened.table(opened.rows[::-1], ("row",)).column("row").to_pylist()
    assert rows == [*range(23, -1, -1)]
    assert (again / "manifest.json").read_bytes() == (store / "manifest.json").read_bytes()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store on disk, with 24 shards of four rows, each in its row group of 40 kB."""
    monkeypatch.setattr(shards, "GROUP_BYTES", 60_000)
    numbers = np.random.default_rng(0).normal(size=(24, 4, 10_000)).astype(np.float32)
    paths = [tmp_path / "shards" / f"{n:05d}.parquet" for n in range(24)]
    columns = {"chosen_values": Column("float32", ragged=True), "chosen_token_logps": Column("float32", ragged=True)}
    for n, path in enumerate(paths):
        rows = {"row": (ROW, range(4 * n, 4 * n + 4))}
        write_shard(path, rows | {name: (column, [*numbers[n]]) for name, column in columns.items()}, {})
    return Signals({}, open_shards(paths)), numbers.reshape(96, 10_000)


def read(store, row):
    return store.flat("chosen_values", np.array([row]))


def kept(store):
    """Read a store row by row; return how many bytes of it stay in memory."""
    before = pa.total_allocated_bytes()
    for row in store.rows:
        read(store, int(row))
    return pa.total_allocated_bytes() - before


def test_row_groups_in_memory_are_bounded_for_all_shards_together(store, monkeypatch):
    opened, numbers = store
    assert kept(pickle.loads(pickle.dumps(opened))) > numbers.nbytes
    monkeypatch.setattr(shards, "BYTES_KEPT", 500_000, raising=False)
    for each in (opened, pickle.loads(pickle.dumps(opened))):
        assert 400_000 < kept(each) < 510_000


def test_so_are_those_of_a_store_that_is_aligned_in_memory(pairs, tokenizer, monkeypatch):
    teacher = random_store(pairs, make_tokenizer("chatml"), ("values",), shard_rows=1)
    texts = EncodedTexts.of(pairs, tokenizer, Truncation(None), teacher.responses)
    aligned, _ = align(teacher, texts, tokenizer, Truncation(None))
    assert len(aligned.shards) == 24
    everything = kept(pickle.loads(pickle.dumps(aligned)))
    monkeypatch.setattr(shards, "BYTES_KEPT", 1, raising=False)
    assert 0 < kept(aligned) < everything / 2


def test_a_row_group_larger_than_the_bound_is_read(store, monkeypatch):
    opened, numbers = store
    monkeypatch.setattr(shards, "BYTES_KEPT", 1)
    monkeypatch.setattr(shards, "LARGE", 1)  # with threads
    np.testing.assert_array_equal(opened.flat("chosen_values", np.arange(96)), numbers.ravel())


def test_reading_a_few_rows_reads_only_their_row_groups(store):
    opened, numbers = store
    assert opened.shards[0].file.num_row_groups == 4
    before = pa.total_allocated_bytes()
    for row in (90, 3, 90):
        np.testing.assert_array_equal(read(opened, row), numbers[row])
    assert pa.total_allocated_bytes() - before < 100_000


def test_forked_processes_read_a_store_that_is_open(store):
    """As workers of a data loader do."""
    opened, numbers = store
    read(opened, 0)
    loader = torch.utils.data.DataLoader(
        range(96), batch_size=None, num_workers=2, multiprocessing_context="fork", collate_fn=partial(read, opened)
    )
    for row, values in enumerate(loader):
        np.testing.assert_array_equal(values, numbers[row])
    np.testing.assert_array_equal(read(opened, 95), numbers[95])
