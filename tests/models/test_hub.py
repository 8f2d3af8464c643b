"""Models on the Hub, which is a cache on this disk here, while somebody pushes new commits."""

import json

import pytest
from peft import LoraConfig, get_peft_model

from prefdistill.core.stages import run_stage
from prefdistill.experiment import step
from prefdistill.experiment.inputs import Sources
from prefdistill.experiment.plan import build_plan
from prefdistill.experiment.recipe import load_recipe
from prefdistill.models import hub
from prefdistill.models.identity import model_identity, model_key, weights_digest
from prefdistill.models.load import check_model, load_model, load_tokenizer
from prefdistill.models.quantize import stored_quantization
from support.tiny_runs import QUICKSTART, SMALL

A, B = "a" * 40, "b" * 40


@pytest.fixture
def push(tmp_path, monkeypatch):
    """Returns a function that pushes what `save` writes into a directory as the newest commit of a repository."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "COMMITS", {})

    def push(name, commit, save):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        save(place / "snapshots" / commit)
        (place / "refs" / "main").write_text(commit)

    return push


@pytest.fixture
def push_model(push, make_model, tokenizer):
    def push_model(commit, seed):
        def save(place):
            make_model(seed).save_pretrained(place)
            tokenizer.save_pretrained(place)
            if seed:  # another tokenizer as well
                settings = json.loads((place / "tokenizer_config.json").read_text())
                (place / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": seed}))

        push("org/model", commit, save)

    return push_model


def test_one_process_reads_one_commit_of_a_model(push_model, make_model, monkeypatch):
    push_model(A, 0)
    key = model_key("org/model")
    assert key == {"hub": "org/model", "revision": A}
    push_model(B, 7)
    check_model("org/model")
    model = load_model("org/model")
    assert weights_digest(model) == weights_digest(make_model(0))
    assert load_tokenizer("org/model").model_max_length != 7
    assert model_identity(model, "org/model")["revision"] == A
    assert model_key("org/model") == key
    monkeypatch.setattr(hub, "COMMITS", {})  # another process
    assert model_key("org/model")["revision"] == B
    assert weights_digest(load_model("org/model")) == weights_digest(make_model(7))


def test_a_model_that_is_loaded_without_a_key_is_of_one_commit_too(push_model):
    push_model(A, 0)
    load_tokenizer("org/model")
    push_model(B, 7)
    assert model_identity(load_model("org/model"), "org/model")["revision"] == A


def test_how_a_model_is_stored_is_read_at_its_commit(push, push_model, tmp_path):
    push_model(A, 0)
    model_key("org/model")
    quantised = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}

    def save(place):
        place.mkdir()
        (place / "config.json").write_text(json.dumps(quantised))

    push("org/model", B, save)
    assert stored_quantization("org/model") is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_and_its_base_are_read_at_one_commit(push, push_model, make_model):
    def adapter(rank):
        def save(place):
            adapted = get_peft_model(make_model(0), LoraConfig(r=rank, init_lora_weights=False, task_type="CAUSAL_LM"))
            adapted.save_pretrained(place)
            settings = json.loads((place / "adapter_config.json").read_text())
            settings["base_model_name_or_path"] = "org/model"
            (place / "adapter_config.json").write_text(json.dumps(settings))

        return save

    push_model(A, 0)
    push("org/adapter", A, adapter(2))
    key = model_key("org/adapter")
    before = weights_digest(load_model("org/adapter"))
    push_model(B, 7)
    push("org/adapter", B, adapter(4))
    assert weights_digest(load_model("org/adapter")) == before
    assert model_key("org/adapter") == key
    assert (key["revision"], key["base"]["revision"]) == (A, A)


def test_a_finished_step_stays_when_somebody_pushes_a_commit_meanwhile(push_model, tmp_path):
    sources = Sources()
    push_model(A, 0)
    request = {"model": sources.model_key("org/model")}

    def make(out):
        (out / "result").write_text("of hours")
        push_model(B, 0)

    run_stage("step", tmp_path / "step", request, sources.unchanged(["org/model"], make))
    assert (tmp_path / "step" / "result").read_text() == "of hours"


def test_processes_that_work_for_a_run_read_its_commits(push_model, tmp_path, monkeypatch):
    push_model(A, 0)
    requests = []
    monkeypatch.setattr(step, "launch", lambda _, request, __: requests.append(request) or [{"peak_memory": 0}])
    monkeypatch.setattr(step, "launcher_of", lambda *_: "two processes")
    key = model_key("org/model")
    build_plan(load_recipe(QUICKSTART, SMALL), tmp_path, 0).steps[0].work(tmp_path)
    push_model(B, 7)
    monkeypatch.setattr(hub, "COMMITS", {})  # another process
    hub.pin_commits(json.loads(json.dumps(requests[0]["commits"])))
    assert model_key("org/model") == key
