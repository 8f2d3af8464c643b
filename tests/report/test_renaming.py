"""No run's name has a meaning: whatever the runs are called, the report says the same of them."""

import copy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from prefdistill.evaluation.results import Results, Role
from prefdistill.evaluation.verdict import verdict, verdict_of
from prefdistill.report import sections, svg
from prefdistill.report.glossary import glossary_of
from prefdistill.report.warnings import warnings_of
from support.runs import NAN, make_results

TRICKY = (
    "tvkd", "dpo", "teacher", "start", "tvkd-shuffled", "dpo-shuffled", "other-order", "dpo-other-order",
    "oracle-margin", "placebo", "random", "sft-chosen", "distill-tvkd-0", "baseline", "method", "shuffled-other-order",
)  # fmt: skip
BY_NAME = ("methods", "differences", "roles", "labels", "display_names", "shaping", "responses")


def renamed(results: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the results with every run renamed, in every section."""
    results = copy.deepcopy(results)
    for section in BY_NAME:
        results[section] = {names.get(name, name): value for name, value in results[section].items()}
    for role in results["roles"].values():
        role["of"] = role["of"] and names[role["of"]]
    if results["headline"]["method"]:
        results["headline"]["method"] = names[results["headline"]["method"]]
    for ranges in results["by_length"].values():
        for part in ranges:
            part["methods"] = {names[name]: value for name, value in part["methods"].items()}
    for sample in results["samples"]:
        for part in ("responses", "scores"):
            sample[part] = {names[name]: value for name, value in sample[part].items()}
    for stage in results["stages"]:
        if "method" in stage:
            stage["method"] = names[stage["method"]]
            stage["name"] = f"distill-{stage['method']}-{stage['order']}"
    return results


def seen(results: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return what the report says of the results, with each name replaced by the original one."""
    original = {new: old for old, new in names.items()}
    read = Results(results)
    run = {"results": read, "curves": collapsed(results), "early": {}, "problems": [], "notes": [], "path": ".",
           "name": "run", "recipe": None, "environment": None}  # fmt: skip
    judged = verdict_of(results)
    table = sections.table_of(read, svg.styles_of(read))
    return {
        "text": judged["text"],  # of display names
        "floor": judged["noise_floor"],
        "runs": {
            original[name]: {**of, "placebos": {original[p]: v for p, v in of["placebos"].items()}}
            for name, of in judged["runs"].items()
        },
        "roles": [(original[row["name"]], row["role"], row["word"], row["style"]) for row in table["rows"]],
        "warnings": [
            next(
                (f"{old}: {w.removeprefix(new + ': ')}" for new, old in original.items() if w.startswith(f"{new}: ")), w
            )
            for w in warnings_of(run)
        ],
        "terms": glossary_of([run]),
        "stages": [(row["runs"], row["time"]) for row in sections.stages_of(read)["rows"]],
    }


def collapsed(results: dict[str, Any]) -> dict[str, Any]:
    """Return training logs of every method whose rejected log-probs collapse."""
    return {
        name: {"logps/rejected": [[(float(s), -10.0 - s) for s in range(100)]]}
        for name, role in results["roles"].items()
        if role["kind"] not in ("teacher", "start")
    }


def plain_results() -> dict[str, Any]:
    """Return results with a display name for every run, a strong third method and numbers that are not finite."""
    results = make_results()
    results["display_names"] = {name: f"run {i}" for i, name in enumerate(results["methods"])}
    results["differences"]["sft-chosen"]["reward_t1"]["mean"] = 0.889
    results["methods"]["start"]["reward_greedy"]["mean"] = NAN
    return results


@settings(max_examples=60, deadline=None)
@given(st.permutations(TRICKY), st.sampled_from(["tvkd", None]), st.booleans())
def test_renaming_every_run_changes_nothing_but_names(order: list[str], headline: str | None, noisy: bool) -> None:
    results = plain_results()
    results["headline"]["method"] = headline
    if noisy:
        results["differences"]["dpo-other-order"]["reward_t1"]["mean"] = 0.5
    same = {name: name for name in results["methods"]}
    names = dict(zip(results["methods"], order, strict=False))
    assert seen(renamed(results, names), names) == seen(results, same)


def test_every_method_is_in_the_verdict_with_its_difference() -> None:
    results = plain_results()
    for headline in ("tvkd", "sft-chosen", None):
        results["headline"]["method"] = headline
        text = verdict(results)
        assert "0.039 ± " in text
        assert "0.889 ± " in text


def test_results_without_roles_are_all_methods_whatever_they_are_called() -> None:
    results = make_results()
    del results["roles"]
    assert set(Results(results).roles.values()) == {Role("method")}
    assert verdict(results).startswith("No baseline was run")
