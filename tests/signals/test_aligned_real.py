"""Real teachers of SmolLM2: Gemma, with other tokens and no chat template, and SmolLM2 with its tokens renamed.

PREFDISTILL_MODELS names the directory that holds `smollm2-135m` and `gemma3-270m`.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from prefdistill import LiveTeacher, extract_signals, load_pairs
from prefdistill.data.columns import SIDES
from prefdistill.models.form import apply_form
from prefdistill.models.load import load_model, load_tokenizer
from prefdistill.models.options import Form
from prefdistill.signals.join import join
from prefdistill.signals.shaping import shaping_returns
from support.permuted import permuted, with_ids

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path():
    root = os.environ.get("PREFDISTILL_MODELS")

    def path(name):
        if root is None or not (Path(root) / name).is_dir():
            pytest.skip(f"no model {name} (set PREFDISTILL_MODELS to the directory that holds it)")
        return str(Path(root) / name)

    return path


@pytest.fixture(scope="module")
def pairs(data_dir):
    """The shortest real pairs of eight prompts."""
    data = load_pairs(str(data_dir / "alpacaeval_pairs" / "test.jsonl.gz")).select_columns(["prompt", *SIDES])
    lengths = [sum(len(message["content"]) for part in row.values() for message in part) for row in data]
    shortest = {data[int(row)]["prompt"][-1]["content"]: int(row) for row in np.argsort(lengths)[:200][::-1]}
    return data.select([*shortest.values()][-8:])


@torch.no_grad()
def naive(model, tokenizer, row, side):
    """V before and after the text, and its log-prob, from one full pass over the rendered conversation."""
    prompt, text = row["prompt"], row[side][0]["content"]
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    before = tokenizer(start, add_special_tokens=False)["input_ids"]
    after = tokenizer(start + text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    assert after[: len(before)] == before
    known = torch.tensor(sorted(tokenizer.get_vocab().values()))
    logits = model(input_ids=torch.tensor([after])).logits[0, len(before) - 1 : -1].double()
    values, tokens = logits[:, known].logsumexp(-1), torch.tensor(after[len(before) :])
    logps = logits.gather(-1, tokens[:, None])[:, 0] - values
    return values[0].item(), values[-1].item(), logps.sum().item()


def test_gemma_teaches_smollm2(model_path, pairs, tmp_path):
    """Stored values of the two ends and log-probs are those of a full forward pass, within 1e-5 of their size."""
    reader = apply_form(load_tokenizer(model_path("gemma3-270m")), Form(chat_template="plain"))
    gemma, student = load_model(model_path("gemma3-270m"), dtype="float32"), load_tokenizer(model_path("smollm2-135m"))
    store = extract_signals(gemma, pairs, reader, ("values",), tmp_path / "values", positions="endpoints")
    of_texts = extract_signals(gemma, pairs, reader, ("logps",), tmp_path / "logps")
    result = join([store, of_texts], pairs, student, responses=SIDES)
    assert len(result.encoded) >= 7
    for side in SIDES:
        returns = shaping_returns(result.signals, side, discount=1.0, terminal="last")
        logps = result.signals.scalar("teacher", "logps", side)
        for row, got, logp in zip(result.encoded["row"][:], returns, logps, strict=True):
            start, end, expected = naive(gemma, reader, pairs[row], side)
            stored = store.row(row)[side]
            assert (stored["start_value"], stored["end_value"]) == pytest.approx((start, end), rel=1e-5)
            assert got == pytest.approx(end - start, abs=1e-4)
            assert logp == pytest.approx(expected, rel=1e-5)


def test_smollm2_with_renamed_tokens_is_the_same_teacher(model_path, pairs):
    path = model_path("smollm2-135m")
    tokenizer, model = load_tokenizer(path), load_model(path, dtype="float32")
    renamed, order = permuted(tokenizer)
    stores = [
        LiveTeacher(one, "teacher", ("values", "logps", "token_logps"), dataset=pairs, tokenizer=reader).bind()
        for one, reader in ((model, tokenizer), (with_ids(model, order), renamed))
    ]
    assert [store.is_read_with(tokenizer) for store in stores] == [True, False]
    own, mapped = (join([store], pairs, tokenizer, responses=SIDES).signals for store in stores)
    assert mapped.rows.tolist() == own.rows.tolist()
    for side in SIDES:
        for terminal in ("last", "bootstrap", "zero"):
            returns = [shaping_returns(part, side, discount=1.0, terminal=terminal) for part in (mapped, own)]
            np.testing.assert_allclose(*returns, rtol=0, atol=1e-3)
        logps = [part.scalar("teacher", "logps", side) for part in (mapped, own)]
        np.testing.assert_allclose(*logps, rtol=1e-4)
