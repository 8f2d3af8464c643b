"""Models of fewer layers compute what the whole ones do without the others, in every architecture, or are refused."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from prefdistill.core.errors import UserError
from prefdistill.models.pruned import empty_pruned, layer_numbers, pruned, save_pruned

SHAPE = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 320, "n_embd": 16, "n_layer": 6, "n_head": 2, "n_positions": 64}
FAMILIES = {
    "llama, tied, as many end tokens as layers": transformers.LlamaConfig(
        **SHAPE, tie_word_embeddings=True, eos_token_id=[1, 2, 3, 4, 5, 6]
    ),
    "gemma3, other layer types": transformers.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4),
    "qwen2, windows from a layer on": transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "smollm3, layers without positions": transformers.SmolLM3Config(**SHAPE, no_rope_layer_interval=3, pad_token_id=0),
    "gpt2": transformers.GPT2Config(**GPT2),
    "mixtral, as many experts as layers": transformers.MixtralConfig(
        **SHAPE, num_local_experts=6, num_experts_per_tok=2
    ),
}


def random_weights(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.mul_(6)
    return model


def skip(model, kept):
    """Have the layers that are not kept return their input."""
    stack = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for number, layer in enumerate(stack):
        if number not in kept:
            layer.forward = lambda hidden_states, *_, **__: hidden_states


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fewer_layers_give_the_logits_of_the_whole_with_the_others_skipped(family, tmp_path, tokenizer):
    model = random_weights(FAMILIES[family])
    model.save_pretrained(tmp_path / "whole")
    ids = torch.randint(7, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    everything = model(input_ids=ids, use_cache=False).logits
    for layers, kept in ((4, [0, 1, 4, 5]), ([1, 2, 5], [1, 2, 5])):
        whole, out = random_weights(FAMILIES[family]), tmp_path / str(layers)
        skip(whole, kept)
        expected = whole(input_ids=ids, use_cache=False).logits
        assert (expected - everything).abs().max() > 0.1
        save_pruned(str(tmp_path / "whole"), layers, tokenizer, out)
        saved = AutoModelForCausalLM.from_pretrained(out).eval()
        torch.testing.assert_close(saved(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=0)
        assert empty_pruned(str(tmp_path / "whole"), layers).num_parameters() == saved.num_parameters()
        tied = saved.get_input_embeddings().weight is saved.get_output_embeddings().weight
        assert tied == model.config.tie_word_embeddings
        assert saved.config.eos_token_id == model.config.eos_token_id
        with_cache, without = (
            saved.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
            for cache in (True, False)
        )
        assert with_cache.tolist() == without.tolist()
        assert transformers.AutoTokenizer.from_pretrained(out)("the cat").input_ids == tokenizer("the cat").input_ids


def test_the_middle_is_left_out():
    assert layer_numbers(24, 30) == [*range(12), *range(18, 30)]
    assert layer_numbers(15, 30) == [*range(7), *range(22, 30)]
    assert layer_numbers(1, 2) == [1]
    assert layer_numbers([0, 2], 4) == [0, 2]


@pytest.mark.parametrize("layers", [6, 7, [], [0, 0], [2, 1], [0, 6], [0, 1, 2, 3, 4, 5]])
def test_layers_that_there_are_not_are_refused(layers):
    with pytest.raises(UserError, match=r"fewer than the 6 of the whole model, or rising numbers of 0 to 5, got"):
        layer_numbers(layers, 6)


def test_architectures_that_depend_on_the_number_of_a_layer_are_refused(tmp_path, tokenizer, make_model):
    # by shape, before a weight is read: dense layers by number among mixtures of experts
    config = transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, mlp_only_layers=[0, 5]
    )
    with torch.device("meta"), pytest.raises(UserError, match=r"a Qwen3MoeForCausalLM: the weights do not fit, the "):
        pruned(AutoModelForCausalLM.from_config(config), 4)
    # by what it computes: attention scaled by the layer's number
    scaled = random_weights(transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True))
    scaled.save_pretrained(tmp_path / "scaled")
    with pytest.raises(UserError, match="a GPT2LMHeadModel: without them it does not compute what it computes when"):
        save_pruned(str(tmp_path / "scaled"), [1, 2], tokenizer, tmp_path / "out")

    from peft import LoraConfig, get_peft_model

    make_model().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter; save it merged into its base before layers are left out"):
        empty_pruned(str(tmp_path / "adapter"), 1)
