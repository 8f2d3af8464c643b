"""Reading a run directory: results, training logs, and what is wrong with them."""

import json
import math
import re
from pathlib import Path

import pytest

from prefdistill.core.errors import UserError
from prefdistill.report import load_run, render_html
from support.runs import NAN, REWARD, distill_stage, log


def test_load_run(run: Path) -> None:
    loaded = load_run(run)
    assert loaded["name"] == "quickstart"
    assert loaded["results"].methods.keys() == REWARD.keys()
    assert loaded["recipe"].startswith("name: quickstart")
    assert loaded["environment"]["packages"]["trl"] == "1.16.0"
    assert list(loaded["curves"]) == [name for name in REWARD if name not in ("teacher", "start")]
    assert len(loaded["curves"]["tvkd"]["loss"]) == 9  # one line per seed and data order
    assert loaded["curves"]["tvkd"]["loss"][0][0][0] == 5
    assert "learning_rate" not in loaded["curves"]["tvkd"]
    assert loaded["early"].keys() == {"teacher-sft", "teacher-dpo", "student-sft"}
    assert loaded["problems"] == []
    assert load_run(run / "results.json")["name"] == "quickstart"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results.json"),
        ("{", "not valid JSON"),
        ("[]", 'no "methods"'),
        ('{"methods": {}}', 'no "methods"'),
        ('{"methods": {"dpo": 3}}', '"dpo" must be'),
    ],
)
def test_load_run_names_what_is_wrong(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_run(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_unfinished_run_and_no_run_have_different_messages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no results\.json of a run: name a directory"):
        load_run(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match="the run has not finished"):
        load_run(tmp_path)


def test_load_run_of_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"):
        load_run(tmp_path / "file")
    with pytest.raises(UserError, match="no run directory given"):
        render_html([])


def test_stages_that_the_results_do_not_name_are_not_read(tmp_path: Path) -> None:
    (tmp_path.parent / "metrics.jsonl").write_text('{"step": 1, "loss": 9}')
    named = distill_stage("dpo", seed=0, directory="seed-0/distill-dpo-0")
    outside = [distill_stage("dpo", 3, seed=0, directory=".."), {"name": "data", "seed": 0, "directory": "/etc"}]
    stages = [named, *outside, {"name": ["of a stranger"], "seed": {}, "directory": 1, "method": {}}, 7]
    (tmp_path / "results.json").write_text(json.dumps({"methods": {"dpo": {"r": 1}}, "stages": stages}))
    log(tmp_path, 0, "distill-dpo-0", [{"step": 1, "loss": 1}])
    log(tmp_path, 1, "distill-dpo-0", [{"step": 1, "loss": 9}])  # of another seed, order, method
    log(tmp_path, 0, "distill-dpo-1", [{"step": 1, "loss": 9}])
    log(tmp_path, 0, "distill-tvkd-0", [{"step": 1, "loss": NAN}])
    loaded = load_run(tmp_path)
    assert (loaded["curves"], loaded["early"]) == ({"dpo": {"loss": [[(1, 1)]]}}, {})
    assert loaded["problems"] == []


def test_logs_of_interrupted_and_diverged_runs(tmp_path: Path) -> None:
    stages = [distill_stage("dpo", seed=n, directory=f"seed-{n}/distill-dpo-0") for n in (0, 2, 10)]
    (tmp_path / "results.json").write_text(json.dumps({"methods": {"dpo": {"r": 1}}, "stages": stages}))
    log(tmp_path, 0, "distill-dpo-0", [{"step": 1, "loss": 9}, {"step": 2, "loss": 5}, {"step": 1, "loss": 7}])
    log(tmp_path, 10, "distill-dpo-0", [{"step": 1, "loss": 3}, {"step": 2, "loss": NAN}, {"train_runtime": 3}])
    log(tmp_path, 2, "distill-dpo-0", [{"step": 1, "loss": 4}])
    with (tmp_path / "seed-2/distill-dpo-0/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    loaded = load_run(tmp_path)
    first, second, third = loaded["curves"]["dpo"]["loss"]
    assert first == [(1, 7), (2, 5)]  # a resumed run logs a step again: the last one counts
    assert second == [(1, 4)]
    assert third[0] == (1, 3)
    assert any("1 line is not valid JSON" in p for p in loaded["problems"])
    assert any("not finite at 1 logged step, the first at step 2" in p for p in loaded["problems"])
    assert "not finite at 1 logged step" in render_html([tmp_path])


def test_of_several_rounds_the_last_is_drawn(tmp_path: Path) -> None:
    stages = [distill_stage("dpo", seed=0, round=n, directory=f"seed-0/round-{n}") for n in (1, 3, 2)]
    (tmp_path / "results.json").write_text(json.dumps({"methods": {"dpo": {"r": 1}}, "stages": stages}))
    for n in (1, 2, 3):
        log(tmp_path, 0, f"round-{n}", [{"step": 1, "loss": n}])
    assert load_run(tmp_path)["curves"] == {"dpo": {"loss": [[(1, 3)]]}}


def test_results_without_roles_say_how_to_rebuild_them(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"methods": {"dpo": {"r": 1}, "tvkd-shuffled": {"r": 2}}}')
    (note,) = load_run(tmp_path)["notes"]
    assert "declares no roles" in note
    assert f"prefdistill run {tmp_path}/recipe.yaml --out {tmp_path}" in note
    assert "declares no roles" in render_html([tmp_path])


def test_average_takes_the_steps_that_all_runs_share() -> None:
    from prefdistill.report import svg
    from prefdistill.report.load import average

    assert average([[(1, 1.0), (2, 2.0), (3, 9.0)], [(1, 3.0), (2, 4.0)]]) == [(1, 2.0), (2, 3.0)]
    assert average([[(1, 1.0)], [(2, 1.0)]]) == []
    thinned = svg.thin([(float(x), float(x)) for x in range(1000)], 80)
    assert len(thinned) == 80
    assert thinned[0] == (5.5, 5.5)
    assert math.isnan(svg.thin([(0, NAN), (1, 1), (2, 2), (3, 3)], 2)[0][1])
