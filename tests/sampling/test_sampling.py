"""Sampling draws from the model's own distribution, in the order of the prompts, repeatably; its file is complete, and
the same however often it was interrupted."""

import copy
import gzip
import json
import sys
import weakref
from dataclasses import dataclass
from datetime import datetime
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import chisquare
from transformers import PreTrainedTokenizerFast

from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import sidecar
from prefdistill.data.encode import encode_pairs
from prefdistill.data.load import load_messages, load_pairs, load_prompts
from prefdistill.data.truncation import Truncation
from prefdistill.sampling.files import sample_responses
from prefdistill.sampling.sampler import sample
from support.clock import dated, move_clock
from support.texts import sentence
from support.tiny_runs import stop
from support.tokenizer_styles import make_tokenizer

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
    return argmax_after(model, prompt_ids(tokenizer, prompt), n, [tokenizer.eos_token_id])


def argmax_after(model, prompt, n, ends):
    ids = list(prompt)
    while len(ids) - len(prompt) < n:
        ids.append(int(next_logits(model, ids).argmax()))
        if ids[-1] in ends:
            return ids[len(prompt) : -1], True
    return ids[len(prompt) :], False


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


def test_a_truncated_response_is_marked_as_not_ended(model, tokenizer):
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
    """Prompts of similar length are batched together; responses return to the order of the prompts."""
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    ask = {"temperature": 0, "max_new_tokens": 6, "batch_size": 3}
    straight = sample(model, tokenizer, PROMPTS, **ask)
    mixed = sample(model, tokenizer, [PROMPTS[i] for i in order], **ask)
    assert mixed == [straight[i] for i in order]
    assert len({response.text for response in straight}) > 5


def text_shares(model, tokenizer, prompt, temperature=1.0, top_p=1.0):
    """The probability of each one-token text, by hand: softmax, then the smallest top set that reaches top_p."""
    p = torch.softmax(next_logits(model, prompt_ids(tokenizer, prompt)).double() / temperature, -1).numpy()
    order = np.argsort(-p)
    kept = order[: 1 + int(np.searchsorted(np.cumsum(p[order]), top_p))] if top_p < 1 else order
    shares = {}
    for token in kept.tolist():
        text = tokenizer.decode([token], skip_special_tokens=True)
        shares[text] = shares.get(text, 0.0) + p[token] / p[kept].sum()
    return shares


@pytest.fixture
def flat(model):
    """A model with a distribution so flat that many tokens are drawn."""
    model.lm_head.weight.data /= 4
    return model


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.5)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("of_one_prompt", [True, False])
def test_frequencies_are_the_softmax(flat, tokenizer, temperature, top_p, of_one_prompt):
    """One-token responses: chi-square against the softmax of the logits, rare tokens together."""
    total, prompt = 4000, PROMPTS[3]
    expected = {t: total * p for t, p in text_shares(flat, tokenizer, prompt, temperature, top_p).items()}
    prompts, n = ([prompt], total) if of_one_prompt else ([prompt] * total, 1)
    found = sample(
        flat, tokenizer, prompts, n=n, temperature=temperature, top_p=top_p, max_new_tokens=1, batch_size=total
    )
    observed = {}
    for response in found:
        observed[response.text] = observed.get(response.text, 0) + 1
    assert observed.keys() <= expected.keys()  # nothing from outside of top_p
    common = [text for text in expected if expected[text] >= 10]
    assert len(common) > 10
    rare = total - sum(expected[text] for text in common), total - sum(observed.get(text, 0) for text in common)
    pools = [[*(observed.get(text, 0) for text in common), rare[1]], [*map(expected.get, common), rare[0]]]
    if rare[0] < 1:  # no rare ones there
        assert rare[1] == 0
        pools = [pools[0][:-1], pools[1][:-1]]
    assert chisquare(*pools, sum_check=False).pvalue > 1e-3


def test_the_responses_to_a_prompt_are_independent(flat, tokenizer):
    """Two draws agree with the sum of the squared probabilities: copies would always agree."""
    pairs, shares = 3000, text_shares(flat, tokenizer, PROMPTS[3])
    found = sample(flat, tokenizer, [PROMPTS[3]] * pairs, n=2, max_new_tokens=1, batch_size=500, seed=1)
    agree = np.mean([a.text == b.text for a, b in zip(found[::2], found[1::2], strict=True)])
    expected = sum(share**2 for share in shares.values())
    assert abs(agree - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs)


def test_n_responses_are_consecutive_in_the_order_of_the_prompts(model, tokenizer):
    ask = {"max_new_tokens": 6, "batch_size": 5}
    once = sample(model, tokenizer, PROMPTS, temperature=0, **ask)
    assert sample(model, tokenizer, PROMPTS, n=3, temperature=1e-4, **ask) == [r for r in once for _ in range(3)]
    assert len(set(sample(model, tokenizer, PROMPTS[:1], n=8, max_new_tokens=6))) > 4


@pytest.mark.parametrize("limit", [{"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_a_tiny_temperature_or_top_p_is_greedy(model, tokenizer, limit):
    greedy = sample(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=8)
    assert sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=5, **limit) == greedy


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1}, "temperature must be greater than or equal to 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_p": 0}, "top_p must be greater than 0, got 0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"n": 0}, "n must be greater than 0, got 0"),
        ({"n": 2, "temperature": 0}, "temperature=0 gives the same response 2 times; use n=1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be greater than 0"),
        ({"batch_size": 0}, "batch_size must be greater than 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(model, tokenizer, setting, message):
    with pytest.raises(UserError) as raised:
        sample(model, tokenizer, PROMPTS[:1], **setting)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "habit",
    [
        {"repetition_penalty": 3.0}, {"min_p": 0.9}, {"top_k": 1}, {"top_p": 0.1}, {"temperature": 0.01},
        {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(5, 200))}, {"max_length": 3}, {"num_beams": 2},
    ],
    ids=str,
)  # fmt: skip
def test_the_generation_config_of_the_model_is_ignored(model, tokenizer, habit):
    def both():
        return [sample(model, tokenizer, PROMPTS[:4], temperature=t, max_new_tokens=6) for t in (0.0, 1.0)]

    plain = both()
    for key, value in habit.items():
        setattr(model.generation_config, key, value)
    assert both() == plain
    assert {key: getattr(model.generation_config, key) for key in habit} == habit  # and they are still there


def test_plain_text_prompts(model, tokenizer):
    """Text does not go through the chat template."""
    text = sentence(4, 2)
    ids = tokenizer(text)["input_ids"]
    (response,) = sample(model, tokenizer, [text], temperature=0, max_new_tokens=1)
    assert response.text == tokenizer.decode([int(next_logits(model, ids).argmax())], skip_special_tokens=True)


def test_the_end_token_of_the_template_ends_a_response(model, tokenizer):
    """A chat template may end its answers with another token than the tokenizer's EOS."""
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


def test_no_prompts_give_no_responses(model, tokenizer):
    assert sample(model, tokenizer, []) == []


# ---- Truncation ----------------------------------------


class Recorder(torch.nn.Module):
    """A mock model: records its prompts without padding, and responds with an end token."""

    device, generation_config = torch.device("cpu"), None

    def __init__(self):
        super().__init__()
        self.prompts = []

    def get_input_embeddings(self):
        return torch.nn.Embedding(1_000, 1)

    def generate(self, input_ids, attention_mask, eos_token_id, **_):
        self.prompts += [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.nn.functional.pad(input_ids, (0, 1), value=eos_token_id[0])


def pair(prompt, chat):
    if not chat:
        return {"prompt": prompt, "chosen": " yes", "rejected": " no"}
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": answers[0], "rejected": answers[1]}


@pytest.mark.parametrize("truncation", [None, Truncation(64, 9), Truncation(None, 3)], ids=str)
@pytest.mark.parametrize(
    ("style", "chat", "options"),
    [
        ("llama3", True, {}), ("gemma", True, {}), ("phi3", True, {}), ("chatml_bare", True, {}),
        ("llama3", False, {}), ("zephyr", False, {}), ("zephyr", False, {"adds_eos": True}), ("chatml", False, {}),
    ],
)  # fmt: skip
def test_the_model_gets_the_tokens_of_encode_pairs(truncation, style, chat, options):
    tokenizer = make_tokenizer(style, **options)
    questions = ["What is the capital of France?", "Write a short poem about the sea.", "Hi", "東京 🙂</s>", "a" * 30]
    rows = Dataset.from_list([pair(question, chat) for question in questions])
    encoded, dropped = encode_pairs(rows, tokenizer, truncation or Truncation(None))
    assert not dropped
    model = Recorder()
    found = sample(model, tokenizer, rows["prompt"][:], truncation=truncation, batch_size=1)
    assert sorted(model.prompts) == sorted(encoded["prompt_ids"][:])
    assert [(response.text, response.tokens, response.ended) for response in found] == [("", 1, True)] * len(questions)


def test_null_keys_of_messages_do_not_reach_the_template():
    """Arrow gives every message the keys of all."""
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.chat_template = "{% for message in messages %}{{ message.keys() | join(' ') }}. {% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b", "name": "x"}]
    rows, model = Dataset.from_list([{"prompt": messages}]), Recorder()
    assert rows[0]["prompt"][0] == {"role": "user", "content": "a", "name": None}
    sample(model, tokenizer, rows["prompt"][:])
    assert tokenizer.decode(model.prompts[0]) == "role content. role content name. "


@pytest.mark.parametrize("room", [1, 2])
def test_responses_are_truncated_as_by_encode_pairs(model, tokenizer, room):
    whole = sample(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=12)
    lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in PROMPTS]
    longest = max(lengths) + room
    cut = sample(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=12, truncation=Truncation(longest))
    for prompt, length, before, after in zip(PROMPTS, lengths, whole, cut, strict=True):
        assert after.tokens == min(before.tokens, longest - length)
        assert after.ended == (before.ended and before.tokens <= longest - length)
        if not after.ended:
            tokens, _ = argmax_loop(model, tokenizer, prompt, after.tokens)
            assert after.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert any(after.tokens < before.tokens for before, after in zip(whole, cut, strict=True))
    assert any(after.ended for after in cut)


def test_generation_stops_at_the_length_limit(model, tokenizer, monkeypatch):
    asked, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: asked.append(kw["max_new_tokens"]) or generate(**kw))
    lengths = sorted((len(prompt_ids(tokenizer, prompt)) for prompt in PROMPTS), reverse=True)
    sample(model, tokenizer, PROMPTS, max_new_tokens=50, truncation=Truncation(60), batch_size=1)
    assert asked == [min(50, 60 - length) for length in lengths]


def test_a_prompt_that_leaves_no_room_is_refused_before_generation(tokenizer):
    model = Recorder()
    most = max(len(prompt_ids(tokenizer, prompt)) for prompt in PROMPTS)
    first = next(i for i, prompt in enumerate(PROMPTS) if len(prompt_ids(tokenizer, prompt)) == most)
    with pytest.raises(UserError, match=f"prompt {first}: the prompt leaves no room for a response"):
        sample(model, tokenizer, PROMPTS, truncation=Truncation(most))
    with pytest.raises(UserError, match="prompt 1: the prompt has no tokens"):
        sample(model, make_tokenizer("chatml"), ["a", ""])
    with pytest.raises(UserError, match="prompt 0: the chat template refuses its messages"):
        sample(model, make_tokenizer("gemma"), [[{"role": "system", "content": "s"}, PROMPTS[0][0]]])
    assert model.prompts == []


def test_a_tokenizer_without_template_or_end_token_is_refused(model, tokenizer):
    without_template = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|eos|>")
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        sample(model, without_template, PROMPTS[:1])
    with pytest.raises(UserError, match="the tokenizer has no end token"):
        sample(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer), ["a"])


# ---- Files ----------------------------------------


@pytest.fixture
def rows(pairs):
    """Conversations of many lengths with columns of their own."""
    return pairs.select(range(11)).add_column("id", [f"row {i}" for i in range(11)])


ASK = {"column": "student_response", "n": 2, "max_new_tokens": 6, "batch_size": 4, "shard_rows": 3}


def read(path):
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def test_each_row_is_written_with_its_responses(model, tokenizer, rows, tmp_path):
    out = tmp_path / "new" / "sampled.jsonl"
    dataset = sample_responses(model, rows, tokenizer, out, **ASK)
    written = read(out)
    assert [row["id"] for row in written] == [f"row {i}" for i in range(11) for _ in range(2)]
    for row, response in zip(written, dataset, strict=True):
        (original,) = (r for r in rows if r["id"] == row["id"])
        assert {key: row[key] for key in original} == original
        names = ("", "_ended", "_tokens", "_ids", "_check")
        assert list(row) == [*original, *(f"student_response{name}" for name in names)]
        assert [m["role"] for m in row["student_response"]] == ["assistant"]
        assert response == row  # what is given back is the file
    texts = [row["student_response"][0]["content"] for row in written]
    assert texts[::2] != texts[1::2]
    assert {row["student_response_ended"] for row in written} == {True, False}
    assert len(load_pairs(str(out))) == 22
    assert sorted(path.name for path in out.parent.iterdir()) == ["sampled.jsonl", "sampled.jsonl.meta.json"]


def test_the_file_holds_the_responses_of_sampling_in_memory(model, tokenizer, rows, tmp_path):
    """Greedy: other batch sizes and parts change nothing."""
    found = sample(model, tokenizer, rows["prompt"][:], temperature=0, max_new_tokens=6)
    ask = {"temperature": 0, "max_new_tokens": 6}
    for name, more in {"a": {}, "b": {"shard_rows": 2}, "c": {"batch_size": 1}}.items():
        written = sample_responses(model, rows, tokenizer, tmp_path / f"{name}.jsonl", **ask, **more)
        assert [row["completion"][0]["content"] for row in written] == [response.text for response in found]
        assert written["completion_ended"][:] == [response.ended for response in found]
        assert written["completion_tokens"][:] == [response.tokens for response in found]
    loaded = load_messages(str(tmp_path / "a.jsonl"))
    assert loaded["prompt"][:] == rows["prompt"][:]
    assert [message["content"] for (message,) in loaded["completion"]] == [response.text for response in found]
    meta = json.loads((tmp_path / "a.jsonl.meta.json").read_text())
    assert (meta["prompts"], meta["responses"]) == (11, 11)
    assert meta["tokens"] == sum(response.tokens for response in found)
    assert meta["ended_share"] == pytest.approx(np.mean([response.ended for response in found]), abs=1e-6)
    assert meta["tokens_per_second"] == pytest.approx(meta["tokens"] / meta["seconds"], rel=0.01)
    assert meta["dropped"] == {}


def test_plain_text_prompts_get_plain_text_responses(model, tokenizer, tmp_path, capsys):
    prompts = [sentence(1 + i, i) for i in range(5)]
    ask = {"temperature": 0, "max_new_tokens": 6}
    written = sample_responses(model, Dataset.from_dict({"prompt": prompts}), tokenizer, tmp_path / "a.jsonl", **ask)
    assert written["completion"][:] == [response.text for response in sample(model, tokenizer, prompts, **ask)]
    assert "does not go through the chat template" in capsys.readouterr().err


def test_pairs_of_two_samples_are_encoded_as_they_were_sampled(model, tokenizer, rows, tmp_path):
    """The prompt's tokens, and an end token if and only if the model wrote one."""
    prompts, ask = rows.select_columns("prompt"), {"max_new_tokens": 6, "truncation": Truncation(20, 12)}
    first = sample_responses(model, prompts, tokenizer, tmp_path / "a.jsonl", column="chosen", seed=1, **ask)
    sample_responses(model, first, tokenizer, tmp_path / "b.jsonl", column="rejected", seed=2, **ask)
    pairs = load_pairs(str(tmp_path / "b.jsonl"))
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation(None, 12))
    for side in ("chosen", "rejected"):
        ended = [pairs[row][f"{side}_ended"] for row in encoded["row"]]
        assert set(ended) == {True, False}
        assert encoded[f"{side}_ended"][:] == ended
        assert [ids[-1] == tokenizer.eos_token_id for ids in encoded[f"{side}_ids"]] == ended


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_an_interrupted_file_is_resumed_to_the_same_bytes(model, tokenizer, rows, tmp_path, monkeypatch, name):
    whole, broken = tmp_path / "whole" / name, tmp_path / "broken" / name
    generate, sampled = model.generate, []

    def until(most):
        def counted(**options):
            sampled.append(len(options["input_ids"]))
            if sum(sampled) > most:
                raise KeyboardInterrupt
            return generate(**options)

        sampled.clear()
        monkeypatch.setattr(model, "generate", counted)

    until(22)
    sample_responses(model, rows, tokenizer, whole, **ASK, seed=3)
    for most in (1, 9, 13):  # in the first part, then after it, then in the last
        until(most)
        with pytest.raises(KeyboardInterrupt):
            sample_responses(model, rows, tokenizer, broken, **ASK, seed=3)
        assert not broken.exists()
    until(4)
    again = sample_responses(model, rows, tokenizer, broken, **ASK, seed=3)  # what was there is not sampled again
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in broken.parent.iterdir()) == [name, f"{name}.meta.json"]
    assert again[:] == load_prompts(str(whole))[:]


def test_all_formats_hold_the_same_rows(model, tokenizer, rows, tmp_path):
    found = [
        sample_responses(model, rows, tokenizer, tmp_path / f"a{suffix}", **ASK)
        for suffix in (".jsonl", ".jsonl.gz", ".parquet")
    ]
    assert found[0][:] == found[1][:] == found[2][:]


def test_a_seed_gives_the_same_file_and_parts_differ_in_their_draws(model, tokenizer, tmp_path):
    """One prompt repeated: parts that shared their draws would hold the same responses."""
    rows, ask = Dataset.from_list([{"prompt": PROMPTS[3]}] * 8), {"max_new_tokens": 8, "shard_rows": 4}
    texts = {}
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        written = sample_responses(model, rows, tokenizer, tmp_path / f"{name}.jsonl", seed=seed, **ask)
        texts[name] = [row["completion"][0]["content"] for row in written]
    assert texts["a"] == texts["b"] != texts["c"]
    assert texts["a"][:4] != texts["a"][4:]


def test_a_finished_file_is_reused_and_anything_else_refused(model, tokenizer, rows, tmp_path, monkeypatch):
    out = tmp_path / "a.jsonl"
    first = sample_responses(model, rows, tokenizer, out, **ASK)
    made = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(model, "generate", None)
    assert sample_responses(model, rows, tokenizer, out, **ASK)[:] == first[:]

    def refused(match, dataset=rows, **change):
        with pytest.raises(UserError, match=match):
            sample_responses(model, dataset, tokenizer, out, **(ASK | change))

    refused(
        r"a.jsonl holds work of another request \(seed is 1, was 0; temperature is 2.0, was 1.0\); delete it or give",
        seed=1,
        temperature=2,
    )
    refused(r"\(data\.fingerprint differs .*; data\.rows is 10, was 11\)", dataset=rows.select(range(10)))
    refused(r"\(data\.fingerprint differs \(\w+\.\.\., was \w+\.\.\.\)\)", dataset=rows.rename_column("id", "name"))
    refused(r"\(max_length is 200, was None\)", truncation=Truncation(200))
    model.lm_head.weight.data[0, 0] += 1
    refused(r"\(model\.weights_sha256 differs \(")
    model.lm_head.weight.data[0, 0] -= 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == made
    out.write_text(out.read_text() + "\n")
    refused("is not as `prefdistill sample` wrote it")
    out.unlink()
    out.mkdir()
    refused("is a directory")


def test_unfinished_work_of_another_request_is_not_resumed(model, tokenizer, rows, tmp_path, monkeypatch):
    out, generate = tmp_path / "a.jsonl", model.generate
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample_responses(model, rows, tokenizer, out, **ASK)
    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(UserError, match=r"a.jsonl holds work of another request \(n is 1, was 2\)"):
        sample_responses(model, rows, tokenizer, out, **(ASK | {"n": 1}))
    (tmp_path / "b.jsonl.parts").mkdir()
    (tmp_path / "b.jsonl.parts" / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match=r"b.jsonl.parts is not empty and was not made by `prefdistill sample`"):
        sample_responses(model, rows, tokenizer, tmp_path / "b.jsonl", **ASK)
    out.write_text("mine")
    with pytest.raises(UserError, match="is not as"):
        sample_responses(model, rows, tokenizer, out, **ASK)
    assert out.read_text() == "mine"


def test_prompts_without_room_are_dropped_and_counted(model, tokenizer, rows, tmp_path, capsys):
    lengths = [len(prompt_ids(tokenizer, row["prompt"])) for row in rows]
    limit = sorted(lengths)[5]  # half of them
    written = sample_responses(model, rows, tokenizer, tmp_path / "a.jsonl", **ASK, truncation=Truncation(limit))
    left = [f"row {i}" for i, length in enumerate(lengths) if length < limit]
    assert 0 < len(left) < 11
    assert written["id"][::2] == written["id"][1::2] == left
    reason = "the prompt leaves no room for a response within max_length"
    assert json.loads(sidecar(tmp_path / "a.jsonl").read_text())["dropped"] == {reason: 11 - len(left)}
    assert f"sample: dropped {11 - len(left)} rows: {reason}" in capsys.readouterr().err
    with pytest.raises(UserError, match="No prompt is left: dropped 11 rows"):
        sample_responses(model, rows, tokenizer, tmp_path / "b.jsonl", **ASK, truncation=Truncation(2))
    assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "a.csv"}, "a.csv: unknown file type. Give --out a name that ends in .jsonl, .jsonl.gz, .parquet"),
        ({"column": "chosen"}, "a data set in memory has a column 'chosen' already; name another with --column"),
        ({"column": "prompt"}, "has a column 'prompt' already"),
        ({"column": "a b"}, "column='a b': use letters, digits and _"),
        ({"engine": "magic"}, "unknown engine 'magic'; known: transformers, ray, vllm"),
        ({"engine": "vllm"}, "vLLM loads a model itself: give its Hub name or directory"),
        ({"shard_rows": 0}, "shard_rows must be greater than 0"),
        ({"top_p": 2}, "top_p must be less than or equal to 1"),
    ],
    ids=str,
)
def test_invalid_input_is_refused_before_any_file_is_written(model, tokenizer, rows, tmp_path, options, message):
    out = tmp_path / options.pop("out", "a.jsonl")
    with pytest.raises(UserError) as raised:
        sample_responses(model, rows, tokenizer, out, **options)
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_columns_that_json_cannot_hold_need_parquet(model, tokenizer, tmp_path):
    when = datetime(2020, 1, 2)
    rows = Dataset.from_list([{"prompt": PROMPTS[0], "when": when}])
    with pytest.raises(UserError, match=r"row 0 of the data cannot be written as JSON .* ends in .parquet"):
        sample_responses(model, rows, tokenizer, tmp_path / "a.jsonl", max_new_tokens=2)
    written = sample_responses(model, rows, tokenizer, tmp_path / "a.parquet", max_new_tokens=2)
    assert written["when"][0] == when


# ---- Prompts ----------------------------------------


def test_prompts_are_read_from_every_data_format(tmp_path):
    def load(**row):
        (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
        return load_prompts(str(tmp_path / "data.jsonl"))[0]

    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    assert load(prompt="Q", answer="A", messages=[question]) == {"prompt": "Q", "answer": "A", "messages": [question]}
    assert load(prompt=[question, answer, question]) == {"prompt": [question, answer, question]}
    pair = {"chosen": [question, answer], "rejected": [question, {**answer, "content": "B"}], "id": 7}
    found = load(**pair)
    assert (found["prompt"], found["chosen"], found["id"]) == ([question], [answer], 7)
    assert load(messages=[question, answer], id=7) == {"id": 7, "prompt": [question], "completion": [answer]}
    for row, message in [
        ({"question": "Q"}, "no column 'prompt'; it has 'question'. Prompts are `prompt`, or the start of `messages`"),
        ({"prompt": 3}, "row 0: 'prompt' must be text or a list of messages"),
        ({"prompt": [question, answer]}, "row 0: the prompt ends with an assistant message"),
        ({"chosen": [answer], "rejected": [question]}, "do not start alike"),
        ({"messages": [question]}, "'messages' must be a prompt and then an assistant message"),
    ]:
        with pytest.raises(UserError) as raised:
            load(**row)
        assert message in str(raised.value)
    with pytest.raises(UserError, match="The data set, row 0: the prompt ends with an assistant message"):
        load_prompts(Dataset.from_list([{"prompt": [question, answer]}]))


# ---- vLLM ----------------------------------------


@pytest.fixture
def vllm(model, tokenizer, monkeypatch):
    """A stand-in for the package, which is not installed: the calls and answers that vLLM documents, and no more. It
    answers as `model` does, greedily, or with the tokens in `said`. What the real one does is not tested here."""

    @dataclass
    class SamplingParams:
        n: int
        temperature: float
        top_p: float
        max_tokens: int
        seed: int
        stop_token_ids: list
        ignore_eos: bool
        detokenize: bool

    class LLM:
        def __init__(self, **options):
            package.options.append(options)
            package.alive.add(self)
            self.model_config = SimpleNamespace(max_model_len=package.room)

        def generate(self, prompts, sampling_params, use_tqdm=True):
            assert not use_tqdm
            found = []
            for prompt, params in zip(prompts, sampling_params, strict=True):
                package.asked.append(params)
                assert list(prompt) == ["prompt_token_ids"]
                answers = [self.answer(prompt["prompt_token_ids"], params) for _ in range(params.n)]
                found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids)) for ids in answers]))
            return found

        def answer(self, ids, params):
            if package.said:
                return package.said.pop(0)[: params.max_tokens]
            tokens, ended = argmax_after(model, ids, params.max_tokens, params.stop_token_ids)
            return tokens + [params.stop_token_ids[0]] * ended

    package = ModuleType("vllm")
    package.LLM, package.SamplingParams, package.__version__ = LLM, SamplingParams, "0.0-stand-in"
    package.options, package.asked, package.said, package.alive = [], [], [], weakref.WeakSet()
    package.room = 1024
    monkeypatch.setitem(sys.modules, "vllm", package)
    return package


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_vllm_refuses_adapters_and_gguf_files(vllm, saved, rows, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{saved}"}}')
    with pytest.raises(UserError, match="is an adapter and vLLM loads whole models"):
        sample_responses(str(tmp_path / "adapter"), rows, out=tmp_path / "out.jsonl", engine="vllm")
    with pytest.raises(UserError, match="is a GGUF file: use the engine transformers"):
        sample_responses("org/model/q8.gguf", rows, out=tmp_path / "out.jsonl", engine="vllm")


def test_a_vllm_stand_in_gets_the_same_requests(vllm, saved, tokenizer, rows, tmp_path):
    ask = {"temperature": 0, "max_new_tokens": 6, "shard_rows": 4, "truncation": Truncation(14), "seed": 5}
    ours = sample_responses(saved, rows, out=tmp_path / "ours.jsonl", **ask)
    theirs = sample_responses(saved, rows, out=tmp_path / "theirs.jsonl", engine="vllm", dtype="float32", **ask)
    assert theirs[:] == ours[:]
    (options,) = vllm.options  # loaded once
    expected = {"model": saved, "tokenizer": saved, "dtype": "float32", "trust_remote_code": False, "seed": 5}
    expected |= {"revision": None, "tokenizer_revision": None}  # of a directory
    assert options == expected | {"generation_config": "vllm", "max_model_len": -1}
    assert not vllm.alive
    lengths = [len(prompt_ids(tokenizer, row["prompt"])) for row in rows]
    assert [params.max_tokens for params in vllm.asked] == [min(6, 14 - length) for length in lengths if length < 14]
    for params in vllm.asked:
        assert (params.n, params.temperature, params.top_p) == (1, 0, 1)
        assert params.stop_token_ids == [tokenizer.eos_token_id]
        assert params.ignore_eos
        assert not params.detokenize
    meta = json.loads(sidecar(tmp_path / "theirs.jsonl").read_text())
    assert (meta["request"]["engine"], meta["versions"]["vllm"]) == ("vllm", "0.0-stand-in")


def test_arguments_of_vllm_are_part_of_the_request(vllm, saved, rows, tmp_path):
    ask = {"out": tmp_path / "a.jsonl", "engine": "vllm", "max_new_tokens": 1}
    sample_responses(saved, rows, vllm={"tensor_parallel_size": 2, "max_model_len": 64}, **ask)
    (options,) = vllm.options
    assert (options["tensor_parallel_size"], options["max_model_len"]) == (2, 64)
    with pytest.raises(UserError, match=r"vllm is unset, was \{'tensor_parallel_size': 2"):
        sample_responses(saved, rows, **ask)
    with pytest.raises(UserError, match=r"vllm=\{dtype: ...\}: that is decided by prefdistill's own options"):
        sample_responses(saved, rows, vllm={"dtype": "float32"}, **ask)
    sample_responses(saved, rows, vllm={"tensor_parallel_size": 2, "max_model_len": 64}, batch_size=3, **ask)
    assert len(vllm.options) == 1  # the file is reused: vLLM makes its own batches
    with pytest.raises(UserError, match="vllm has arguments of the engine vllm; leave it out"):
        sample_responses(saved, rows, out=tmp_path / "b.jsonl", vllm={"max_model_len": 64})


def test_responses_that_vllm_would_cut_short_are_refused(vllm, saved, tokenizer, rows, tmp_path):
    lengths = [len(prompt_ids(tokenizer, row["prompt"])) for row in rows]
    longest, ask = int(np.argmax(lengths)), {"engine": "vllm", "max_new_tokens": 6}
    vllm.room = max(lengths) + 6
    sample_responses(saved, rows, out=tmp_path / "a.jsonl", **ask)
    vllm.room -= 1
    with pytest.raises(UserError, match=rf"row {longest} of the data has up to {vllm.room + 1} tokens"):
        sample_responses(saved, rows, out=tmp_path / "b.jsonl", **ask)


def test_a_file_is_written_where_every_part_was_sampled_by_vllm_before(vllm, saved, rows, tmp_path, monkeypatch):
    ask, out = {"engine": "vllm", "max_new_tokens": 2}, tmp_path / "a.jsonl"
    with monkeypatch.context() as cut:
        cut.setattr("prefdistill.sampling.files._read_parts", stop)
        with pytest.raises(KeyboardInterrupt):
            sample_responses(saved, rows, out=out, **ask)
    asked = len(vllm.asked)
    assert len(sample_responses(saved, rows, out=out, **ask)) == asked == len(vllm.asked)


def test_each_response_of_a_vllm_stand_in_has_its_own_seed(vllm, saved, rows, tmp_path):
    """vLLM gives the i-th response to a prompt the seed of the prompt plus i."""
    sample_responses(
        saved, rows, out=tmp_path / "a.jsonl", engine="vllm", n=4, max_new_tokens=1, shard_rows=3, top_p=0.9
    )
    assert {params.top_p for params in vllm.asked} == {0.9}
    seeds = [params.seed + i for params in vllm.asked for i in range(params.n)]
    assert len(set(seeds)) == len(seeds) == 44
    assert 0 <= min(seeds) <= max(seeds) < 2**63


def test_a_missing_vllm_is_an_error_with_the_fix(saved, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vLLM is not installed: `pip install vllm`"):
        sample_responses(saved, rows, out=tmp_path / "a.jsonl", engine="vllm")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_sampled_tokens_are_those_that_are_learnt(vllm, saved, tokenizer, tmp_path):
    """A text can be sampled in other tokens than the tokenizer gives, or with special tokens in it."""
    text = sentence(3, 1)
    usual = tokenizer(text, add_special_tokens=False)["input_ids"]
    letters = [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert letters != usual
    assert tokenizer.decode(letters) == text
    marker, end = tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id
    said = [[*usual, end], usual, [end], [*letters, end], [*usual, marker, *usual, end], letters]
    vllm.said = [*said]
    rows = Dataset.from_list([{"prompt": PROMPTS[i]} for i in range(6)])
    written = sample_responses(saved, rows, out=tmp_path / "a.jsonl", engine="vllm")
    assert written["completion_ended"][:] == [True, False, True, True, True, False]
    texts = [text, text, "", text, text + text, text]
    assert [row["completion"][0]["content"] for row in written] == texts
    assert written["completion_ids"][:] == said
    encoded, dropped = encode_pairs(written, tokenizer, Truncation(None), responses=("completion",))
    assert not dropped
    assert encoded["completion_ids"][:] == said
    assert encoded["completion_ended"][:] == written["completion_ended"][:]
    assert encoded["prompt_ids"][:] == [prompt_ids(tokenizer, row["prompt"]) for row in rows]


def test_a_file_whose_prompts_are_rendered_otherwise_is_refused(vllm, saved, tokenizer, tmp_path, monkeypatch):
    move_clock(monkeypatch, 0)
    rows = Dataset.from_list([{"prompt": PROMPTS[i]} for i in range(3)])

    def draw(name):
        return sample_responses(saved, rows, dated(tokenizer), tmp_path / name, engine="vllm", shard_rows=1)

    assert draw("a.jsonl")["completion_check"][:] == draw("a.jsonl")["completion_check"][:]  # reused
    with monkeypatch.context() as cut:
        cut.setattr("prefdistill.sampling.files._read_parts", stop)
        with pytest.raises(KeyboardInterrupt):
            draw("b.jsonl")
    (tmp_path / "b.jsonl.parts" / "00002.json").unlink()
    move_clock(monkeypatch, 1)
    for name in ("a.jsonl", "b.jsonl"):
        with pytest.raises(UserError, match=rf"the prompt of row 0 of .*{name} is rendered otherwise.*prints the date"):
            draw(name)
    assert not (tmp_path / "b.jsonl").exists()
