"""Held-out pairs: the teacher's terms and a student's implicit reward, by hand and against naive forward passes."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.measure import Measured
from prefdistill.evaluation.pairs import evaluate_pairs, gauge_flips, implicit_rewards, pair_terms
from prefdistill.evaluation.stats import estimate, margin_accuracy, mean_and_error, pair_wins
from prefdistill.signals import SignalSet, extract_signals
from support.stores import store_by_hand

# -- wins --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "accuracy"),
    [
        ([1, 1], [0, 0], 1), ([0, 0], [1, 1], 0), ([1, 0], [0, 1], 0.5), ([3, 3, 3], [3, 3, 3], 0.5),
        ([1, 2, 0], [0, 2, 5], 0.5), ([2, 2, 2, 2], [1, 2, 2, 3], 0.5), ([1, 1, 1, 1], [0, 0, 1, 2], 0.625),
        ([-math.inf], [math.inf], 0),
    ],
)  # fmt: skip
def test_ties_count_one_half(chosen, rejected, accuracy):
    assert margin_accuracy(chosen, rejected) == accuracy
    assert margin_accuracy(rejected, chosen) == 1 - accuracy
    assert margin_accuracy(torch.tensor(chosen), torch.tensor(rejected)) == accuracy


# -- the teacher's terms -----------------------------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path, make_model, pairs, tokenizer):
    """The stores of a teacher, of the model its DPO started from, and of a student's start."""

    def make(role, seed, kinds=("values", "logps", "q"), **options):
        out = tmp_path / f"{role}-{len(list(tmp_path.iterdir()))}"
        return extract_signals(make_model(seed), pairs, tokenizer, kinds, out, role=role, **options)

    return make


def signal_set(pairs, *stores):
    return SignalSet.of(stores, pairs)


@pytest.fixture
def naive(make_model, pairs, tokenizer):
    """Return, for a model with this seed and one side, the sum of raw token logits, the values and the log-probs."""

    @torch.no_grad()
    def read(seed, side, truncation=None):
        model, results = make_model(seed), []
        for row in encode_pairs(pairs, tokenizer, truncation or Truncation())[0]:
            prompt, response = row["prompt_ids"], row[f"{side}_ids"]
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :].double()
            taken = logits[torch.arange(len(response)), response]
            values = torch.logsumexp(logits, -1)
            results.append(
                {"q": taken.sum(), "values": values, "logp": (taken - values[:-1]).sum(), "tokens": len(response)}
            )
        return results

    return read


def wins(naive, score, seed=5, **options):
    """Return the wins by a score of naive forward passes."""
    return pair_wins(*([float(score(row)) for row in naive(seed, side, **options)] for side in ("chosen", "rejected")))


def test_terms_are_what_a_naive_forward_gives(pairs, stores, naive):
    results = pair_terms(signal_set(pairs, stores("teacher", 5), stores("teacher_reference", 6, ("logps",))))
    expected = {
        "shaping return": wins(naive, lambda row: row["values"][-2] - row["values"][0]),
        "value after the end token": wins(naive, lambda row: row["values"][-1] - row["values"][0]),
        "teacher log-prob": wins(naive, lambda row: row["logp"]),
        "teacher Q (raw logits)": wins(naive, lambda row: row["q"]),
        "longer is better": wins(naive, lambda row: row["tokens"]),
    }
    ratios = {
        side: [float(a["logp"] - b["logp"]) for a, b in zip(naive(5, side), naive(6, side), strict=True)]
        for side in ("chosen", "rejected")
    }
    expected["teacher implicit reward"] = pair_wins(ratios["chosen"], ratios["rejected"])
    assert results.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(results[name], values, err_msg=name)
    assert len({tuple(values) for values in results.values()}) == len(results)  # no two terms are equal
    assert 0.5 in results["longer is better"]  # there are ties


def by_hand(role, *rows):
    """Return a store with rows of (values, log-prob, raw logits, ended) of chosen and rejected."""
    sides = ("chosen", "rejected")
    table = [
        {"row": i} | {
            f"{side}_{name}": value
            for side, (values, logp, q, ended) in zip(sides, row, strict=True)
            for name, value in
            {"values": values, "logps": logp, "q": q, "ended": ended, "tokens": len(values) - 1}.items()
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    manifest = {"role": role, "value_temperature": 1.0, "kinds": ["values", "logps", "q"], "responses": sides}
    return store_by_hand(manifest, table)


def test_terms_by_hand():
    teacher = by_hand(
        "teacher",
        (([1.0, 2.0, 50.0], -3.0, 0.0, True), ([1.0, 3.0, 0.0], -3.5, 0.5, True)),
        (([1.0, 4.0, 0.0], -9.0, -4.0, True), ([1.0, 2.0, 3.0, 5.0], -1.0, 5.0, False)),  # cut: its last state counts
        (([2.0, 7.0], -1.0, 1.0, True), ([2.0, 7.0], -1.0, 1.0, True)),
    )
    reference = by_hand(
        "teacher_reference",
        (([0.0] * 3, -1.0, 0.0, True), ([0.0] * 3, -3.5, 0.0, True)),
        (([0.0] * 3, -12.0, 0.0, True), ([0.0] * 4, -1.0, 0.0, False)),
        (([0.0] * 2, -1.0, 0.0, True), ([0.0] * 2, -1.0, 0.0, True)),
    )
    signals = SignalSet((teacher, reference), Dataset.from_list([{}] * 3), np.arange(3))
    results = {name: values.tolist() for name, values in pair_terms(signals).items()}
    assert results == {
        "shaping return": [0, 0, 0.5],  # 1 : 2, 3 : 4, 0 : 0
        "value after the end token": [1, 0, 0.5],  # 49 : -1, -1 : 4
        "teacher log-prob": [1, 0, 0.5],
        "teacher Q (raw logits)": [0, 0, 0.5],
        "teacher implicit reward": [0, 1, 0.5],  # -2 : 0, 3 : 0
        "longer is better": [0.5, 0, 0.5],
    }


def test_discount_and_terminal_are_those_of_the_method(pairs, stores, naive):
    signals = signal_set(pairs, stores("teacher", 5))
    np.testing.assert_array_equal(
        pair_terms(signals, discount=0.9)["shaping return"],
        wins(
            naive,
            lambda row: sum(0.9 * v for v in [*row["values"][1:-1], row["values"][-2]]) - row["values"][:-1].sum(),
        ),
    )
    bootstrap = pair_terms(signals, terminal="bootstrap")
    assert "value after the end token" not in bootstrap
    np.testing.assert_array_equal(
        bootstrap["shaping return"], wins(naive, lambda row: row["values"][-1] - row["values"][0])
    )


def test_raw_logits_do_not_depend_on_temperature_and_need_the_q_signal(pairs, stores, naive):
    terms = pair_terms(signal_set(pairs, stores("teacher", 5, value_temperature=0.5)))
    np.testing.assert_array_equal(terms["teacher Q (raw logits)"], wins(naive, lambda row: row["q"]))
    terms = pair_terms(signal_set(pairs, stores("teacher", 5, ("values", "logps"))))
    assert "teacher Q (raw logits)" not in terms
    assert "shaping return" in terms


def test_gauge_flips_by_hand():
    """Margins 3, -1, 0 and 2 at the last states; 1 of 4 pairs flips under the first direction, 2 under the second."""
    margins = [  # last values of chosen and rejected, shifts of chosen and of rejected
        ((5.0, 2.0), (0.0, -4.0), (2.0, -1.0)),  # 3 - 2, 3 - 3: neither flips
        ((1.0, 2.0), (0.5, 3.0), (0.0, 1.0)),  # -1 + 0.5 does not, -1 + 2 does
        ((4.0, 4.0), (1.0, -1.0), (0.0, 0.0)),  # a tie cannot flip
        ((3.0, 1.0), (-1.0, 0.0), (2.0, 5.0)),  # 2 - 3 and 2 - 5 both do
    ]
    table = [
        {
            "row": i,
            # an ended response counts by the state before its end token, a cut one by its last
            "chosen_values": [9.0, values[0], -99.0],
            "rejected_values": [9.0, 77.0, values[1]],
            "chosen_gauge": chosen,
            "rejected_gauge": rejected,
            **{f"{side}_tokens": 2 for side in ("chosen", "rejected")},
            "chosen_ended": True,
            "rejected_ended": False,
        }
        for i, (values, chosen, rejected) in enumerate(margins)
    ]
    manifest = {"role": "teacher", "kinds": ["values"], "responses": ["chosen", "rejected"]}
    assert gauge_flips(store_by_hand(manifest, table)) == mean_and_error([1 / 4, 2 / 4])


def test_a_truncated_response_keeps_its_last_state(pairs, stores, naive):
    """A truncated response has no end token whose value would be left out."""
    truncation = Truncation(max_length=14)
    store = stores("teacher", 5, truncation=truncation)
    signals = signal_set(pairs, store)
    ended = [signals.scalar("teacher", "values", side, "ended") for side in ("chosen", "rejected")]
    assert not all(map(np.all, ended))
    assert any(map(np.any, ended))
    returns = [
        [float(row["values"][-2 if end else -1] - row["values"][0]) for row, end in zip(rows, ends, strict=True)]
        for rows, ends in zip((naive(5, side, truncation) for side in ("chosen", "rejected")), ended, strict=True)
    ]
    np.testing.assert_array_equal(pair_terms(signals)["shaping return"], pair_wins(*returns))


# -- a student ---------------------------------------------------------------------------------------------------------


def test_a_student_equal_to_its_reference_has_no_reward(pairs, stores, make_model, tokenizer):
    reference = stores("reference", 0, ("logps",))
    reward = implicit_rewards(make_model(0), pairs, tokenizer, reference)
    for side in ("chosen", "rejected"):
        np.testing.assert_array_equal(getattr(reward, side), 0)
    results = evaluate_pairs(make_model(0), pairs, tokenizer, [reference])
    assert results["metrics"]["reward_accuracy"] == {**estimate([0.5] * 24), "over": "test prompts"}
    assert results["margin_accuracy"].keys() == {"longer is better", "the start's log-prob"}
    assert results["pairs"] == 24


def test_rewards_are_log_ratios(pairs, stores, make_model, tokenizer, naive):
    reference = stores("reference", 0, ("logps",))
    results = evaluate_pairs(make_model(3), pairs, tokenizer, [reference, stores("teacher", 5)])
    student, start = ({side: naive(seed, side) for side in ("chosen", "rejected")} for seed in (3, 0))
    ratios = [
        [float(a["logp"] - b["logp"]) for a, b in zip(student[side], start[side], strict=True)]
        for side in ("chosen", "rejected")
    ]
    over = {"over": "test prompts"}
    assert results["metrics"]["reward_accuracy"] == estimate(pair_wins(*ratios)) | over
    per_token = estimate([float(row["logp"]) / row["tokens"] for row in student["chosen"]])
    for key in ("mean", "se", "low", "high"):
        assert results["metrics"]["chosen_logp"][key] == pytest.approx(per_token[key], abs=1e-4)
    terms = results["margin_accuracy"]
    assert terms["teacher Q (raw logits)"] == estimate(wins(naive, lambda row: row["q"])) | over
    assert terms["longer is better"] == estimate(wins(naive, lambda row: row["tokens"])) | over
    assert terms["the start's log-prob"] == estimate(wins(naive, lambda row: row["logp"], seed=0)) | over
    reward = implicit_rewards(make_model(3), pairs, tokenizer, reference)
    np.testing.assert_allclose([reward.chosen, reward.rejected], ratios, atol=2e-3)


def test_pairs_of_one_prompt_are_resampled_together(make_model, tokenizer, tmp_path, pairs):
    """Six pairs of four prompts, in no order; a pair without room for a response is left out."""
    prompts = ["b", "a", "b", "c", "a", "d " * 60]
    rows = [
        {**pairs[i], "prompt": [{"role": "user", "content": prompt}], "chosen": pairs[i + 8]["chosen"]}
        for i, prompt in enumerate(prompts)
    ]
    few = Dataset.from_list(rows)
    store = extract_signals(
        make_model(0), few, tokenizer, ("logps",), tmp_path / "store", role="reference", truncation=Truncation(40)
    )
    results = evaluate_pairs(make_model(3), few, tokenizer, [store])
    reward = implicit_rewards(make_model(3), few, tokenizer, store)
    assert reward.row.tolist() == [0, 1, 2, 3, 4]
    wins = pair_wins(reward.chosen, reward.rejected)
    assert results["metrics"]["reward_accuracy"] == estimate(wins, list("babca")) | {"over": "test prompts"}
    assert (results["pairs"], results["metrics"]["reward_accuracy"]["n"]) == (5, 3)
    measured = Measured()
    measured.add_metrics("pairs", reward)
    assert measured.groups["reward_accuracy"] == [0, 1, 0, 2, 1]
    assert measured.metrics["reward_accuracy"] == wins.mean()


def test_mismatched_signals_are_refused(pairs, stores, make_model, tokenizer):
    import copy

    reference, model = stores("reference", 0, ("logps",)), make_model(0)
    with pytest.raises(UserError, match="reference's logps"):
        evaluate_pairs(model, pairs, tokenizer, [stores("teacher", 5)])
    with pytest.raises(UserError, match="reference's logps"):
        evaluate_pairs(model, pairs, tokenizer, [stores("reference", 0, ("values",))])
    with pytest.raises(UserError, match="the reference signals were made from other data"):
        evaluate_pairs(model, pairs.select(range(20)), tokenizer, [reference])
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("{{ bos_token }}", "")
    with pytest.raises(UserError, match=r"the reference signals were made with another tokenizer .*template"):
        evaluate_pairs(model, pairs, other, [reference])
