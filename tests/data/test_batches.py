"""Documents in rows: by hand, for any lengths, and through models, which must not see what a mask hides."""

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from prefdistill.data.batches import PADDED, PADDING, Document, Layout, PairCollator, layout_for, make_batch
from prefdistill.models.backbone import attention_of, model_inputs
from prefdistill.models.logprobs import reduce_logits

ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 9], "rejected_ids": [4], "margin": 1, "score_chosen": 0.5, "row": 7},
    {"prompt_ids": [5], "chosen_ids": [6, 7, 8, 9], "rejected_ids": [8, 8], "margin": 2, "score_chosen": -1, "row": 9},
]
FREE = Layout("masked", attention_cost=0.0)  # attention costs nothing: prompts are always shared


def test_padded_by_hand():
    batch = PairCollator(pad_token_id=0, features=("margin", "score_chosen"))(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 0], [1, 2, 4, 0, 0], [5, 6, 7, 8, 9], [5, 8, 8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["lengths"].tolist() == batch["sizes"] == [2, 4, 1, 2]  # chosen of both rows, rejected of both
    assert batch["states"].tolist() == [1, 2, 10, 11, 12, 13, 6, 15, 16]
    assert batch["tokens"].tolist() == [3, 9, 6, 7, 8, 9, 4, 8, 8]
    assert batch["features"] == {"margin": [1, 2], "score_chosen": [0.5, -1]}
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_one_response_and_no_features():
    batch = PairCollator(pad_token_id=-1, responses=("chosen",))(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, -1], [5, 6, 7, 8, 9]]
    assert batch["features"] == {}


def test_masked_by_hand():
    """Both responses share a prompt; each token sees the tokens that the mask allows."""
    batch = PairCollator(pad_token_id=0, layout=FREE)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 8, 8], [1, 2, 3, 9, 4, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 1, 2], [0, 1, 2, 3, 2, 0, 0]]
    assert batch["segments"].tolist() == [[0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, PADDING, PADDING]]
    assert batch["states"].tolist() == [8, 9, 0, 1, 2, 3, 8, 0, 5]  # both responses of a row start in the same state
    assert batch["tokens"].tolist() == [3, 9, 6, 7, 8, 9, 4, 8, 8]
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    visible = model_inputs(batch, model)["attention_mask"][1, 0]
    sees = ["".join("x" if bit else "." for bit in row) for row in visible.tolist()]
    assert sees == ["x......", "xx.....", "xxx....", "xxxx...", "xx..x..", ".....x.", ".....xx"]


def test_prompts_are_shared_if_that_costs_less():
    long_prompt, short_prompt = (Document([1] * n, [(0, [2] * 40), (1, [3] * 40)]) for n in (100, 2))
    layout = Layout("masked", attention_cost=0.01)
    # 180 + 0.01 * 180^2 = 504 against 2 * (140 + 0.01 * 140^2) = 672; 82 + 67 = 149 against 2 * (42 + 18) = 119
    assert layout.documents(long_prompt) == [long_prompt]
    assert len(layout.documents(short_prompt)) == 2
    assert len(PADDED.documents(long_prompt)) == 2


def test_short_documents_share_rows_with_long_ones():
    widths = [9, 4, 5, 3, 3, 3]
    documents = [Document([1], [(i, [2] * (width - 1))]) for i, width in enumerate(widths)]
    rows = [[document.width for document in row] for row in Layout("masked").rows(documents)]
    assert rows == [[9], [5, 4], [3, 3, 3]]
    assert [[document.width for document in row] for row in Layout("packed").rows(documents)] == [widths]
    assert len(PADDED.rows(documents)) == 6


texts = st.lists(st.integers(3, 90), min_size=1, max_size=9)
pairs_of_texts = st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=5)


@settings(deadline=None, max_examples=200)
@given(pairs_of_texts, st.sampled_from([PADDED, FREE, Layout("masked", 0.1), Layout("packed")]))
def test_states_of_every_response_are_indexed(pairs, layout):
    """In every layout, each state sees exactly the text before it, at the positions of that text."""
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
    batch = PairCollator(pad_token_id=0, layout=layout)(rows)
    ids, width = batch["input_ids"], batch["input_ids"].shape[1]
    expected = [(r["prompt_ids"], r[name]) for name in ("chosen_ids", "rejected_ids") for r in rows]
    assert batch["lengths"].tolist() == batch["sizes"] == [len(response) for _, response in expected]
    states = iter(zip(batch["states"].tolist(), batch["tokens"].tolist(), strict=True))
    for prompt, response in expected:
        for t, token in enumerate(response):
            at, chosen = next(states)
            assert chosen == token
            assert text_seen(batch, at // width, at % width) == [*prompt, *response[:t]]
    assert next(states, None) is None
    assert ids.numel() >= max(len(p) + len(r) for p, r in expected)


def text_seen(batch, row, at):
    """Return the tokens that a state sees, by the batch's masks and positions."""
    ids = batch["input_ids"][row].tolist()
    if "attention_mask" in batch:
        assert batch["attention_mask"][row, : at + 1].all()
        return ids[: at + 1]
    positions = batch["position_ids"][row].tolist()
    if "segments" not in batch:  # packed: back to where positions start anew
        first = max(i for i in range(at + 1) if positions[i] == 0)
        seen = list(range(first, at + 1))
    else:
        segments = batch["segments"][row].tolist()
        prompt = segments[at] // 1024 * 1024
        seen = [i for i in range(at + 1) if segments[i] in (segments[at], prompt)]
    assert [positions[i] for i in seen] == list(range(len(seen)))
    return [ids[i] for i in seen]


def test_the_endpoints_by_hand():
    documents = [[Document([1, 2], [(0, [3, 4, 5]), (1, [6])])]]
    batch = make_batch(documents, 0, states=lambda place, tokens: np.array([0, tokens - 1 + place]))
    assert batch["states"].tolist() == [1, 3, 1, 5]
    assert batch["tokens"].tolist() == [3, 5, 6, 0]
    assert batch["sizes"] == [2, 2]


# -- through models ----------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def random_rows(seed=0, n=5):
    generator = np.random.default_rng(seed)
    return [
        {name: generator.integers(3, 97, size=generator.integers(2, 12)).tolist()
         for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for _ in range(n)
    ]  # fmt: skip


def loud(config, attention=None, dtype=torch.float32):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_every_layout_gives_the_same_logits_and_gradients(attention, kind):
    model = loud(tf.LlamaConfig(**SMALL), attention)
    found = []
    for layout in (PADDED, Layout(kind, 0.0)):
        batch = PairCollator(pad_token_id=0, layout=layout)(random_rows())
        model.zero_grad()
        (logits,) = reduce_logits(model, batch, lambda logits: (logits,))
        logits.square().sum().backward()
        found.append((logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-2, rtol=1e-3)


def test_masks_work_in_autocast_and_half_precision():
    rows = random_rows()
    for attention in ("sdpa", "eager"):
        model = loud(tf.LlamaConfig(**SMALL), attention, torch.bfloat16)
        assert layout_for(model, 64).kind == "masked"
        batch = PairCollator(pad_token_id=0, layout=FREE)(rows)
        for part, cast in ((model, False), (loud(tf.LlamaConfig(**SMALL), attention), True)):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
                (logits,) = reduce_logits(part, batch, lambda logits: (logits,))
            assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("config", "longest", "kind"),
    [
        (tf.LlamaConfig(**SMALL), None, "masked"),
        (tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4), 64, "masked"),
        (tf.MistralConfig(**SMALL, num_key_value_heads=4, sliding_window=64), 64, "masked"),
        # an explicit mask would replace that of the window
        (tf.MistralConfig(**SMALL, num_key_value_heads=4, sliding_window=64), 65, "padded"),
        (tf.MistralConfig(**SMALL, num_key_value_heads=4, sliding_window=64), None, "padded"),
        # positions counted along the mask; recurrent states that ignore it
        (tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), 64, "padded"),
        (tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4), 64, "padded"),
    ],
)
def test_layout_for_each_kind_of_model(config, longest, kind):
    model = loud(config)
    assert layout_for(model, longest).kind == kind
    assert not model.training


def test_a_model_that_ignores_the_mask_gets_padded_rows():
    """A model may accept positions and masks and ignore them."""
    model = loud(tf.LlamaConfig(**SMALL))
    assert layout_for(model).kind == "masked"
    forward = model.model.forward
    model.model.forward = lambda **given: forward(**{**given, "position_ids": None})
    assert layout_for(model) == PADDED
    assert attention_of(model) == "sdpa"


def test_attention_cost_is_relative_to_the_rest_of_the_model():
    model = loud(tf.LlamaConfig(**SMALL, tie_word_embeddings=True))
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    # a pair of tokens: 4 FLOP per layer and channel, half as fast again; a token: 2 FLOP per weight
    assert layout_for(model).attention_cost == pytest.approx(1.5 * 4 * 2 * 32 / (2 * layers))
