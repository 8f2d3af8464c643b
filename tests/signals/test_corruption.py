"""Damage to a signal store is found when it is opened, and repaired without making the rest again."""

import shutil
from pathlib import Path

import pytest
from benchmarks.corruption import parts_of_manifest, parts_of_shard, try_flips, try_truncations

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_sealed, write_json, write_jsonl, write_sealed
from prefdistill.signals import Signals, extract_signals, repair_signals, request

KINDS = ("values", "logps", "q", "topk")


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_model, pairs, tokenizer):
    """A directory with a model, pairs and a store of three shards, made from them by name."""
    place = tmp_path_factory.mktemp("made")
    make_model().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    write_jsonl(place / "pairs.jsonl", list(pairs)[:6])
    asked = {"kinds": KINDS, "k": 3, "shard_rows": 2, "dtype": "float32"}
    extract_signals(str(place / "model"), str(place / "pairs.jsonl"), out=place / "store", **asked)
    return place


@pytest.fixture
def store(made, tmp_path):
    return Path(shutil.copytree(made / "store", tmp_path / "store"))


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def flip(path, place=100):
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])


# -- found -------------------------------------------------------------------------------------------------------------


def test_every_part_of_a_shard_is_under_its_checksum(store):
    shard = store / "shards" / "00001.parquet"
    parts = parts_of_shard(shard)
    names = {name for name, _ in parts}
    columns = {f"data pages of {name}" for name in Signals.open(store).columns}
    assert columns | {"magic", "footer", "footer length", "dictionary page of chosen_topk_counts"} <= names
    covered = sorted(place for _, places in parts for place in places)
    assert covered == list(range(shard.stat().st_size))  # no byte is in none of them, or in two
    tried, found = try_flips(store, shard, parts, bits=1, stride=7)
    assert tried == found
    assert set(tried) == names
    assert Signals.open(store)  # all was put back


def test_every_field_of_the_manifest_is_under_its_checksum(store):
    manifest = store / "manifest.json"
    parts = parts_of_manifest(manifest)
    assert {f"manifest: {key}" for key in [*read_sealed(manifest), "sha256"]} <= {name for name, _ in parts}
    assert sorted(place for _, places in parts for place in places) == list(range(manifest.stat().st_size))
    tried, found = try_flips(store, manifest, parts, bits=1)
    assert tried == found
    assert tried.total() == manifest.stat().st_size


def test_truncated_files_are_detected(store):
    for path in (store / "shards" / "00000.parquet", store / "manifest.json"):
        tried, found = try_truncations(store, path, stride=101)
        assert tried == found > 10


def test_swapped_shards_are_detected(store):
    first, second = (store / "shards" / f"0000{n}.parquet" for n in (0, 1))
    swapped = first.read_bytes()
    second.replace(first)
    second.write_bytes(swapped)
    with pytest.raises(
        UserError, match=r"00000\.parquet is damaged \(its checksum differs\); `prefdistill signals --re"
    ):
        Signals.open(store)


def test_a_reformatted_value_breaks_the_seal(tmp_path):
    write_sealed(tmp_path / "a.json", {"x": 1e-05, "y": [1, None]})
    assert read_sealed(tmp_path / "a.json") == {"x": 1e-05, "y": [1, None]}
    text = (tmp_path / "a.json").read_text()
    for other in (text.replace("1e-05", "1E-05"), text.replace("\n", ""), text.replace('"y"', '"z"'), "[" * 100_000):
        (tmp_path / "a.json").write_text(other)
        assert read_sealed(tmp_path / "a.json") is None
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_sealed(tmp_path / "a.json") is None


# -- repaired ----------------------------------------------------------------------------------------------------------


def lose_notes(store):
    for name in ("manifest.json", "request.json"):
        flip(store / name)


DAMAGE = {
    "a flipped bit": (lambda s: flip(s / "shards/00001.parquet"), {"shards/00001.parquet"}),
    "two shards": (
        lambda s: [flip(s / "shards/00000.parquet"), (s / "shards/00002.parquet").unlink()],
        {"shards/00000.parquet", "shards/00002.parquet"},
    ),
    "a shard cut short": (
        lambda s: (s / "shards/00000.parquet").write_bytes((s / "shards/00000.parquet").read_bytes()[:-1]),
        {"shards/00000.parquet"},
    ),
    "the manifest": (lambda s: flip(s / "manifest.json"), {"manifest.json"}),
    "no manifest": (lambda s: (s / "manifest.json").unlink(), {"manifest.json"}),
    "manifest and shard": (
        lambda s: [flip(s / "manifest.json"), flip(s / "shards/00002.parquet")],
        {"manifest.json", "shards/00002.parquet"},
    ),
    "request": (lambda s: flip(s / "request.json"), {"request.json"}),
    "no request": (lambda s: (s / "request.json").unlink(), {"request.json"}),
    "a checksum": (lambda s: flip(s / "checksums/00001.sha256", 3), {"checksums/00001.sha256"}),
    "all shards": (lambda s: shutil.rmtree(s / "shards"), {f"shards/0000{n}.parquet" for n in range(3)}),
    "all but the manifest": (
        lambda s: [shutil.rmtree(s / "shards"), shutil.rmtree(s / "checksums"), (s / "request.json").unlink()],
        {"request.json"} | {f"{x}" for n in range(3) for x in (f"shards/0000{n}.parquet", f"checksums/0000{n}.sha256")},
    ),
    "nothing": (lambda s: None, set()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_rebuilds_only_what_is_damaged_to_the_last_byte(damage, store, made, monkeypatch):
    harm, expected = DAMAGE[damage]
    whole, calls, real = contents(store), [], request.score_pairs
    monkeypatch.setattr(request, "score_pairs", lambda *args, **given: calls.append(1) or real(*args, **given))
    harm(store)
    found, damaged = repair_signals(store)
    assert set(damaged) == expected
    assert len(calls) == sum(name.startswith("shards/") for name in expected)
    assert contents(store) == whole
    assert len(found) == 6


def test_an_interrupted_repair_resumes(store, monkeypatch):
    whole, real = contents(store), request.score_pairs
    shutil.rmtree(store / "shards")
    calls = []

    def second(*args, **given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **given)

    monkeypatch.setattr(request, "score_pairs", second)
    with pytest.raises(KeyboardInterrupt):
        repair_signals(store)
    with pytest.raises(UserError, match="are unfinished"):
        Signals.open(store)
    repair_signals(store)
    assert contents(store) == whole


def test_resuming_rebuilds_damaged_shards(store, made):
    whole = contents(store)
    (store / "manifest.json").unlink()
    flip(store / "shards" / "00000.parquet")
    asked = {"kinds": KINDS, "k": 3, "shard_rows": 2, "dtype": "float32"}
    extract_signals(str(made / "model"), str(made / "pairs.jsonl"), out=store, **asked)
    assert contents(store) == whole


def test_impossible_repairs_say_why(store, made, make_model, pairs, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no signals in .* to repair"):
        repair_signals(tmp_path / "nowhere")
    flip(store / "shards" / "00000.parquet")
    with pytest.raises(UserError, match=r"another request \(model\.weights_sha256 differs \("):
        repair_signals(store, make_model(seed=1), tokenizer=tokenizer)
    with pytest.raises(
        UserError, match=r"another request \(data\.fingerprint differs \(.*\); data\.rows is 24, was 6\)"
    ):
        repair_signals(store, dataset=pairs)
    repair_signals(store, make_model(), pairs.select(range(6)), tokenizer)  # the same, wherever they lie
    lose_notes(store)
    with pytest.raises(UserError, match=r"neither manifest\.json nor request\.json .* can be read: delete it"):
        repair_signals(store)


def test_a_store_at_ids_of_another_is_repaired_with_that_one(store, made, make_model, pairs, tokenizer, tmp_path):
    some = pairs.select(range(6))
    ids = Signals.open(store)
    extract_signals(make_model(3), some, tokenizer, ("topk",), tmp_path / "own", role="reference", ids_from=ids)
    extract_signals(make_model(3), some, tokenizer, ("topk",), tmp_path / "other", k=2)
    whole = contents(tmp_path / "own")
    flip(tmp_path / "own" / "shards" / "00000.parquet")
    with pytest.raises(UserError, match="give that one as --ids-from"):
        repair_signals(tmp_path / "own", make_model(3), some, tokenizer)
    with pytest.raises(UserError, match="another store than --ids-from; give the teacher's"):
        repair_signals(tmp_path / "own", make_model(3), some, tokenizer, ids_from=Signals.open(tmp_path / "other"))
    with pytest.raises(UserError, match="was extracted from a data set in memory: give it as --data"):
        repair_signals(tmp_path / "own", make_model(3), ids_from=ids)
    repair_signals(tmp_path / "own", make_model(3), some, tokenizer, ids_from=ids)
    assert contents(tmp_path / "own") == whole


def test_repair_with_data_that_moved(store, made, tmp_path):
    repair_signals(store)  # nothing is damaged, and nobody asks for them
    flip(store / "shards" / "00000.parquet")
    moved = (made / "pairs.jsonl").rename(tmp_path / "moved.jsonl")
    try:
        with pytest.raises(
            UserError, match=r"was extracted from .*pairs\.jsonl, which is missing; give its place with --data"
        ):
            repair_signals(store)
        repair_signals(store, dataset=str(moved))
    finally:
        moved.rename(made / "pairs.jsonl")


def test_on_the_command_line(made, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(made)
    assert main(["signals", "--model", "model", "--data", "pairs.jsonl", "--out", str(tmp_path / "s")]) == 0
    whole = contents(tmp_path / "s")
    flip(tmp_path / "s" / "shards" / "00000.parquet")
    again = ["signals", "--model", "model", "--data", "pairs.jsonl", "--out", str(tmp_path / "s")]
    assert main(again) == 2
    assert f"`prefdistill signals --repair --out {tmp_path / 's'}`" in capsys.readouterr().err
    assert main(["signals", "--repair", "--out", str(tmp_path / "s"), "--kind", "values"]) == 2
    assert "--repair uses the options of the store; leave --kind out" in capsys.readouterr().err
    assert main(["signals", "--repair", "--out", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out == "rebuilt: shards/00000.parquet\n"
    assert contents(tmp_path / "s") == whole
    assert main(["signals", "--repair", "--out", str(tmp_path / "s"), "--json"]) == 0
    assert '"damaged": []' in capsys.readouterr().out
    assert main(["signals", "--out", str(tmp_path / "s")]) == 2
    assert "--model is required" in capsys.readouterr().err
