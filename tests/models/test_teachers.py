"""Whole extraction against a model's own full forward, for the families that a teacher may be of.

The forward goes over one response at a time, with no padding and nothing beside it. Prompts are longer than the windows
and kernels of these models, and the responses to one differ in length: however extraction lays them out, a wrong mask,
a wrong position, or a state that passes from one response into the other changes what is found.
"""

import copy
import importlib.util

import pytest
import torch
import transformers as tf
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import sidecar
from prefdistill.core.files import read_json
from prefdistill.models.load import load_model
from prefdistill.sampling.files import sample_responses
from prefdistill.signals import extract_signals
from support.tokenizer_styles import make_tokenizer

quantised = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason='bitsandbytes is not installed (pip install "prefdistill[quantized]")',
)

TEXT = "the small teacher reads a long prompt and answers with care while every student copies what it says"
LENGTHS = [(9, 1, 7), (14, 6, 2), (5, 8, 8), (11, 3, 10), (7, 5, 4), (2, 12, 1)]  # words of prompt, chosen, rejected

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {**WIDTH, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
WINDOW = {"head_dim": 8, "sliding_window": 6}
EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": (tf.LlamaConfig, COMMON),
    "qwen3": (tf.Qwen3Config, {**COMMON, "head_dim": 8}),
    "phi3": (tf.Phi3Config, COMMON),
    # learned positions; learned and counted along the mask; a bias on distances
    "gpt2": (tf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": (tf.OPTConfig, {**WIDTH, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": (tf.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": (tf.MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    # logits that are scaled or capped
    "cohere": (tf.CohereConfig, {**COMMON, "logit_scale": 0.3}),
    "granite": (tf.GraniteConfig, {**COMMON, "logits_scaling": 4.0, "attention_multiplier": 0.2}),
    # sliding windows: in every layer, in every other one; with sinks
    "mistral": (tf.MistralConfig, {**COMMON, **WINDOW}),
    "gemma2": (tf.Gemma2Config, {**COMMON, **WINDOW, "final_logit_softcapping": 5.0}),
    "gemma3": (
        tf.Gemma3TextConfig,
        {**COMMON, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt-oss": (tf.GptOssConfig, {**COMMON, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # experts
    "mixtral": (tf.MixtralConfig, {**COMMON, "num_local_experts": 4}),
    "qwen3-moe": (tf.Qwen3MoeConfig, {**COMMON, **EXPERTS}),
    "olmoe": (tf.OlmoeConfig, {**COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
    # a backbone that get_decoder() does not name
    "llama4": (
        tf.Llama4TextConfig,
        {**COMMON, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "modernbert-decoder": (tf.ModernBertDecoderConfig, {**COMMON, "cls_token_id": 1, "sep_token_id": 2}),
    # a recurrent state in place of all or some attention
    "mamba": (tf.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "lfm2": (tf.Lfm2Config, {**COMMON, "layer_types": ["conv", "full_attention"]}),
    "recurrent-gemma": (
        tf.RecurrentGemmaConfig,
        {**WIDTH, "num_hidden_layers": 3, "intermediate_size": 96, "attention_window_size": 6},
    ),
    "qwen3-next": (
        tf.Qwen3NextConfig,
        {
            **COMMON,
            **EXPERTS,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}


def message(role, content):
    return [{"role": role, "content": content}]


def spoken():
    """Rows of texts: prompt, chosen, rejected."""
    known = TEXT.split()
    words = (known[(5 * i + i * i // 7) % len(known)] for i in range(1_000))
    return [[" ".join(next(words) for _ in range(n)) for n in lengths] for lengths in LENGTHS]


def make(tokenizer, family, *, vocabulary=None, scale=0.3, **changes):
    config, settings = FAMILIES[family]
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(
        config(**{**settings, **changes}, vocab_size=vocabulary or len(tokenizer), **special), dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:  # weights large enough that every state is another
            parameter.data.normal_(0, scale)
    return model.eval()


@torch.no_grad()
def check(model, tokenizer, out, *, atol=2e-4, rtol=1e-5, k=5):
    rows = spoken()
    data = Dataset.from_list(
        [
            {"prompt": message("user", p), "chosen": message("assistant", c), "rejected": message("assistant", r)}
            for p, c, r in rows
        ]
    )
    store = extract_signals(
        model, data, tokenizer, ("values", "logps", "topk"), out, k=k, topk_coding="float32", batch_tokens=200
    )

    def same(found, expected):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, atol=atol, rtol=rtol)

    for i, (prompt, *answers) in enumerate(rows):
        start = tokenizer.apply_chat_template(message("user", prompt), add_generation_prompt=True, return_dict=False)
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            response = torch.tensor([*tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
            whole = torch.cat([torch.tensor(start), response])[None].to(model.device)
            logits = model(input_ids=whole, use_cache=False).logits[0].double().cpu()
            states = logits[len(start) - 1 :, : len(tokenizer)]
            logps = states[:-1].log_softmax(-1)
            found, topk = store.row(i)[name], store.topk(name, [i])
            same(found["values"], states.logsumexp(-1))
            same(found["logps"], logps.gather(-1, response[:, None]).sum())
            ids = torch.tensor(topk.ids)
            same(topk.logps, logps.gather(-1, ids))
            same(topk.logps, logps.topk(k).values)
            same(topk.rest, logps.scatter(-1, ids, -torch.inf).logsumexp(-1))
    return store


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_scores_equal_those_of_single_responses(family, tokenizer, tmp_path):
    check(make(tokenizer, family), tokenizer, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_padded_vocabulary_rows_get_no_probability(family, tokenizer, tmp_path):
    check(make(tokenizer, family, vocabulary=len(tokenizer) + 7), tokenizer, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16(family, tokenizer, tmp_path):
    """Rounding may differ between a batch and a single response, by a few units in the last place."""
    model = make(tokenizer, family).bfloat16()
    store = check(model, tokenizer, tmp_path, atol=0.08, rtol=0.02)
    assert store.manifest["model"]["dtype"] == "bfloat16"


# -- quantised ---------------------------------------------------------------------------------------------------------


def small(tokenizer, directory, **settings):
    """A float32 model on disk, so that only quantisation rounds."""
    make(tokenizer, "llama", hidden_size=64, intermediate_size=128, **settings).save_pretrained(directory)
    return str(directory)


@quantised
@pytest.mark.parametrize(
    ("bits", "scale", "atol"),
    [("4bit", 0.3, 2e-4), ("8bit", 0.1, 2e-3)],  # in 8 bits with no activation so large that it changes the rounding
)
def test_a_quantised_teacher(bits, scale, atol, tokenizer, tmp_path):
    model = load_model(small(tokenizer, tmp_path / "plain", scale=scale), dtype="float32", quantization=bits)
    assert sum(not p.is_floating_point() for p in model.parameters()) == 14  # all linear layers but the head
    store = check(model, tokenizer, tmp_path / "signals", atol=atol)
    settings = store.manifest["model"]["quantization"]
    assert (settings["quant_method"], settings[f"load_in_{bits}"]) == ("bitsandbytes", True)

    model.save_pretrained(tmp_path / "stored")
    again = check(load_model(str(tmp_path / "stored")), tokenizer, tmp_path / "again", atol=atol)
    for name in ("weights_sha256", "dtype", "quantization"):
        assert again.manifest["model"][name] == store.manifest["model"][name]


@quantised
def test_a_quantised_teacher_samples(tokenizer, tmp_path):
    name = small(tokenizer, tmp_path / "plain", scale=0.3)
    prompts = Dataset.from_dict({"prompt": ["the small teacher", "every student reads"]})
    ask = {"max_new_tokens": 12, "temperature": 0.0}
    by_name = sample_responses(name, prompts, tokenizer, tmp_path / "a.jsonl", quantization="4bit", **ask)
    model = load_model(name, quantization="4bit")
    assert (
        by_name["completion"][:]
        == sample_responses(model, prompts, tokenizer, tmp_path / "b.jsonl", **ask)["completion"][:]
    )
    assert read_json(sidecar(tmp_path / "a.jsonl"))["request"]["quantization"] == "4bit"
    for wrong in ({"model": model}, {"model": name, "engine": "vllm"}):
        with pytest.raises(UserError, match="quantization applies to"):
            sample_responses(
                dataset=prompts, tokenizer=tokenizer, out=tmp_path / "c.jsonl", quantization="4bit", **wrong
            )


@quantised
def test_an_adapter_on_a_quantised_base(tokenizer, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = load_model(small(tokenizer, tmp_path / "plain"), quantization="4bit")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    model = load_model(str(tmp_path / "adapter"), quantization="4bit")
    assert isinstance(model, PeftModel)
    rounding = 5e-3  # where 4-bit products are made in bfloat16, they depend on the shape of the batch
    found = check(model, tokenizer, tmp_path / "adapted", atol=rounding).row(0)["chosen"]["values"]
    with model.disable_adapter():
        without = check(model, tokenizer, tmp_path / "base", atol=rounding).row(0)["chosen"]["values"]
    assert abs(found - without).max() > 0.1


# -- with a tokenizer of its own ---------------------------------------------------------------------------------------


def padded(tokenizer, directory):
    """More embedding rows than tokens."""
    make(tokenizer, "llama", vocabulary=len(tokenizer) + 13).save_pretrained(directory)


def resized(tokenizer, directory):
    """Embeddings that were resized for added tokens, to a multiple."""
    model = make(tokenizer, "llama")
    tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model.save_pretrained(directory)


def adapter(tokenizer, directory):
    """A LoRA adapter with added tokens and a tokenizer of its own, on a base without one."""
    from peft import LoraConfig, get_peft_model

    make(tokenizer, "llama", hidden_size=64, intermediate_size=128).save_pretrained(directory / "base")
    tokenizer.add_tokens(["<think>"])
    base = load_model(str(directory / "base"))
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = str(directory / "base")
    model.save_pretrained(directory)


@pytest.mark.parametrize(
    ("build", "loading", "atol"),
    [
        (padded, {}, 2e-4),
        (resized, {}, 2e-4),
        (adapter, {}, 2e-4),
        pytest.param(resized, {"quantization": "4bit"}, 2e-4, marks=quantised),
        pytest.param(adapter, {"quantization": "4bit"}, 5e-3, marks=quantised),
    ],
    ids=["padded", "resized", "adapter", "resized-4bit", "adapter-4bit"],
)
@torch.no_grad()
def test_a_teacher_with_a_tokenizer_of_its_own(build, loading, atol, tmp_path):
    tokenizer = copy.deepcopy(make_tokenizer("llama3"))
    with torch.enable_grad():
        build(tokenizer, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [{"prompt": message("user", p), "chosen": message("assistant", c)} for p, c, _ in spoken()]
    store = extract_signals(
        str(tmp_path), Dataset.from_list(rows), out=tmp_path / "t", responses=("chosen",), dtype="float32", **loading
    )
    model = load_model(str(tmp_path), dtype="float32", **loading)
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    emits = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    emits[list(tokenizer.get_vocab().values())] = True
    for i, row in enumerate(rows):
        ids = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False)
        start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
        logits = model(torch.tensor([ids])).logits[0, start - 1 :].double().masked_fill(~emits, -torch.inf)
        logps = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None]).sum()
        stored = store.row(i)["chosen"]
        assert stored["values"] == pytest.approx(logits.logsumexp(-1).numpy(), abs=atol)
        assert stored["logps"] == pytest.approx(logps.item(), abs=10 * atol)
