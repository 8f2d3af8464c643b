"""The table that every method passes: its loss and gradient are those of the equations, worked out naively in float64
from full distributions; what is stored at full vocabulary is as good as what is live; padding and batches do not count.

A new method adds its equation to `CASES`, and where it refuses something of its own a line to `REFUSED`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from prefdistill import METHODS
from prefdistill.data.batches import PADDING
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.methods import make_method
from support.methods import (
    MODELS,
    NUMBERS,
    ROWS,
    SAMPLED,
    SIDES,
    assert_same_gradient,
    batch_of,
    flat,
    live_signals,
    value_and_gradient,
    with_batch,
)

# -- the equations -----------------------------------------------------------------------------------------------------


class Row:
    """One row of the data, with the full float64 logits of every model at every state of its responses."""

    def __init__(self, models, encoded, index, k="vocab", p=None):
        self.models, self.encoded, self.index, self.seen = models, encoded, index, {}
        self.k, self.p = k, p

    def number(self, column):
        return NUMBERS[column][self.index]

    def tokens(self, response):
        return self.encoded[response][self.index][f"{response}_ids"]

    def ended(self, response):
        return self.encoded[response][self.index][f"{response}_ended"]

    def z(self, who, response):
        """Logits at s_0 .. s_T, without padding and without a batch."""
        if (who, response) not in self.seen:
            prompt = self.encoded[response][self.index]["prompt_ids"]
            with torch.set_grad_enabled(who == "student"):
                logits = self.models[who](input_ids=torch.tensor([prompt + self.tokens(response)])).logits
            self.seen[who, response] = logits[0, len(prompt) - 1 :]
        return self.seen[who, response]

    def pi(self, who, response):
        """pi(.|s_t) for t = 0 .. T-1."""
        return [z.softmax(0) for z in self.z(who, response)[:-1]]

    def known(self, who, response):
        """pi(.|s_t) as far as the teacher's ids tell: its k likeliest, or the fewest of them that hold p; the rest is
        one outcome more."""
        if self.k == "vocab":
            return self.pi(who, response)
        found = []
        for teacher, pi in zip(self.pi("teacher", response), self.pi(who, response), strict=True):
            ids = []
            for a in teacher.argsort(descending=True).tolist()[: self.k]:
                if self.p is None or float(teacher[ids].sum()) < self.p:
                    ids.append(a)
            others = [a for a in range(len(pi)) if a not in ids]
            found.append(torch.cat([pi[ids], pi[others].sum()[None]]))
        return found

    def logp(self, who, response):
        return sum(pi[a].log() for pi, a in zip(self.pi(who, response), self.tokens(response), strict=True))

    def mean(self, response, number):
        """Of a number per token: mean over t of number(t, a_t)."""
        per_token = [number(t, a) for t, a in enumerate(self.tokens(response))]
        return sum(per_token) / len(per_token)

    def sft(self, response="chosen"):
        return -self.logp("student", response) / len(self.tokens(response))

    def kl(self, response, skew=0.0, backward=False):
        p, q = self.known("teacher", response), self.known("student", response)
        if backward:
            p, q = q, p
        mixture = [skew * a + (1 - skew) * b for a, b in zip(p, q, strict=True)]
        return self.mean(response, lambda t, _: (p[t] * (p[t] / mixture[t]).log()).sum())

    def ratio(self, response, to="reference"):
        return self.logp("student", response) - self.logp(to, response)

    def dpo(self, beta, w="chosen", l="rejected", to="reference", offset=0.0):  # noqa: E741
        return minus_log_sigmoid(beta * (self.ratio(w, to) - self.ratio(l, to)) + offset)

    def values(self, response, b=1.0, of_logprobs=False):
        z = self.z("teacher", response)
        return [b * ((x.log_softmax(0) if of_logprobs else x) / b).exp().sum().log() for x in z]

    def psi(self, response, g=1.0, terminal="last", **values):
        """sum_t psi_t, psi_t = g V(s_{t+1}) - V(s_t), with what stands for the value after the end token."""
        v = self.values(response, **values)
        if self.ended(response) and terminal == "last":
            v[-1] = v[-2]
        if self.ended(response) and terminal == "zero":
            v[-1] = torch.zeros(())
        return sum(g * v[t + 1] - v[t] for t in range(len(v) - 1))

    def tvkd(self, psi, alpha=0.7, beta=0.1, offset=0.0):
        return self.dpo(beta, offset=alpha * (psi("chosen") - psi("rejected")) + offset)


def minus_log_sigmoid(x):
    return torch.log1p(torch.exp(-x))


def adpa(row, gamma=1.0, reference="teacher_reference", beta=1.0):
    q, teacher, base = (row.known(who, "student_response") for who in ("student", "teacher", reference))
    score = row.mean("student_response", lambda t, _: (q[t] * beta * (teacher[t].log() - base[t].log())).sum())
    return row.sft() - gamma * score


def dpkd_tokens(row, beta=0.1):
    """At every state the teacher's likeliest token against the student's. Beyond the teacher's k likeliest tokens all
    have the same share of what those leave."""
    p, q = row.pi("teacher", "teacher_response"), row.pi("student", "teacher_response")

    def loss(t, _):
        y_t, y_s = int(p[t].argmax()), int(q[t].argmax())
        order = p[t].argsort(descending=True).tolist()
        known = order if row.k == "vocab" else order[: row.k]
        theirs = p[t][y_s] if y_s in known else (1 - sum(p[t][a] for a in known)) / (len(order) - len(known))
        return minus_log_sigmoid(beta * ((q[t][y_t] / p[t][y_t]).log() - (q[t][y_s] / theirs).log()))

    return row.mean("teacher_response", loss)


def wpo(row, beta=0.1, offset=0.0):
    """DPO times exp(mean_t [log pi(a_t|s_t) - log sum_a pi(a|s_t)^2]) of both responses, without gradient."""
    weight = 1.0
    for side in SIDES:
        pi = [x.detach() for x in row.pi("student", side)]
        weight = weight * row.mean(side, lambda t, a, pi=pi: pi[t][a].log() - (pi[t] ** 2).sum().log()).exp()
    return weight * row.dpo(beta, offset=offset)


def simpo(row, beta=2.0, gamma=1.0):
    per_token = [row.logp("student", side) / len(row.tokens(side)) for side in SIDES]
    return minus_log_sigmoid(beta * (per_token[0] - per_token[1]) - gamma)


def from_log_two(row, beta, w="chosen", l="rejected"):  # noqa: E741
    """Where the student is its own reference: -log sigmoid(0), and the slope of DPO there."""
    margin = row.logp("student", w) - row.logp("student", l)
    return minus_log_sigmoid(beta * (margin - margin.detach()))


def nothing(row):
    return 0.0 * row.logp("student", "chosen")


@dataclass(frozen=True)
class Case:
    method: str
    options: dict
    loss: Callable[[Row], torch.Tensor]  # of one row, from the equations of the papers (shared/design/METHODS.md)
    alike: Callable[[Row], torch.Tensor] | None = None  # the same where student, teacher and references are one model
    k: int | str = "vocab"
    p: float | None = None

    def make(self):
        return make_method(self.method, self.options)

    def __str__(self):
        known = {} if self.k == "vocab" else {"k": self.k, "p": self.p}
        return "-".join([self.method, *(f"{key}={value}" for key, value in (self.options | known).items())])


SEQUENCE = {"w": "teacher_response", "l": "student_response"}
CASES = [
    Case("sft", {}, lambda r: r.sft()),
    Case("seqkd", {}, lambda r: r.sft("teacher_response")),
    Case("dpo", {"beta": 0.3}, lambda r: r.dpo(0.3), lambda r: from_log_two(r, 0.3)),
    Case("tvkd", {}, lambda r: r.tvkd(r.psi)),
    Case(
        "tvkd", {"alpha": -0.3, "beta": 0.2, "terminal": "bootstrap", "discount": 0.9},
        lambda r: r.tvkd(lambda y: r.psi(y, 0.9, "bootstrap"), -0.3, 0.2),
    ),
    Case(
        "tvkd", {"terminal": "zero", "discount": 0.9},
        lambda r: r.tvkd(lambda y: r.psi(y, 0.9, "zero")),
    ),
    Case(
        "tvkd", {"values_from": "logprobs", "value_temperature": 2.0},
        lambda r: r.tvkd(lambda y: r.psi(y, b=2.0, of_logprobs=True)),
    ),
    Case("tvkd", {"shaping": "log_prob"}, lambda r: r.tvkd(lambda y: r.logp("teacher", y))),
    Case(
        "tvkd", {"shaping": "q"},
        lambda r: r.tvkd(lambda y: sum(r.z("teacher", y)[t][a] for t, a in enumerate(r.tokens(y)))),
    ),
    Case(
        "tvkd", {"potential": "implicit_reward", "teacher_beta": 0.5},
        lambda r: r.tvkd(lambda y: 0.5 * (r.logp("teacher", y) - r.logp("teacher_reference", y))),
    ),
    Case("vanillakd", {"alpha": 0.4}, lambda r: r.sft() + 0.4 * r.kl("chosen"), Row.sft),
    Case("dckd", {"alpha": 1.3}, lambda r: r.sft() + 1.3 * (r.kl("chosen") + r.kl("rejected")), Row.sft),
    Case("adpa", {"gamma": 0.7}, lambda r: adpa(r, 0.7), Row.sft),
    Case(
        "adpa", {"advantage_reference": "reference", "teacher_beta": 0.1},
        lambda r: adpa(r, 1.0, "reference", 0.1), Row.sft,
    ),
    Case(
        "dpkd", {"beta": 0.2},
        lambda r: r.dpo(0.2, **SEQUENCE, to="teacher"), lambda r: from_log_two(r, 0.2, **SEQUENCE),
    ),
    Case(
        "dpkd", {"lm_weight": 0.5},
        lambda r: r.dpo(0.1, **SEQUENCE, to="teacher") + 0.5 * r.sft("teacher_response"),
        lambda r: from_log_two(r, 0.1, **SEQUENCE) + 0.5 * r.sft("teacher_response"),
    ),
    Case("dpkd", {"level": "token", "beta": 0.4}, lambda r: dpkd_tokens(r, 0.4), lambda r: math.log(2) + nothing(r)),
    Case("dpkd", {"level": "token", "beta": 0.4}, lambda r: dpkd_tokens(r, 0.4), k=3),
    Case("dpkd", {"level": "token", "lm_weight": 1.0}, lambda r: dpkd_tokens(r) + r.sft("teacher_response")),
    Case("simpo", {"beta": 1.5, "gamma": 0.4}, lambda r: simpo(r, 1.5, 0.4)),
    Case("wpo", {"beta": 0.2}, lambda r: wpo(r, 0.2)),
    Case(
        "dadpo", {"beta": 0.1, "teacher_beta": 0.05},
        lambda r: minus_log_sigmoid(sum(
            sign * (0.1 * r.ratio(y) + 0.05 * r.ratio(y, "teacher")) for sign, y in zip((1, -1), SIDES, strict=True)
        )),
        lambda r: from_log_two(r, 0.15),
    ),
    Case("dadpo", {"beta": 0.0}, lambda r: r.dpo(0.1, to="teacher"), lambda r: from_log_two(r, 0.1)),
    Case(
        "distillm2", {},
        lambda r: (r.kl("teacher_response", 0.1) + r.kl("student_response", 0.1, backward=True)) / 2, nothing,
    ),
    Case(
        "distillm2", {"skew": 0.0},
        lambda r: (r.kl("teacher_response") + r.kl("student_response", backward=True)) / 2, nothing,
    ),
]  # fmt: skip
COLUMNS = {"weight": "importance", "margin": "gap"}
CASES += [
    Case("dpo", {"weight": "importance"}, lambda r: r.number("importance") * r.dpo(0.1)),
    Case("dpo", {"margin": "gap"}, lambda r: r.dpo(0.1, offset=-r.number("gap"))),
    *(
        Case(name, COLUMNS, lambda r, loss=loss: r.number("importance") * loss(r, -r.number("gap")))
        for name, loss in {
            "tvkd": lambda r, m: r.tvkd(r.psi, offset=m),
            "dadpo": lambda r, m: minus_log_sigmoid(sum(
                sign * 0.1 * (r.ratio(y) + r.ratio(y, "teacher")) for sign, y in zip((1, -1), SIDES, strict=True)
            ) + m),
            "wpo": lambda r, m: wpo(r, offset=m),
            "simpo": lambda r, m: simpo(r, gamma=1.0 - m),
        }.items()
    ),
]  # fmt: skip
DISTRIBUTIONS = [case for case in CASES if case.method in ("vanillakd", "dckd", "adpa", "distillm2")]
CASES += [replace(case, k=k, p=p) for case in DISTRIBUTIONS for k, p in ((1, None), (4, None), (30, 0.7))]


def table(cases):
    return [pytest.param(case, id=str(case)) for case in cases]


@pytest.fixture(scope="module")
def encoded(rows, tokenizer):
    parts = [encode_pairs(rows, tokenizer, Truncation(), responses=names) for names in (SIDES, SAMPLED)]
    assert not any(dropped for _, dropped in parts)
    return {name: part for names, (part, _) in zip((SIDES, SAMPLED), parts, strict=True) for name in names}


@pytest.fixture(scope="module")
def naive(model_of, encoded):
    """Loss and gradient of an equation, one row at a time, in float64."""
    models = {role: model_of(role).double() for role in MODELS}
    seen = {}

    def run(equation, case, same=""):
        asked = {role: models[same or role] for role in MODELS}
        asked["student"].zero_grad()
        total = 0.0
        for place in ROWS:
            row = Row(asked, encoded, place, case.k, case.p)
            row.seen = dict(seen.setdefault((same, place), {}))
            loss = equation(row) / len(ROWS)
            loss.backward()
            seen[same, place] |= {key: z for key, z in row.seen.items() if key[0] != "student"}
            total += loss.item()
        return total, flat(asked["student"])

    return run


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_has_every_method():
    assert {case.method for case in CASES} == METHODS.keys()


@pytest.mark.parametrize("case", table(CASES))
def test_loss_and_gradient_are_those_of_the_equation(case, trainer_of, naive):
    """With signals stored at full vocabulary, which is as good as asking the teacher on the spot; in float32 here, in
    float64 there."""
    trainer = trainer_of(case.make(), k=case.k, p=case.p)
    loss, gradient = value_and_gradient(trainer, batch_of(trainer, ROWS))
    expected, expected_gradient = naive(case.loss, case)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert float(gradient.norm()) > 1e-3
    assert_same_gradient(gradient, expected_gradient)


@pytest.mark.parametrize("case", table(case for case in CASES if case.alike))
def test_identical_models_leave_no_teacher_term(case, trainer_of, naive):
    """Neither to the loss nor to its gradient: what is left is SFT, the start of DPO, or nothing at all."""
    trainer = trainer_of(case.make(), k=case.k, p=case.p, same="teacher")
    loss, gradient = value_and_gradient(trainer, batch_of(trainer, ROWS))
    expected, expected_gradient = naive(case.alike, case, same="teacher")
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert_same_gradient(gradient, expected_gradient)


@pytest.mark.parametrize("case", table(CASES))
def test_the_loss_of_a_batch_is_the_mean_over_its_rows(case, trainer_of):
    """Padding is as if it were not there, in value and in gradient; so is what stands in it."""
    trainer = trainer_of(case.make(), k=case.k, p=case.p)
    batch = batch_of(trainer, ROWS)
    loss, gradient = value_and_gradient(trainer, batch)
    alone = [value_and_gradient(trainer, batch_of(trainer, [place])) for place in ROWS]
    assert loss == pytest.approx(np.mean([value for value, _ in alone]), abs=1e-5)
    assert_same_gradient(gradient, sum(part for _, part in alone) / len(ROWS))
    batch = batch_of(trainer, ROWS)
    padding = batch["segments"] == PADDING if "segments" in batch else batch["attention_mask"] == 0
    assert padding.any()
    batch["input_ids"][padding] = 7
    other, other_gradient = value_and_gradient(trainer, batch)
    assert other == pytest.approx(loss, abs=1e-6)
    assert_same_gradient(other_gradient, gradient)


@pytest.mark.parametrize("case", table(CASES))
def test_a_row_without_tokens_is_finite_and_has_no_gradient(case, trainer_of):
    trainer = trainer_of(case.make(), k=case.k, p=case.p)

    def masked(kept):
        """A batch of two rows of which the first `kept` have tokens."""
        rows = [dict(trainer.train_dataset[place]) for place in ROWS[2:4]]
        for row in rows[kept:]:
            row |= {f"{name}_ids": [] for name in trainer.method.responses}
        batch = trainer.data_collator(rows)
        first = batch_of(trainer, ROWS[2 : 2 + kept])["features"]["states"] if kept else {}
        states = batch["features"]["states"]
        batch["features"]["states"] = {name: x[: len(first[name]) if kept else 0] for name, x in states.items()}
        return batch

    _, alone = value_and_gradient(trainer, batch_of(trainer, ROWS[2:3]))
    loss, gradient = value_and_gradient(trainer, masked(1))
    assert math.isfinite(loss)
    assert_same_gradient(gradient, alone / 2)
    loss, gradient = value_and_gradient(trainer, masked(0))
    assert math.isfinite(loss)
    assert not gradient.any()


@pytest.mark.parametrize("case", table(case for case in DISTRIBUTIONS if case.method != "adpa"))
def test_more_ids_bring_the_divergence_closer_from_below(case, trainer_of):
    trainer = trainer_of(case.make())
    full, gradient = value_and_gradient(trainer, batch_of(trainer, ROWS))
    errors = []
    for k in (1, 4, 30, 200):
        trainer = trainer_of(case.make(), k=k)
        loss, part = value_and_gradient(trainer, batch_of(trainer, ROWS))
        errors.append(float((part - gradient).norm() / gradient.norm()))
        assert loss < full + 1e-5
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2  # where the student puts its mass elsewhere, it takes nearly all ids


@pytest.mark.parametrize("case", table(CASES))
def test_live_signals_give_the_loss_and_gradient_of_stored_ones(case, trainer_of, model_of):
    method = case.make()
    stored = value_and_gradient(*with_batch(trainer_of(method, k=case.k, p=case.p)))
    live = value_and_gradient(*with_batch(trainer_of(method, signals=live_signals(method, model_of, case.k, case.p))))
    assert live[0] == pytest.approx(stored[0], rel=1e-5, abs=1e-6)
    assert_same_gradient(live[1], stored[1])
