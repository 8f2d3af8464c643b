"""A store knows the token ids that it was computed from."""

import copy
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from prefdistill import METHODS, extract_signals
from prefdistill.core.errors import UserError
from prefdistill.core.files import file_digest, read_sealed, write_sealed
from prefdistill.core.parts import write_checksum
from prefdistill.data.encode import encode_pairs
from prefdistill.data.template import changes_with_time
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.pairs import evaluate_pairs
from prefdistill.report.tokens import write_token_view
from prefdistill.signals import Signals, SignalSet, repair_signals
from prefdistill.signals.ids import Ids, OtherIds, check_ids
from prefdistill.signals.shards import NOTES
from prefdistill.training.rows import prepare_rows
from support import clock as clocks
from support.clock import move_clock


@pytest.fixture
def clock(monkeypatch):
    """Move the clock that chat templates read: `clock(days)`."""
    move_clock(monkeypatch, 0)
    return lambda days: move_clock(monkeypatch, days)


@pytest.fixture
def dated(tokenizer):
    return clocks.dated(tokenizer)


def test_digests_are_of_the_ids_of_prompt_and_response(tmp_path, make_model, pairs, tokenizer):
    store = extract_signals(make_model(), pairs, tokenizer, ("logps",), tmp_path / "s", shard_rows=10)
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    ids = np.array(encoded[13]["prompt_ids"] + encoded[13]["chosen_ids"], dtype="<i4")
    assert store.scalar("chosen_ids_crc32", np.array([13])) == zlib.crc32(ids.tobytes())
    assert [shard["ids_sha256"] for shard in store.manifest["shards"]] == [
        Ids.of(encoded.select(range(start, min(start + 10, 24))), ("chosen", "rejected")).sha256
        for start in (0, 10, 20)
    ]
    assert Ids.of(encoded.select([]), ("chosen",)).checks["chosen"].shape == (0,)
    for moved in ({"prompt_ids": [1, 2, 3], "chosen_ids": [4]}, {"prompt_ids": [1, 2], "chosen_ids": [3, 4]}):
        ids = Ids.of(Dataset.from_list([{"row": 0, **moved}]), ("chosen",))  # the same text, cut elsewhere
        assert (ids.checks["chosen"][0], ids.lengths["chosen"][0]) == (
            zlib.crc32(np.array([1, 2, 3, 4], dtype="<i4").tobytes()),
            len(moved["chosen_ids"]),
        )


def test_a_store_of_another_day_is_refused_by_all_that_reads_it(tmp_path, make_model, pairs, dated, clock):
    model = make_model()
    options = {"role": "reference", "shard_rows": 10}
    extract = lambda name: extract_signals(model, pairs, dated, ("logps",), tmp_path / name, **options)  # noqa: E731
    store = extract("s")
    assert prepare_rows(pairs, METHODS["dpo"](), [store], dated, None)[0].num_rows == 24
    clock(1)
    shown = r"first in row 0 \(chosen: stored '27 Nov.*', now '28 Nov.*', and (23 of 23|9 of 9) other rows\)"
    readers = {
        "training": lambda: prepare_rows(pairs, METHODS["dpo"](), [store], dated, None),
        "evaluation": lambda: evaluate_pairs(model, pairs, dated, [store]),
        "token view": lambda: write_token_view(pairs, [store], tmp_path / "t.html", dated),
        "extraction": lambda: extract("s"),
    }
    for reader in readers.values():
        with pytest.raises(OtherIds, match=f"{shown}; the chat template prints the date") as refusal:
            reader()
        assert "extract them again with `prefdistill signals`" in str(refusal.value)
    assert not (tmp_path / "t.html").exists()
    teacher = extract_signals(model, pairs, dated, ("logps",), tmp_path / "teacher")
    with pytest.raises(UserError, match=r"other token ids, first in row 0 \((chosen|rejected)\)"):
        SignalSet.of([teacher, store], pairs)
    # an extraction that was interrupted, or a store with a damaged shard, does not go on with other ids
    (tmp_path / "s" / "shards" / "00002.parquet").unlink()
    with pytest.raises(OtherIds, match=shown):
        repair_signals(tmp_path / "s", model, pairs, dated)
    assert not (tmp_path / "s" / "shards" / "00002.parquet").exists()
    clock(0)
    assert repair_signals(tmp_path / "s", model, pairs, dated)[0].digest == store.digest


def test_a_single_row_that_differs_is_named(tmp_path, make_model, pairs, tokenizer):
    store = extract_signals(make_model(), pairs, tokenizer, ("logps",), tmp_path / "s", truncation=Truncation(48))
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation(48))
    check_ids(store, encoded, tokenizer, within=range(24))

    def changed(place, **columns):
        rows = [dict(row) for row in encoded]
        rows[place] |= columns
        return Dataset.from_list(rows, features=encoded.features)

    ids = encoded[7]["rejected_ids"]
    with pytest.raises(OtherIds, match=rf"row 7 \(rejected: {len(ids)} tokens stored, {len(ids)} now"):
        check_ids(store, changed(7, rejected_ids=[*ids[:-1], ids[-1] ^ 1]), tokenizer)
    with pytest.raises(OtherIds, match=rf"row 7 \(rejected: {len(ids)} tokens stored, {len(ids) + 1} now"):
        check_ids(store, changed(7, rejected_ids=[*ids, 3]), tokenizer)
    split = [token for letter in tokenizer.decode(encoded[0]["chosen_ids"]) for token in tokenizer.encode(letter)]
    with pytest.raises(OtherIds, match=r"row 0 \(chosen: the same text, in the ids \[.*\] stored and \[.*\] now\)"):
        check_ids(store, changed(0, chosen_ids=split), tokenizer)
    others = encoded.filter(lambda row: row["row"] != 5, keep_in_memory=True)
    check_ids(store, others, tokenizer)  # a part of the rows
    with pytest.raises(OtherIds, match=r"row 5 \(it is dropped now\)"):
        check_ids(store, others, tokenizer, within=range(24))
    few = extract_signals(make_model(), pairs, tokenizer, ("logps",), tmp_path / "f", truncation=Truncation(16))
    dropped = few.manifest["dropped"]["rows"]
    with pytest.raises(OtherIds, match=rf"row {dropped[0]} \(it was dropped then and is not dropped now\)"):
        check_ids(few, encoded, tokenizer)


def test_a_store_of_an_older_version_is_read_with_a_warning(tmp_path, make_model, pairs, dated, clock, capsys):
    extract_signals(make_model(), pairs, dated, ("logps",), tmp_path / "s", role="reference")
    shard, manifest = tmp_path / "s" / "shards" / "00000.parquet", read_sealed(tmp_path / "s" / "manifest.json")
    table = pq.read_table(shard).drop_columns(["chosen_ids_crc32", "rejected_ids_crc32"])
    pq.write_table(table.replace_schema_metadata({NOTES: b"{}"}), shard)
    write_checksum(shard, file_digest(shard))
    manifest["shards"] = [{"file": shard.name, "rows": 24, "sha256": file_digest(shard)}]
    write_sealed(tmp_path / "s" / "manifest.json", manifest | {"schema": 5})
    old = Signals.open(tmp_path / "s")
    prepare_rows(pairs, METHODS["dpo"](), [old], dated, None)
    assert f"({tmp_path / 's'}) are of an older version, without digests" in capsys.readouterr().err
    with pytest.raises(UserError, match="written by an older version; delete it and extract the signals again"):
        repair_signals(tmp_path / "s", make_model(), pairs, dated)
    encoded, _ = encode_pairs(pairs, dated, Truncation())
    longer = encoded.map(lambda row: {"chosen_ids": [*row["chosen_ids"], 3]}, keep_in_memory=True)
    with pytest.raises(OtherIds, match=r"row 0 \(chosen: \d+ tokens stored"):
        check_ids(old, longer, dated)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("26 Jul 2024", False),
        ("{{ strftime_now('%Y') }}", True),
        ("{% if day is not defined %}{% set day = strftime_now('%d %b') %}{% endif %}{{ day }}", True),
        ("{% if messages[0].role == 'system' %}{{ strftime_now('%H') }}{% endif %}", False),
        ("{{ range(10**9) | list | length if false }}{{ ['%s' % i for i in range(3)] }}", False),
        ("{{ range(99999) | random }}", True),
        ("{% if strftime_now is defined %}dated{% endif %}", False),
    ],
)
def test_templates_that_change_with_time(tokenizer, text, expected):
    other = copy.deepcopy(tokenizer)
    other.chat_template = text + tokenizer.chat_template
    assert changes_with_time(other) is expected
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert changes_with_time(other, system) is (expected or "system" in text)
