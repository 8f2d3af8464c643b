"""The built-in task: its reward by hand, its language as a tokenizer, its data by seed, its judge by statistics."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from prefdistill.core.errors import UserError
from prefdistill.data import synthetic
from prefdistill.data.synthetic import (
    build_tokenizer,
    careless_response,
    correct_response,
    demonstrations,
    flip_labels,
    preference_pairs,
    reward,
    sample_prompts,
)

PROMPTS = sample_prompts(300, seed=0)
prompts = st.builds(
    lambda list_op, item_op, items: f"{list_op} {item_op} : {' '.join(items)}",
    st.sampled_from(sorted(synthetic.LIST_OPERATIONS)),
    st.sampled_from(sorted(synthetic.ITEM_OPERATIONS)),
    st.lists(st.sampled_from(synthetic.DIGITS), min_size=3, max_size=5),
)
words = st.sampled_from([*synthetic.DIGITS, "<", ">", ":", "inc", "sort", *synthetic.FILLERS])
responses = st.lists(words, max_size=14).map(" ".join)


@pytest.fixture(scope="module", params=["built", "reloaded"])
def tokenizer(request, tmp_path_factory):
    built = build_tokenizer()
    if request.param == "built":
        return built
    folder = tmp_path_factory.mktemp("tokenizer")
    built.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def chat(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def test_the_other_tokenizer_splits_the_words_and_gives_the_text_back():
    tokenizer, rng = synthetic.build_other_tokenizer(), random.Random(0)
    texts = [careless_response(prompt, rng) for prompt in PROMPTS]
    tokens = tokenizer(texts)["input_ids"]
    assert [tokenizer.decode(ids) for ids in tokens] == texts
    assert max(map(len, tokens)) < 16  # max_new_tokens of the quickstart, with the end token
    assert sum(map(len, tokens)) > sum(len(text.split()) for text in texts)
    assert {len(tokenizer.tokenize(prompt)) - len(prompt.split()) for prompt in PROMPTS} == {2}
    assert tokenizer.tokenize("so um") == ["s", "o", " u", "m"]
    assert tokenizer.apply_chat_template(chat("copy id : 1 2 3", "< 1"), tokenize=False).startswith(
        "<|bos|><|user|>copy"
    )
    assert synthetic.build_other_tokenizer().get_vocab() == tokenizer.get_vocab()


# --- the task and its reward


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("copy id : 3 1 2", "< 3 1 2 >"),
        ("reverse inc : 3 4 9", "< 0 5 4 >"),  # 9 + 1 wraps to 0
        ("sort dec : 5 0 3", "< 2 4 9 >"),  # 0 - 1 wraps to 9, before sorting
        ("desc flip : 0 9 4 4", "< 9 5 5 0 >"),
        ("evens inc : 1 2 3 4 5", "< 2 4 6 >"),
        ("evens id : 1 3 5", "< >"),
        ("rotate id : 1 2 3 4", "< 2 3 4 1 >"),
    ],
)
def test_correct_response_by_hand(prompt, response):
    assert correct_response(prompt) == response


@pytest.mark.parametrize(
    ("response", "ended", "expected"),
    [
        ("< 6 5 4 >", True, 4.0),
        ("< 6 5 4 >", False, 3.5),
        ("6 5 4", True, 3.0),
        ("< 6 5 4", True, 3.5),
        ("well < 6 5 4 > um so", True, 3.25),  # fillers around the marks do not unmake them
        ("6 < 5 4 >", True, 3.25),  # a mark in the wrong place is one more word
        ("< < 6 5 4 > >", True, 3.5),
        ("< 3 5 4 >", True, 3.0),
        ("< 6 5 >", True, 3.0),
        ("< 6 5 4 0 0 0 >", True, 2.5),  # 3 * 3/6 + 1
        ("< 65 4 >", True, 0.75),  # `65` is not a digit: 0 of 3, one extra
        ("", True, 0.0),
        ("", False, -0.5),
        ("> <", True, -0.5),
        ("٣ ½ ²", True, -0.75),  # digits of other scripts are extras
    ],
)
def test_reward_by_hand(response, ended, expected):
    assert reward("reverse inc : 3 4 5", response, ended) == pytest.approx(expected, abs=1e-12)


def test_reward_of_an_empty_answer():
    assert reward("evens id : 1 3 5", "< >") == 4.0
    assert reward("evens id : 1 3 5", "< 1 >") == 1.0


@given(prompts)
def test_the_correct_response_has_reward_four(prompt):
    assert reward(prompt, correct_response(prompt)) == 4.0


@given(prompts, st.data())
def test_changing_any_word_lowers_the_reward(prompt, data):
    response = correct_response(prompt).split()
    at = data.draw(st.integers(0, len(response)))
    gone = data.draw(st.integers(0, 1))
    response[at : at + gone] = data.draw(st.lists(words, max_size=1))
    worth_four = reward(prompt, " ".join(response)) == 4.0
    assert worth_four == (response == correct_response(prompt).split())


@given(prompts, st.text(), st.booleans())
def test_reward_accepts_any_text(prompt, response, ended):
    value = reward(prompt, response, ended)
    assert math.isfinite(value)
    assert value <= 4.0


@pytest.mark.parametrize("prompt", ["", "copy", "copy id 1 2", "id copy : 1 2 3", "copy id : 1 x", "copy id : 12"])
def test_a_foreign_prompt_is_refused(prompt):
    with pytest.raises(UserError, match="one looks like"):
        reward(prompt, "< 1 >")


# --- tokenizer and template


@given(prompt=prompts, response=responses)
def test_template_and_token_boundary(tokenizer, prompt, response):
    conversation = chat(prompt, response)
    start = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == start + response + tokenizer.eos_token

    start_ids = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, return_dict=False)
    out = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    assert ids[: len(start_ids)] == start_ids
    assert mask == [0] * len(start_ids) + [1] * (len(ids) - len(start_ids))
    assert len(ids) - len(start_ids) == len(response.split()) + 1
    assert (ids.count(tokenizer.bos_token_id), ids[0]) == (1, tokenizer.bos_token_id)
    assert (ids.count(tokenizer.eos_token_id), ids[-1]) == (1, tokenizer.eos_token_id)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(start_ids, skip_special_tokens=True) == prompt
    assert tokenizer.decode(ids[len(start_ids) :], skip_special_tokens=True) == response


def test_special_tokens_are_distinct(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(token) for token in synthetic.SPECIALS]
    assert ids == list(range(len(synthetic.SPECIALS)))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert set(tokenizer.all_special_tokens) == set(synthetic.SPECIALS)


# --- data


def test_prompts_are_distinct_and_a_longer_draw_continues_a_shorter_one():
    assert len(set(PROMPTS)) == len(PROMPTS)
    assert sample_prompts(100, seed=0) == PROMPTS[:100]
    assert sample_prompts(100, seed=1) != PROMPTS[:100]
    assert synthetic.PROMPT_COUNT == 2_664_000


@given(st.integers(0, 50), st.integers(), st.sets(st.sampled_from(PROMPTS)))
def test_excluded_prompts_are_never_drawn(n, seed, exclude):
    drawn = sample_prompts(n, seed, exclude)
    assert len(drawn) == len(set(drawn)) == n
    assert exclude.isdisjoint(drawn)


def test_exclusion_skips_and_keeps_the_order():
    assert sample_prompts(50, seed=0, exclude=PROMPTS[:10]) == PROMPTS[10:60]


def test_too_many_prompts_are_refused():
    with pytest.raises(UserError, match="2664000"):
        sample_prompts(synthetic.PROMPT_COUNT, seed=0, exclude=PROMPTS)


def test_demonstrations_are_reproducible_conversations_without_touching_global_state():
    state = random.getstate()
    rows = demonstrations(50, seed=3, exclude=PROMPTS)
    assert random.getstate() == state
    assert rows == demonstrations(50, seed=3, exclude=PROMPTS)
    assert [row["messages"][0]["content"] for row in rows] == sample_prompts(50, seed=3, exclude=PROMPTS)
    assert {tuple(message["role"] for message in row["messages"]) for row in rows} == {("user", "assistant")}


@given(prompts, st.integers())
def test_careless_responses_stay_in_the_language_and_short(prompt, seed):
    response = careless_response(prompt, random.Random(seed))
    assert response == careless_response(prompt, random.Random(seed))
    assert len(response.split()) <= 11
    assert set(response.split()) <= {*synthetic.DIGITS, *synthetic.FILLERS, "<", ">"}


def test_habits_have_their_stated_frequency():
    n, prompt, rng = 20_000, "reverse inc : 3 4 5", random.Random(0)
    given_ = [careless_response(prompt, rng).split() for _ in range(n)]
    seen = Counter(
        habit
        for words_ in given_
        for habit, struck in {
            "HURRY": words_[0] != "<",
            "UNCLOSED": ">" not in words_,
            "DROP": sum(word in synthetic.DIGITS for word in words_) == 2,
        }.items()
        if struck
    )
    for habit, count in seen.items():
        p = getattr(synthetic, habit)
        assert count / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n)), habit
    assert len(seen) == 3


# --- the judge


def test_pairs_are_trl_rows_with_true_rewards():
    rng = random.Random(0)
    first, second = ([careless_response(prompt, rng) for prompt in PROMPTS] for _ in range(2))
    rows = preference_pairs(PROMPTS, first, second, seed=0)
    kept = [i for i in range(len(PROMPTS)) if first[i] != second[i]]
    assert len(rows) == len(kept) < len(PROMPTS)
    for row, i in zip(rows, kept, strict=True):
        assert row["prompt"] == [{"role": "user", "content": PROMPTS[i]}]
        ((chosen,), (rejected,)) = row["chosen"], row["rejected"]
        assert {chosen["content"], rejected["content"]} == {first[i], second[i]}
        assert chosen["role"] == rejected["role"] == "assistant"
        assert row["score_chosen"] == reward(PROMPTS[i], chosen["content"])
        assert row["score_rejected"] == reward(PROMPTS[i], rejected["content"])
    assert rows == preference_pairs(PROMPTS, first, second, seed=0)
    assert rows != preference_pairs(PROMPTS, first, second, seed=1)


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ("< 1 2 3 >", "< 1 2 >", 1.0),
        ("< 1 2 3", "< 1 2 3 >", -0.5),
        ("well < 1 2 3 >", "um < 1 2 3 >", 0.0),
        ("< 1 2 3 >", "3 1 2", 4.0),
    ],
)
def test_labels_follow_bradley_terry(first, second, difference):
    n, prompt = 8000, "copy id : 1 2 3"
    assert reward(prompt, first) - reward(prompt, second) == pytest.approx(difference)
    rows = preference_pairs([prompt] * n, [first] * n, [second] * n, seed=0)
    p = 1 / (1 + math.exp(-difference))
    rate = sum(row["chosen"][0]["content"] == first for row in rows) / n
    assert rate == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_a_very_long_response_loses_without_overflow():
    (row,) = preference_pairs(["copy id : 1 2 3"], ["um " * 10_000], ["< 1 2 3 >"], seed=0)
    assert row["score_chosen"] == 4.0


def test_a_skipped_pair_does_not_change_other_labels():
    n = 200
    same = preference_pairs(PROMPTS[:n], ["< 1 >"] * n, ["< 1 >"] + ["< 2 >"] * (n - 1), seed=0)
    different = preference_pairs(PROMPTS[:n], ["< 1 >"] * n, ["< 2 >"] * n, seed=0)
    assert same == different[1:]


def test_pairs_need_one_response_of_each_kind_per_prompt():
    with pytest.raises(UserError, match="1 prompts but 1 first and 2 second"):
        preference_pairs(["copy id : 1 2 3"], ["< 1 >"], ["< 1 >", "< 2 >"], seed=0)


def test_flip_labels_flips_that_share_and_nothing_else():
    rows = preference_pairs(PROMPTS[:200], ["< 1 >"] * 200, ["< 2 >"] * 200, seed=0)
    flipped = {share: flip_labels(rows, share, seed=3) for share in (0.0, 0.25, 0.5, 1.0)}
    assert flipped[0.0] == rows
    changed = {share: {i for i in range(200) if found[i] != rows[i]} for share, found in flipped.items()}
    assert [len(changed[share]) for share in (0.25, 0.5, 1.0)] == [50, 100, 200]
    assert changed[0.25] < changed[0.5]
    for before, after in zip(rows, flipped[1.0], strict=True):
        assert after["prompt"] == before["prompt"]
        assert (after["chosen"], after["rejected"]) == (before["rejected"], before["chosen"])
        assert (after["score_chosen"], after["score_rejected"]) == (before["score_rejected"], before["score_chosen"])
    assert flip_labels(rows, 0.5, seed=4) != flipped[0.5]
