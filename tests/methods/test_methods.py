"""Methods by name and options, what they refuse, and the shaping terms of TVKD."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset

from prefdistill import METHODS
from prefdistill.core.errors import UserError
from prefdistill.data.truncation import Truncation
from prefdistill.methods import make_method, sampled
from prefdistill.methods.tvkd import _other_rows
from prefdistill.signals import Need, SignalSet
from prefdistill.training.factory import make_trainer
from prefdistill.training.options import Training
from support.methods import (
    SAMPLED,
    SIDES,
)
from support.stores import store_by_hand

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


def test_missing_signals_are_listed_for_every_method():
    own = {name for name in METHODS if METHODS[name].scores_reference}  # WPO computes what it lacks
    assert {name for name, *_ in MISSING} == {name for name in METHODS if METHODS[name]().needs} - own


@pytest.mark.parametrize(("name", "options", "roles", "message"), MISSING)
def test_a_missing_signal_names_the_command_that_extracts_it(name, options, roles, message, trainer_of, stores):
    """All other signals of the models in `roles` are there, of the pairs or, of a teacher alone, of the samples."""
    where = SAMPLED if roles == ["teacher"] else SIDES
    at_hand = [s for s in stores() if s.role in roles and set(s.responses) <= set(where)]
    assert len(at_hand) == len(roles)
    with pytest.raises(UserError) as refusal:
        trainer_of(METHODS[name](**options), signals=at_hand)
    assert message in str(refusal.value)


def test_missing_responses_name_the_command_that_samples_them(pairs, tokenizer, model_of, tmp_path):
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
    refuse(rows, other, r"signals were made with another tokenizer .*template_sha256|one vocabulary only: map")


@pytest.mark.parametrize(
    ("options", "numbers", "message"),
    [
        (
            {"weight": "lost"},
            None,
            "DPO lacks data.lost. The data has no column 'lost'; give every pair a number there",
        ),
        ({"weight": "w"}, [1.0, -0.5], "weights must be 0 or more, not all 0; the least in column 'w' is -0.5"),
        ({"weight": "w"}, [0.0, 0.0], "weights must be 0 or more, not all 0; the least in column 'w' is 0"),
        ({"weight": "w"}, [1.0, math.nan], "column 'w' has no number in row 1 of the data"),
        ({"margin": "w"}, [1.0, None], "column 'w' has no number in row 1 of the data"),
        ({"margin": "w"}, ["one", "two"], "column 'w' must hold numbers; convert it, or name another column"),
        ({"weight": "w"}, [[1.0], [2.0]], "column 'w' must hold numbers; convert it, or name another column"),
    ],
)
def test_columns_that_cannot_be_weights_or_margins_are_refused(options, numbers, message, rows, trainer_of, stores):
    data = rows if numbers is None else rows.add_column("w", numbers * 12)
    with pytest.raises(UserError) as refusal:
        trainer_of(METHODS["dpo"](**options), data=data)
    assert message in str(refusal.value)


def test_weights_and_margins_of_a_csv_file_are_text(rows, trainer_of):
    method = METHODS["dpo"](weight="w", margin="w")
    trainers = [trainer_of(method, data=rows.add_column("w", numbers)) for numbers in ([0.5] * 24, ["0.5"] * 24)]
    first, second = (trainer.train_dataset[0] for trainer in trainers)
    assert first == second
    assert first["feature_weight"] == first["feature_margin"] == 0.5


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
    ("dpo", {"alpha": 1.0}, "dpo has no option 'alpha'; its options: beta, margin, weight"),
    ("dpo", {"weight": 0.5}, "dpo: weight must be a string, got 0.5"),
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
    ("dckd", {"beta": 1.0}, "dckd has no option 'beta'; its options: across, alpha"),
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
    ("distillm2", {"skew": 0.0, "across": "first_token"}, "skew must be above 0 with across"),
    ("vanillakd", {"across": "uld"}, "across must be 'first_token', got 'uld'"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_bad_methods(name, options, message):
    with pytest.raises(UserError) as refusal:
        make_method(name, options)
    assert message in str(refusal.value)


def test_integers_are_accepted_as_numbers():
    assert make_method("tvkd", {"alpha": 1, "clip": 2}) == METHODS["tvkd"](alpha=1.0, clip=2.0)
    assert METHODS["dadpo"](beta=0).needs == (Need("reference", "logps"), Need("teacher", "logps"))


def test_sampled_responses_of_each_method():
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
