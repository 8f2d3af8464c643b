"""The table that every method passes: its loss and gradient are those of the equations, worked out naively in float64
from full distributions; what is stored at full vocabulary is as good as what is live; padding and batches do not count.

A new method adds its equation to `CASES`, and where it refuses something of its own a line to `REFUSED`."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from prefdistill import METHODS, LiveTeacher, PrefDistillTrainer
from prefdistill.core.errors import UserError
from prefdistill.data.batches import PADDING
from prefdistill.data.encode import encode_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.methods import TRLMethod, make_method, sampled
from prefdistill.methods.tvkd import _other_rows
from prefdistill.models.identity import weights_digest
from prefdistill.models.scratch import random_model
from prefdistill.signals import Need, SignalSet, extract_signals
from prefdistill.training.factory import make_trainer
from prefdistill.training.options import Lora, Training
from support.stores import store_by_hand
from support.tokenizer_styles import STYLES, make_tokenizer

SIDES = ("chosen", "rejected")
SAMPLED = ("teacher_response", "student_response")
ROWS = (0, 3, 8, 13, 18, 23)  # of the data, with responses of many lengths, ended and cut
OURS = [name for name, method in METHODS.items() if not issubclass(method, TRLMethod)]
THEIRS = [name for name in METHODS if name not in OURS]

# -- models, data, signals ---------------------------------------------------------------------------------------------

MODELS = {"student": (0, 2.0), "reference": (0, 2.0), "teacher": (5, 4.0), "teacher_reference": (6, 3.0)}


@pytest.fixture(scope="module")
def model_of(make_model):
    """Models by role. The student starts as the reference; the others differ from it and are surer of themselves."""

    def make(role):
        seed, sharpness = MODELS[role]
        model = make_model(seed)
        model.lm_head.weight.data *= sharpness
        return model

    return make


@pytest.fixture(scope="module")
def rows(pairs):
    """The pairs, with what a teacher and a student might have answered; some of it was cut before its end."""
    data = pairs
    for n, name in enumerate(SAMPLED):
        data = data.add_column(name, [pairs[(5 * i + 7 * n + 3) % 24][SIDES[n]] for i in range(24)])
        data = data.add_column(f"{name}_ended", [(i + n) % 3 != 0 for i in range(24)])
    return data


class Stores:
    """All that any method needs, as the command line makes it, for distributions of k ids."""

    def __init__(self, root, model_of, rows, tokenizer):
        self.root, self.model_of, self.rows, self.tokenizer = root, model_of, rows, tokenizer
        self.made = {}

    def extract(self, role, kinds, responses=SIDES, *, model=None, name="", **options):
        out = self.root / "-".join([name, model or role, role, *kinds, *responses])
        return extract_signals(
            self.model_of(model or role), self.rows, self.tokenizer, kinds, out, role=role, responses=responses,
            **options,
        )  # fmt: skip

    def __call__(self, k="vocab", p=None, same=""):
        """`same`: the role whose model is asked in everyone's place."""
        key = (k, p, same)
        if key not in self.made:
            name = f"k{k}-p{p}-{same}"
            model = {role: same or role for role in ("teacher", "teacher_reference", "reference")}
            teacher = {"model": model["teacher"], "k": k, "p": p, "topk_coding": "float32"}
            own = self.extract("teacher", ("logps", "topk"), SAMPLED, name=name, **teacher)
            self.made[key] = [
                own,
                self.extract("teacher", ("values", "logps", "q", "topk"), name=name, **teacher),
                self.extract("teacher", ("logprob_values",), model=model["teacher"], name=name, value_temperature=2.0),
                *(
                    self.extract(role, kinds, responses, model=model[role], name=name, **at)
                    for role in ("teacher_reference", "reference")
                    for kinds, responses, at in (
                        (("logps",), SIDES, {}),
                        (("topk",), SAMPLED, {"ids_from": own}),  # in the same rows as the teacher, so to the last bit
                    )
                ),
            ]
        return self.made[key]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, model_of, rows, tokenizer):
    return Stores(tmp_path_factory.mktemp("stores"), model_of, rows, tokenizer)


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory, model_of, rows, tokenizer, stores):
    """The trainer of a method, ours or TRL's, before its first step."""

    def make(method, *, k="vocab", p=None, same="", signals=None, **training):
        if signals is None:
            signals = [] if isinstance(method, TRLMethod) else stores(k, p, same)
        options = {"batch_size": 4, "max_steps": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 100}
        trainer = make_trainer(
            method, lambda: model_of(same or "student"), rows, tokenizer, Training(**options | training),
            tmp_path_factory.mktemp("out"), signals=signals, seed=11,
        )  # fmt: skip
        trainer.model.eval()
        return trainer

    return make


def batch_of(trainer, places):
    return trainer.data_collator([trainer.train_dataset[place] for place in places])


def value_and_gradient(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), flat(trainer.model)


def flat(model):
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def assert_same_gradient(found, expected):
    """As vectors: no more apart than float32 makes them."""
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-5


def test_evaluation_reads_the_signals_of_the_rows_it_is_given(tmp_path_factory, model_of, rows, tokenizer, stores):
    """Held-out rows have stores of their own, with the same row numbers."""
    from transformers import TrainingArguments

    from prefdistill import PrefDistillTrainer

    held_out = rows.select(range(len(rows) - 1, -1, -1))
    exact = {"k": 20, "topk_coding": "float32"}
    teacher = extract_signals(
        model_of("teacher"), held_out, tokenizer, ("topk",), tmp_path_factory.mktemp("e"), **exact
    )
    method = METHODS["dckd"]()
    ours = next(s for s in stores(20, None, "") if s.role == "teacher" and {"topk"} <= set(s.kinds)
                and set(SIDES) <= set(s.responses))  # fmt: skip
    trainer = PrefDistillTrainer(
        model_of("student"), method, TrainingArguments(str(tmp_path_factory.mktemp("o")), use_cpu=True,
        report_to="none"), rows, [ours], tokenizer, eval_dataset=held_out, eval_signals=[teacher],
    )  # fmt: skip
    both = [trainer.evaluate(data)["eval_loss"] for data in (None, trainer.train_dataset)]
    assert both[0] == pytest.approx(both[1], abs=1e-5)  # the same rows in another order
    with pytest.raises(UserError, match="these rows have no signals"):
        trainer.evaluate(trainer.train_dataset.select(range(2)))


def test_trl_reads_its_reference_as_it_goes(trainer_of):
    with pytest.raises(UserError, match="precompute_ref_log_probs is not supported"):
        trainer_of(METHODS["wpo"](), arguments={"precompute_ref_log_probs": True})


# -- the equations -----------------------------------------------------------------------------------------------------


class Row:
    """One row of the data, with the full float64 logits of every model at every state of its responses."""

    def __init__(self, models, encoded, index, k="vocab", p=None):
        self.models, self.encoded, self.index, self.seen = models, encoded, index, {}
        self.k, self.p = k, p

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

    def tvkd(self, psi, alpha=0.7, beta=0.1):
        return self.dpo(beta, offset=alpha * (psi("chosen") - psi("rejected")))


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


def wpo(row, beta=0.1):
    """DPO times exp(mean_t [log pi(a_t|s_t) - log sum_a pi(a|s_t)^2]) of both responses, without gradient."""
    weight = 1.0
    for side in SIDES:
        pi = [x.detach() for x in row.pi("student", side)]
        weight = weight * row.mean(side, lambda t, a, pi=pi: pi[t][a].log() - (pi[t] ** 2).sum().log()).exp()
    return weight * row.dpo(beta)


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
def test_where_all_models_are_one_the_teacher_adds_nothing(case, trainer_of, naive):
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
    if case.method in OURS:
        batch = batch_of(trainer, ROWS)
        padding = batch["segments"] == PADDING if "segments" in batch else batch["attention_mask"] == 0
        assert padding.any()
        batch["input_ids"][padding] = 7
        other, other_gradient = value_and_gradient(trainer, batch)
        assert other == pytest.approx(loss, abs=1e-6)
        assert_same_gradient(other_gradient, gradient)


@pytest.mark.parametrize("case", table(case for case in CASES if case.method in OURS))
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
def test_the_more_ids_the_closer_and_no_divergence_is_overstated(case, trainer_of):
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


# -- where one method becomes another ----------------------------------------------------------------------------------


def trained(trainer):
    trainer.train()
    return trainer


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def assert_same_trajectory(one, other, tolerance):
    assert len(history(one)) == 8
    assert np.ptp(history(one)) > 0.05  # something is learnt, or agreement says nothing
    np.testing.assert_allclose(history(one), history(other), atol=tolerance)
    torch.testing.assert_close(weights(one), weights(other), atol=10 * tolerance, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_micro_batches_do_not_change_how(name, trainer_of, model_of):
    whole = trained(trainer_of(METHODS[name](), k=7))
    assert len(set(history(whole))) == 8
    start = torch.cat([p.detach().flatten() for p in model_of("student").parameters()])
    assert float((weights(whole) - start).abs().max()) > 1e-3
    parts = trained(trainer_of(METHODS[name](), k=7, micro_batch_size=2))
    assert parts.args.gradient_accumulation_steps == 2
    np.testing.assert_allclose(history(whole), history(parts), atol=1e-5)
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-4, rtol=1e-3)


def live_signals(method, model_of, k="vocab", p=None):
    """What the method needs, from loaded models; reference models before the teacher, to test their order."""
    kinds = {}
    for need in method.needs:
        kinds.setdefault(need.role, set()).add(need.kind)
    kinds.pop("data", None)
    topk = {"k": k, "p": p, "topk_coding": "float32"}
    return [
        LiveTeacher(model_of(role), role, **(topk if role == "teacher" and "topk" in kinds[role] else {}))
        for role in sorted(kinds)
    ]


@pytest.mark.parametrize("case", table(case for case in CASES if case.method in OURS))
def test_live_signals_give_the_loss_and_gradient_of_stored_ones(case, trainer_of, model_of):
    method = case.make()
    stored = value_and_gradient(*with_batch(trainer_of(method, k=case.k, p=case.p)))
    live = value_and_gradient(*with_batch(trainer_of(method, signals=live_signals(method, model_of, case.k, case.p))))
    assert live[0] == pytest.approx(stored[0], rel=1e-5, abs=1e-6)
    assert_same_gradient(live[1], stored[1])


def with_batch(trainer):
    return trainer, batch_of(trainer, ROWS)


@pytest.mark.parametrize("name", [name for name in OURS if METHODS[name]().needs])
def test_training_on_live_signals_has_the_trajectory_of_stored_ones(name, trainer_of, model_of):
    stored = trained(trainer_of(METHODS[name](), max_steps=3))
    live = trained(trainer_of(METHODS[name](), signals=live_signals(METHODS[name](), model_of), max_steps=3))
    np.testing.assert_allclose(history(live), history(stored), atol=1e-5)
    torch.testing.assert_close(weights(live), weights(stored), atol=1e-4, rtol=1e-3)


def test_vanillakd_without_its_teacher_has_the_trajectory_of_sft(trainer_of):
    sft, other = trained(trainer_of(METHODS["sft"]())), trained(trainer_of(METHODS["vanillakd"](alpha=0.0)))
    assert_same_trajectory(sft, other, 1e-5)


def test_dckd_without_its_teacher_has_the_trajectory_of_sft(trainer_of):
    sft, other = trained(trainer_of(METHODS["sft"]())), trained(trainer_of(METHODS["dckd"](alpha=0.0)))
    assert_same_trajectory(sft, other, 1e-5)


def test_adpa_with_teachers_that_agree_has_the_trajectory_of_sft(trainer_of):
    sft = trained(trainer_of(METHODS["sft"]()))
    agreeing = trained(trainer_of(METHODS["adpa"](gamma=3.0), k=20, same="student"))
    assert history(agreeing, "advantage") == [0.0] * 8
    assert_same_trajectory(sft, agreeing, 1e-5)
    other = trained(trainer_of(METHODS["adpa"](gamma=3.0), k=20))
    assert not np.allclose(history(sft), history(other), atol=0.01)


def test_dpkd_is_dpo_with_the_teacher_as_reference_to_the_last_bit(
    tmp_path, trainer_of, model_of, rows, tokenizer, stores
):
    dpkd = trained(trainer_of(METHODS["dpkd"](beta=0.2)))
    names = {f"{response}{flag}": f"{side}{flag}" for response, side in zip(SAMPLED[::1], SIDES, strict=True)
             for flag in ("", "_ended")}  # fmt: skip
    renamed = rows.remove_columns([*SIDES, "score_chosen", "score_rejected"]).rename_columns(names)
    teacher = extract_signals(model_of("teacher"), renamed, tokenizer, ("logps",), tmp_path / "s", role="reference")
    teacher.manifest["model"]["weights_sha256"] = weights_digest(model_of("student"))  # or DPO would refuse it
    training = Training(batch_size=4, max_steps=8, learning_rate=1e-3, logging_steps=1)
    dpo = make_trainer(
        METHODS["dpo"](beta=0.2), lambda: model_of("student"), renamed, tokenizer, training, tmp_path / "out",
        signals=[teacher], seed=11,
    )  # fmt: skip
    dpo.train()
    assert history(dpkd) == history(dpo)
    assert torch.equal(weights(dpkd), weights(dpo))


def test_a_topk_method_is_evaluated_with_the_signals_of_the_held_out_rows(tmp_path, rows, model_of, tokenizer):
    """Before anything is learnt, the loss on rows held out is what training on them would start from."""
    first, last = rows.select(range(16)), rows.select(range(16, 24))
    stores = [
        [extract_signals(model_of("teacher"), part, tokenizer, ("topk",), tmp_path / str(n), k=7)]
        for n, part in enumerate((first, last))
    ]

    def trainer(part, signals, **more):
        sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 3, "max_steps": 1}
        options = {"learning_rate": 0.0, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
        args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, **sizes, **options)
        return PrefDistillTrainer(model_of("student"), METHODS["dckd"](), args, part, signals, tokenizer, **more)

    held_out = trainer(first, stores[0], eval_dataset=last, eval_signals=stores[1])
    on_them = history(trained(trainer(last, stores[1])))
    assert held_out.evaluate()["eval_loss"] == pytest.approx(on_them[0], abs=1e-5)
    assert history(trained(held_out)) != on_them


# -- baselines of TRL --------------------------------------------------------------------------------------------------


def assert_tokens_are(trainer, ours, places):
    """What the loss of a TRL trainer is made of: prompt and response tokens of each row."""
    assert len(trainer.train_dataset) == len(ours)
    for place in places:
        batch, row = batch_of(trainer, [place]), ours[place]
        for n, side in enumerate(SIDES):
            if "chosen_labels" in batch:  # of SimPO
                tokens, labels, kept = (batch[f"{side}_{x}"][0] for x in ("input_ids", "labels", "attention_mask"))
                mask = labels != -100
                assert labels[mask].tolist() == row[f"{side}_ids"]
            else:
                tokens, mask, kept = (batch[x][n] for x in ("input_ids", "completion_mask", "attention_mask"))
            assert tokens[kept.bool()].tolist() == row["prompt_ids"] + row[f"{side}_ids"]
            assert tokens[mask.bool()].tolist() == row[f"{side}_ids"]


@pytest.mark.parametrize("truncation", [Truncation(None), Truncation(20), Truncation(1024, max_prompt_length=6)])
@pytest.mark.parametrize("name", THEIRS)
def test_trl_trains_on_our_tokens(name, truncation, tmp_path, model_of, rows, tokenizer):
    """The same prompt and response tokens, cut at the same places; no limit means none, also beyond TRL's defaults."""
    long = dict(rows[0])
    long["chosen"] = [{"role": "assistant", "content": "the small teacher reads " * 300}]
    data = Dataset.from_list([dict(row) for row in rows] + [long])
    training = Training(batch_size=1, max_steps=1)
    trainer = make_trainer(
        METHODS[name](), lambda: model_of("student"), data, tokenizer, training, tmp_path, truncation=truncation
    )
    ours, _ = encode_pairs(data, tokenizer, truncation)
    assert len(ours) == (24 if truncation.max_length == 20 else 25)  # one prompt leaves no room
    longest = max(map(len, ours["chosen_ids"]))
    assert (longest > 1024) == (truncation.max_length is None)
    assert (max(map(len, ours["prompt_ids"])) == 6) == (truncation.max_prompt_length is not None)
    assert_tokens_are(trainer, ours, (0, 5, len(ours) - 1))


@pytest.mark.parametrize("style", ["llama3", "chatml", "zephyr", "phi3"])
@pytest.mark.parametrize("name", THEIRS)
def test_trl_trains_on_nothing_behind_the_end_token(name, style, tmp_path):
    """Neither on what the template writes there nor on an end token that TRL adds."""
    tokenizer = make_tokenizer(style)
    row = {"prompt": ("user", "a"), "chosen": ("assistant", "b"), "rejected": ("assistant", "c")}
    row = {name: [{"role": role, "content": text}] for name, (role, text) in row.items()}
    data, training = Dataset.from_list([row, row]), Training(batch_size=1, max_steps=1)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    trainer = make_trainer(
        METHODS[name](), lambda: random_model(tokenizer, shape, 0), data, tokenizer, training, tmp_path
    )
    ours, _ = encode_pairs(data, tokenizer, Truncation())
    assert tokenizer.decode(ours[0]["chosen_ids"]) == "b" + STYLES[style].end
    assert_tokens_are(trainer, ours, (0, 1))


@pytest.mark.parametrize("case", table(case for case in CASES if case.method in THEIRS))
def test_an_adapter_of_trl_starts_where_the_model_does(case, trainer_of, naive):
    """The reference is the model without its adapter; only the adapter is trained."""
    trainer = trainer_of(case.make(), lora=Lora(r=4), max_steps=2, learning_rate=1e-2)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch_of(trainer, ROWS))
    assert loss.item() == pytest.approx(naive(case.loss, case)[0], rel=1e-5, abs=1e-7)
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p.cpu(), before[name])}
    assert moved
    assert all("lora" in name for name in moved)


def test_trl_needs_no_signals(trainer_of, stores):
    for name in THEIRS:
        with pytest.raises(UserError, match="trained by TRL on the pairs alone; leave the signals out"):
            trainer_of(METHODS[name](), signals=stores())
        with pytest.raises(UserError, match=r"use prefdistill\.training\.factory\.make_trainer"):
            PrefDistillTrainer(None, METHODS[name](), None, None)


# -- what is refused ---------------------------------------------------------------------------------------------------

TOPK = "Make it with `prefdistill signals --role teacher --kind topk"
LOGPS = "Make it with `prefdistill signals --role teacher --kind logps"
MISSING = [  # method, options, the signals at hand, what is said
    ("dpo", {}, [], "DPO lacks reference.logps of chosen, rejected. Make it with `prefdistill signals --role reference"
     " --kind logps --model STUDENT --data DATA --out DIR`"),
    ("tvkd", {}, ["reference"], "TVKD lacks teacher.values of chosen, rejected. Make it with `prefdistill signals"
     " --role teacher --kind values --model TEACHER --data"),
    ("tvkd", {"values_from": "logprobs", "value_temperature": 2.0}, ["reference"],
     "--kind logprob_values --value-temperature 2.0 --model"),
    ("tvkd", {"shaping": "q"}, ["reference"], "--kind q --model TEACHER"),
    ("tvkd", {"potential": "implicit_reward"}, ["reference"], "TVKD lacks teacher.logps of chosen, rejected;"
     f" teacher_reference.logps of chosen, rejected. {LOGPS} --model TEACHER --data"),
    ("vanillakd", {}, [], f"VanillaKD lacks teacher.topk of chosen. {TOPK} --responses chosen --model TEACHER --data"),
    ("dckd", {}, [], f"DCKD lacks teacher.topk of chosen, rejected. {TOPK} --model TEACHER --data DATA"),
    ("adpa", {}, [], "ADPA lacks teacher.topk of student_response; teacher_reference.topk of student_response."
     f" {TOPK} --responses student_response --model TEACHER --data"),
    ("adpa", {}, ["teacher"], "ADPA lacks teacher_reference.topk of student_response. Make it with `prefdistill signals"
     " --role teacher_reference --kind topk --responses student_response --ids-from DIR_OF_THE_TEACHERS"
     " --model TEACHER_SFT_MODEL --data"),
    ("adpa", {"advantage_reference": "reference"}, ["teacher"], "--role reference --kind topk --responses"
     " student_response --ids-from DIR_OF_THE_TEACHERS --model STUDENT"),
    ("dpkd", {}, [], "DPKD lacks teacher.logps of teacher_response, student_response."
     f" {LOGPS} --responses teacher_response,student_response --model TEACHER"),
    ("dpkd", {"level": "token"}, [], f"lacks teacher.topk of teacher_response. {TOPK} --responses teacher_response --"),
    ("dadpo", {}, ["reference"], f"DaDPO lacks teacher.logps of chosen, rejected. {LOGPS} --model TEACHER"),
    ("distillm2", {}, [], "DistiLLM2 lacks teacher.topk of teacher_response, student_response."
     f" {TOPK} --responses teacher_response,student_response --model TEACHER"),
]  # fmt: skip


def test_the_list_of_what_may_be_missing_has_every_method():
    assert {name for name, *_ in MISSING} == {name for name in METHODS if METHODS[name]().needs}


@pytest.mark.parametrize(("name", "options", "roles", "message"), MISSING)
def test_a_missing_signal_says_which_command_makes_it(name, options, roles, message, trainer_of, stores):
    """All other signals of the models in `roles` are there, of the pairs or, of a teacher alone, of the samples."""
    where = SAMPLED if roles == ["teacher"] else SIDES
    at_hand = [s for s in stores() if s.role in roles and set(s.responses) <= set(where)]
    assert len(at_hand) == len(roles)
    with pytest.raises(UserError) as refusal:
        trainer_of(METHODS[name](**options), signals=at_hand)
    assert message in str(refusal.value)


def test_responses_that_were_not_sampled_say_which_command_samples_them(pairs, tokenizer, model_of, tmp_path):
    training = Training(batch_size=1, max_steps=1)
    with pytest.raises(UserError, match=r"no column 'teacher_response'.*prefdistill sample --column teacher_response"):
        make_trainer(METHODS["seqkd"](), lambda: model_of("student"), pairs, tokenizer, training, tmp_path)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().needs])
def test_signals_of_other_data_or_another_tokenizer_are_refused(name, tmp_path, model_of, rows, tokenizer, stores):
    def refuse(data, tokenizer, message):
        training = Training(batch_size=1, max_steps=1)
        with pytest.raises(UserError, match=message):
            make_trainer(
                METHODS[name](), lambda: model_of("student"), data, tokenizer, training, tmp_path, signals=stores()
            )

    refuse(rows.select(range(20)), tokenizer, "the teacher signals were made from other data")
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|assistant|>", "<|assistant|>:")
    refuse(rows, other, r"the teacher signals were made with another tokenizer .*template_sha256")


def test_training_with_another_truncation_than_the_signals_is_refused(tmp_path, model_of, rows, tokenizer, stores):
    training = Training(batch_size=1, max_steps=1)
    with pytest.raises(UserError, match=r"signals were made with Truncation\(max_length=1024"):
        make_trainer(
            METHODS["dckd"](), lambda: model_of("student"), rows, tokenizer, training, tmp_path, signals=stores(),
            truncation=Truncation(512),
        )  # fmt: skip


NUMBER = "must be a number, got"
REFUSED = [
    ("tvkdd", {}, "unknown method 'tvkdd'; did you mean 'tvkd'?"),
    ("dpo", {"alpha": 1.0}, "dpo has no option 'alpha'; its options: beta"),
    ("sft", {"beta": 1.0}, "sft has no option 'beta'; its options: none"),
    ("seqkd", {"beta": 1.0}, "its options: none"),
    ("dpo", {"beta": "big"}, f"dpo: beta {NUMBER} 'big'"),
    ("dpo", {"beta": True}, f"dpo: beta {NUMBER} True"),
    ("dpo", {"beta": math.nan}, "beta must be a finite number, got nan"),
    ("dpo", {"beta": math.inf}, "beta must be a finite number, got inf"),
    ("dpo", {"beta": 0.0}, "dpo: beta must be positive, got 0"),
    ("tvkd", {"beta": -0.1}, "tvkd: beta must be positive"),
    ("tvkd", {"potential": "kinetic"}, "potential must be 'value', 'shuffled', 'implicit_reward' or 'reward', got"),
    ("tvkd", {"shaping": "none"}, "shaping must be 'state', 'log_prob' or 'q', got 'none'"),
    ("tvkd", {"terminal": "never"}, "terminal must be 'last', 'bootstrap' or 'zero', got 'never'"),
    ("tvkd", {"values_from": "probs"}, "values_from must be 'logits' or 'logprobs', got 'probs'"),
    ("tvkd", {"values_from": "logprobs"}, "values_from=logprobs needs a value_temperature other than 1"),
    ("tvkd", {"discount": 1.5}, "discount must lie in 0..1, got 1.5"),
    ("tvkd", {"discount": -0.5}, "discount must lie in 0..1"),
    ("tvkd", {"clip": 0.0}, "clip must be positive, got 0.0"),
    ("tvkd", {"noise": -1.0}, "noise must be 0 or more, got -1.0"),
    ("tvkd", {"clip": "1"}, f"clip {NUMBER} '1'"),
    ("tvkd", {"standardize": 1}, "standardize must be a boolean, got 1"),
    ("tvkd", {"shaping": "q", "potential": "reward"}, "shaping=q replaces the potential; leave potential out"),
    ("vanillakd", {"alpha": -1.0}, "vanillakd: alpha must be 0 or more, got -1.0"),
    ("dckd", {"alpha": -1.0}, "dckd: alpha must be 0 or more"),
    ("dckd", {"beta": 1.0}, "dckd has no option 'beta'; its options: alpha"),
    ("adpa", {"gamma": -1.0}, "gamma must be 0 or more"),
    ("adpa", {"teacher_beta": -1.0}, "teacher_beta must be 0 or more"),
    ("adpa", {"advantage_reference": "teacher"}, "advantage_reference must be 'teacher_reference' or 'reference', got"),
    ("dpkd", {"beta": 0}, "dpkd: beta must be positive"),
    ("dpkd", {"lm_weight": -0.5}, "lm_weight must be 0 or more"),
    ("dpkd", {"level": "word"}, "level must be 'sequence' or 'token', got 'word'"),
    ("simpo", {"beta": 0.0}, "simpo: beta must be positive"),
    ("simpo", {"gamma": None}, f"gamma {NUMBER} None"),
    ("wpo", {"beta": 0.0}, "wpo: beta must be positive"),
    ("dadpo", {"beta": -0.1}, "dadpo: beta must be 0 or more"),
    ("dadpo", {"beta": 0.0, "teacher_beta": 0.0}, "beta and teacher_beta are both 0"),
    ("distillm2", {"skew": 1.0}, "skew must lie in 0..1"),
    ("distillm2", {"skew": -0.1}, "skew must lie in 0..1"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_bad_methods(name, options, message):
    with pytest.raises(UserError) as refusal:
        make_method(name, options)
    assert message in str(refusal.value)


def test_numbers_may_be_whole():
    assert make_method("tvkd", {"alpha": 1, "clip": 2}) == METHODS["tvkd"](alpha=1.0, clip=2.0)
    assert METHODS["dadpo"](beta=0).needs == (Need("reference", "logps"), Need("teacher", "logps"))


def test_responses_that_have_to_be_sampled_first():
    found = {name: sampled(METHODS[name]()) for name in METHODS}
    assert {name: part for name, part in found.items() if part} == {
        "seqkd": ("teacher_response",),
        "adpa": ("student_response",),
        "dpkd": ("teacher_response", "student_response"),
        "distillm2": ("teacher_response", "student_response"),
    }
    assert sampled(METHODS["dpkd"](level="token")) == ("teacher_response",)


# -- TVKD: potentials, ablations, controls -----------------------------------------------------------------------------


@pytest.fixture
def signals(rows, stores):
    return SignalSet.of(stores(), rows)


def test_the_value_potential_is_the_shaping_return_of_each_row(signals):
    found = METHODS["tvkd"](terminal="bootstrap").row_signals(signals)
    last = METHODS["tvkd"](terminal="last").row_signals(signals)
    for i in (0, 7, 23):
        values = signals.store("teacher", "values", "rejected").row(i)["rejected"]["values"]
        assert found["shaping_rejected"][i] == pytest.approx(values[-1] - values[0], abs=1e-6)
        assert last["shaping_rejected"][i] == pytest.approx(values[-2] - values[0], abs=1e-6)


def test_the_implicit_reward_potential_is_the_teachers_dpo_reward(signals):
    found = METHODS["tvkd"](potential="implicit_reward", teacher_beta=0.5).row_signals(signals)
    teacher, base = (signals.store(r, "logps", "chosen").row(3)["chosen"] for r in ("teacher", "teacher_reference"))
    expected = 0.5 * (teacher["logps"] - base["logps"])
    assert found["shaping_chosen"][3] == pytest.approx(expected, abs=1e-5)


def test_the_reward_potential_is_the_score_column(signals, rows):
    found = METHODS["tvkd"](potential="reward").row_signals(signals)
    assert found["shaping_chosen"].tolist() == rows["score_chosen"][:]
    assert found["shaping_rejected"].tolist() == rows["score_rejected"][:]
    without = SignalSet(signals.stores, rows.remove_columns(["score_chosen"]), signals.rows)
    missing = without.missing(METHODS["tvkd"](potential="reward").needs)
    assert list(map(str, missing)) == ["data.score_chosen"]


def test_the_placebo_moves_every_pair_to_another_row_and_keeps_the_distribution(signals):
    true = METHODS["tvkd"]().row_signals(signals)
    placebo = METHODS["tvkd"](potential="shuffled").row_signals(signals)
    margin = true["shaping_chosen"] - true["shaping_rejected"]
    moved = placebo["shaping_chosen"] - placebo["shaping_rejected"]
    assert sorted(margin) == sorted(moved)
    for n in (2, 3, 24, 1000):
        other = _other_rows(n)
        assert sorted(other) == list(range(n))
        assert all(other != np.arange(n))


def by_hand(**columns):
    """Signals of pairs, given as columns of chosen and rejected: log-probabilities, raw logits, values."""
    n = len(next(iter(columns.values()))[0])
    sides = dict(zip(SIDES, zip(*columns.values(), strict=True), strict=True))
    table = [
        {"row": i, **{
            f"{side}_{name}": column[i]
            for side, given in sides.items()
            for name, column in [("tokens", [2] * n), ("ended", [True] * n), *zip(columns, given, strict=True)]
        }}
        for i in range(n)
    ]  # fmt: skip
    manifest = {"role": "teacher", "kinds": list(columns), "responses": list(SIDES), "value_temperature": 0.5}
    reference = [{"row": i, "chosen_logps": -1.0, "rejected_logps": -2.0} for i in range(n)]
    stores = (
        store_by_hand(manifest, table),
        store_by_hand({"role": "reference", "kinds": ["logps"], "responses": list(SIDES)}, reference),
    )
    return SignalSet(stores, Dataset.from_list([{}] * n), np.arange(n))


def shaping(signals, **options):
    found = METHODS["tvkd"](**options).row_signals(signals)
    assert found["ref_chosen"].tolist() == [-1.0] * 3
    return found["shaping_chosen"].tolist(), found["shaping_rejected"].tolist()


def test_ablations_by_hand():
    """What stands in the place of the shaping: log-probabilities, raw logits, values made from log-probabilities."""
    signals = by_hand(
        logps=([-3.0, -5.0, -1.0], [-2.0, -9.0, -4.0]),
        q=([7.0, 8.0, 9.0], [1.0, 0.0, -1.0]),
        # [V(s_0), V(s_1), V(s_2)] of ended responses of two tokens: under "last" the return is V(s_1) - V(s_0)
        logprob_values=(
            [[1.0, 4.0, 50.0], [0.0, 2.0, 70.0], [3.0, 3.5, 50.0]],
            [[1.0, 0.0, 60.0], [0.0, 0.5, 60.0], [3.0, 1.0, 60.0]],
        ),
    )
    assert shaping(signals, shaping="log_prob") == ([-3.0, -5.0, -1.0], [-2.0, -9.0, -4.0])
    assert shaping(signals, shaping="q") == ([7.0, 8.0, 9.0], [1.0, 0.0, -1.0])
    made_from = {"values_from": "logprobs", "value_temperature": 0.5}
    assert shaping(signals, **made_from) == ([3.0, 2.0, 0.5], [-1.0, 0.5, -2.0])
    assert shaping(signals, **made_from, terminal="bootstrap") == ([49.0, 70.0, 47.0], [59.0, 60.0, 57.0])
    # 0.5 V(s_1) - V(s_0) + 0.5 V(s_1) - V(s_1) = -V(s_0)
    with pytest.raises(UserError, match="it carries no information"):
        shaping(signals, **made_from, discount=0.5)
    with pytest.raises(UserError, match=r"have value_temperature=0\.5, the method needs 2\.0"):
        signals.check_settings(METHODS["tvkd"](values_from="logprobs", value_temperature=2.0).needs)


def test_clipping_and_standardizing_by_hand():
    """Returns 1, 3, 1 and 3, 1, 9: mean 3, squares 4 + 0 + 4 + 0 + 4 + 36, spread sqrt 8."""
    signals = by_hand(logps=([1.0, 3.0, 1.0], [3.0, 1.0, 9.0]))
    assert shaping(signals, shaping="log_prob", clip=2.0) == ([1.0, 2.0, 1.0], [2.0, 1.0, 2.0])
    root = math.sqrt(8)
    found = shaping(signals, shaping="log_prob", standardize=True)
    assert found[0] == pytest.approx([-2 / root, 0.0, -2 / root])
    assert found[1] == pytest.approx([0.0, -2 / root, 6 / root])
    found = shaping(signals, shaping="log_prob", standardize=True, clip=0.5)
    assert found[0] == pytest.approx([-0.5, 0.0, -0.5])
    assert found[1] == pytest.approx([0.0, -0.5, 0.5])


def test_standardized_returns_do_not_depend_on_their_scale():
    one = by_hand(logps=([1.0, 3.0, 1.0], [3.0, 1.0, 9.0]))
    other = by_hand(logps=([100.0, 300.0, 100.0], [300.0, 100.0, 900.0]))
    options = {"shaping": "log_prob", "standardize": True}
    np.testing.assert_allclose(shaping(one, **options), shaping(other, **options), atol=1e-12)


def test_a_margin_that_is_constant_is_refused_unless_it_has_no_weight():
    signals = by_hand(logps=([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]))
    with pytest.raises(UserError, match=r"is the same number, 1, for all 3 pairs: it carries no information"):
        shaping(signals, shaping="log_prob")
    assert shaping(signals, shaping="log_prob", alpha=0.0) == ([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])


def test_noise_is_a_rows_own_and_in_units_of_the_spread():
    rng = np.random.default_rng(1)
    n = 4000
    returns = {side: rng.normal(5.0, 3.0, n) for side in SIDES}
    signals = by_hand(logps=tuple(returns[side].tolist() for side in SIDES))
    clean = METHODS["tvkd"](shaping="log_prob").row_signals(signals)
    noisy = METHODS["tvkd"](shaping="log_prob", noise=0.5).row_signals(signals)
    added = {side: noisy[f"shaping_{side}"] - clean[f"shaping_{side}"] for side in SIDES}
    both = np.concatenate([added[side] for side in SIDES])
    spread = np.concatenate([returns[side] for side in SIDES]).std()
    assert both.std() == pytest.approx(0.5 * spread, rel=0.03)
    assert abs(both.mean()) < 0.1
    for one, other in ((added["chosen"], added["rejected"]), (added["chosen"], returns["chosen"])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
    # the same rows, fewer of them and in another order: each keeps its own, up to the spread of those at hand
    rows = np.array([3000, 7, 42])
    few = METHODS["tvkd"](shaping="log_prob", noise=0.5).row_signals(signals.at(rows))
    alone = few["shaping_chosen"] - clean["shaping_chosen"][rows]
    assert np.ptp(alone / added["chosen"][rows]) < 1e-4
    # with `standardize`, what is left of the teacher correlates with it by 1 / sqrt(1 + noise^2)
    mixed = METHODS["tvkd"](shaping="log_prob", noise=2.0, standardize=True).row_signals(signals)["shaping_rejected"]
    assert np.corrcoef(mixed, returns["rejected"])[0, 1] == pytest.approx(1 / math.sqrt(5), abs=0.04)
    assert METHODS["tvkd"](noise=0).noise == 0


def test_methods_are_named_in_any_case_or_by_dotted_name():
    assert make_method("TVKD", {"alpha": 1}) == METHODS["tvkd"](alpha=1.0)
    assert make_method("prefdistill.methods.tvkd.TVKD", {}) == METHODS["tvkd"]()
    with pytest.raises(UserError, match=r"unknown method 'tvdk'; did you mean 'tvkd'\?"):
        make_method("tvdk", {})
    with pytest.raises(UserError, match=r"json\.JSONDecoder is no method"):
        make_method("json.JSONDecoder", {})


def test_display_names():
    names = {name: method.display_name for name, method in METHODS.items()}
    assert names["tvkd"] == "TVKD"
    assert names["dadpo"] == "daDPO"
    assert names["distillm2"] == "DistiLLM-2"
    assert len(set(names.values())) == len(METHODS)


def test_methods_are_made_without_torch():
    """Recipes are checked before torch is imported."""
    code = (
        "import sys; from prefdistill.methods import METHODS, make_method; make_method('tvkd', {'alpha': 0.5}); "
        "[method() for method in METHODS.values()]; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
