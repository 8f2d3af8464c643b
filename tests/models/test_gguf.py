"""Models in GGUF files, written here as llama.cpp's converter writes them."""

import importlib.util
import json
import shutil

import pytest
import torch

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.models.hub import gguf_parts
from prefdistill.models.identity import model_key
from prefdistill.models.load import check_model, empty_model, load_model, load_tokenizer
from prefdistill.signals import Signals
from support.gguf_files import write_gguf
from support.pairs import write_jsonl

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason='gguf is not installed (pip install "prefdistill[gguf]")'
)
TEXTS = ["the small teacher", "  héllo 🙂 don't  x\n\n y 1234", "<|user|>a<|eos|>", "a<|endoftext|>b"]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(scale=3.0, num_key_value_heads=2)


@pytest.fixture(scope="module")
def files(model, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gguf")
    return {kind: str(write_gguf(model, tokenizer, directory / f"{kind}.gguf", kind)) for kind in ("F32", "Q8_0")}


@torch.no_grad()
def logits(model):
    return model(torch.arange(60)[None]).logits


@pytest.mark.parametrize(("kind", "atol"), [("F32", 1e-5), ("Q8_0", 0.3)])
def test_a_gguf_file_has_the_logits_and_tokens_of_its_model(kind, atol, files, model, tokenizer, capsys):
    from_file = load_model(files[kind])
    torch.testing.assert_close(logits(from_file), logits(model), atol=atol, rtol=1e-4)
    assert (logits(from_file) != logits(model)).any() == (kind == "Q8_0")  # weights in 8 bits are rounded
    assert not getattr(from_file, "is_quantized", False)
    assert from_file.name_or_path == files[kind]
    assert "is dequantised" in capsys.readouterr().err
    assert load_model(files[kind], dtype="bfloat16").dtype == torch.bfloat16
    own = load_tokenizer(files[kind])
    assert "the tokenizer is rebuilt from what the GGUF file holds" in capsys.readouterr().err
    assert own(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert own.get_vocab() == tokenizer.get_vocab()
    assert (own.chat_template, own.name_or_path) == (tokenizer.chat_template, files[kind])
    check_model(files[kind])
    assert empty_model(files[kind]).num_parameters() == model.num_parameters()


def test_the_key_is_that_of_the_file(files, tmp_path):
    keys = {kind: model_key(file) for kind, file in files.items()}
    assert keys["F32"] != keys["Q8_0"]
    moved = shutil.copy(files["F32"], tmp_path / "moved.gguf")
    (tmp_path / "config.json").write_text("{}")  # of another model beside it
    assert model_key(str(moved)) == keys["F32"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name/model-Q8_0.gguf", ("org/name", "model-Q8_0.gguf")),
        ("org/name/folder/model.GGUF", ("org/name", "folder/model.GGUF")),
        ("/a/b/c/model.gguf", ("/a/b/c", "model.gguf")),
        ("model.gguf", (".", "model.gguf")),
        ("org/name-GGUF", None),
    ],
)
def test_names_of_gguf_files(name, parts):
    assert gguf_parts(name) == parts


def test_signals_and_samples_of_a_gguf_file(files, model, tokenizer, pairs, in_tmp_path, capsys):
    write_jsonl(in_tmp_path / "pairs.jsonl", pairs.select(range(4)))
    shutil.copy(files["Q8_0"], "m.gguf")
    data = ["--data", "pairs.jsonl"]
    assert main(["signals", "--model", ".", "--gguf-file", "m.gguf", *data, "--out", "t"]) == 0
    store, loaded = Signals.open("t"), load_model("m.gguf")
    assert store.manifest["tokenizer"]["name"] == "./m.gguf"
    whole = tokenizer.apply_chat_template([*pairs[0]["prompt"], *pairs[0]["chosen"]], return_dict=False)
    with torch.no_grad():
        logps = loaded(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    of_tokens = logps.gather(-1, torch.tensor(whole)[1:, None])[-store.row(0)["chosen"]["tokens"] :]
    assert store.row(0)["chosen"]["logps"] == pytest.approx(of_tokens.sum().item(), abs=1e-3)
    # the original's tokenizer, where there is one; a direct path; a repair
    tokenizer.save_pretrained("original")
    own = ["--model", "m.gguf", "--tokenizer", "original"]
    assert main(["signals", *own, *data, "--out", "o"]) == 0
    assert Signals.open("o").scalar("chosen_logps", range(4)) == pytest.approx(store.scalar("chosen_logps", range(4)))
    (in_tmp_path / "t" / "shards" / "00000.parquet").unlink()
    assert main(["signals", "--repair", "--out", "t"]) == 0
    assert Signals.open("t").digest == store.digest
    assert main(["sample", *own, *data, "--out", "s.jsonl", "--max-new-tokens", "3"]) == 0
    assert json.loads((in_tmp_path / "s.jsonl.meta.json").read_text())["request"]["model"]["key"] == model_key("m.gguf")
    capsys.readouterr()
    assert main(["signals", *own, *data, "--out", "q", "--quantization", "4bit"]) == 2
    assert "is dequantised; leave quantization=4bit out" in capsys.readouterr().err


def test_an_adapter_on_a_gguf_file(files, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(load_model(files["Q8_0"]), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "adapter"))), logits(adapted), atol=1e-4, rtol=1e-4)
    assert load_tokenizer(str(tmp_path / "adapter")).name_or_path == files["Q8_0"]


def test_an_adapter_trained_on_a_gguf_file_is_saved_with_its_base(files, pairs, in_tmp_path):
    write_jsonl(in_tmp_path / "pairs.jsonl", pairs.select(range(2)))
    fast = ["max_steps=1", "batch_size=2", "micro_batch_size=2", "lora.r=2"]
    assert main(["sft", "--model", files["Q8_0"], "--data", "pairs.jsonl", "--out", "m", *fast]) == 0
    merged, adapted = load_model("m"), load_model("m/adapter")
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)
    assert (in_tmp_path / "m" / "base" / "model.safetensors").is_file()


def test_what_is_missing_is_named(files, tmp_path, monkeypatch):
    (tmp_path / "junk.gguf").write_text("junk")
    with pytest.raises(UserError, match=r"exists but holds no model.*not a GGUF file"):
        load_model(str(tmp_path / "junk.gguf"))
    for load in (load_model, load_tokenizer, empty_model):
        with pytest.raises(UserError, match=rf"no GGUF file none\.gguf in {tmp_path}; its GGUF files: junk\.gguf"):
            load(str(tmp_path / "none.gguf"))
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
    with pytest.raises(UserError, match=r'pip install "prefdistill\[gguf\]"'):
        load_model(files["F32"])
