"""Signal kinds: per-token log-probabilities, and a kind that another package adds."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from prefdistill import METHODS, PrefDistillTrainer, Signals, extract_signals
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_sealed, write_sealed
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.signals import KINDS, Kind, Need, SignalSet
from prefdistill.signals.sizes import store_bytes


class Entropy(Kind):
    """What another package writes: one class."""

    name = "entropy"
    description = "entropy of the distribution at each state"
    in_batch = True

    def reduce(self, tile):
        logps = tile.logits.log_softmax(-1)
        return (-(logps.exp() * logps).sum(-1),)


@dataclass(frozen=True, kw_only=True)
class Weighted(METHODS["sft"]):
    """SFT whose tokens count by the teacher's entropy, and the teacher's mean as a number per row."""

    @property
    def needs(self):
        return (Need("teacher", "entropy", ("chosen",)), Need("teacher", "token_logps", ("chosen",)))

    @property
    def reads_token_logps(self):
        return True

    def row_signals(self, signals):
        return {"mean": np.array([x.mean() for x in signals.ragged("teacher", "entropy", "chosen")])}

    def loss(self, student, signals):
        weight = signals["teacher_chosen_entropy"]
        loss = -student.mean_over_tokens("chosen", weight * student.token_logps["chosen"])
        means = student.mean_over_tokens("chosen", weight)
        torch.testing.assert_close(means, signals["mean"])
        assert weight.shape == signals["teacher_chosen_token_logps"].shape == student.token_logps["chosen"].shape
        totals = student.mean_over_tokens("chosen", student.token_logps["chosen"]) * student.tokens["chosen"]
        torch.testing.assert_close(totals, student.logps["chosen"])
        return loss.mean(), {"entropy": weight.mean()}


@pytest.fixture
def entropy():
    KINDS.register("entropy", Entropy)
    yield
    KINDS._things.pop("entropy")


@torch.no_grad()
def naive(model, row, side):
    prompt, tokens = row["prompt_ids"], row[f"{side}_ids"]
    logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1), torch.tensor(tokens)


def test_token_logps_equal_a_naive_forward_and_sum_to_logps(tmp_path, make_model, pairs, tokenizer):
    model = make_model()
    store = extract_signals(model, pairs, tokenizer, ("logps", "token_logps", "values"), tmp_path, shard_rows=10)
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    for row in encoded:
        signals = store.row(row["row"])
        for side in SIDES:
            logps, tokens = naive(model, row, side)
            expected = logps.gather(1, tokens[:, None])[:, 0].numpy()
            assert signals[side]["token_logps"].dtype == np.float32
            np.testing.assert_allclose(signals[side]["token_logps"], expected, atol=2e-4)
            total = signals[side]["token_logps"].sum(dtype=np.float64)
            assert total == pytest.approx(signals[side]["logps"], rel=1e-6)


def test_a_kind_of_another_package_is_extracted_stored_priced_and_seen_by_a_method(
    entropy, tmp_path, make_model, pairs, tokenizer
):
    model = make_model()
    store = extract_signals(model, pairs, tokenizer, ("entropy", "values", "token_logps"), tmp_path / "store")
    store = Signals.open(tmp_path / "store")
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    logps, _ = naive(model, encoded[3], "rejected")
    np.testing.assert_allclose(store.row(3)["rejected"]["entropy"], -(logps.exp() * logps).sum(1).numpy(), atol=1e-4)
    assert store_bytes(["entropy"], 100, 4, 320) - store_bytes([], 100, 4, 320) == 400
    args = TrainingArguments(tmp_path / "out", max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True)
    trainer = PrefDistillTrainer(make_model(1), Weighted(), args, pairs, [store], tokenizer)
    assert np.isfinite(trainer.train().training_loss)


def test_a_kind_that_nobody_registers_is_refused_and_never_imported(entropy, tmp_path, make_model, pairs, tokenizer):
    extract_signals(make_model(), pairs, tokenizer, ("entropy",), tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    write_sealed(path, {**read_sealed(path), "kinds": ["tests.no_such_module.Entropy"]})
    with pytest.raises(UserError, match=r"signal kind 'tests\.no_such_module\.Entropy', which no installed package"):
        Signals.open(tmp_path / "store")
    with pytest.raises(UserError, match=r"unknown signal kind 'valeus'; did you mean 'values'\?"):
        extract_signals(make_model(), pairs, tokenizer, ("valeus",), tmp_path / "other")


def test_columns_of_a_batch_follow_its_rows(tmp_path, make_model, pairs, tokenizer):
    store = extract_signals(make_model(), pairs, tokenizer, ("token_logps",), tmp_path / "store", shard_rows=10)
    rows = np.array([17, 2, 11])
    batch = SignalSet.of([store], pairs).at(rows).batch("teacher", "token_logps", "rejected")
    expected = np.concatenate([store.row(int(row))["rejected"]["token_logps"] for row in rows])
    np.testing.assert_array_equal(batch["teacher_rejected_token_logps"], expected)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_describes_itself(name):
    kind = KINDS[name]
    assert kind.name == name
    assert kind.description
    assert len(kind.description) < 100
