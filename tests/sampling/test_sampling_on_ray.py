"""Responses of workers on a Ray cluster: the bytes of sampling without it, also when a worker is killed."""

import os
import signal

import pytest
import torch

from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import sidecar
from prefdistill.core.files import read_json
from prefdistill.sampling import ray_engine
from prefdistill.sampling.files import sample_responses
from prefdistill.sampling.ray_engine import load_worker
from support import ray_stand_in
from support.pairs import write_jsonl
from support.ray_work import killing_a_worker

ASK = {"column": "student_response", "n": 2, "max_new_tokens": 6, "batch_size": 4, "shard_rows": 2, "seed": 3}


@pytest.fixture
def place(in_tmp_path, make_model, pairs, tokenizer):
    """The working directory with pairs, a model, and responses without Ray in `one.jsonl`."""
    write_jsonl(in_tmp_path / "pairs.jsonl", pairs)
    model = make_model()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    sample_responses("model", "pairs.jsonl", out="one.jsonl", **ASK)
    return in_tmp_path


def ray_sample(out, **options):
    return sample_responses("model", "pairs.jsonl", out=out, engine="ray", **ASK | options)


def test_responses_of_workers_that_die(place, monkeypatch, capsys):
    """With a stand-in for Ray: a worker dies with its third part, which another one draws."""
    ray_stand_in.install(monkeypatch)
    draw, seeds = ray_engine.SampleWorker.draw, []

    def dying(worker, part):
        seeds.append(part.seed)
        if len(seeds) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(worker, part)

    monkeypatch.setattr(ray_engine.SampleWorker, "draw", dying)
    ray_sample("two.jsonl", workers=2)
    assert sorted(seeds) == sorted([*set(seeds), seeds[2]])
    assert len(set(seeds)) == 12
    assert "runs again on another one" in capsys.readouterr().err
    assert (place / "two.jsonl").read_bytes() == (place / "one.jsonl").read_bytes()
    requests = [read_json(sidecar(place / name))["request"] for name in ("one.jsonl", "two.jsonl")]
    assert requests[0] == requests[1]


@pytest.mark.parametrize("engines", [("ray", "transformers"), ("transformers", "ray")])
def test_either_engine_resumes_and_reuses_the_work_of_the_other(engines, place, monkeypatch, capsys):
    ray_stand_in.install(monkeypatch)
    draw, drawn = ray_engine.TransformersEngine.draw, []

    def interrupted(engine, part, progress):
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(part)
        return draw(engine, part, progress)

    monkeypatch.setattr(ray_engine.TransformersEngine, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_responses("model", "pairs.jsonl", out="two.jsonl", engine=engines[0], **ASK)
    written = len(list((place / "two.jsonl.parts").glob("0*.json")))
    assert written in (4, 5)  # a worker runs its task before its result is written
    drawn.clear()
    monkeypatch.setattr(ray_engine.TransformersEngine, "draw", lambda *asked: drawn.append(asked) or draw(*asked))
    sample_responses("model", "pairs.jsonl", out="two.jsonl", engine=engines[1], **ASK)
    assert len(drawn) == 12 - written
    assert (place / "two.jsonl").read_bytes() == (place / "one.jsonl").read_bytes()
    capsys.readouterr()
    sample_responses("model", "pairs.jsonl", out="two.jsonl", engine=engines[0], **ASK)
    assert "sample: reused" in capsys.readouterr().err


@pytest.mark.slow  # a cluster takes seconds to start, and each worker imports torch and transformers
def test_responses_of_two_workers_of_which_one_is_killed(place, ray_cluster, capsys):
    parts = place / "two.jsonl.parts"
    with killing_a_worker(lambda: len(list(parts.glob("0*.json"))) >= 2):
        ray_sample("two.jsonl", workers=2, shard_rows=1)
    assert "runs again on another one" in capsys.readouterr().err
    sample_responses("model", "pairs.jsonl", out="three.jsonl", **ASK | {"shard_rows": 1})
    assert (place / "two.jsonl").read_bytes() == (place / "three.jsonl").read_bytes()


def test_an_error_of_a_worker_names_the_row(place, make_model, monkeypatch):
    ray_stand_in.install(monkeypatch)
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    model.save_pretrained("model")
    with pytest.raises(UserError, match=r"worker on .*: the model's logits are not finite after the prompt of row \d+"):
        ray_sample("two.jsonl")


def test_what_workers_cannot_use_is_refused(place, make_model, tokenizer):
    with pytest.raises(UserError, match="load the model themselves: give its Hub name or directory"):
        sample_responses(make_model(), "pairs.jsonl", tokenizer, "two.jsonl", engine="ray")
    with pytest.raises(UserError, match="workers applies to the engine ray"):
        sample_responses("model", "pairs.jsonl", out="two.jsonl", workers=2)
    with pytest.raises(UserError, match="device_map applies to the engine transformers"):
        sample_responses("model", "pairs.jsonl", out="two.jsonl", engine="ray", device_map="auto")
    with pytest.raises(UserError, match="model is not the model that the other machines have under this name"):
        load_worker("model", {"another": "key"}, [], tokenizer, None)
    assert not list(place.glob("two*"))
