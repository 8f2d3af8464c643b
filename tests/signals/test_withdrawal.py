"""What is left of an extraction that stops at an error, alone and beside others that still write."""

import shutil
from types import SimpleNamespace

import pytest

from prefdistill.core.errors import UserError
from prefdistill.signals import extract, extract_signals, ray_engine
from support import ray_stand_in
from support.pairs import write_jsonl

OPTIONS = {"kinds": ("logps",), "shard_rows": 10}


def refuse(*_):
    raise UserError("the logits are not finite")


def contents(store):
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_alone_it_leaves_nothing(tmp_path, make_model, pairs, tokenizer, monkeypatch):
    monkeypatch.setattr(extract, "write_part", refuse)
    with pytest.raises(UserError, match="not finite"):
        extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "store", **OPTIONS)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("engine", ["transformers", "ray"])
def test_beside_others_it_leaves_the_note_of_its_request(
    engine, in_tmp_path, make_model, pairs, tokenizer, monkeypatch
):
    """Another process of the launcher, or a worker, then writes a shard; the next run resumes."""
    write_jsonl(in_tmp_path / "pairs.jsonl", pairs)
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    extract_signals("model", "pairs.jsonl", out="one", **OPTIONS)
    ray_stand_in.install(monkeypatch)
    with monkeypatch.context() as patch:
        team = SimpleNamespace(num_processes=2, process_index=1, is_main_process=False)
        patch.setattr(extract, "processes", lambda: team, raising=False)
        for module in (extract, ray_engine):
            patch.setattr(module, "write_part", refuse)
        with pytest.raises(UserError, match="not finite"):
            extract_signals("model", "pairs.jsonl", out="two", engine=engine, **OPTIONS)
    for name in ("checksums/00000.sha256", "shards/00000.parquet"):
        (in_tmp_path / "two" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(in_tmp_path / "one" / name, in_tmp_path / "two" / name)
    extract_signals("model", "pairs.jsonl", out="two", engine=engine, **OPTIONS)
    assert contents(in_tmp_path / "two") == contents(in_tmp_path / "one")
