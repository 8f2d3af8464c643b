"""Signals of workers on a Ray cluster: the bytes of an extraction without it, also when a worker is killed."""

import os
import signal
from pathlib import Path

import pytest

from prefdistill.core.errors import UserError
from prefdistill.core.files import temporary_path
from prefdistill.signals import Signals, extract_signals, ray_engine
from support import ray_stand_in
from support.pairs import write_jsonl
from support.ray_work import killing_a_worker

OPTIONS = {"kinds": ("values", "logps", "topk"), "k": 5, "shard_rows": 1}


@pytest.fixture
def place(in_tmp_path, make_model, pairs, tokenizer):
    """The working directory with 24 pairs, a model, and the store of an extraction without Ray in `one`."""
    write_jsonl(in_tmp_path / "pairs.jsonl", pairs)
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    extract_signals("model", "pairs.jsonl", out="one", **OPTIONS)
    return in_tmp_path


def contents(store):
    """The files of a store; none is a worker's temporary file."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def check_that_either_engine_resumes_the_other(place, one, capsys):
    for name, engine in (("two", "transformers"), ("one", "ray")):
        for lost in ("manifest.json", "shards/00003.parquet", "shards/00011.parquet"):
            (place / name / lost).unlink()
        extract_signals("model", "pairs.jsonl", out=name, engine=engine, **OPTIONS)
        assert contents(place / name) == one
    capsys.readouterr()
    extract_signals("model", "pairs.jsonl", out="one", engine="ray", **OPTIONS)
    assert "signals: reused" in capsys.readouterr().err

    (place / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"worker on .*pairs\.jsonl"):
        extract_signals("model", "pairs.jsonl", out="three", engine="ray", **OPTIONS)
    assert not (place / "three").exists()


def test_signals_of_workers_that_die(place, monkeypatch, capsys):
    """With a stand-in for Ray: the first worker writes two shards and half of the third one, the next one others."""
    ray_stand_in.install(monkeypatch)
    write_part, numbers = ray_engine.write_part, []

    def write(store, extraction, number, progress):
        numbers.append(number)
        if len(numbers) == 3:
            temporary_path(store.shards(24).path(number)).write_bytes(b"half of a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        write_part(store, extraction, number, progress)

    monkeypatch.setattr(ray_engine, "write_part", write)
    extract_signals("model", "pairs.jsonl", out="two", engine="ray", workers=2, **OPTIONS)
    assert sorted(numbers) == sorted([*range(24), numbers[2]])
    assert f"part {numbers[2]} runs again on another one" in capsys.readouterr().err
    one = contents(place / "one")
    assert contents(place / "two") == one
    check_that_either_engine_resumes_the_other(place, one, capsys)


@pytest.mark.slow  # a cluster takes seconds to start, and each worker imports torch and transformers
def test_signals_of_two_workers_of_which_one_is_killed(place, ray_cluster, capsys):
    with killing_a_worker(lambda: len(list((place / "two" / "shards").glob("*.parquet"))) >= 3):
        extract_signals("model", "pairs.jsonl", out="two", engine="ray", workers=2, **OPTIONS)
    assert "runs again on another one" in capsys.readouterr().err
    one = contents(place / "one")
    assert contents(place / "two") == one
    check_that_either_engine_resumes_the_other(place, one, capsys)


def test_data_in_memory_are_sent_to_the_workers(place, pairs, monkeypatch):
    ray_stand_in.install(monkeypatch)
    some = pairs.select(range(3, 9))  # not the first rows, and not those of a file
    one = extract_signals("model", some, out="some", **OPTIONS)
    assert contents(place / "some") == contents(
        Path(extract_signals("model", some, out="sent", engine="ray", workers=2, **OPTIONS).place)
    )
    assert len(one) == 6


def test_workers_that_read_other_files_are_refused(place, monkeypatch):
    ray_stand_in.install(monkeypatch)
    load, loaded = ray_engine.Extraction.load, []

    def load_other(*arguments):
        loaded.append(load(*arguments))
        if len(loaded) > 1:
            loaded[-1].request["model"]["dtype"] = "bfloat16"
        return loaded[-1]

    monkeypatch.setattr(ray_engine.Extraction, "load", load_other)
    with pytest.raises(UserError, match=r"of the other workers \(model\.dtype is 'bfloat16', was 'float32'\)"):
        extract_signals("model", "pairs.jsonl", out="two", engine="ray", workers=2, **OPTIONS)


def test_what_other_machines_cannot_read_is_refused(tmp_path, make_model, pairs, tokenizer):
    ask = {"tokenizer": tokenizer, "out": tmp_path / "out", "engine": "ray"}
    with pytest.raises(UserError, match="load the model themselves: give its Hub name"):
        extract_signals(make_model(), "pairs.jsonl", **ask)
    teacher = extract_signals(make_model(), pairs.select(range(2)), tokenizer, ("topk",), tmp_path / "teacher")
    in_memory = Signals(teacher.manifest, teacher.shards)
    with pytest.raises(UserError, match="open the store of ids_from themselves"):
        extract_signals("model", "pairs.jsonl", kinds=("topk",), role="student", ids_from=in_memory, **ask)
    with pytest.raises(UserError, match="workers applies to the engine ray"):
        extract_signals("model", "pairs.jsonl", out=tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
