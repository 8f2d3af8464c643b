"""Sampling: what it draws is the model's own distribution, in the order of the prompts, and repeatable."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from conftest import sentence
from prefdistill.sample import sample

PROMPTS = [[{"role": "user", "content": sentence(1 + (i * 5) % 11, i)}] for i in range(14)]


@pytest.fixture
def model(make_model, tokenizer):
    """A model that ends some of its responses early, some late and some never."""
    model = make_model()
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 4
    return model


def prompt_ids(tokenizer, prompt):
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def next_logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0, -1]


def argmax_loop(model, tokenizer, prompt, n):
    """Tokens of the greedy response, and whether it ended, from whole forward passes without a cache."""
    ids, start = prompt_ids(tokenizer, prompt), len(prompt_ids(tokenizer, prompt))
    while len(ids) - start < n:
        ids.append(int(next_logits(model, ids).argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            return ids[start:-1], True
    return ids[start:], False


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_is_the_argmax_loop(model, tokenizer, batch_size):
    found = sample(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=12, batch_size=batch_size)
    ends = set()
    for prompt, response in zip(PROMPTS, found, strict=True):
        tokens, ended = argmax_loop(model, tokenizer, prompt, 12)
        assert response.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert (response.tokens, response.ended) == (len(tokens) + ended, ended)
        ends.add(ended)
    assert ends == {True, False}


def test_a_response_that_has_not_ended_says_so(model, tokenizer):
    short = sample(model, tokenizer, PROMPTS, max_new_tokens=2, seed=3)
    assert all(response.tokens == 2 for response in short if not response.ended)
    assert any(not response.ended for response in short)
    never = model
    never.lm_head.weight.data[tokenizer.eos_token_id] = 0
    for response in sample(never, tokenizer, PROMPTS[:3], temperature=0, max_new_tokens=5):
        assert (response.tokens, response.ended) == (5, False)


def test_the_same_seed_gives_the_same_responses(model, tokenizer):
    ask = {"max_new_tokens": 8, "batch_size": 5}
    first = sample(model, tokenizer, PROMPTS, seed=1, **ask)
    torch.manual_seed(99)  # the state outside does not matter
    assert sample(model, tokenizer, PROMPTS, seed=1, **ask) == first
    assert sample(model, tokenizer, PROMPTS, seed=2, **ask) != first


def test_the_global_generator_is_left_alone(model, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sample(model, tokenizer, PROMPTS[:2], max_new_tokens=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_responses_keep_the_order_of_the_prompts(model, tokenizer):
    """Prompts of like length are batched together; the answer to a prompt is where the prompt was."""
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    ask = {"temperature": 0, "max_new_tokens": 6, "batch_size": 3}
    straight = sample(model, tokenizer, PROMPTS, **ask)
    mixed = sample(model, tokenizer, [PROMPTS[i] for i in order], **ask)
    assert mixed == [straight[i] for i in order]
    assert len({response.text for response in straight}) > 5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_softmax(model, tokenizer, temperature):
    """One-token responses of one prompt: chi-square against the softmax of the logits, rare tokens together."""
    n, prompt = 4000, PROMPTS[3]
    logits = next_logits(model, prompt_ids(tokenizer, prompt)).double()
    p = torch.softmax(logits / (4 * temperature), -1).numpy()
    model.lm_head.weight.data /= 4  # flat enough that many tokens are drawn
    found = sample(model, tokenizer, [prompt] * n, temperature=temperature, max_new_tokens=1, batch_size=n, seed=0)
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(p))]
    expected, observed = {}, {}
    for text, share in zip(texts, p, strict=True):
        expected[text] = expected.get(text, 0.0) + share * n
    for response in found:
        observed[response.text] = observed.get(response.text, 0) + 1
    common = [text for text in expected if expected[text] >= 10]
    assert len(common) > 10
    rare = n - sum(expected[text] for text in common), n - sum(observed.get(text, 0) for text in common)
    test = chisquare([*(observed.get(text, 0) for text in common), rare[1]], [*map(expected.get, common), rare[0]])
    assert test.pvalue > 1e-3


@pytest.mark.parametrize(
    "habit",
    [
        {"repetition_penalty": 3.0}, {"min_p": 0.9}, {"top_k": 1}, {"top_p": 0.1}, {"temperature": 0.01},
        {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(5, 200))}, {"max_length": 3}, {"num_beams": 2},
    ],
    ids=str,
)  # fmt: skip
def test_the_settings_a_model_comes_with_change_nothing(model, tokenizer, habit):
    def both():
        return [sample(model, tokenizer, PROMPTS[:4], temperature=t, max_new_tokens=6) for t in (0.0, 1.0)]

    plain = both()
    for key, value in habit.items():
        setattr(model.generation_config, key, value)
    assert both() == plain
    assert {key: getattr(model.generation_config, key) for key in habit} == habit  # and they are still there


def test_plain_text_prompts(model, tokenizer):
    """Text is not put through the chat template."""
    text = sentence(4, 2)
    ids = tokenizer(text)["input_ids"]
    (response,) = sample(model, tokenizer, [text], temperature=0, max_new_tokens=1)
    assert response.text == tokenizer.decode([int(next_logits(model, ids).argmax())], skip_special_tokens=True)


def test_the_end_token_of_the_template_ends_a_response(model, tokenizer):
    """A chat template may end its answers with another token than the tokenizer's EOS."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "{{ '<|system|>' }}")
    marker = other.convert_tokens_to_ids("<|system|>")
    model.lm_head.weight.data[marker] = 4 * model.lm_head.weight.data[tokenizer.eos_token_id]
    found = sample(model, other, PROMPTS, temperature=0, max_new_tokens=12)
    stopped = [response for response in found if response.ended]
    assert stopped
    assert all("<|system|>" not in response.text for response in found)
    prompt = PROMPTS[found.index(stopped[0])]
    ids = prompt_ids(other, prompt)
    for _ in range(stopped[0].tokens):
        ids.append(int(next_logits(model, ids).argmax()))
    assert ids[-1] == marker


def test_no_prompts_no_responses(model, tokenizer):
    assert sample(model, tokenizer, []) == []
