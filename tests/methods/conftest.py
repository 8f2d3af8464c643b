"""Models by role, data with sampled responses, stores and trainers, shared by the methods' tests."""

import pytest

from prefdistill.training.factory import make_trainer
from prefdistill.training.options import Training
from support.methods import Stores, role_model, with_responses


@pytest.fixture(scope="session")
def model_of(make_model):
    """Models by role. The student starts as the reference; the others differ from it and are surer of themselves."""

    def make(role):
        return role_model(make_model, role)

    return make


@pytest.fixture(scope="session")
def rows(pairs):
    """The pairs, with what a teacher and a student might have answered; some of it was cut before its end."""
    return with_responses(pairs)


@pytest.fixture(scope="session")
def stores(tmp_path_factory, model_of, rows, tokenizer):
    return Stores(tmp_path_factory.mktemp("stores"), model_of, rows, tokenizer)


@pytest.fixture(scope="session")
def trainer_of(tmp_path_factory, model_of, rows, tokenizer, stores):
    """The trainer of a method before its first step."""

    def make(method, *, k="vocab", p=None, same="", signals=None, data=None, **training):
        signals = stores(k, p, same) if signals is None else signals
        options = {"batch_size": 4, "max_steps": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 100}
        trainer = make_trainer(
            method, lambda: model_of(same or "student"), data or rows, tokenizer, Training(**options | training),
            tmp_path_factory.mktemp("out"), signals=signals, seed=11,
        )  # fmt: skip
        trainer.model.eval()
        return trainer

    return make
