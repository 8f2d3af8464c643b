"""The verdict: what it says of a win, a loss, a tie and controls, and that it depends on no run's name."""

import json

import pytest

from prefdistill.evaluation.results import Estimate
from prefdistill.evaluation.verdict import verdict, verdict_of
from support.runs import NAN, make_results, small

REFERENCES = {"teacher": None, "start": None}  # measured, but with nothing paired
REFERENCE_ROLES = {"teacher": ("teacher", None), "start": ("start", None)}
PLACEBO = {"placebo": ("placebo", "tvkd")}
VERDICTS = {
    "win": (
        small({"tvkd": (0.039, 0.012, 10)}),
        "TVKD beat DPO by 0.039 ± 0.012 on reward (mean ± s.e. over 10 seeds).",
    ),
    "loss, in the same words": (
        small({"tvkd": (-0.114, 0.021, 10)}),
        "TVKD lost to DPO by 0.114 ± 0.021 on reward (mean ± s.e. over 10 seeds).",
    ),
    "lower is better: a negative difference wins": (
        small({"tvkd": (-0.2, 0.03, 10)}, higher=False),
        "TVKD beat DPO by 0.200 ± 0.030 on reward (mean ± s.e. over 10 seeds).",
    ),
    "lower is better: a positive difference loses": (
        small({"tvkd": (0.2, 0.03, 10)}, higher=False),
        "TVKD lost to DPO by 0.200 ± 0.030 on reward (mean ± s.e. over 10 seeds).",
    ),
    "no direction: neither wins": (
        small({"tvkd": (0.2, 0.03, 10)}, higher=None),
        "TVKD came out above DPO by 0.200 ± 0.030 on reward (mean ± s.e. over 10 seeds).",
    ),
    "within two standard errors": (
        small({"tvkd": (0.02, 0.012, 10)}),
        "TVKD differs from DPO on reward by no more than seed-to-seed variance: +0.020 ± 0.012 "
        "(mean ± s.e. over 10 seeds).",
    ),
    "exactly two standard errors is not more than two": (
        small({"tvkd": (0.5, 0.25, 10)}),
        "TVKD differs from DPO on reward by no more than seed-to-seed variance: +0.500 ± 0.250 "
        "(mean ± s.e. over 10 seeds).",
    ),
    "below the noise floor": (
        small({"tvkd": (0.03, 0.01, 10), "again": (0.04, 0.01, 10)}, controls={"again": ("noise_floor", "dpo")}),
        "TVKD differs from DPO on reward by no more than the noise floor (0.040, from again): +0.030 ± 0.010 "
        "(mean ± s.e. over 10 seeds).",
    ),
    "a noise floor of either sign, at least two of its standard errors": (
        small({"tvkd": (-0.03, 0.01, 10), "again": (0.001, 0.02, 10)}, controls={"again": ("noise_floor", "dpo")}),
        "TVKD differs from DPO on reward by no more than the noise floor (0.040, from again): -0.030 ± 0.010 "
        "(mean ± s.e. over 10 seeds).",
    ),
    "above the noise floor": (
        small({"tvkd": (0.05, 0.01, 10), "again": (-0.01, 0.01, 10)}, controls={"again": ("noise_floor", "dpo")}),
        "TVKD beat DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds).",
    ),
    "a repeat of another method than the baseline": (
        small({"tvkd": (0.05, 0.01, 10), "again": (0.12, 0.01, 10)}, controls={"again": ("noise_floor", "tvkd")}),
        "TVKD differs from DPO on reward by no more than the noise floor (0.070, from again): +0.050 ± 0.010 "
        "(mean ± s.e. over 10 seeds).",
    ),
    "three seeds: two s.e. but an interval that includes zero": (
        small({"tvkd": (0.039, 0.012, 3)}, seeds=3),
        "TVKD came out ahead of DPO by 0.039 ± 0.012 on reward (mean ± s.e. over 3 seeds), but with so few repeats "
        "the 95 % interval (-0.013 to +0.091) still includes zero.",
    ),
    "two seeds": (
        small({"tvkd": (0.5, 0.01, 2)}, seeds=2),
        "TVKD beat DPO by 0.500 ± 0.010 on reward (mean ± s.e. over 2 seeds); 2 seeds are too few to cover much more "
        "than training-order noise.",
    ),
    "data orders of one seed": (
        small({"tvkd": (-0.5, 0.01, 3)}, over="data orders", seeds=1),
        "TVKD lost to DPO by 0.500 ± 0.010 on reward (mean ± s.e. over 3 data orders); this covers training-order "
        "noise only, another seed may differ.",
    ),
    "what it was repeated over is inferred": (
        small({"tvkd": (0.0, 0.01, 3)}, over="", seeds=1),
        "TVKD differs from DPO on reward by no more than order-to-order variance: 0.000 ± 0.010 (mean ± s.e. over "
        "3 data orders); this covers training-order noise only, another seed may differ.",
    ),
    "one run": (
        small({"tvkd": (0.5, None, 1)}),
        "TVKD came out 0.500 better than DPO on reward in a single run; without repeats this may be noise.",
    ),
    "one run with a standard error of zero": (
        small({"tvkd": (-0.5, 0.0, 1)}),
        "TVKD came out 0.500 worse than DPO on reward in a single run; without repeats this may be noise.",
    ),
    "several runs without a standard error": (
        small({"tvkd": (0.5, None, 3)}),
        "TVKD came out 0.500 better than DPO on reward over 3 seeds; without a standard error it may be noise.",
    ),
    "placebo did as well as a win": (
        small({"tvkd": (0.05, 0.01, 10), "placebo": (0.045, 0.01, 10)}, controls=PLACEBO),
        "TVKD beat DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds); its placebo placebo "
        "(+0.045 ± 0.010) did as well, so the gain cannot be credited to the teacher's signal.",
    ),
    "placebo did less well than a win": (
        small({"tvkd": (0.05, 0.01, 10), "placebo": (-0.045, 0.01, 10)}, controls=PLACEBO),
        "TVKD beat DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds); its placebo placebo "
        "(-0.045 ± 0.010) did less well.",
    ),
    "placebo did no worse than a loss": (
        small({"tvkd": (-0.05, 0.01, 10), "placebo": (-0.01, 0.01, 10)}, controls=PLACEBO),
        "TVKD lost to DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds); its placebo placebo "
        "(-0.010 ± 0.010) did no worse.",
    ),
    "placebo where lower is better": (
        small({"tvkd": (-0.05, 0.01, 10), "placebo": (-0.06, 0.01, 10)}, controls=PLACEBO, higher=False),
        "TVKD beat DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds); its placebo placebo "
        "(-0.060 ± 0.010) did as well, so the gain cannot be credited to the teacher's signal.",
    ),
    "not finite": (
        small({"tvkd": (NAN, 0.1, 3)}),
        "The difference between TVKD and DPO on reward is not a finite number: a run failed or diverged.",
    ),
    "no paired difference": (
        small({"tvkd": None}),
        "TVKD scored 1.000 and DPO 1.000 on reward, but no paired difference was recorded, so neither can be called "
        "better.",
    ),
    "two placebos": (
        small(
            {"tvkd": (0.05, 0.01, 10), "p": (0.045, 0.01, 10), "q": (-0.045, 0.01, 10), "r": (0.9, 0.01, 10)},
            controls={"p": ("placebo", "tvkd"), "q": ("placebo", "tvkd"), "r": ("placebo", "dpo")},
        ),
        "TVKD beat DPO by 0.050 ± 0.010 on reward (mean ± s.e. over 10 seeds); its placebo p (+0.045 ± 0.010) did as "
        "well, so the gain cannot be credited to the teacher's signal; its placebo q (-0.045 ± 0.010) did less well.",
    ),
    "another method came out ahead": (
        small(
            {"tvkd": (-0.114, 0.021, 10), "other": (0.093, 0.019, 10), "placebo": (0.2, 0.01, 10)},
            controls=PLACEBO,
            headline="tvkd",
        ),
        "TVKD lost to DPO by 0.114 ± 0.021 on reward (mean ± s.e. over 10 seeds); its placebo placebo "
        "(+0.200 ± 0.010) did no worse. The other method against DPO: other ahead (+0.093 ± 0.019).",
    ),
    "another method came out ahead, of few seeds": (
        small({"tvkd": (0.0, 0.01, 3), "other": (-0.093, 0.03, 3)}, seeds=3, higher=False, headline="tvkd"),
        "TVKD differs from DPO on reward by no more than seed-to-seed variance: 0.000 ± 0.010 (mean ± s.e. over 3 "
        "seeds). The other method against DPO: other leans ahead (-0.093 ± 0.030).",
    ),
    "every other method has its own difference, and the sentence says that they are many": (
        small(
            {
                "tvkd": (0.0, 0.01, 10),
                "dckd": (0.1, 0.01, 10),
                "seqkd": (0.01, 0.01, 10),
                "adpa": (-0.1, 0.01, 10),
                "one": (0.3, None, 1),
                "failed": (NAN, None, 1),
                **REFERENCES,
            },
            controls=REFERENCE_ROLES,
            headline="tvkd",
        ),
        "TVKD differs from DPO on reward by no more than seed-to-seed variance: 0.000 ± 0.010 (mean ± s.e. over 10 "
        "seeds). The other methods against DPO: DCKD ahead (+0.100 ± 0.010), SeqKD within noise (+0.010 ± 0.010), ADPA "
        "behind (-0.100 ± 0.010), one +0.300 in a single run, failed not finite; 5 methods, not corrected for multiple "
        "comparisons.",
    ),
    "a placebo of another method that did as well": (
        small(
            {"tvkd": (0.1, 0.01, 9), "other": (0.2, 0.01, 9), "p": (0.19, 0.01, 9)},
            controls={"p": ("placebo", "other")},
            headline="tvkd",
        ),
        "TVKD beat DPO by 0.100 ± 0.010 on reward (mean ± s.e. over 9 seeds). The other method against DPO: other "
        "ahead (+0.200 ± 0.010; its placebo p did as well).",
    ),
    "no headline: every method, no control": (
        small(
            {"dckd": (0.14, 0.02, 10), "adpa": (-0.2, 0.02, 10), "seqkd": (0.01, 0.02, 10), "best": (1, 0.1, 10)},
            controls={"best": ("bound", "dckd")},
        ),
        "Against DPO on reward: DCKD ahead (+0.140 ± 0.020), ADPA behind (-0.200 ± 0.020), SeqKD within noise "
        "(+0.010 ± 0.020) (mean ± s.e. over 10 seeds).",
    ),
    "no headline, and no method ahead": (
        small({"dckd": (0.03, 0.02, 10), "adpa": (-0.2, 0.02, 10)}),
        "No method beats DPO on reward by more than seed-to-seed variance: DCKD within noise (+0.030 ± 0.020), ADPA "
        "behind (-0.200 ± 0.020) (mean ± s.e. over 10 seeds).",
    ),
    "no headline, one run each": (
        small({"dckd": (0.14, None, 1), "adpa": (NAN, None, 1)}),
        "Against DPO on reward: DCKD +0.140 in a single run, ADPA not finite; without repeats this may be noise.",
    ),
    "the only method is the headline": (
        small({"dckd": (0.14, 0.02, 10), **REFERENCES}, controls=REFERENCE_ROLES),
        "DCKD beat DPO by 0.140 ± 0.020 on reward (mean ± s.e. over 10 seeds).",
    ),
    "SFT is a method": (
        small({"sft": (-0.5, 0.1, 10), **REFERENCES}, controls=REFERENCE_ROLES),
        "SFT lost to DPO by 0.500 ± 0.100 on reward (mean ± s.e. over 10 seeds).",
    ),
    "names mean nothing: the same verdict as if the placebo were called one": (
        small(
            {"dpo-shuffled": (0.2, 0.01, 10), "tvkd": (0.2, 0.01, 10), "teacher": (0.25, 0.01, 10)},
            controls={"tvkd": ("placebo", "dpo-shuffled"), "teacher": ("noise_floor", "dpo")},
        )
        | {"display_names": {}},
        "dpo-shuffled differs from dpo on reward by no more than the noise floor (0.250, from teacher): +0.200 ± 0.010 "
        "(mean ± s.e. over 10 seeds); its placebo tvkd (+0.200 ± 0.010) did as well.",
    ),
    "no baseline": (
        {"methods": {"tvkd": {"r": 1.0}}},
        "No baseline was run, so nothing can be said about which method is better.",
    ),
    "controls only": (
        small({"best": (1, 0.1, 10), **REFERENCES}, controls=REFERENCE_ROLES | {"best": ("bound", "dpo")}),
        "Only baselines and controls were run, so there is nothing to compare.",
    ),
    "nothing measured": ({"methods": {"tvkd": {}}}, "Nothing was measured, so there is nothing to compare."),
    "the headline metric was not measured": (
        small({"tvkd": (0.1, 0.01, 10)}) | {"headline": {"metric": "rouge_l", "method": None}},
        "The headline metric, rouge_l, was not measured, so there is nothing to compare.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(case: str) -> None:
    results, sentence = VERDICTS[case]
    assert verdict(results) == sentence


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict_is_one_line_that_a_terminal_can_print(case: str) -> None:
    sentence = verdict(VERDICTS[case][0])
    assert "\n" not in sentence
    assert sentence.endswith(".")
    sentence.encode("cp1252")


def test_interval_uses_students_t() -> None:
    assert Estimate(1.0, 0.5, 3).interval() == pytest.approx((-1.1513, 3.1513), abs=1e-4)
    assert Estimate(1.0, 0.5, 11).interval() == pytest.approx((1 - 0.5 * 2.22814, 1 + 0.5 * 2.22814), abs=1e-4)
    assert Estimate(1.0, 0.5, None).interval() == pytest.approx((1 - 0.5 * 1.95996, 1 + 0.5 * 1.95996), abs=1e-4)
    assert Estimate(1.0, 0.5, 1).interval() is None
    assert Estimate(1.0, None, 3).interval() is None


def test_a_recorded_interval_wins_over_students_t() -> None:
    measured = Estimate.parse({"mean": 0.7, "se": 0.1, "n": 9, "low": 0.55, "high": 0.81})
    assert measured is not None
    assert measured.interval() == (0.55, 0.81)
    upside_down = Estimate.parse({"mean": 0.7, "se": 0.1, "n": 9, "low": 0.81, "high": 0.55})
    assert upside_down is not None
    assert upside_down.interval() == pytest.approx((0.7 - 0.2306, 0.7 + 0.2306), abs=1e-4)  # t of 8 degrees of freedom


def test_a_verdict_over_test_prompts_says_what_it_does_not_cover() -> None:
    results = make_results()
    estimate = {"mean": 0.2, "se": 0.02, "n": 87, "over": "test prompts", "low": 0.16, "high": 0.24}
    results["differences"] = {"tvkd": {"reward_t1": estimate}}
    assert "over 87 test prompts" in verdict(results)
    assert "another training run or seed may differ" in verdict(results)


def test_verdict_as_data() -> None:
    results = make_results()
    verdict_data = verdict_of(results)
    assert verdict_data["text"] == verdict(results)
    assert (verdict_data["metric"], verdict_data["baseline"]) == ("reward_t1", "dpo")
    assert verdict_data["noise_floor"] == pytest.approx(2 * (0.007 + 0.002 * 7 / 3))
    assert verdict_data["runs"]["tvkd"] == {
        "outcome": "leaning", "good": 1, "below_floor": False, "placebos": {"tvkd-shuffled": False},
    }  # fmt: skip
    assert verdict_data["runs"].keys() == results["differences"].keys()


def test_a_verdict_by_a_reward_model_that_measures_length_says_so() -> None:
    unsure = {
        "accuracy": {"mean": 0.7, "se": 0.03, "n": 87},
        "longer_is_better": {"mean": 0.83, "se": 0.03, "n": 87},
    }
    raw = json.loads(json.dumps(small({"tvkd": (0.2, 0.01, 10)})).replace('"r"', '"reward_model_win_rate_start"'))
    assert verdict(raw | {"reward_model": unsure}) == (
        f"{verdict(raw)} Do not rely on this: the reward model orders 0.700 ± 0.030 of the held-out pairs correctly, "
        "not clearly more than length alone (0.830): its win rates may only measure length."
    )
    assert verdict(raw | {"reward_model": unsure | {"longer_is_better": {"mean": 0.6}}}) == verdict(raw)
    # a verdict on what no reward model has scored stands
    assert "rely" not in verdict(small({"tvkd": (0.2, 0.01, 10)}) | {"reward_model": unsure})
