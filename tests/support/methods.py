"""Models, signals and trainers of the methods' tests."""

import numpy as np
import torch

from prefdistill import LiveTeacher
from prefdistill.signals import extract_signals

SIDES = ("chosen", "rejected")
SAMPLED = ("teacher_response", "student_response")
ROWS = (0, 3, 8, 13, 18, 23)  # of the data, with responses of many lengths, ended and cut

NUMBERS = {"importance": [(i % 4) / 2 for i in range(24)], "gap": [0.3 * (i % 5) - 0.5 for i in range(24)]}

MODELS = {"student": (0, 2.0), "reference": (0, 2.0), "teacher": (5, 4.0), "teacher_reference": (6, 3.0)}


def role_model(make_model, role):
    seed, sharpness = MODELS[role]
    model = make_model(seed)
    model.lm_head.weight.data *= sharpness
    return model


def with_responses(pairs):
    """The 24 pairs, with what a teacher and a student might have answered, and numbers that weigh them."""
    data = pairs
    for name, numbers in NUMBERS.items():
        data = data.add_column(name, numbers)
    for n, name in enumerate(SAMPLED):
        data = data.add_column(name, [pairs[(5 * i + 7 * n + 3) % 24][SIDES[n]] for i in range(24)])
        data = data.add_column(f"{name}_ended", [(i + n) % 3 != 0 for i in range(24)])
    return data


class Stores:
    """All signals that any method needs, as the command line extracts them, with top-k distributions."""

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


def with_batch(trainer):
    return trainer, batch_of(trainer, ROWS)
