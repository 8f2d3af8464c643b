"""Models and tokenizers: loading says what is wrong, identities tell weights and tokens apart, nothing leaks."""

import hashlib
import importlib.util
import json
import os
import shutil
import types

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefdistill.core.errors import UserError
from prefdistill.data.template import end_token_ids
from prefdistill.models.device import default_dtype
from prefdistill.models.identity import (
    computing_config,
    fits_in,
    model_identity,
    model_key,
    tokenizer_identity,
    weights_digest,
)
from prefdistill.models.load import load_model, load_tokenizer, ready
from prefdistill.models.scratch import random_model, train_tokenizer
from prefdistill.models.vocabulary import check_same_tokens

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
quantised = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason='bitsandbytes is not installed (pip install "prefdistill[quantized]")',
)
TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 10


@pytest.fixture
def saved(tmp_path, make_model, tokenizer):
    """A directory with a model and its tokenizer."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9, device=model.device)[None]).logits[0]


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "found"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_load_model_uses_the_requested_dtype(saved, make_model, dtype, found):
    model = load_model(saved, dtype=dtype)
    assert model.dtype == getattr(torch, found)
    if found == "float32":
        assert torch.equal(logits(model.eval()), logits(make_model()))


def test_dtype_auto_is_that_of_the_file(tmp_path, make_model):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.bfloat16
    assert load_model(str(tmp_path), dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "float", "", "float64"])
def test_unknown_dtypes_are_refused(saved, dtype):
    with pytest.raises(UserError, match="dtype must be one of auto, float32, bfloat16, float16, got"):
        load_model(saved, dtype=dtype)


@pytest.mark.parametrize("name", ["nowhere", "no-org/no-model", "models/nowhere", "a/b/c", "has space", ""])
@pytest.mark.parametrize(("load", "what"), [(load_model, "model"), (load_tokenizer, "tokenizer")])
def test_an_unknown_name_is_refused(name, load, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no {what} at {name!r}: it is not a local directory, and loading it") as error:
        load(name)
    assert "\n" not in str(error.value)


def test_a_directory_without_a_model_is_refused(tmp_path):
    for load, what in ((load_model, "model"), (load_tokenizer, "tokenizer")):
        with pytest.raises(UserError, match=f"exists but holds no {what}") as error:
            load(str(tmp_path))
        assert "\n" not in str(error.value)
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "{"), ("config.json", '{"model_type": "no-such-type"}'), ("model.safetensors", "no tensors")],
)
def test_a_damaged_model_directory_is_refused(saved, tmp_path, name, content):
    (tmp_path / "model" / name).write_text(content)
    with pytest.raises(UserError, match="exists but holds no model"):
        load_model(saved)


def test_a_model_without_a_language_model_head_is_refused(tmp_path):
    from transformers import T5Config, T5Model

    T5Model(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="exists but holds no model"):
        load_model(str(tmp_path))


def test_an_adapter_is_merged_into_its_base(saved, tmp_path, tokenizer):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load_model(saved), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    found = load_model(str(tmp_path / "adapter"), dtype="float32").eval()
    assert all(weight.requires_grad for weight in found.parameters())  # a training may start from it
    assert type(found).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name in found.state_dict())
    torch.testing.assert_close(logits(found), logits(adapted.eval()), atol=1e-3, rtol=1e-3)
    assert (logits(found) - logits(load_model(saved).eval())).abs().max() > 1


def test_an_adapter_without_its_base_is_refused(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(load_model(saved), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone"):
        load_model(str(tmp_path / "adapter"))


def test_missing_weights_are_refused(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model" / "model.safetensors"
    kept = {name: weight for name, weight in load_file(path).items() if name != "lm_head.weight"}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, the first is lm_head\.weight"):
        load_model(saved)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    found = load_tokenizer(str(tmp_path))
    assert (found.pad_token, found.pad_token_id) == (found.eos_token, found.eos_token_id)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    with pytest.raises(UserError, match=r"has no end token \(eos_token\); set one in its tokenizer_config.json"):
        load_tokenizer(str(tmp_path))


# -- dtypes and quantisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "fast", "dtype"),
    [
        ("cpu", {"avx512_bf16": True, "amx_bf16": False}, "auto"),
        ("cpu", {"avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ("cpu", {"neon": True}, "auto"),
        ("cuda", True, "bfloat16"),
        ("cuda", False, "auto"),
        ("xpu", True, "bfloat16"),
        ("mps", True, "auto"),
    ],
)
def test_teachers_default_to_bfloat16_if_that_is_fast(device, fast, dtype, monkeypatch):
    monkeypatch.setattr("prefdistill.models.device.default_device", lambda: torch.device(device))
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: fast)
    for backend in ("cuda", "xpu"):
        monkeypatch.setattr(f"torch.{backend}.is_bf16_supported", lambda including_emulation: fast)
    assert (default_dtype("teacher"), default_dtype("teacher_reference")) == (dtype, dtype)
    assert default_dtype("reference") == "float32"


def test_unknown_quantizations_are_refused(saved):
    with pytest.raises(UserError, match="quantization must be 4bit or 8bit, got '2bit'"):
        load_model(saved, quantization="2bit")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("it requires bitsandbytes"), r'needs bitsandbytes: pip install "prefdistill\[quantized\]"$'),
        (RuntimeError("None of the devices\nis good"), r"loaded quantised \(bitsandbytes\) here: None of the devices$"),
    ],
)
def test_quantisation_without_its_requirements_is_refused(saved, monkeypatch, error, message):
    def missing(**_):
        raise error

    monkeypatch.setattr("transformers.BitsAndBytesConfig", missing)
    with pytest.raises(UserError, match=message):
        load_model(saved, quantization="4bit")


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
def test_a_quantised_checkpoint_without_its_package_is_refused(saved, tmp_path):
    path = tmp_path / "model" / "config.json"
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    with pytest.raises(UserError, match=r"model cannot be loaded quantised \(awq\) here: .*gptqmodel"):
        load_model(saved)
    with pytest.raises(UserError, match=r"is stored quantised already \(awq\); leave the quantization 4bit out"):
        load_model(saved, quantization="4bit")


@quantised
def test_a_quantised_checkpoint_is_loaded_as_it_is(saved, tmp_path, capsys):
    model = ready(load_model(saved, quantization="4bit"))
    model.save_pretrained(tmp_path / "stored")
    found = ready(load_model(str(tmp_path / "stored"), dtype="bfloat16"))
    assert "is stored quantised (bitsandbytes) and loaded as it is, not in bfloat16" in capsys.readouterr().err
    assert found.dtype == torch.float32
    assert torch.equal(logits(found), logits(model))


@quantised
@pytest.mark.parametrize(("dtype", "products"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "float32")])
def test_the_dtype_of_a_quantised_model(saved, monkeypatch, dtype, products):
    monkeypatch.setattr("prefdistill.models.device.fast_bf16", lambda: False)
    model = load_model(saved, dtype=dtype, quantization="4bit")
    assert model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    assert model_identity(model)["quantization"]["bnb_4bit_compute_dtype"] == products
    assert model.model.layers[0].mlp.up_proj.compute_dtype == getattr(torch, products)


@quantised
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_using_a_quantised_model_does_not_change_it(saved, bits):
    model = ready(load_model(saved, quantization=bits))
    identity, before = model_identity(model), logits(model)
    assert model_identity(model) == identity
    assert torch.equal(logits(model), before)
    assert identity == model_identity(ready(load_model(saved, quantization=bits)))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.data[0] += 1
    assert model_identity(model)["weights_sha256"] != identity["weights_sha256"]


@quantised
def test_4bit_products_equal_those_of_dequantised_weights(saved):
    from bitsandbytes.functional import dequantize_4bit

    model, plain = ready(load_model(saved, quantization="4bit")), ready(load_model(saved))
    expected = logits(plain)
    for name, module in model.named_modules():
        if getattr(module, "quant_state", None) is not None:
            plain.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, module.quant_state)
    # bitsandbytes multiplies in bfloat16 on a CPU that can, whatever the dtype; what 4 bits cost is far more
    assert (logits(model) - logits(plain)).norm() < 0.03 * (logits(plain) - expected).norm()


@quantised
def test_a_4bit_model_repacked_on_the_cpu_is_refused(saved):
    model = load_model(saved, quantization="4bit")
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match=r"this 4-bit model has been run on the CPU.*; load it again"):
        ready(model)


@quantised
def test_experts_that_are_not_quantised_are_named(tokenizer, tmp_path, capsys):
    from transformers import MixtralConfig

    shape = SHAPE | {"num_key_value_heads": 2, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**shape, vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path), quantization="4bit")
    assert "its experts (1,536 weights) stay in float32" in capsys.readouterr().err


def test_a_quantised_model_is_not_moved(make_model):
    model = make_model().train()
    model.is_quantized, model.to = True, None
    assert not ready(model).training


# -- identity ----------------------------------------------------------------------------------------------------------


def test_changing_one_weight_changes_the_identity(make_model):
    same, other = make_model(), make_model()
    with torch.no_grad():
        other.lm_head.weight[3, 5] += 1e-3
    digests = [model_identity(model)["weights_sha256"] for model in (make_model(), same, other, make_model(1))]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_identity_depends_on_weights_and_not_on_the_path(saved, make_model):
    found, made = model_identity(load_model(saved), saved), model_identity(make_model())
    assert found["weights_sha256"] == made["weights_sha256"]
    assert found["name"] == saved
    assert (found["revision"], found["dtype"], found["architecture"]) == (None, "float32", "LlamaForCausalLM")


def test_identity_of_a_plain_model(make_model):
    model, digest = make_model(), hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} torch.float32 {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert model_identity(model, "org/name") == {
        "name": "org/name",
        "revision": None,
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "weights_sha256": digest.hexdigest(),
        "config": computing_config(model),
    }


def test_computing_config_holds_only_what_changes_outputs(make_model, tmp_path):
    model = make_model()
    before = computing_config(model)
    model.config.use_cache, model.config.pad_token_id, model.config.attention_dropout = False, 3, 0.1
    model.config.output_hidden_states, model.config.num_labels = True, 1
    model.save_pretrained(tmp_path / "stored")
    for dtype in ("float32", "bfloat16"):
        assert computing_config(load_model(str(tmp_path / "stored"), dtype=dtype)) == before
    for key, value in (("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("num_attention_heads", 2)):
        assert computing_config(make_model(**{key: value}))[key] == value != before[key]


def test_state_that_is_not_a_tensor_is_part_of_the_digest():
    """Quantised state: a tensor that consists of several, or values that are not tensors."""

    class Packed:
        def __init__(self, codes, scale):
            self.codes, self.scale = torch.tensor(codes, dtype=torch.uint8), torch.tensor(scale)

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    def digest(codes, scale, group):
        state = {"weight": Packed(codes, scale), "group": group}
        model = types.SimpleNamespace(state_dict=lambda: state, name_or_path="", dtype=torch.float32)
        return weights_digest(model)

    same = digest([1, 2], 0.5, 64)
    assert same == digest([1, 2], 0.5, 64)
    assert len({same, digest([1, 3], 0.5, 64), digest([1, 2], 0.25, 64), digest([1, 2], 0.5, 32)}) == 4


def test_changing_the_dtype_changes_the_identity(make_model):
    found = model_identity(make_model().to(torch.bfloat16))
    assert found["dtype"] == "bfloat16"
    assert found["weights_sha256"] != model_identity(make_model())["weights_sha256"]


def test_identity_does_not_depend_on_mode_or_gradients(make_model):
    model = make_model().train().requires_grad_(False)
    assert model_identity(model) == model_identity(make_model())


def test_model_key_covers_the_files_that_are_loaded(saved, tmp_path):
    before = model_key(saved)
    directory = tmp_path / "model"
    for name in (".lock", "notes.txt", "responses.jsonl", "training_args.bin"):
        (directory / name).write_text("says nothing of the model")
    assert model_key(saved) == before
    copied = shutil.copytree(directory, tmp_path / "elsewhere", copy_function=shutil.copy)  # with other times
    assert model_key(str(copied)) == before
    weights = directory / "model.safetensors"
    times, found = weights.stat(), bytearray(weights.read_bytes())
    found[-1] ^= 1
    weights.write_bytes(found)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.stat().st_size == times.st_size
    assert model_key(saved) != before  # though names, sizes and times are what they were
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        before = model_key(saved)
        (directory / name).write_text("{ }")
        assert model_key(saved) != before


def test_model_key_on_the_hub_is_name_and_revision():
    assert (model_key("org/name"), model_key(None)) == ({"hub": "org/name", "revision": None}, None)


def test_model_key_of_a_hub_adapter_includes_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = []
    for revision in ("a" * 40, "b" * 40):
        monkeypatch.setattr("prefdistill.models.hub.COMMITS", {})  # as in another process
        place = tmp_path / "models--org--adapter" / "snapshots" / revision
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
        (place.parent.parent / "refs").mkdir(exist_ok=True)
        (place.parent.parent / "refs" / "main").write_text(revision)
        found.append(model_key("org/adapter"))
    assert [key["revision"] for key in found] == ["a" * 40, "b" * 40]
    assert found[0]["base"] == {"hub": "org/base", "revision": None}


def test_model_key_covers_shards_and_code_but_not_readmes(saved, tmp_path):
    directory = tmp_path / "model"
    files = ["shards/one.safetensors", "custom_generate/generate.py", "vocab.txt", "dict.txt"]
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": files[0]}}))
    for name in files:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("")
    for name in files:
        before = model_key(saved)
        (directory / name).write_text("other")
        assert model_key(saved) != before
    before = model_key(saved)
    for name in ("tokens.html", "token-counts.csv", "optimizer.bin", "shards/two.safetensors"):
        (directory / name).write_text("")
    assert model_key(saved) == before
    for text in ("[]", "[" * 100_000, json.dumps({"weight_map": {"w": "x" * 300, "v": "\0", "u": 3}})):
        (directory / "model.safetensors.index.json").write_text(text)  # for the loader to refuse
        model_key(saved)
    (directory / "model.safetensors.index.json").unlink()
    (directory / "model.safetensors.index.json").mkdir()
    model_key(saved)


def test_fits_in_a_narrower_dtype(make_model):
    model = make_model()
    assert not fits_in(model, "bfloat16")
    narrow = make_model().to(torch.bfloat16).float()
    with torch.no_grad():
        narrow.get_output_embeddings().weight[0, 0] = float("nan")  # is refused for what it is, elsewhere
    assert fits_in(narrow, "bfloat16")
    assert fits_in(model, "float32")


def test_adapters_that_name_each_other_as_base_are_refused(tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        text = json.dumps({"base_model_name_or_path": str(tmp_path / other)})
        (tmp_path / one / "adapter_config.json").write_text(text)
    assert model_key(str(tmp_path / "a"))["base"]["adapter_config.json"]
    with pytest.raises(UserError):
        load_model(str(tmp_path / "a"))


def test_model_key_of_an_adapter_includes_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for directory in (base, adapter):
        directory.mkdir()
    (base / "model.safetensors").write_text("before")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = model_key(str(adapter))
    assert model_key(str(adapter)) == before
    (base / "model.safetensors").write_text("trained on")
    assert model_key(str(adapter)) != before
    (adapter / "adapter_config.json").write_text("{}")  # is refused when it is loaded
    assert model_key(str(adapter)) != before


def test_tokenizer_identity_ignores_state():
    used, fresh = (train_tokenizer(TEXTS, 300) for _ in range(2))
    used(["a", "the cat"], padding=True, truncation=True, max_length=8)
    assert used.backend_tokenizer.padding is not None
    assert tokenizer_identity(used) == tokenizer_identity(fresh)


def test_different_tokenizers_have_different_identities():
    identity = tokenizer_identity(train_tokenizer(TEXTS, 300))
    split = train_tokenizer(TEXTS, 300)
    split.split_special_tokens = True
    assert tokenizer_identity(split)["sha256"] != identity["sha256"]
    other_template, other_end = train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS, 300)
    other_template.chat_template += " "
    other_end.eos_token = "<|pad|>"
    assert tokenizer_identity(other_template)["template_sha256"] != identity["template_sha256"]
    assert tokenizer_identity(other_template)["sha256"] == identity["sha256"]
    assert tokenizer_identity(other_end)["sha256"] != identity["sha256"]
    assert tokenizer_identity(train_tokenizer(TEXTS[:1], 300))["sha256"] != identity["sha256"]


def test_tokenizer_identity_survives_saving(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    before, after = tokenizer_identity(tokenizer), tokenizer_identity(load_tokenizer(str(tmp_path)))
    assert {k: v for k, v in before.items() if k != "name"} == {k: v for k, v in after.items() if k != "name"}
    assert after["name"] == str(tmp_path)


# -- the same tokens ---------------------------------------------------------------------------------------------------


def test_equal_tokenizers_pass_silently(capsys):
    check_same_tokens(train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS, 300))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("larger_first", [False, True])
def test_extra_tokens_are_allowed_and_reported(capsys, larger_first):
    small, large = train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS, 300)
    size = len(small)
    large.add_tokens(["<|tool|>", "<|image|>"])
    check_same_tokens(*((large, small) if larger_first else (small, large)))
    assert f"the {size} they share agree" in capsys.readouterr().err


def test_different_tokens_are_refused_with_an_example():
    one, other = train_tokenizer(TEXTS, 300), train_tokenizer(["zebra quartz vexing"] * 10, 300)
    with pytest.raises(UserError, match=r"have different tokenizers: \d+ of \d+ tokens differ, e\.g\. '.+'; choose"):
        check_same_tokens(one, other)


def test_an_id_with_two_tokens_is_refused():
    one, other = train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS, 300)
    one.add_tokens(["<|mine|>"])
    other.add_tokens(["<|yours|>"])
    with pytest.raises(UserError, match=r"1 of \d+ tokens differ, e\.g\. '<\|mine\|>'"):
        check_same_tokens(one, other)


# -- made here ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["the cat sat", " two  spaces ", "naïve 猫 🙂\n\ttabs", "<|user|> in the text"])
def test_a_trained_tokenizer_decodes_to_the_text(text):
    tokenizer = train_tokenizer(TEXTS, 300)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_learns_merges_up_to_the_vocabulary_size():
    small, large = train_tokenizer(TEXTS, 262), train_tokenizer(TEXTS, 275)
    assert (len(small), len(large)) == (262, 275)  # 256 bytes and 6 special tokens, then merges
    assert len(large("the cat")["input_ids"]) < len(small("the cat")["input_ids"]) == len("the cat")


def test_the_prompt_is_a_prefix_of_the_conversation(tokenizer):
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what it says"}]
    answer = {"role": "assistant", "content": "the small teacher"}
    render = {"return_dict": False}
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **render)
    whole = tokenizer.apply_chat_template([*prompt, answer], **render)
    assert whole[: len(start)] == start
    assert whole[len(start) :] == [*tokenizer(answer["content"])["input_ids"], tokenizer.eos_token_id]
    assert whole.count(tokenizer.bos_token_id) == 1
    assert end_token_ids(tokenizer) == {tokenizer.eos_token_id}


def test_random_models_depend_only_on_their_seed(tokenizer):
    torch.manual_seed(1)
    one = model_identity(random_model(tokenizer, SHAPE, 0))
    torch.manual_seed(2)
    assert model_identity(random_model(tokenizer, SHAPE, 0)) == one
    assert model_identity(random_model(tokenizer, SHAPE, 1)) != one


def test_random_model_leaves_the_global_generator_alone(tokenizer):
    before = torch.get_rng_state()
    random_model(tokenizer, SHAPE, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_model_fits_its_tokenizer(tokenizer, tmp_path):
    model = random_model(tokenizer, SHAPE, 0)
    assert model.get_output_embeddings().weight.shape == (len(tokenizer), 16)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model_identity(again)["weights_sha256"] == model_identity(model)["weights_sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 8}, "has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"vocab_size": 8}, "has no 'vocab_size'"),  # the tokenizer says
        ({"hidden_size": "large"}, "cannot be made: .*hidden_size.*expected int"),
        ({"hidden_size": -8}, "cannot be made: .*negative dimension"),
        ({"hidden_act": "nope"}, "cannot be made: there is no 'nope'"),
        ({"num_attention_heads": 3}, r"cannot be made: .*hidden size \(16\) is not a multiple"),
    ],
)
def test_invalid_shapes_are_refused(tokenizer, change, message):
    with pytest.raises(UserError, match=message) as error:
        random_model(tokenizer, SHAPE | change, 0)
    assert "\n" not in str(error.value)
