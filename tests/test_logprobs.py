"""Log-probabilities and values against a naive forward with full logits, for model families with heads of their own."""

import pytest
import torch
import transformers as tf

from prefdistill.logprobs import (
    emittable_ids,
    next_tokens,
    reduce_logits,
    response_states,
    sequence_logps,
    sum_by_row,
)
from prefdistill.losses import soft_value

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": tf.LlamaConfig(**COMMON),
    "llama-tied": tf.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": tf.Qwen2Config(**COMMON),
    "qwen3": tf.Qwen3Config(**COMMON, head_dim=8),
    "gpt2": tf.GPT2Config(**GPT2),
    "gemma2-softcapped": tf.Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=5.0),
    "cohere-scaled": tf.CohereConfig(**COMMON, logit_scale=0.3),
    "granite-scaled": tf.GraniteConfig(**COMMON, logits_scaling=4.0),
    "mixtral-moe": tf.MixtralConfig(**COMMON, num_local_experts=2),
    # its backbone is not its base_model
    "opt": tf.OPTConfig(
        **{k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")},
        ffn_dim=48,
        word_embed_proj_dim=32,
    ),
}


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[request.param]).float().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    prompts, lengths = torch.tensor([3, 4, 1, 2]), torch.tensor([5, 8, 6, 1])
    return {
        "input_ids": torch.randint(3, 97, (4, 12), generator=generator),
        "attention_mask": (torch.arange(12) < (prompts + lengths)[:, None]).long(),
        "prompt_lengths": prompts,
        "lengths": lengths,
    }


def naive_logits(model, batch):
    """Full logits, one row at a time, without padding."""
    rows = []
    for ids, prompt, length in zip(batch["input_ids"], batch["prompt_lengths"], batch["lengths"], strict=True):
        rows.append(model(input_ids=ids[None, : prompt + length]).logits[0])
    return rows


def naive_logps(model, batch):
    total = []
    for i, logits in enumerate(naive_logits(model, batch)):
        start, length = int(batch["prompt_lengths"][i]), int(batch["lengths"][i])
        logps = logits.double().log_softmax(-1)
        total.append(sum(logps[start + t - 1, batch["input_ids"][i, start + t]] for t in range(length)))
    return torch.stack(total)


@pytest.mark.parametrize("tile", [None, 7])
def test_sequence_logps_and_gradient_equal_the_naive_forward(model, batch, tile):
    sequence_logps(model, batch, tile=tile).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = naive_logps(model, batch)
    expected.sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with torch.no_grad():
        torch.testing.assert_close(sequence_logps(model, batch, tile=tile).double(), expected, atol=1e-4, rtol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    model.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_values_equal_the_naive_forward(model, batch, temperature):
    ids = batch["input_ids"]
    states = response_states(batch["prompt_lengths"], batch["lengths"], 12, final=True)
    inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    (values,) = reduce_logits(model, inputs, states, lambda logits: (soft_value(logits, temperature),), tile=5)
    expected = []
    for i, logits in enumerate(naive_logits(model, batch)):
        first = int(batch["prompt_lengths"][i]) - 1
        shown = logits[first : first + int(batch["lengths"][i]) + 1].double()
        expected.append(temperature * torch.logsumexp(shown / temperature, -1))
    torch.testing.assert_close(values.double(), torch.cat(expected), atol=1e-4, rtol=1e-5)
    assert values.dtype == torch.float32


def test_states_by_hand():
    prompts, lengths = torch.tensor([2, 1]), torch.tensor([1, 3])
    assert response_states(prompts, lengths, 4, final=False).tolist() == [[0, 1, 0, 0], [1, 1, 1, 0]]
    assert response_states(prompts, lengths, 4, final=True).tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]


def test_tokens_chosen_in_states_by_hand():
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    states = response_states(torch.tensor([2, 1]), torch.tensor([1, 3]), 4, final=False)
    assert next_tokens(ids, states).tolist() == [7, 9, 10, 11]


def test_sums_by_row():
    states = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    assert sum_by_row(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), states).tolist() == [3.0, 0.0, 12.0]


def test_padding_and_garbage_behind_a_response_change_nothing(model, batch):
    with torch.no_grad():
        before = sequence_logps(model, batch)
        ids = batch["input_ids"].clone()
        ids[batch["attention_mask"] == 0] = 96
        torch.testing.assert_close(sequence_logps(model, {**batch, "input_ids": ids}), before, atol=1e-5, rtol=1e-6)


def test_no_more_logits_than_a_tile_exist_at_once(model, batch):
    rows = []

    def reduce(logits, tokens):
        rows.append(len(logits))
        return (logits.sum(-1),)

    states = response_states(batch["prompt_lengths"], batch["lengths"], 12, final=False)
    tokens = next_tokens(batch["input_ids"], states)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        reduce_logits(model, inputs, states, reduce, tokens, tile=4)
    assert rows == [4, 4, 4, 4, 4]  # 5 + 8 + 6 + 1 states


def test_the_model_is_left_as_it_was(model, batch):
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="from the reduction"):
        reduce_logits(model, {"input_ids": batch["input_ids"]}, batch["attention_mask"].bool(), _fail)
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[name].keys() == after[name].keys() for name in before)


def _fail(logits):
    raise RuntimeError("from the reduction")


def test_padded_vocabulary_rows_get_no_probability(batch):
    """A head with 7 rows more than the tokenizer has ids gives what the same head without them gives."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON)).eval()
    expected = sequence_logps(model, batch)
    model.resize_token_embeddings(104, mean_resizing=False)
    assert not torch.allclose(sequence_logps(model, batch), expected, atol=1e-3)
    emittable = torch.arange(104) < 97
    torch.testing.assert_close(sequence_logps(model, batch, emittable=emittable), expected, atol=1e-5, rtol=1e-6)


def test_emittable_ids(tokenizer):
    size = len(tokenizer)
    assert emittable_ids(tokenizer, size) is None
    padded = emittable_ids(tokenizer, size + 3)
    assert padded.tolist() == [True] * size + [False] * 3


def test_a_model_whose_head_goes_another_way_is_refused(batch):
    """Logits that are not made from the backbone's output would be silently wrong."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON)).eval()
    stray = tf.LlamaModel(tf.LlamaConfig(**COMMON))
    model.get_decoder = lambda: stray
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        sequence_logps(model, batch)


def test_adapters_are_part_of_the_answer(batch):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = tf.LlamaConfig(**COMMON)
    model = get_peft_model(
        tf.LlamaForCausalLM(config).eval(), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        adapted = sequence_logps(model, batch)
        torch.testing.assert_close(adapted.double(), naive_logps(model, batch), atol=1e-4, rtol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(sequence_logps(model, batch), adapted, atol=1e-2)
    sequence_logps(model, batch).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)
    assert any("lm_head" in name for name in trained)
