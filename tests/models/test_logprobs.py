"""Log-probabilities and values against a naive forward with full logits, for model families with heads of their own."""

import functools
import math

import numpy as np
import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefdistill.data.batches import Document, make_batch
from prefdistill.losses import soft_value
from prefdistill.methods import Method
from prefdistill.models import logprobs
from prefdistill.models.logprobs import (
    emittable_ids,
    likeliest,
    log_normaliser,
    reduce_logits,
    sum_by_response,
    token_and_topk_logps,
    token_logps,
    top_of_blocks,
    topk_logps,
)
from prefdistill.training.student import read_student

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


@pytest.fixture(autouse=True)
def one_tile_is_kept(monkeypatch):
    """Of the tiles of 7 states that tests ask for: the others are made again in backward."""
    monkeypatch.setattr(logprobs, "STORED_ELEMENTS", 7 * 97)


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[request.param]).float().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def batch_of(prompts, lengths, ids, **options):
    """A padded batch of responses behind prompts of these lengths; what is behind them stays as it is in `ids`."""
    rows = [
        [Document(row[:prompt].tolist(), [(i, row[prompt : prompt + length].tolist())])]
        for i, (row, prompt, length) in enumerate(zip(ids, prompts, lengths, strict=True))
    ]
    made = make_batch(rows, pad_token_id=0, **options)
    assert made["input_ids"].shape == ids.shape
    return made | {"input_ids": ids, "prompt_lengths": torch.tensor(prompts)}


@pytest.fixture
def batch():
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(1))
    return batch_of([3, 4, 1, 2], [5, 8, 6, 1], ids)


class Reading(Method):
    """A method that reads these responses and nothing else."""

    def __init__(self, *responses, likeliest=False):
        self.read, self.best = responses or ("y",), likeliest

    responses = property(lambda self: self.read)
    reads_likeliest = property(lambda self: self.best)


def sequence_logps(model, batch, **options):
    return read_student(model, batch, Reading(), {}, **options).logps["y"]


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


def naive_answers(model, batch, ids):
    """What `read_student` is asked for, from full float64 log-probabilities: by row, and by state one after another."""
    logps, at_ids, rest, best, at_best = [], [], [], [], []
    for i, logits in enumerate(naive_logits(model, batch)):
        start, length = int(batch["prompt_lengths"][i]), int(batch["lengths"][i])
        full = logits.double().log_softmax(-1)[start - 1 : start + length - 1]
        logps.append(sum(full[t, batch["input_ids"][i, start + t]] for t in range(length)))
        for row, given in zip(full, ids[len(rest) : len(rest) + length].tolist(), strict=True):
            others = [a for a in range(len(row)) if a not in given]
            at_ids.append(torch.stack([row[a] if a >= 0 else row.new_tensor(-math.inf) for a in given]))
            rest.append(torch.logsumexp(row[others], 0) if others else row.new_tensor(-math.inf))
            best.append(row.argmax())
            at_best.append(row[best[-1]])
    return tuple(map(torch.stack, (logps, at_ids, rest, best, at_best)))


def weighted(logps, at_ids, rest, at_best):
    """One number in which every answer has a weight of its own; -inf has none."""
    total = 0.0
    for n, part in enumerate((logps, at_ids, rest, at_best)):
        part = part.double()
        weight = torch.randn(part.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        total = total + (weight * part.masked_fill(part == -math.inf, 0.0)).sum()
    return total


def gradients(model, number):
    model.zero_grad()
    number.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("tile", [None, 7])
def test_sequence_logps_and_gradient_equal_the_naive_forward(model, batch, tile):
    ours = gradients(model, sequence_logps(model, batch, tile=tile).sum())
    expected = naive_logps(model, batch)
    theirs = gradients(model, expected.sum())
    with torch.no_grad():
        torch.testing.assert_close(sequence_logps(model, batch, tile=tile).double(), expected, atol=1e-4, rtol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize("ids", ["few", "ragged", "all"])
def test_what_a_student_is_asked_and_its_gradient_equal_the_naive_forward(model, batch, ids, tile):
    """Log-probabilities of the tokens, at given ids, of the rest, and of the likeliest token, all in one pass."""
    generator = torch.Generator().manual_seed(4)
    order = torch.stack([torch.randperm(97, generator=generator) for _ in range(20)])  # 5 + 8 + 6 + 1 states
    given = {"few": order[:, :5], "ragged": order[:, :9].clone(), "all": order}[ids]
    if ids == "ragged":
        given[torch.arange(9) >= torch.arange(1, 21)[:, None] % 9 + 1] = -1

    def ask():
        found = read_student(model, batch, Reading(likeliest=True), {"y_ids": given}, tile=tile)
        best, at_best = found.likeliest["y"]
        assert found.tokens["y"].tolist() == [5, 8, 6, 1]
        return found.logps["y"], found.topk["y"], found.rest["y"], best, at_best

    with torch.no_grad():
        for found, expected in zip(ask(), naive_answers(model, batch, given), strict=True):
            torch.testing.assert_close(found.double(), expected.double(), atol=1e-4, rtol=1e-5)
    (*ours, _, ours_best), (*theirs, _, theirs_best) = ask(), naive_answers(model, batch, given)
    ours = gradients(model, weighted(*ours, ours_best))
    theirs = gradients(model, weighted(*theirs, theirs_best))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        size = float(gradient.norm())
        assert float((ours[name] - gradient).norm()) < 1e-4 * size + 1e-4, name


def test_each_response_is_read_at_its_own_ids(model, batch):
    """The rows of the first response, then of the second; what is asked of one says nothing of the other."""
    ids = torch.arange(20 * 4).reshape(20, 4) % 97
    first, second = ids[:13], ids[13:, :2]  # 5 + 8 and 6 + 1 states
    with torch.no_grad():
        whole = read_student(model, batch, Reading(), {"y_ids": ids})
        both = read_student(model, batch, Reading("a", "b"), {"a_ids": first, "b_ids": second})
        one = read_student(model, batch, Reading("a", "b"), {"b_ids": second})
        none = read_student(model, batch, Reading("a", "b"), {})
    same = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-6)  # other ids, other roundings
    same(torch.cat([both.logps["a"], both.logps["b"]]), whole.logps["y"])
    assert (both.tokens["a"].tolist(), both.tokens["b"].tolist()) == ([5, 8], [6, 1])
    assert torch.equal(both.topk["a"], whole.topk["y"][:13])
    same(both.topk["b"], whole.topk["y"][13:, :2])
    assert torch.equal(both.rest["a"], whole.rest["y"][:13])
    assert (both.rest["b"] > whole.rest["y"][13:]).all()  # fewer ids, more besides
    assert one.topk.keys() == one.rest.keys() == {"b"}
    same(one.topk["b"], both.topk["b"])
    same(one.rest["b"], both.rest["b"])
    assert (none.topk, none.rest, none.likeliest) == ({}, {}, {})


class Widest(TorchDispatchMode):
    """The most rows that any tensor over the vocabulary has, views and what backward makes included."""

    def __init__(self, *sizes):
        self.sizes, self.rows = set(sizes), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.dim() and self.sizes & {x.shape[-1], x.shape[0]}:
                size = next(s for s in self.sizes if s in (x.shape[-1], x.shape[0]))
                if tuple(x.shape) not in {(size, 32), (32, size)}:  # the head itself
                    self.rows = max(self.rows, x.numel() // size)
        return found


@pytest.mark.parametrize(("tile", "rows"), [(3, 3), (20, 20)])
def test_no_logits_of_more_states_than_a_tile_forward_or_backward(model, batch, tile, rows):
    """Of 20 states. All that is as wide as the vocabulary (97, and one more for ids that are none) is counted."""
    given = torch.randint(0, 97, (20, 11), generator=torch.Generator().manual_seed(0))
    with Widest(97, 98) as widest:
        found = read_student(model, batch, Reading(likeliest=True), {"y_ids": given}, tile=tile)
        forward = widest.rows
        weighted(found.logps["y"], found.topk["y"], found.rest["y"], found.likeliest["y"][1]).backward()
    model.zero_grad()
    assert (forward, widest.rows) == (rows, rows)


@pytest.mark.parametrize("tiles", [0, 2])
def test_no_logits_beyond_the_first_tiles_are_kept_from_forward_to_backward(model, batch, monkeypatch, tiles):
    monkeypatch.setattr(logprobs, "STORED_ELEMENTS", tiles * 3 * 97)
    kept = []

    def keep(x):
        if {97, 98} & {*x.shape[:1], *x.shape[-1:]} and tuple(x.shape) not in {(97, 32), (32, 97)}:
            kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        full = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)[batch["states"]]
        token_logps(full.float(), batch["tokens"])
        naive = len(kept)
        read_student(model, batch, Reading(), {}, tile=3)
    assert naive > 0  # full logits are
    ours = kept[naive:]
    assert all(3 in shape for shape in ours)
    assert tiles <= len(ours) <= 3 * tiles  # of 7 tiles; soft-capping keeps more than one thing of each


def test_the_gradient_of_a_token_log_prob():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 8, 3, 3])
    assert torch.autograd.gradcheck(lambda z: token_logps(z, tokens)[0], logits)
    barred = logits.detach().clone()
    barred[:, 5] = -math.inf  # a token that cannot be
    barred.requires_grad_()
    token_logps(barred, tokens)[0].sum().backward()
    expected = torch.nn.functional.one_hot(tokens, 9) - barred.detach().softmax(-1)
    torch.testing.assert_close(barred.grad, expected)


# -- the likeliest tokens, and those at given ids ----------------------------------------------------------------------


LOGITS = [  # probabilities 0.5, 0.25, 0.125, 0.125 and a token that cannot be, in two orders
    [0.0, math.log(0.5), math.log(0.25), math.log(0.25), -math.inf],
    [math.log(0.25) + 9, -math.inf, 0.0 + 9, math.log(0.25) + 9, math.log(0.5) + 9],
]


@pytest.mark.parametrize(
    ("k", "mass", "ids", "rest"),
    [
        (1, None, [[0], [2]], [0.5, 0.5]),
        (2, None, [[0, 1], [2, 4]], [0.25, 0.25]),
        (4, None, [[0, 1, {2, 3}, {2, 3}], [2, 4, {0, 3}, {0, 3}]], [0.0, 0.0]),
        (5, None, [[0, 1, {2, 3}, {2, 3}, -1], [2, 4, {0, 3}, {0, 3}, -1]], [0.0, 0.0]),
        (99, None, [[0, 1, {2, 3}, {2, 3}, -1], [2, 4, {0, 3}, {0, 3}, -1]], [0.0, 0.0]),
        (3, 0.4, [[0, -1, -1], [2, -1, -1]], [0.5, 0.5]),  # the first alone holds more than that
        (3, 0.6, [[0, 1, -1], [2, 4, -1]], [0.25, 0.25]),
        (3, 0.8, [[0, 1, {2, 3}], [2, 4, {0, 3}]], [0.125, 0.125]),
        (2, 0.99, [[0, 1], [2, 4]], [0.25, 0.25]),  # k holds fewer
        (1, 1e-6, [[0], [2]], [0.5, 0.5]),
    ],
)
def test_likeliest_by_hand(k, mass, ids, rest):
    found, logps, others = likeliest(torch.tensor(LOGITS), k, mass)
    assert found.dtype == torch.int32
    for row, expected in zip(found.tolist(), ids, strict=True):
        assert len(row) == len(expected)
        assert len(set(row) - {-1}) == len([i for i in row if i != -1])
        assert all(i in a if isinstance(a, set) else i == a for i, a in zip(row, expected, strict=True))
    chance = {-1: 0.0, 0: 0.5, 1: 0.25, 2: 0.125, 3: 0.125, 4: 0.0}, {-1: 0.0, 2: 0.5, 4: 0.25, 0: 0.125, 3: 0.125}
    for row, ours, of in zip(found.tolist(), logps.exp().tolist(), chance, strict=True):
        assert ours == pytest.approx([of[i] for i in row], abs=1e-6)
    assert others.exp().tolist() == pytest.approx(rest, abs=1e-6)


@pytest.mark.parametrize("mass", [None, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("k", [1, 7, 60, 500])
def test_likeliest_is_what_sorting_the_float64_probabilities_gives(k, mass):
    logits = 4 * torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    logits[:, ::7] = -math.inf
    ids, logps, rest = likeliest(logits, k, mass)
    for row, found, ours, others in zip(logits.double().numpy(), ids.tolist(), logps, rest, strict=True):
        chance = np.exp(row - row.max())
        chance /= chance.sum()
        order = [int(i) for i in np.argsort(-chance) if chance[i] > 0][:k]
        named = [i for i in found if i >= 0]
        assert found[len(named) :] == [-1] * (min(k, 60) - len(named))
        assert named == order[: len(named)]
        if mass is None:
            assert named == order
        else:  # the fewest that hold it, but for rounding where a sum comes close to it
            assert len(named) == 1 or chance[named[:-1]].sum() < mass + 1e-6
            assert named == order or chance[named].sum() > mass - 1e-6
        np.testing.assert_allclose(ours[: len(named)], np.log(chance[named]), atol=1e-5)
        assert (ours[len(named) :] == -math.inf).all()
        left = 1 - sum(sorted(chance[named])) if len(named) < len(np.flatnonzero(chance)) else 0.0
        assert float(others.exp()) == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize("elements", [1, 3 * 60, 7 * 60, 2**17])
def test_rows_are_reduced_together_or_a_few_at_a_time(monkeypatch, elements):
    """To the same numbers, those of float64, and to the same gradient."""
    monkeypatch.setattr(logprobs, "ROWS_ELEMENTS", elements)
    logits = 4 * torch.randn(7, 60, generator=torch.Generator().manual_seed(0))
    logits[:, ::7] = -math.inf
    ids = torch.arange(1, 7).expand(7, -1)
    tokens = torch.arange(1, 6).repeat(2)[:7]
    exact = logits.double().requires_grad_()
    total, leaf = torch.logsumexp(exact, -1), logits.clone().requires_grad_()
    torch.testing.assert_close(log_normaliser(logits).double(), total.detach(), atol=1e-6, rtol=1e-6)
    of_token, at_ids, rest = token_and_topk_logps(leaf, tokens, ids)
    others = torch.logsumexp(exact[:, 8:], -1) - total  # column 0 and column 7 have no mass
    (token_logps(leaf, tokens)[0].sum() + of_token.sum() + at_ids.sum() + 2 * rest.sum()).backward()
    logps = exact.log_softmax(-1)
    (2 * logps.gather(-1, tokens[:, None]).sum() + logps[:, 1:7].sum() + 2 * others.sum()).backward()
    torch.testing.assert_close(rest.double(), others, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("columns", [64 * 40, 64 * 40 + 13])
@pytest.mark.parametrize("k", [1, 7, 19, 50])
def test_the_top_of_blocks_is_that_of_the_whole(k, columns):
    """Also where the best are in one block, behind the last whole block, equal, or fewer than k are finite."""
    logits = torch.randn(7, columns, generator=torch.Generator().manual_seed(0))
    logits[0, 64:128] += 20
    logits[1, -13:] += 20
    logits[2] = logits[2].round()
    logits[3] = 1.0
    logits[4, 5:] = -math.inf
    logits[5] = -math.inf
    top, ids = top_of_blocks(logits, k)
    assert torch.equal(top, logits.topk(k).values)
    assert torch.equal(logits.gather(-1, ids), top)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("grad", [False, True])
def test_tokens_that_cannot_be_emitted_have_no_probability(model, batch, grad):
    """Their columns are in the middle and at the end; the model's own logits stay as they are."""
    emittable = torch.ones(97, dtype=torch.bool)
    emittable[[2, 50, 96]] = False
    with torch.set_grad_enabled(grad):
        (logits,) = reduce_logits(model, batch, lambda z, _: (z,), batch["tokens"], emittable=emittable, tile=7)
    with torch.no_grad():
        spans = zip(batch["prompt_lengths"].tolist(), batch["lengths"].tolist(), strict=True)
        rows = zip(naive_logits(model, batch), spans, strict=True)
        full = torch.cat([z[start - 1 : start + length - 1] for z, (start, length) in rows])
    torch.testing.assert_close(logits.detach(), full.masked_fill(~emittable, -math.inf), atol=1e-4, rtol=1e-5)


def test_log_probabilities_at_ids_by_hand():
    """Also of a row that has no ids, and of a token that cannot be; an empty place must not stand for token 0."""
    logits = torch.tensor([LOGITS[0]] * 4)
    ids = torch.tensor([[0, 2, -1], [-1, -1, -1], [3, 1, 0], [4, -1, 0]])
    at_ids, rest, total = topk_logps(logits, ids)
    assert at_ids.exp().tolist() == [
        pytest.approx(row) for row in ([0.5, 0.125, 0], [0, 0, 0], [0.125, 0.25, 0.5], [0, 0, 0.5])
    ]
    assert rest.exp().tolist() == pytest.approx([0.375, 1.0, 0.125, 0.5])
    assert total.exp().tolist() == pytest.approx([2.0] * 4)  # the first logit is 0, its probability 1/2


def test_a_rest_that_is_small_is_exact():
    """Taken from the logits of the others: 1 - sum would be 0 in float32."""
    logits = torch.tensor([[0.0, -30.0, -31.0]], requires_grad=True)
    _, rest, _ = topk_logps(logits, torch.tensor([[0]]))
    assert rest.item() == pytest.approx(math.log(math.exp(-30) + math.exp(-31)), rel=1e-6)
    rest.sum().backward()
    share = 1 / (1 + math.exp(-1))  # of the two others; the distribution itself is all on the first
    np.testing.assert_allclose(logits.grad[0], [-1.0, share, 1 - share], atol=1e-6)


@pytest.mark.parametrize("ids", [[[0, 1, 2, 3]], [[2, -1, -1, -1]], [[-1, -1, -1, -1]], [[4, 1, 0, -1]]])
def test_gradient_at_ids_by_hand(ids):
    """d log p_i / d z_a = [i = a] - p_a, of the rest R of p [a in R] p_a / R - p_a, of the normaliser p_a."""
    logits = torch.tensor(LOGITS[:1], dtype=torch.float64, requires_grad=True)
    p = [0.5, 0.25, 0.125, 0.125, 0.0]
    at_ids, rest, total = topk_logps(logits, torch.tensor(ids))
    (gradient,) = torch.autograd.grad(total.sum(), logits, retain_graph=True)
    np.testing.assert_allclose(gradient[0], p, atol=1e-14)
    named = [i for i in ids[0] if i >= 0]
    others = [a for a in range(5) if a not in named]
    mass = sum(p[a] for a in others)
    for place, i in enumerate(ids[0]):
        if i >= 0 and p[i]:
            (gradient,) = torch.autograd.grad(at_ids[0, place], logits, retain_graph=True)
            np.testing.assert_allclose(gradient[0], [(a == i) - p[a] for a in range(5)], atol=1e-14)
    (gradient,) = torch.autograd.grad(rest.sum(), logits, retain_graph=True)
    expected = [(a in others) * p[a] / mass - p[a] if mass else 0.0 for a in range(5)]
    np.testing.assert_allclose(gradient[0], expected, atol=1e-14)
    everything = at_ids.masked_fill(at_ids == -math.inf, 0.0).sum() + rest.masked_fill(rest == -math.inf, 0.0).sum()
    (gradient,) = torch.autograd.grad(everything, logits)
    assert torch.isfinite(gradient).all()


def test_the_gradient_of_all_that_is_read_at_once_equals_the_naive_one():
    """Of many distributions, some all on the ids: their rest is next to nothing, and its gradient is not."""
    rng = torch.Generator().manual_seed(0)
    start = 3 * torch.randn(30, 20, generator=rng, dtype=torch.float64)
    ids = torch.stack([torch.randperm(20, generator=rng)[:6] for _ in range(30)])
    ids[5:10, 3:] = -1
    ids[10, :] = -1
    for row, gap in ((0, 50.0), (1, 100.0), (2, 2000.0), (6, 800.0)):
        start[row, ids[row][ids[row] >= 0]] += gap
    start[::4, 7] = -math.inf
    tokens = torch.randint(8, 20, (30,), generator=rng)  # none of those that cannot be
    weights = (
        torch.randn(30, 6, generator=rng, dtype=torch.float64),
        *torch.randn(2, 30, generator=rng, dtype=torch.float64),
    )

    def gradient(read):
        logits = start.clone().requires_grad_()
        of_token, at_ids, rest = read(logits)
        found = (at_ids.masked_fill(at_ids == -math.inf, 0.0), rest, of_token)
        (torch.cat([(w * x).flatten() for w, x in zip(weights, found, strict=True)]).sum()).backward()
        return logits.grad

    def naive(logits):
        logps = logits.log_softmax(-1)
        named = torch.zeros_like(logits, dtype=torch.bool)
        for row, of in enumerate(ids):
            named[row, of[of >= 0]] = True
        rest = torch.logsumexp(logits.masked_fill(named, -math.inf), -1) - torch.logsumexp(logits, -1)
        at_ids = logps.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
        return logps.gather(-1, tokens[:, None])[:, 0], at_ids, rest

    ours = gradient(lambda logits: token_and_topk_logps(logits, tokens, ids))
    torch.testing.assert_close(ours, gradient(naive), atol=1e-12, rtol=1e-10)


# -- values, states, tiles ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_values_equal_the_naive_forward(model, batch, temperature):
    lengths = (batch[name].tolist() for name in ("prompt_lengths", "lengths"))
    all_states = batch_of(*lengths, batch["input_ids"], states=lambda place, tokens: np.arange(tokens + 1))
    (values,) = reduce_logits(model, all_states, lambda logits: (soft_value(logits, temperature),), tile=5)
    expected = []
    for i, logits in enumerate(naive_logits(model, batch)):
        first = int(batch["prompt_lengths"][i]) - 1
        shown = logits[first : first + int(batch["lengths"][i]) + 1].double()
        expected.append(temperature * torch.logsumexp(shown / temperature, -1))
    torch.testing.assert_close(values.double(), torch.cat(expected), atol=1e-4, rtol=1e-5)
    assert values.dtype == torch.float32


def test_sums_by_response():
    sums = sum_by_response(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([2, 0, 3]))
    assert sums.tolist() == [3.0, 0.0, 12.0]


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

    with torch.no_grad():
        reduce_logits(model, batch, reduce, batch["tokens"], tile=4)
    assert rows == [4, 4, 4, 4, 4]  # 5 + 8 + 6 + 1 states


def test_the_model_is_left_as_it_was(model, batch):
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="from the reduction"):
        reduce_logits(model, batch, _fail)
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
