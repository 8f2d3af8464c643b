"""The signal store: what is in it equals a naive forward, and a store that is not whole or not ours is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from prefdistill.data import data_fingerprint
from prefdistill.encode import Truncation, encode_pairs
from prefdistill.errors import UserError
from prefdistill.signals import Signals, SignalSet, extract_signals


@pytest.fixture
def store(tmp_path, make_model, pairs, tokenizer):
    return extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "store", shard_rows=10)


@torch.no_grad()
def naive(model, row, side):
    """Values and log-probability from the full logits of one sequence."""
    prompt, response = row["prompt_ids"], row[f"{side}_ids"]
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    values = torch.logsumexp(logits[len(prompt) - 1 :], -1)
    logps = logits.log_softmax(-1)
    return values.numpy(), sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(response))


def test_rows_equal_a_naive_forward(store, make_model, pairs, tokenizer):
    encoded, dropped = encode_pairs(pairs, tokenizer, Truncation())
    assert not dropped
    assert len(store) == len(pairs) == 24
    for i in range(24):
        found = store.row(i)
        for side in ("chosen", "rejected"):
            values, logp = naive(make_model(), encoded[i], side)
            assert found[side]["tokens"] == len(encoded[i][f"{side}_ids"])
            assert found[side]["ended"] is True
            assert found[side]["values"].dtype == np.float32
            np.testing.assert_allclose(found[side]["values"], values, atol=1e-4)
            assert found[side]["logps"] == pytest.approx(logp, abs=1e-3)


def test_both_responses_start_from_the_same_number(store):
    for i in range(len(store)):
        row = store.row(i)
        assert row["chosen"]["values"][0] == row["rejected"]["values"][0]


def test_states_are_places_in_the_text(store, pairs):
    offsets = store.row(3)["chosen"]["offsets"]
    text = pairs[3]["chosen"][0]["content"]
    assert len(offsets) == store.row(3)["chosen"]["tokens"]
    assert offsets[-2] == len(text)  # the last token of the text, before the end token


def test_value_temperature(tmp_path, make_model, pairs, tokenizer, store):
    sharp = extract_signals(make_model(), pairs, tokenizer, ("values",), tmp_path / "b", value_temperature=0.5)
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    with torch.no_grad():
        logits = make_model()(input_ids=torch.tensor([encoded[0]["prompt_ids"]])).logits[0, -1].double()
    expected = 0.5 * float(torch.logsumexp(logits / 0.5, -1))
    assert sharp.row(0)["chosen"]["values"][0] == pytest.approx(expected, abs=1e-4)
    assert sharp.kinds == ("values",)
    assert "logps" not in sharp.row(0)["chosen"]


def test_batching_changes_nothing_that_matters(tmp_path, make_model, pairs, tokenizer, store):
    one_by_one = extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "single", batch_tokens=1)
    for i in range(len(store)):
        np.testing.assert_allclose(store.row(i)["chosen"]["values"], one_by_one.row(i)["chosen"]["values"], atol=1e-4)


def test_columns_for_some_rows(store):
    rows = np.array([5, 0, 17])
    assert store.scalar("chosen_tokens", rows).tolist() == [store.row(i)["chosen"]["tokens"] for i in (5, 0, 17)]
    for found, i in zip(store.ragged("rejected_values", rows), (5, 0, 17), strict=True):
        np.testing.assert_array_equal(found, store.row(i)["rejected"]["values"])


def test_dropped_rows_are_named_and_have_no_signals(tmp_path, make_model, pairs, tokenizer):
    rows = [dict(row) for row in pairs]
    rows[4]["prompt"] = [{"role": "user", "content": "long " * 60}]
    from datasets import Dataset

    store = extract_signals(
        make_model(), Dataset.from_list(rows), tokenizer, out=tmp_path / "s", truncation=Truncation(max_length=48)
    )
    assert len(store) == 24
    assert 4 not in store.rows
    assert len(store.rows) == 23
    with pytest.raises(IndexError, match="row 4 has no signals: dropped"):
        store.row(4)
    with pytest.raises(UserError, match=r"gap: 1 rows, the first is row 4"):
        store.scalar("chosen_logps", np.array([3, 4]))
    with pytest.raises(IndexError, match="of 24 rows"):
        store.row(24)


def test_a_finished_store_is_opened_not_made_again(store, tmp_path, make_model, pairs, tokenizer, monkeypatch):
    import prefdistill.signals.extract as extract

    def forbidden(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(extract, "score_pairs", forbidden)
    again = extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "store", shard_rows=10)
    assert again.row(1)["chosen"]["logps"] == store.row(1)["chosen"]["logps"]


def test_an_interrupted_extraction_goes_on_and_ends_with_the_same_bytes(
    store, tmp_path, make_model, pairs, tokenizer, monkeypatch
):
    import prefdistill.signals.extract as extract

    calls = []
    real = extract.score_pairs

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(extract, "score_pairs", once)
    ask = {"out": tmp_path / "again", "shard_rows": 10}
    with pytest.raises(KeyboardInterrupt):
        extract_signals(make_model(), pairs, tokenizer, **ask)
    with pytest.raises(UserError, match="unfinished"):
        Signals.open(tmp_path / "again")
    extract_signals(make_model(), pairs, tokenizer, **ask)
    assert len(calls) == 4  # one finished before, one interrupted, then only the two that were missing
    for path in sorted((tmp_path / "store").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "store")).read_bytes()


def test_another_request_does_not_overwrite_a_store(store, tmp_path, make_model, pairs, tokenizer):
    with pytest.raises(UserError, match=r"another request \(other model\)"):
        extract_signals(make_model(seed=1), pairs, tokenizer, out=tmp_path / "store", shard_rows=10)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds no signals"):
        extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_damage_is_found_at_open(store, tmp_path):
    shard = tmp_path / "store" / "shards" / "00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(UserError, match=r"00001\.parquet is damaged"):
        Signals.open(tmp_path / "store")
    shard.unlink()
    with pytest.raises(UserError, match=r"00001\.parquet is missing"):
        Signals.open(tmp_path / "store")
    shard.write_bytes(whole)
    assert len(Signals.open(tmp_path / "store")) == 24


def test_a_gap_is_refused(store, tmp_path):
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"].pop()
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="do not cover every row"):
        Signals.open(tmp_path / "store")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "not a signal manifest"), ('{"schema": 99}', "not a signal manifest")],
)
def test_a_manifest_that_is_not_one(store, tmp_path, content, message):
    (tmp_path / "store" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Signals.open(tmp_path / "store")


def test_no_store_says_which_command_makes_one(tmp_path):
    with pytest.raises(UserError, match="prefdistill signals --out"):
        Signals.open(tmp_path / "nowhere")


def test_logits_that_are_not_finite_are_refused_with_the_row(tmp_path, make_model, pairs, tokenizer):
    model = make_model()
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(UserError, match="not finite in 24 pairs, the first is row 0"):
        extract_signals(model, pairs, tokenizer, out=tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("values", "hopes")}, "unknown signal kind 'hopes'"),
        ({"kinds": ()}, "no signal kind"),
        ({"role": "parrot"}, "unknown role 'parrot'"),
        ({"value_temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_requests(tmp_path, make_model, pairs, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_a_set_of_signals_is_of_one_data_set_one_truncation_one_role_each(
    store, tmp_path, make_model, pairs, tokenizer
):
    fingerprint = data_fingerprint(pairs)
    ask = {"kinds": ("logps",), "role": "reference"}
    reference = extract_signals(make_model(1), pairs, tokenizer, out=tmp_path / "ref", **ask)
    both = SignalSet.of([store, reference], pairs, fingerprint)
    assert not both.missing(("teacher.values", "reference.logps", "data.score_chosen"))
    assert both.missing(("reference.values", "teacher_reference.logps", "data.stars")) == [
        "reference.values",
        "teacher_reference.logps",
        "data.stars",
    ]
    with pytest.raises(UserError, match="two signal stores have the role teacher"):
        SignalSet.of([store, store], pairs, fingerprint)
    other = pairs.select(range(20))
    with pytest.raises(UserError, match="teacher signals were made from other data"):
        SignalSet.of([store], other, data_fingerprint(other))
    short = extract_signals(
        make_model(1), pairs, tokenizer, out=tmp_path / "short", truncation=Truncation(max_length=30), **ask
    )
    with pytest.raises(UserError, match="reference and teacher signals differ in truncation"):
        SignalSet.of([store, short], pairs, fingerprint)


def test_the_manifest_says_where_the_signals_come_from(store, pairs):
    manifest = store.manifest
    assert manifest["data"]["fingerprint"] == data_fingerprint(pairs)
    assert manifest["model"]["architecture"] == "LlamaForCausalLM"
    assert len(manifest["model"]["weights_sha256"]) == len(manifest["tokenizer"]["template_sha256"]) == 64
    assert manifest["model"]["dtype"] == "float32"
    assert {"torch", "transformers", "prefdistill"} <= manifest["versions"].keys()
    assert [shard["rows"] for shard in manifest["shards"]] == [10, 10, 4]


def test_the_store_is_plain_parquet_for_datasets(store, tmp_path):
    from datasets import Dataset

    files = sorted(str(path) for path in (tmp_path / "store" / "shards").iterdir())
    table = Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))
    assert table["row"][:] == list(range(24))
    np.testing.assert_array_equal(table[2]["chosen_values"], store.row(2)["chosen"]["values"])
    shutil.rmtree(tmp_path / "cache")
