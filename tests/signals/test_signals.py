"""The signal store: what is in it equals a naive forward, and a store that is not whole or not ours is refused."""

import copy
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.core.files import read_sealed, write_sealed
from prefdistill.core.lock import locked
from prefdistill.data.encode import encode_pairs
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.pairs import gauge_flips, pair_terms
from prefdistill.evaluation.stats import mean_and_error
from prefdistill.signals import Need, Signals, SignalSet, extract_signals, request
from prefdistill.signals.gauge import DIRECTIONS, gauge_directions

EXACT = {"topk_coding": "float32"}


@pytest.fixture
def store(tmp_path, make_model, pairs, tokenizer):
    return extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "store", shard_rows=10)


@pytest.fixture
def extract(tmp_path, pairs, tokenizer):
    """`extract_signals` on the pairs into a new directory."""

    def run(model, *kinds, data=pairs, **options):
        out = tmp_path / f"extracted-{len(list(tmp_path.iterdir()))}"
        return extract_signals(model, data, tokenizer, kinds, out, **options)

    return run


@pytest.fixture
def sampled(pairs):
    """What `sample` writes: other responses to the same prompts; every third was cut before its end token."""
    rows = [
        {
            "prompt": row["prompt"],
            "student_response": pairs[(i + 5) % 24]["rejected"],
            "student_response_ended": i % 3 != 0,
        }
        for i, row in enumerate(pairs)
    ]
    return Dataset.from_list(rows)


@torch.no_grad()
def naive_logits(model, row, response):
    """Full logits at s_0 .. s_T of one sequence, in float64."""
    prompt, tokens = row["prompt_ids"], row[f"{response}_ids"]
    return model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :].double()


def naive(model, row, side):
    """Values and log-probability from the full logits of one sequence."""
    logits = naive_logits(model, row, side)
    logps = logits.log_softmax(-1)
    return torch.logsumexp(logits, -1).numpy(), sum(float(logps[t, a]) for t, a in enumerate(row[f"{side}_ids"]))


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


def test_a_finished_store_is_reused(store, tmp_path, make_model, pairs, tokenizer, monkeypatch):

    def forbidden(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(request, "score_pairs", forbidden)
    again = extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "store", shard_rows=10)
    assert again.row(1)["chosen"]["logps"] == store.row(1)["chosen"]["logps"]


@pytest.mark.parametrize("kinds", [("values", "logps"), ("topk",), ("topk", "at ids")])
def test_an_interrupted_extraction_resumes_to_the_same_bytes(
    kinds, tmp_path, make_model, pairs, tokenizer, monkeypatch
):

    ask = {"kinds": kinds, "shard_rows": 10} | ({"p": 0.8} if kinds == ("topk",) else {})
    if "at ids" in kinds:
        ids = extract_signals(make_model(5), pairs, tokenizer, ("topk",), tmp_path / "ids", shard_rows=7)
        ask |= {"kinds": ("topk",), "role": "reference", "ids_from": ids}
    extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "store", **ask)

    calls = []
    real = request.score_pairs

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(request, "score_pairs", once)
    with pytest.raises(KeyboardInterrupt):
        extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "again", **ask)
    with pytest.raises(UserError, match="unfinished"):
        Signals.open(tmp_path / "again")
    extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "again", **ask)
    assert len(calls) == 4  # one finished before, one interrupted, then only the two that were missing
    written = [path for path in sorted((tmp_path / "store").rglob("*.*")) if path.is_file()]
    assert len(written) == 8
    for path in written:
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "store")).read_bytes()


def test_another_request_does_not_overwrite_a_store(store, tmp_path, make_model, pairs, tokenizer):
    with pytest.raises(UserError, match=r"another request \(model\.weights_sha256 differs \("):
        extract_signals(make_model(seed=1), pairs, tokenizer, out=tmp_path / "store", shard_rows=10)
    same_weights = make_model(rms_norm_eps=1e-2)
    with pytest.raises(UserError, match=r"another request \(model\.config\.rms_norm_eps is"):
        extract_signals(same_weights, pairs, tokenizer, out=tmp_path / "store", shard_rows=10)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="was not made by prefdistill"):
        extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_damage_is_detected_at_open(store, tmp_path):
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
    manifest = read_sealed(path)
    manifest["shards"].pop()
    write_sealed(path, manifest)
    with pytest.raises(UserError, match="lack rows of the data"):
        Signals.open(tmp_path / "store")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("", "is damaged"),
        ('{"schema": 99}', "is damaged"),
        ('{"schema": 3}', "written by an older version"),
    ],
)
def test_an_invalid_manifest_is_refused(store, tmp_path, content, message):
    (tmp_path / "store" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Signals.open(tmp_path / "store")
    write_sealed(tmp_path / "store" / "manifest.json", {"schema": 99})
    with pytest.raises(UserError, match="not a signal manifest"):
        Signals.open(tmp_path / "store")


def test_a_missing_store_names_the_command_that_extracts_one(tmp_path):
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
        ({"kinds": ()}, "kinds is empty"),
        ({"role": "parrot"}, "role must be 'teacher', .*, got 'parrot'"),
        ({"value_temperature": 0.0}, "value_temperature must be greater than 0"),
        ({"kinds": ("logprob_values",)}, "logprob_values at value_temperature 1 is 0 everywhere"),
        ({"kinds": ("topk",), "k": 0}, "k must be greater than 0 or 'vocab', got 0"),
        ({"kinds": ("topk",), "k": "all"}, "k must be .*, got 'all'"),
        ({"kinds": ("topk",), "p": 0.0}, "p must be greater than 0, got 0"),
        ({"kinds": ("topk",), "p": 1.5}, r"p must be less than or equal to 1, got 1\.5"),
        ({"responses": ()}, "responses must name columns of the data, each once, got none"),
        ({"responses": ("chosen", "chosen")}, "responses must name columns of the data, each once"),
        ({"responses": ("student_response",)}, r"no column 'student_response'.*prefdistill sample --column"),
    ],
)
def test_bad_requests(tmp_path, make_model, pairs, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_the_manifest_has_the_provenance(store, pairs):
    manifest = store.manifest
    assert manifest["data"]["fingerprint"] == data_fingerprint(pairs)
    assert (manifest["responses"], manifest["topk"]) == (["chosen", "rejected"], {})
    assert manifest["model"]["architecture"] == "LlamaForCausalLM"
    assert len(manifest["model"]["weights_sha256"]) == len(manifest["tokenizer"]["template_sha256"]) == 64
    assert manifest["model"]["dtype"] == "float32"
    assert {"torch", "transformers", "prefdistill"} <= manifest["versions"].keys()
    assert [shard["rows"] for shard in manifest["shards"]] == [10, 10, 4]


def test_datasets_can_read_the_store_as_parquet(store, tmp_path):
    from datasets import Dataset

    files = sorted(str(path) for path in (tmp_path / "store" / "shards").iterdir())
    table = Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))
    assert table["row"][:] == list(range(24))
    np.testing.assert_array_equal(table[2]["chosen_values"], store.row(2)["chosen"]["values"])
    shutil.rmtree(tmp_path / "cache")


# -- kinds -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def padded_model(make_model, tokenizer):
    """A head with 7 rows more than the tokenizer has ids, whose logits are the largest of all."""
    model = make_model(5)
    model.resize_token_embeddings(len(tokenizer) + 7, mean_resizing=False)
    model.lm_head.weight.data[-7:] = 4 * model.lm_head.weight.data[:7]
    model.lm_head.weight.data *= 4
    return model


@pytest.fixture
def sharp_model(make_model):
    """Sure of itself in some states and not in others."""
    model = make_model(5)
    model.lm_head.weight.data *= 6
    return model


@pytest.mark.parametrize(
    ("ask", "widest"), [({"k": 5}, 5), ({"k": 9, "p": 0.7}, 9), ({"k": "vocab"}, None), ({"k": 10_000}, None)]
)
def test_distributions_equal_a_naive_forward(extract, padded_model, pairs, tokenizer, ask, widest):
    """The likeliest tokens of each state in order, all the mass besides; padded rows of the head are no tokens."""
    store = extract(padded_model, "topk", **ask, **EXACT)
    size = len(tokenizer)
    widest = widest or size
    assert store.manifest["topk"] == {"k": ask["k"], "p": ask.get("p"), "vocabulary": size, "coding": "float32"}
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    widths = set()
    for i in (0, 7, 12, 23):
        for side in ("chosen", "rejected"):
            found = store.row(i)[side]
            states = naive_logits(padded_model, encoded[i], side)[:-1, :size].log_softmax(-1).numpy()
            assert found["tokens"] == len(states) == len(found["topk_counts"]) == len(found["topk_rest"])
            ends = np.cumsum(found["topk_counts"])
            assert ends[-1] == len(found["topk_ids"]) == len(found["topk_logps"])
            parts = zip(np.split(found["topk_ids"], ends), np.split(found["topk_logps"], ends), strict=True)
            for logps, (ids, ours), rest in zip(states, parts, [*found["topk_rest"], None], strict=False):
                order = np.argsort(-logps)
                held = np.exp(logps[order]).cumsum()
                width = widest if "p" not in ask else min(widest, 1 + int((held < ask["p"]).sum()))
                widths.add(width)
                assert len({*ids.tolist()}) == width
                np.testing.assert_allclose(logps[ids], logps[order[:width]], atol=1e-5)  # the order, but for ties
                np.testing.assert_allclose(ours, logps[ids], atol=1e-4)
                left = np.exp(logps[order[width:]]).sum()
                assert np.exp(rest) == pytest.approx(left, abs=1e-5)
                assert (rest == -np.inf) == (width == size)
    assert widths == {widest} if "p" not in ask else len(widths) > 3  # a nucleus is as wide as it has to be


def test_distributions_of_some_rows_are_in_state_order(extract, sharp_model):
    store = extract(sharp_model, "topk", k=6, p=0.6)
    rows = np.array([5, 0, 17])
    found = store.topk("rejected", rows)
    alone = [store.row(i)["rejected"] for i in (5, 0, 17)]
    counts = np.concatenate([row["topk_counts"] for row in alone])
    assert found.ids.shape == found.logps.shape == (len(counts), counts.max())
    assert 1 == counts.min() < counts.max() < 6  # as wide as the widest of these states
    assert ((found.ids >= 0).sum(1) == counts).all()
    assert (np.isneginf(found.logps) == (found.ids < 0)).all()
    for name in ("ids", "logps"):
        kept = getattr(found, name)[found.ids >= 0]  # filled up at the end of a state, so in the order of the store
        np.testing.assert_array_equal(kept, np.concatenate([row[f"topk_{name}"] for row in alone]))
    np.testing.assert_array_equal(found.rest, np.concatenate([row["topk_rest"] for row in alone]))
    assert (found.ids.dtype, found.logps.dtype, found.rest.dtype) == (np.int64, np.float32, np.float32)


def test_raw_logits_and_values_of_log_probabilities_equal_a_naive_forward(extract, padded_model, pairs, tokenizer):
    store = extract(padded_model, "q", "logprob_values", value_temperature=2.0)
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    for i in range(24):
        for side in ("chosen", "rejected"):
            logits, found = naive_logits(padded_model, encoded[i], side)[:, : len(tokenizer)], store.row(i)[side]
            taken = sum(float(logits[t, a]) for t, a in enumerate(encoded[i][f"{side}_ids"]))
            assert found["q"] == pytest.approx(taken, abs=1e-3)
            renyi = 2.0 * logits.softmax(-1).sqrt().sum(-1).log()
            np.testing.assert_allclose(found["logprob_values"], renyi, atol=1e-4)
    assert store.row(3)["chosen"]["logprob_values"][0] == store.row(3)["rejected"]["logprob_values"][0]


def test_padded_rows_of_the_head_have_no_part_in_the_value_and_its_gauge(extract, padded_model, pairs, tokenizer):
    store, size = extract(padded_model, "values"), len(tokenizer)
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    directions = gauge_directions(size).double()
    for i in (0, 12):
        for side in ("chosen", "rejected"):
            logits, found = naive_logits(padded_model, encoded[i], side)[:, :size], store.row(i)[side]
            np.testing.assert_allclose(found["values"], torch.logsumexp(logits, -1), atol=1e-4)
            np.testing.assert_allclose(found["gauge"], logits[-2] @ directions, atol=1e-3)


def test_kinds_extracted_together_equal_kinds_extracted_alone(extract, make_model):
    """The values look at one state more than the rest."""
    kinds = ("topk", "q", "values", "logps", "logprob_values")
    warm, kept = {"value_temperature": 0.5}, {"k": 4, "p": 0.9, **EXACT}
    together = extract(make_model(5), *kinds, **warm, **kept)
    alone = [extract(make_model(5), kind, **warm, **(kept if kind == "topk" else {})) for kind in kinds]
    rows = together.rows
    assert {*together.columns} == set().union(*(store.columns for store in alone))
    for row in rows:
        for side, found in together.row(row).items():
            expected = {name: part for store in alone for name, part in store.row(row)[side].items()}
            assert found.keys() == expected.keys()
            for name, part in found.items():
                np.testing.assert_allclose(part, expected[name], atol=1e-5, err_msg=name)


# -- at the ids of another store ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("topk",), ("topk", "values")])
def test_a_reference_is_scored_at_the_ids_of_the_teacher(extract, make_model, sharp_model, pairs, tokenizer, kinds):
    teacher = extract(sharp_model, "topk", k=6, p=0.8, **EXACT)
    reference = extract(make_model(0), *kinds, role="teacher_reference", ids_from=teacher)
    made = {"ids_from": teacher.digest, "vocabulary": len(tokenizer), "coding": "float32"}
    assert reference.manifest["topk"] == made
    assert "chosen_topk_ids" not in reference.columns
    both = SignalSet.of([teacher, reference], pairs)
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    at = both.at(np.array([3, 0, 20]))
    theirs, ours = at.topk("teacher", "rejected"), at.topk("teacher_reference", "rejected")
    assert len({*(ours.ids >= 0).sum(1).tolist()}) > 2
    np.testing.assert_array_equal(theirs.ids, ours.ids)
    states = torch.cat([naive_logits(make_model(0), encoded[i], "rejected")[:-1] for i in (3, 0, 20)]).softmax(-1)
    assert len(states) == len(ours.ids)
    for chance, ids, logps, rest in zip(states.numpy(), ours.ids, ours.logps, ours.rest, strict=True):
        named = ids[ids >= 0]
        np.testing.assert_allclose(logps[: len(named)], np.log(chance[named]), atol=1e-4)
        assert np.isneginf(logps[len(named) :]).all()
        assert np.exp(rest) == pytest.approx(1 - chance[named].sum(), abs=1e-5)


def test_a_model_scored_at_its_own_ids_gives_the_same_numbers(extract, sharp_model, pairs):
    """To the last bit: teachers that agree have no advantage at all."""
    teacher = extract(sharp_model, "topk", k=6, p=0.8, **EXACT)
    again = extract(sharp_model, "topk", role="reference", ids_from=teacher)
    found = SignalSet.of([teacher, again], pairs)
    a, b = (found.topk(role, "chosen") for role in ("teacher", "reference"))
    for name in ("ids", "logps", "rest"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_ids_that_do_not_fit_are_refused(extract, make_model, pairs, sampled, tokenizer):
    teacher = extract(make_model(5), "topk", k=6)

    def at(store, **options):
        with pytest.raises(UserError) as refusal:
            extract(make_model(0), "topk", **({"role": "reference", "ids_from": store} | options))
        return str(refusal.value)

    assert "has no teacher.topk of chosen, rejected; extract it with --kind topk" in at(extract(make_model(5), "logps"))
    assert "the teacher signals were made from other data" in at(teacher, data=pairs.select(range(20)))
    assert "this has 24 too, in another order" in at(teacher, data=pairs.select(range(23, -1, -1)))
    half = extract(make_model(5), "topk", responses=("rejected",))
    assert "has no teacher.topk of chosen; extract" in at(half)
    assert "another truncation" in at(teacher, truncation=Truncation(max_length=30))
    assert "a teacher cannot be scored at the ids of a teacher" in at(teacher, role="teacher")
    own = extract(make_model(0), "topk", role="reference", k=6)
    assert "a teacher_reference cannot be scored at the ids of a reference" in at(own, role="teacher_reference")
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|assistant|>", "<|assistant|>:")
    with pytest.raises(UserError, match=r"made with another tokenizer .*template_sha256"):
        extract_signals(make_model(0), pairs, other, ("topk",), "nowhere", role="reference", ids_from=teacher)


# -- responses that were sampled ---------------------------------------------------------------------------------------


def test_a_sampled_response_that_was_cut_has_no_end_token(extract, make_model, sampled, tokenizer):
    model = make_model(5)
    store = extract(model, "values", "logps", "topk", data=sampled, responses=("student_response",), k=3)
    assert store.responses == ("student_response",)
    assert store.manifest["data"]["fingerprint"] == data_fingerprint(sampled, ("student_response",))
    encoded, _ = encode_pairs(sampled, tokenizer, Truncation(), responses=("student_response",))
    directions = gauge_directions(len(tokenizer)).double()
    for i in range(24):
        text = sampled[i]["student_response"][0]["content"]
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ended = i % 3 != 0
        found = store.row(i)["student_response"]
        assert encoded[i]["student_response_ids"] == tokens + [tokenizer.eos_token_id] * ended
        assert (found["ended"], found["tokens"]) == (ended, len(tokens) + ended)
        assert len(found["values"]) == found["tokens"] + 1
        assert len(found["topk_rest"]) == found["tokens"]
        values, logp = naive(model, encoded[i], "student_response")
        np.testing.assert_allclose(found["values"], values, atol=1e-4)
        assert found["logps"] == pytest.approx(logp, abs=1e-3)
        last = naive_logits(model, encoded[i], "student_response")[len(tokens)]  # after the text, ended or not
        np.testing.assert_allclose(found["gauge"], last @ directions, atol=1e-3)


def test_whether_a_response_has_ended_is_part_of_the_data(extract, make_model, sampled):
    store = extract(make_model(), "logps", data=sampled, responses=("student_response",))
    other = sampled.remove_columns("student_response_ended").add_column("student_response_ended", [True] * 24)
    assert SignalSet.of([store], sampled).rows.tolist() == list(range(24))
    for changed in (other, sampled.remove_columns("student_response_ended")):
        with pytest.raises(UserError, match=r"made from other data .*student_response"):
            SignalSet.of([store], changed)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_distributions_that_are_not_finite_are_refused(extract, make_model, damage):
    """-inf is a fair answer for the mass of no other token, and for nothing else."""
    model = make_model()
    model.lm_head.weight.data[7] = damage
    with pytest.raises(UserError, match="not finite in 24 pairs, the first is row 0"):
        extract(model, "topk", k="vocab")


# -- several stores ----------------------------------------------------------------------------------------------------


def test_a_set_of_signals_is_of_one_data_set_one_truncation_one_role_each(store, extract, make_model, pairs, sampled):
    ask = {"role": "reference"}
    reference = extract(make_model(1), "logps", **ask)
    both = SignalSet.of([store, reference], pairs)
    needs = [Need("teacher", "values"), Need("reference", "logps"), Need("data", "score_chosen", ())]
    assert both.missing(needs) == []
    assert both.stores == (store, reference)
    assert both.store("reference", "logps", "chosen") is reference
    lacking = [Need("reference", "values"), Need("teacher_reference", "logps"), Need("data", "stars", ())]
    assert both.missing(lacking) == lacking
    with pytest.raises(UserError, match=r"no store holds reference\.values of chosen"):
        both.scalar("reference", "values", "chosen")
    with pytest.raises(UserError, match=r"two signal stores have teacher\.(values|logps) of chosen; give one of each"):
        SignalSet.of([store, store], pairs)
    with pytest.raises(UserError, match="teacher signals were made from other data"):
        SignalSet.of([store], pairs.select(range(20)))
    with pytest.raises(UserError, match=r"teacher signals were made from other data .*chosen, rejected; this has 24"):
        SignalSet.of([store], sampled)
    short = extract(make_model(1), "logps", truncation=Truncation(max_length=30), **ask)
    with pytest.raises(
        UserError,
        match=r"the reference signals \(.*extracted-.*\) differ in truncation\.max_length \(1024, 30\); extract one",
    ):
        SignalSet.of([store, short], pairs)


def test_stores_of_one_role_with_different_kinds_join(extract, make_model, pairs, sampled):
    """Other kinds, or other responses; what is missing is named with the responses that lack it."""
    rows = pairs.add_column("student_response", sampled["student_response"][:])
    chosen = extract(make_model(5), "logps", responses=("chosen",))
    values = extract(make_model(5), "values")
    own = extract(make_model(5), "logps", "topk", data=rows, responses=("student_response",))
    found = SignalSet.of([chosen, values, own], rows)
    assert found.missing([Need("teacher", "values"), Need("teacher", "logps", ("chosen", "student_response"))]) == []
    missing = found.missing([Need("teacher", "logps", ("chosen", "rejected", "student_response"))])
    assert list(map(str, missing)) == ["teacher.logps of rejected"]
    assert list(map(str, found.missing([Need("teacher", "topk")]))) == ["teacher.topk of chosen, rejected"]
    assert found.scalar("teacher", "logps", "student_response").tolist() == [
        own.row(i)["student_response"]["logps"] for i in range(24)
    ]
    assert found.scalar("teacher", "values", "chosen", "tokens").tolist() == [
        chosen.row(i)["chosen"]["tokens"] for i in range(24)
    ]
    with pytest.raises(UserError, match=r"two signal stores have teacher\.logps of chosen"):
        SignalSet.of([chosen, extract(make_model(5), "logps", "q")], pairs)


def test_rows_are_those_that_all_stores_have(extract, make_model, pairs):
    rows = [dict(row) for row in pairs]
    rows[4]["rejected"] = [{"role": "assistant", "content": ""}]
    rows[9]["chosen"] = [{"role": "assistant", "content": ""}]
    data = Dataset.from_list(rows)
    cut = {"truncation": Truncation(max_length=12)}  # no room for the longest prompts
    chosen = extract(make_model(), "logps", data=data, responses=("chosen",), **cut)
    rejected = extract(make_model(), "logps", data=data, responses=("rejected",), **cut)
    found = SignalSet.of([chosen, rejected], data)
    assert found.rows.tolist() == sorted(set(chosen.rows.tolist()) & set(rejected.rows.tolist()))
    assert 0 < len(found.rows) < 24
    some = found.at(found.rows[[2, 0]])
    assert some.scalar("teacher", "logps", "chosen").tolist() == [
        chosen.row(int(i))["chosen"]["logps"] for i in found.rows[[2, 0]]
    ]
    assert some.column("score_chosen").tolist() == [data[int(i)]["score_chosen"] for i in found.rows[[2, 0]]]


def test_a_store_at_other_ids_than_the_teachers_is_refused(extract, make_model, pairs):
    """Numbers of different tokens would be taken for numbers of the same ones."""
    teacher, other = extract(make_model(5), "topk", k=6), extract(make_model(6), "topk", k=6)
    message = (
        "the reference signals were not scored at the token ids of this teacher store: extract them again with `--ids"
    )
    for wrong in (
        extract(make_model(), "topk", role="reference", ids_from=other),
        extract(make_model(), "topk", role="reference", k=6),
    ):
        for order in ([teacher, wrong], [wrong, teacher]):
            with pytest.raises(UserError, match=message):
                SignalSet.of(order, pairs)
        assert SignalSet.of([wrong], pairs).rows.tolist() == list(range(24))  # alone it says nothing wrong


# -- the gauge of the value --------------------------------------------------------------------------------------------


def shifted(model, direction):
    """The same policy: u.h(s) added to all logits of a state, u being a combination of the head's rows."""
    moved = copy.deepcopy(model)
    u = gauge_directions(len(model.lm_head.weight))[:, direction] @ model.lm_head.weight.data
    moved.lm_head.weight.data += u
    return moved, u.double()


def test_logit_offsets_change_the_values_as_stored_and_nothing_else(extract, make_model, pairs, tokenizer):
    model = make_model(5)
    moved, u = shifted(model, 2)
    before, after = (extract(m, "values", "logps", "topk", k=5) for m in (model, moved))
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation())
    for i in (0, 7, 23):
        for side in ("chosen", "rejected"):
            a, b = before.row(i)[side], after.row(i)[side]
            assert b["logps"] == pytest.approx(a["logps"], abs=1e-3)
            np.testing.assert_array_equal(b["topk_ids"], a["topk_ids"])
            np.testing.assert_allclose(b["topk_logps"], a["topk_logps"], atol=1e-4)
            np.testing.assert_allclose(b["topk_rest"], a["topk_rest"], atol=1e-4)
            prompt, tokens = encoded[i]["prompt_ids"], encoded[i][f"{side}_ids"]
            with torch.no_grad():
                hidden = model.model(torch.tensor([prompt + tokens])).last_hidden_state[0, len(prompt) - 1 :].double()
            np.testing.assert_allclose(b["values"] - a["values"], hidden @ u, atol=1e-4)
            assert np.abs(hidden @ u).max() > 0.1  # a shift worth the name
            assert a["gauge"].shape == (DIRECTIONS,)
            assert a["gauge"][2] == pytest.approx(b["values"][-2] - a["values"][-2], abs=1e-4)


def test_a_float32_teacher_under_autocast(extract, make_model):
    """The products are 16-bit, what is summed over the vocabulary is not."""
    exact, cast = (extract(make_model(5), "values", "logps", bf16=bf16) for bf16 in (False, True))
    for row in (0, 12):
        a, b = (store.row(row)["chosen"] for store in (exact, cast))
        np.testing.assert_allclose(a["values"], b["values"], atol=0.1)
        np.testing.assert_allclose(a["gauge"], b["gauge"], atol=0.2)
        assert b["gauge"].dtype == np.float32
    assert cast.manifest["model"]["bf16"] is True


def test_gauge_directions_are_as_long_as_a_row_of_the_head(make_model):
    model = make_model(5)
    rows = model.lm_head.weight.data.norm(dim=1).mean()
    lengths = [float(shifted(model, j)[1].norm() / rows) for j in range(DIRECTIONS)]
    assert all(0.5 < length < 2 for length in lengths)
    assert torch.equal(gauge_directions(50), gauge_directions(50))


def test_gauge_flips_count_pairs_whose_order_changes(extract, make_model, pairs):
    """Every direction for real: a model with that gauge, its signals, the order of the pairs by its shaping return."""
    model = make_model(5)
    original = extract(model, "values", "logps")
    before = pair_terms(SignalSet.of([original], pairs))["shaping return"]
    turned = []
    for j in range(DIRECTIONS):
        moved = extract(shifted(model, j)[0], "values", "logps")
        turned.append(np.mean(pair_terms(SignalSet.of([moved], pairs))["shaping return"] != before))
    assert gauge_flips(original) == pytest.approx(mean_and_error(turned))
    assert 0.1 < np.mean(turned) < 0.9


def test_a_shard_holds_no_more_numbers_than_fit_into_memory(tmp_path, make_model, pairs, tokenizer, monkeypatch):
    """With many ids a state, shards are of fewer rows; what is in them stays the same, and so does resuming."""

    cut = {"truncation": Truncation(max_length=40)}
    whole = extract_signals(make_model(), pairs, tokenizer, ("topk",), tmp_path / "whole", k=9, **cut)
    monkeypatch.setattr(request, "SHARD_NUMBERS", 2_500)
    small = extract_signals(make_model(), pairs, tokenizer, ("topk",), tmp_path / "small", k=9, **cut)
    assert [shard["rows"] for shard in whole.manifest["shards"]] == [24]
    # 40 tokens of two responses at most, 9 ids and the rest for each
    assert [shard["rows"] for shard in small.manifest["shards"]] == [3] * 8
    for row in whole.rows:
        np.testing.assert_array_equal(whole.row(row)["rejected"]["topk_ids"], small.row(row)["rejected"]["topk_ids"])


def test_ids_of_a_store_that_lacks_rows_are_refused_before_the_pass(tmp_path, make_model, pairs, tokenizer):
    empty = [{"role": "assistant", "content": ""}]
    rows = [
        {**row, "student_response": row["chosen"], "teacher_response": empty if i == 2 else row["chosen"],
         "teacher_response_ended": i != 2}
        for i, row in enumerate(pairs)
    ]  # fmt: skip
    from datasets import Dataset

    data, both = Dataset.from_list(rows), ("teacher_response", "student_response")
    ids = extract_signals(make_model(5), data, tokenizer, ("topk",), tmp_path / "ids", responses=both)
    assert 2 not in ids.rows
    ask = {"kinds": ("topk",), "role": "teacher_reference", "ids_from": ids}
    with pytest.raises(UserError, match=r"has no row 2 .*score --responses teacher_response,student_response, as that"):
        extract_signals(make_model(), data, tokenizer, out=tmp_path / "s", responses=("student_response",), **ask)
    assert not (tmp_path / "s").exists()
    made = extract_signals(make_model(), data, tokenizer, out=tmp_path / "s", responses=both, **ask)
    assert made.rows.tolist() == ids.rows.tolist()


def test_a_score_that_is_missing_is_named(pairs):
    from datasets import Dataset

    rows = [{**row, "score_chosen": None if i == 3 else row["score_chosen"]} for i, row in enumerate(pairs)]
    signals = SignalSet.of([], Dataset.from_list(rows))
    assert len(signals.column("score_rejected")) == len(pairs)
    with pytest.raises(UserError, match="column 'score_chosen' has no number in row 3"):
        signals.column("score_chosen")


# -- how signals are stored --------------------------------------------------------------------------------------------


def test_packed_distributions_are_the_exact_ones_within_the_error_that_the_manifest_states(
    extract, make_model, sharp_model, pairs
):
    """Ids and their order stay; a reference at another store's ids too; nucleus-sized distributions as well."""
    for ask in ({"k": 9}, {"k": 9, "p": 0.7}):
        exact, packed = extract(sharp_model, "topk", **ask, **EXACT), extract(sharp_model, "topk", **ask)
        read = [extract(make_model(), "topk", role="teacher_reference", ids_from=store) for store in (exact, packed)]
        assert packed.manifest["topk"]["coding"] == read[1].manifest["topk"]["coding"] == "packed"
        for one, other in ((exact, packed), tuple(read)):
            divergences = []
            for row in one.rows:
                for side in ("chosen", "rejected"):
                    a, b = one.row(row)[side], other.row(row)[side]
                    assert a.keys() == b.keys()
                    np.testing.assert_array_equal(a["topk_counts"], b["topk_counts"])
                    if "topk_ids" in a:
                        np.testing.assert_array_equal(a["topk_ids"], b["topk_ids"])
                    np.testing.assert_allclose(a["topk_logps"], b["topk_logps"], atol=0.2)
                    terms = np.exp(a["topk_logps"]) * (a["topk_logps"].astype(np.float64) - b["topk_logps"])
                    rest = np.exp(a["topk_rest"]) * (a["topk_rest"].astype(np.float64) - b["topk_rest"])
                    starts = np.cumsum(a["topk_counts"]) - a["topk_counts"]
                    divergences += (np.add.reduceat(terms, starts) + rest).tolist()
            stated = other.manifest["topk"]["kl_error"]
            assert stated["states"] == len(divergences)
            assert stated["mean"] == pytest.approx(np.mean(divergences), abs=2e-7)
            assert stated["max"] == pytest.approx(np.max(divergences), abs=2e-6)
            assert 0 < stated["mean"] < 1e-3
            assert "kl_error" not in one.manifest["topk"]
    together = SignalSet.of([packed, read[1]], pairs).at(np.array([3, 0, 20]))
    np.testing.assert_array_equal(
        together.topk("teacher", "chosen").ids, together.topk("teacher_reference", "chosen").ids
    )


def test_endpoints_are_what_tvkd_needs_and_no_more_than_16_bytes_a_pair(extract, make_model, pairs):
    from prefdistill.signals.shaping import shaping_returns

    cut = {"truncation": Truncation(max_length=26)}  # some responses have no end
    whole, ends = (
        extract(make_model(5), "values", **cut),
        extract(make_model(5), "values", positions="endpoints", **cut),
    )
    both = [SignalSet.of([store], pairs) for store in (whole, ends)]
    assert not whole.scalar("chosen_ended", whole.rows).all()
    for side in ("chosen", "rejected"):
        for terminal in ("last", "zero"):
            a, b = (shaping_returns(s, side, discount=1.0, terminal=terminal) for s in both)
            np.testing.assert_allclose(a, b, atol=1e-5)
        for asked in ({"discount": 0.9, "terminal": "last"}, {"discount": 1.0, "terminal": "bootstrap"}):
            with pytest.raises(UserError, match=r"endpoints in these signals: .*--positions all"):
                shaping_returns(both[1], side, **asked)
    row = ends.row(3)
    assert (
        row["chosen"]["start_value"]
        == row["rejected"]["start_value"]
        == pytest.approx(whole.row(3)["chosen"]["values"][0])
    )
    assert set(row["chosen"]) == {"tokens", "ended", "start_value", "end_value"}


def test_only_two_states_of_a_response_are_projected_for_its_endpoints(tmp_path, make_model, pairs, tokenizer):
    model, rows = make_model(), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[-2]))
    extract_signals(model, pairs, tokenizer, ("values",), tmp_path / "ends", positions="endpoints")
    assert sum(rows) == 2 * 2 * len(pairs)


def test_values_in_16_bits(extract, make_model, pairs):
    exact, half = extract(make_model(5), "values"), extract(make_model(5), "values", value_dtype="float16")
    for row in exact.rows:
        a, b = exact.row(row)["chosen"]["values"], half.row(row)["chosen"]["values"]
        assert (a.dtype, b.dtype) == (np.float32, np.float16)
        np.testing.assert_allclose(a, b, rtol=2**-11)
    loud = make_model(5)
    loud.lm_head.weight.data *= 1e5
    with pytest.raises(UserError, match="a value of row 0 is too large for float16; store values as float32"):
        extract(loud, "values", value_dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "ends"}, "positions must be 'all' or 'endpoints', got 'ends'"),
        ({"positions": "endpoints"}, "positions=endpoints stores values alone, not logps"),
        ({"kinds": ("topk",), "positions": "endpoints"}, "positions=endpoints stores values alone, not topk"),
        ({"value_dtype": "int8"}, "value_dtype must be 'float32' or 'float16', got 'int8'"),
        ({"kinds": ("logps",), "value_dtype": "float16"}, "value_dtype applies to values of all states; leave it out"),
        ({"kinds": ("topk",), "topk_coding": "zip"}, "topk_coding must be 'packed' or 'float32', got 'zip'"),
        ({"topk_coding": "packed"}, "topk_coding applies to the kind topk"),
        ({"quantization": "4bit"}, "quantization applies to a model that is loaded by name"),
        ({"quantization": "4bit", "role": "reference"}, "a reference is scored as the student is trained"),
    ],
)
def test_bad_requests_of_storage(tmp_path, make_model, pairs, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_nothing_is_left_if_every_pair_is_dropped(tmp_path, make_model, pairs, tokenizer):
    with pytest.raises(UserError, match="No row is left: dropped 24 rows"):
        extract_signals(
            make_model(), pairs, tokenizer, out=tmp_path / "s", truncation=Truncation(max_length=3), shard_rows=5
        )
    assert not (tmp_path / "s").exists()


def test_a_shard_whose_rows_are_all_dropped(tmp_path, make_model, pairs, tokenizer):
    rows = [dict(row) for row in pairs]
    for row in rows[5:10]:
        row["prompt"] = [{"role": "user", "content": "long " * 60}]
    ask = {"truncation": Truncation(max_length=48), "shard_rows": 5, "kinds": ("values", "topk"), "k": 4}
    store = extract_signals(make_model(), Dataset.from_list(rows), tokenizer, out=tmp_path / "s", **ask)
    assert store.rows.tolist() == [*range(5), *range(10, 24)]
    assert store.manifest["dropped"]["rows"] == [5, 6, 7, 8, 9]
    assert [shard["rows"] for shard in store.manifest["shards"]] == [5, 0, 5, 5, 4]
    assert store.topk("chosen", np.array([12, 2])).ids.shape[1] == 4


def test_the_documented_code_reads_a_store(tmp_path, make_model, pairs, tokenizer, monkeypatch):
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "signals.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    store = extract_signals(make_model(), pairs, tokenizer, ("topk",), "signals/teacher", k=7, p=0.9)
    found = {}
    exec(code, found)
    expected = [store.row(row)["chosen"] for row in range(24)]
    for name in ("ids", "logps", "rest"):
        np.testing.assert_array_equal(found[name], np.concatenate([row[f"topk_{name}"] for row in expected]))


def test_50_of_128256_tokens_take_at_most_128_bytes_on_the_disk(tmp_path):
    """All columns of a shard but the texts' offsets and lengths, with ids that nothing compresses."""
    from prefdistill.data.spans import Spans
    from prefdistill.signals.ids import Ids
    from prefdistill.signals.kinds import Settings, make_kinds
    from prefdistill.signals.request import shard_columns
    from prefdistill.signals.shards import Shard, write_shard

    rng = np.random.default_rng(0)
    found, states = (
        {"chosen_topk_ids": [], "chosen_topk_logps": [], "chosen_topk_rest": [], "chosen_topk_counts": []},
        0,
    )
    for tokens in rng.integers(50, 400, size=24):
        logps = torch.from_numpy(rng.normal(0, 3, (tokens, 20_000))).log_softmax(-1)
        top = logps.topk(50).values.numpy().astype(np.float32)
        found["chosen_topk_ids"].append(np.concatenate([rng.choice(128_256, 50, replace=False) for _ in top]))
        found["chosen_topk_logps"].append(top.ravel())
        found["chosen_topk_rest"].append(np.log1p(-np.exp(top.astype(np.float64)).sum(1)).astype(np.float32))
        found["chosen_topk_counts"].append(np.full(tokens, 50, np.int32))
        states += tokens
    rows = {"chosen_ended": [True] * 24, "chosen_offsets": [[1]] * 24}
    ones = np.ones(24, dtype=np.uint32)
    ids = Ids(np.arange(24), {"chosen": ones}, {"chosen": ones}, "")
    settings = Settings(topk={"k": 50, "vocabulary": 128_256, "coding": "packed", "id_bits": 17})
    spans = {"chosen": Spans(np.zeros(24, np.int32), np.ones(24, np.int32))}
    columns, errors = shard_columns(rows, ids, spans, found, make_kinds(["topk"], settings))
    write_shard(tmp_path / "s.parquet", columns, {"kept": 24})
    assert (tmp_path / "s.parquet").stat().st_size / states <= 128
    assert np.mean(errors) < 1e-3
    assert Shard(tmp_path / "s.parquet").notes == {"kept": 24}


def test_a_second_extraction_is_refused_before_it_loads_anything(tmp_path):
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another prefdistill run is working in"):
        extract_signals("no/such/model", "no-such-file.jsonl", out=tmp_path / "out")
