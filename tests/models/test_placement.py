"""Models that are larger than one device: layers in main memory and on disk give the numbers of a plain load."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prefdistill.core.errors import UserError
from prefdistill.data.batches import layout_for
from prefdistill.models.identity import model_identity
from prefdistill.models.load import load_model, ready
from prefdistill.models.options import Placement
from prefdistill.models.placement import input_device, is_spread
from prefdistill.sampling.files import sample_responses
from prefdistill.sampling.options import SampleRequest
from prefdistill.signals import extract_signals, repair_signals
from support.pairs import write_jsonl

KINDS = ("values", "logps", "topk")


@pytest.fixture(params=[False, True], ids=["own head", "tied head"])
def place(request, in_tmp_path, make_model, tokenizer, pairs):
    """The working directory with a model of three layers, pairs, and the options that leave part of it on disk."""
    model = make_model(num_hidden_layers=3, tie_word_embeddings=request.param)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    write_jsonl(in_tmp_path / "pairs.jsonl", pairs.select(range(8)).select_columns(["prompt", "chosen", "rejected"]))
    half = sum(weight.numel() for weight in model.parameters()) * 4 // 2
    return {"device_map": "auto", "max_memory": {"cpu": half}}


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def test_a_spread_model_is_the_same_model(place, capsys):
    plain, spread = ready(load_model("model")), ready(load_model("model", **place))
    assert is_spread(spread)
    assert not is_spread(plain)
    assert {"cpu", "disk"} == set(spread.hf_device_map.values())
    assert any(weight.device.type == "meta" for weight in spread.parameters())
    said = capsys.readouterr().err
    assert "model does not fit on the devices" in said
    assert "on disk; every pass reads them from there" in said
    assert model_identity(spread, "model") == model_identity(plain, "model")
    assert layout_for(spread, 64) == layout_for(plain, 64)
    ids = torch.arange(12)[None]
    assert torch.equal(spread(ids).logits, plain(ids).logits)


def test_all_of_a_model_may_be_on_disk(place):
    spread = ready(load_model("model", device_map="auto", max_memory={"cpu": 0}))
    assert set(spread.hf_device_map.values()) == {"disk"}
    assert input_device(spread).type == "cpu"
    assert model_identity(spread, "model") == model_identity(load_model("model"), "model")
    extract_signals("model", "pairs.jsonl", out="plain", kinds=KINDS)
    extract_signals("model", "pairs.jsonl", out="spread", kinds=KINDS, device_map="auto", max_memory={"cpu": 0})
    assert files("plain") == files("spread")


def test_signals_and_samples_of_a_spread_model_are_the_same_to_the_byte(place):
    extract_signals("model", "pairs.jsonl", out="plain", kinds=KINDS)
    extract_signals("model", "pairs.jsonl", out="spread", kinds=KINDS, **place)
    assert files("plain") == files("spread")
    Path("spread/shards/00000.parquet").write_bytes(b"damaged")
    _, damaged = repair_signals("spread", placement=Placement(**place))
    assert damaged == ["shards/00000.parquet"]
    assert files("plain") == files("spread")
    for name, more in (("plain", {}), ("spread", place)):
        sample_responses("model", "pairs.jsonl", out=f"{name}.jsonl", column="own", max_new_tokens=6, **more)
    assert Path("plain.jsonl").read_bytes() == Path("spread.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory says how device_map spreads a model"),
        (
            {"device_map": "auto", "max_memory": {"cuda:0": "1GiB"}},
            "max_memory cuda:0=1GiB: write the number",
        ),
        ({"device_map": "auto", "max_memory": {0: "plenty"}}, "max_memory 0=plenty: write the number of a device"),
        ({"device_map": "gpu"}, "device_map must be 'auto', 'balanced', 'balanced_low_0' or 'sequential'"),
        ({"device_map": "auto", "engine": "vllm"}, "device_map applies to the engine transformers"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SampleRequest.checked("sample", **options)


def test_models_that_cannot_be_spread_are_refused(workdir, make_model, pairs, tokenizer, monkeypatch):
    with pytest.raises(UserError, match="model that is loaded by name; leave it out for one in memory"):
        extract_signals(make_model(), pairs, tokenizer, out="out", device_map="auto")
    with pytest.raises(UserError, match="model that is loaded by name; leave it out for one in memory"):
        sample_responses(make_model(), pairs, tokenizer, out="out.jsonl", device_map="auto")
    with pytest.raises(UserError, match="is a GGUF file, which is dequantised on one device"):
        load_model("model/model.gguf", device_map="auto")
    Path("adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "model", "task_type": "CAUSAL_LM"}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="adapter is an adapter, which is merged on one device"):
        load_model("adapter", device_map="auto")
    with monkeypatch.context() as patch:
        patch.setattr("prefdistill.models.placement.processes", lambda: SimpleNamespace(num_processes=2))
        with pytest.raises(UserError, match="for one process; leave it out, or start one process"):
            load_model("model", device_map="auto")
    torch.save(load_model("model").state_dict(), "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()
    with pytest.raises(UserError, match="its files cannot stand in for the rest"):
        load_model("model", device_map="auto", max_memory={"cpu": 1000})


def test_a_model_that_fits_in_one_place_stays_there(place, monkeypatch):
    """As with a device that `max_memory` leaves out, which would otherwise take the whole model."""
    monkeypatch.setattr("prefdistill.models.load.default_device", lambda: torch.device("meta"))
    spread = ready(load_model("model", device_map="auto", max_memory={"cpu": 10**9}))
    assert spread.hf_device_map == {"": "cpu"}
    assert {weight.device.type for weight in spread.parameters()} == {"cpu"}
    assert {weight.device.type for weight in ready(load_model("model")).parameters()} == {"meta"}
