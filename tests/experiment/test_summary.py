"""results.json from measurements: error bars, differences, roles, the headline, and a metric of another package."""

import json
from pathlib import Path

import numpy as np
import pytest

from prefdistill.core.errors import UserError
from prefdistill.evaluation.measure import Measured
from prefdistill.evaluation.metric_inputs import Responses
from prefdistill.evaluation.metrics import METRICS, Metric, headline_metric
from prefdistill.evaluation.responses import measure_texts
from prefdistill.evaluation.stats import crossed, estimate, mean_and_error
from prefdistill.evaluation.verdict import verdict, verdict_of
from prefdistill.experiment.readings import unlike
from prefdistill.experiment.recipe import Recipe, load_recipe
from prefdistill.experiment.summary import length_controlled_margins, margin_accuracies, side_by_side, summarise
from prefdistill.report import method_table, render_html

QUICKSTART = Path(__file__).parents[2] / "src" / "prefdistill" / "experiment" / "recipes" / "quickstart.yaml"
PLACEBO = {"method": "tvkd", "control": {"kind": "placebo", "of": "tvkd"}}


def recipe(**more):
    return Recipe(
        name="hand", data={"train": "x"}, model={"teacher": "a", "student": "b"},
        methods={"dpo": {}, "tvkd": {}, "shuffled": PLACEBO}, **more,
    )  # fmt: skip


def measured(*rewards, accuracy=None):
    """One run per data order, each with the rewards of its test prompts."""
    return [
        Measured(
            {"reward": float(np.mean(items))} | ({"reward_accuracy": accuracy} if accuracy is not None else {}),
            {"reward": list(items)} | ({"reward_accuracy": [accuracy] * 2} if accuracy is not None else {}),
            [],
        )
        for items in rewards
    ]


def test_one_run_has_error_bars_over_test_prompts():
    results = summarise(
        recipe(), [{"dpo": measured([1, 2, 3]), "tvkd": measured([2, 4, 6]), "shuffled": measured([0, 0, 0])}]
    )
    assert results["methods"]["tvkd"]["reward"] == {**estimate([2, 4, 6]), "over": "test prompts"}
    assert results["differences"]["tvkd"]["reward"] == {**estimate([1, 2, 3]), "over": "test prompts"}
    assert results["differences"]["shuffled"]["reward"]["mean"] == -2
    assert results["differences"].keys() == {"tvkd", "shuffled"}


def test_margins_where_length_says_nothing():
    """A term that goes by length, in either direction, gets one half; another one the mean of its two accuracies."""
    longer = np.array([1, 1, 1, 0, 0.5])  # the last pair is of equal length
    terms = {"value": np.array([1, 1, 0, 1, 0]), "as long": longer, "shorter": 1 - longer, "longer is better": longer}
    one = length_controlled_margins([terms], groups=[0, 0, 1, 1, 2])
    assert {name: estimate["mean"] for name, estimate in one.items()} == pytest.approx(
        {"value": (2 / 3 + 1) / 2, "as long": 0.5, "shorter": 0.5}
    )
    assert (one["value"]["n"], one["value"]["over"]) == (2, "test prompts")
    assert margin_accuracies([terms])["value"]["mean"] == pytest.approx(3 / 5)
    two = length_controlled_margins([terms, terms | {"value": np.array([0, 0, 0, 1, 1])}])
    assert two["value"]["mean"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert two["value"]["over"] == "seeds"
    assert length_controlled_margins([terms | {"longer is better": np.ones(5)}]) == {}  # length says all
    assert length_controlled_margins([]) == {}


def test_several_orders_have_error_bars_over_orders_and_prompts():
    """Order k is paired with order k: the difference is far surer than either mean."""
    dpo, tvkd = measured([0, 2], [10, 12], [20, 22]), measured([1, 3], [11, 14], [21, 23])
    results = summarise(recipe(), [{"dpo": dpo, "tvkd": tvkd}])
    level, difference = results["methods"]["dpo"]["reward"], results["differences"]["tvkd"]["reward"]
    assert level == {**crossed([[0, 2], [10, 12], [20, 22]]), "over": "data orders"}
    assert difference == {**crossed([[1, 1], [1, 2], [1, 1]]), "over": "data orders"}
    assert (difference["n"], difference["prompts"]) == (3, 2)
    assert difference["se"] < level["se"] / 10


def test_several_seeds_have_error_bars_over_seeds_and_the_prompts_that_they_share():
    """The orders of a seed are averaged first: they share its models and data."""
    by_seed = [
        {"dpo": measured([0, 1], [2, 3]), "tvkd": measured([3, 0], [5, 4])},
        {"dpo": measured([10, 9], [12, 9]), "tvkd": measured([11, 9], [12, 10])},
    ]
    results = summarise(recipe(), by_seed)
    assert results["methods"]["dpo"]["reward"] == {**crossed([[1, 2], [11, 9]]), "over": "seeds"}
    assert results["differences"]["tvkd"]["reward"] == {**crossed([[3, 0], [0.5, 0.5]]), "over": "seeds"}
    synthetic = load_recipe(QUICKSTART, only=["dpo", "tvkd"])
    results = summarise(synthetic, by_seed)  # every seed has prompts of its own
    assert results["methods"]["dpo"]["reward"] == {**mean_and_error([1.5, 10]), "over": "seeds"}
    assert results["differences"]["tvkd"]["reward"] == {**mean_and_error([1.5, 0.5]), "over": "seeds"}


def test_a_method_is_compared_with_its_control_item_by_item():
    """Both share the baseline's noise, so the gap is far surer than the two differences to the baseline."""
    noise = np.array([0, 8, 1, 5])
    models = {"dpo": measured(noise), "tvkd": measured([3, 4, 3, 4]), "shuffled": measured([2, 3, 2, 3])}
    results = summarise(recipe(), [models])
    assert results["gaps"] == {"shuffled": {"reward": {**estimate([1, 1, 1, 1]), "over": "test prompts"}}}
    raw = results | {"headline": {"metric": "reward", "method": "tvkd"}}
    placebos = verdict_of(raw)["runs"]["tvkd"]["placebos"]
    assert placebos == {"shuffled": False}
    assert verdict_of({**raw, "gaps": {}})["runs"]["tvkd"]["placebos"] == {"shuffled": True}  # as if independent


def test_differences_are_to_the_declared_baseline():
    runs = {"dpo": measured([1, 2]), "tvkd": measured([4, 4])}
    results = summarise(recipe(baseline="tvkd"), [runs])
    assert results["differences"].keys() == {"dpo"}
    assert results["differences"]["dpo"]["reward"]["mean"] == -2.5


def test_win_rates_are_against_the_start_on_the_same_prompts():
    runs = {
        "start": measured([1, 1, 1, 1]),
        "dpo": measured([2, 1, 0, 2], [0, 0, 0, 0]),
        "tvkd": measured([2] * 4, [2] * 4),
    }
    results = summarise(recipe(), [runs])
    assert results["methods"]["start"]["win_rate_start"] == {**estimate([0.5] * 4), "over": "test prompts"}
    wins = np.array([[1, 0.5, 0, 1], [0, 0, 0, 0]])
    assert results["methods"]["dpo"]["win_rate_start"] == {**crossed(wins), "over": "data orders"}
    assert results["differences"]["tvkd"]["win_rate_start"] == {**crossed(1 - wins), "over": "data orders"}
    assert runs["dpo"][0].items["win_rate_start"] == [1, 0.5, 0, 1]
    assert "start" not in results["differences"]


def test_no_win_rate_without_a_start_or_a_known_reward():
    assert "win_rate_start" not in summarise(recipe(), [{"dpo": measured([1, 2])}])["metrics"]
    unknown = [Measured({"reward_accuracy": 0.5}, {"reward_accuracy": [0, 1]}, [])]
    results = summarise(recipe(), [{"start": unknown, "dpo": unknown}])
    assert results["metrics"].keys() == {"reward_accuracy"}


def test_metrics_are_described_in_one_order():
    results = summarise(recipe(), [{"dpo": measured([1, 2], accuracy=0.5), "tvkd": measured([1, 2], accuracy=1.0)}])
    assert list(results["metrics"]) == ["reward", "reward_accuracy"]
    assert results["metrics"]["reward"]["higher_is_better"] is True
    assert results["differences"]["tvkd"]["reward_accuracy"]["mean"] == 0.5


def test_margin_accuracies_over_pairs_or_seeds():
    one, two = {"return": np.array([1, 0, 0.5, 1])}, {"return": np.array([0.0, 0, 0, 1])}
    assert margin_accuracies([one]) == {"return": {**estimate([1, 0, 0.5, 1]), "over": "test prompts"}}
    grouped = margin_accuracies([one], [0, 0, 1, 1])["return"]
    assert grouped == {**estimate([1, 0, 0.5, 1], [0, 0, 1, 1]), "over": "test prompts"}
    assert grouped["n"] == 2
    assert margin_accuracies([one, two]) == {"return": {**mean_and_error([0.625, 0.25]), "over": "seeds"}}
    shared = margin_accuracies([one, two], [0, 0, 1, 1], same_items=True)
    assert shared == {"return": {**crossed([one["return"], two["return"]], [0, 0, 1, 1]), "over": "seeds"}}
    assert margin_accuracies([]) == margin_accuracies([{}]) == {}


def test_the_same_prompts_side_by_side():
    def runs(*responses):
        rows = [{"prompt": f"p{i}", "response": text, "score": i} for i, text in enumerate(responses)]
        return [Measured({}, {}, rows), Measured({}, {}, [])]

    assert side_by_side({"dpo": runs("a", "b"), "tvkd": runs("c", "d"), "none": [Measured({}, {}, [])]}) == [
        {"prompt": "p0", "responses": {"dpo": "a", "tvkd": "c"}, "scores": {"dpo": 0, "tvkd": 0}},
        {"prompt": "p1", "responses": {"dpo": "b", "tvkd": "d"}, "scores": {"dpo": 1, "tvkd": 1}},
    ]
    assert side_by_side({"none": [Measured({}, {}, [])]}) == []


# -- roles and the headline --------------------------------------------------------------------------------------------


def test_roles_are_those_of_the_recipe():
    names = ("teacher", "start", "dpo", "tvkd", "shuffled")
    results = summarise(recipe(headline={"method": "tvkd"}), [{name: measured([1, 2]) for name in names}])
    assert results["roles"] == {
        "teacher": {"kind": "teacher", "of": None},
        "start": {"kind": "start", "of": None},
        "dpo": {"kind": "baseline", "of": None},
        "tvkd": {"kind": "method", "of": None},
        "shuffled": {"kind": "placebo", "of": "tvkd"},
    }
    assert results["headline"] == {"metric": "reward", "method": "tvkd"}
    assert results["display_names"] == {"dpo": "DPO", "tvkd": "TVKD"}


def test_the_default_headline_is_every_method_on_the_first_metric():
    results = summarise(recipe(), [{"dpo": measured([1, 2], accuracy=0.5), "tvkd": measured([1, 2], accuracy=1.0)}])
    assert results["headline"] == {"metric": "reward", "method": None}
    assert headline_metric(["chosen_logp", "reward_accuracy"]) == "reward_accuracy"
    assert headline_metric(["response_tokens"]) == "response_tokens"
    assert headline_metric([]) is None


def test_shipped_quickstart_declares_its_roles():
    loaded = load_recipe(QUICKSTART)
    controls = {name: (run.control.kind, run.control.of) for name, run in loaded.methods.items() if run.control}
    assert controls == {
        "tvkd-shuffled": ("placebo", "tvkd"),
        "tvkd-reversed-shuffled": ("placebo", "tvkd-reversed"),
        "oracle-margin": ("bound", "tvkd"),
        "dpo-other-order": ("noise_floor", "dpo"),
    }
    assert (loaded.headline.metric, loaded.headline.method) == ("reward", "tvkd")


def test_a_control_brings_the_method_it_controls_and_a_headline_may_be_left_out():
    assert list(load_recipe(QUICKSTART, only=["tvkd-shuffled"]).methods) == ["dpo", "tvkd", "tvkd-shuffled"]
    assert load_recipe(QUICKSTART, only=["dckd"]).headline.method is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "methods.tvkd-shuffled.control=true",
            "write e.g. `control: {kind: placebo, of: tvkd}`: kind is placebo, bound",
        ),
        ("methods.tvkd-shuffled.control=false", "leave it out"),
        ("methods.tvkd-shuffled.control={kind: placebo, of: nobody}", "control.of: 'nobody' is not among the methods"),
        ("methods.tvkd-shuffled.control={kind: placebo, of: oracle-margin}", "'oracle-margin' is a control"),
        ("methods.tvkd-shuffled.control={kind: placebo, of: tvkd-shuffled}", "'tvkd-shuffled' is a control"),
        ("methods.tvkd-shuffled.control={kind: other, of: tvkd}", "control.kind"),
        ("methods.dpo.control={kind: placebo, of: tvkd}", "the baseline cannot be a control"),
        ("headline.method=dpo", "headline.method 'dpo' is the baseline or a control"),
        ("headline.method=oracle-margin", "'oracle-margin' is the baseline or a control"),
        ("headline.method=nobody", "headline.method 'nobody' is not among the methods"),
        ("headline.metric='math:pi'", "headline.metric: 'math:pi' is not registered"),
        ("headline.metric=rewad", "headline.metric: unknown metric 'rewad'; did you mean 'reward'?"),
    ],
)
def test_wrong_roles_are_errors(change, message):
    with pytest.raises(UserError) as error:
        load_recipe(QUICKSTART, [change])
    assert message in str(error.value)


# -- a metric of another package ---------------------------------------------------------------------------------------


@pytest.fixture
def exclamations():
    """A registered metric, which counts exclamation marks."""
    METRICS.register(
        "exclamations", Metric("exclamation marks", lambda r: [text.count("!") for text in r.texts], by_length=True)
    )
    yield
    METRICS._things.pop("exclamations")


def test_a_registered_metric_is_in_the_results_the_table_and_the_report(exclamations, tmp_path):
    def responses(*texts):
        measurements = Measured()
        measure_texts(measurements, Responses(["p", "q"], list(texts), references=["one", "two words"]))
        return [measurements]

    results = summarise(
        recipe(headline={"metric": "exclamations"}),
        [{"start": responses("", ""), "dpo": responses("a!", "b"), "tvkd": responses("a!", "b!!!")}],
    )
    assert results["methods"]["tvkd"]["exclamations"]["mean"] == 2
    assert results["differences"]["tvkd"]["exclamations"]["mean"] == 1.5
    assert [part["n"] for part in results["by_length"]["exclamations"]] == [1, 1]
    assert "exclamation marks" in method_table(results, markdown=True)
    assert "exclamation marks" in verdict(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "exclamation marks</b> by the length" in render_html([tmp_path])


def test_a_metric_that_some_runs_lack_is_left_out_of_their_rows():
    partly = [measured([1, 2], accuracy=0.5)[0], measured([1, 2])[0]]
    models = {"dpo": measured([1, 2], [1, 2]), "tvkd": measured([1, 2], [3, 4], accuracy=1.0), "shuffled": partly}
    results = summarise(recipe(), [models])
    assert results["methods"]["tvkd"].keys() == {"reward", "reward_accuracy"}
    assert results["methods"]["shuffled"].keys() == results["differences"]["tvkd"].keys() == {"reward"}


def test_stages_that_read_other_tokens_of_the_same_data_are_named():
    def stage(name, ids, data="train", seed=0):
        return {"name": name, "seed": seed, "read": {"data": data, "responses": ["chosen", "rejected"], "ids": ids}}

    alike = [stage("teacher-dpo", "a"), stage("distill-dpo-0", "a"), stage("distill-dpo-0", "b", seed=1)]
    assert unlike([*alike, stage("sample", "c", "test"), {"name": "init", "seed": 0, "read": {}}]) == []
    assert unlike([*alike, stage("distill-tvkd-0", "b")]) == [
        "stages have encoded train into different rows or tokens: teacher-dpo, distill-dpo-0, unlike distill-tvkd-0"
    ]
