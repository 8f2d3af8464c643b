"""Studies: the cells of a file, which of them are run, and that shared steps give the results of separate runs."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json, write_jsonl
from prefdistill.core.options import Override
from prefdistill.experiment.check import check_plan
from prefdistill.experiment.inputs import Sources, source_fingerprints
from prefdistill.experiment.plan import build_plan
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.experiment.study.load import BUILT_IN, load_study, recipe_of
from prefdistill.experiment.study.options import cells_of
from prefdistill.experiment.study.results import over_seeds
from prefdistill.experiment.study.run import CellsFailed, StudyRun, run_study
from prefdistill.report.study import answers, render_markdown, write_study
from prefdistill.training.nan_guard import NotFinite

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "studies").glob("*.yaml"))
TINY = {
    "data.synthetic": {"demonstrations": 96, "teacher_pairs": 60, "pairs": 40, "test_prompts": 24},
    "teacher.sft.max_steps": 30,
    "teacher.dpo.max_steps": 2,
    "student.sft.max_steps": 30,
    "training": {"max_steps": 3, "learning_rate": 0.01, "batch_size": 16, "micro_batch_size": 16},
    "model.scratch.teacher": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
    "model.scratch.student": {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
    "orders": 1,
}  # fmt: skip
STUDY = {
    "name": "tiny",
    "question": "Is it <b>small</b>?",
    "overrides": TINY,
    "grid": {"methods.tvkd.alpha": [-0.5, 0.5]},
    "methods": ["tvkd"],
    "x": "methods.tvkd.alpha",
    "seeds": 1,
}


def write(path, **changes):
    raw = {key: value for key, value in {**STUDY, **changes}.items() if value is not ...}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two cells that has run once."""
    place = tmp_path_factory.mktemp("study")
    path = write(place / "study.yaml")
    return path, place / "out", run_study(path, place / "out")


def made(out, name):
    """Count how often a step has run, and was not taken from the pool."""
    cells = [read_json(path) for path in sorted((out / "cells").iterdir())]
    return sum(not stage["reused"] for cell in cells for stage in cell["stages"] if stage["name"] == name)


# -- files and cells ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_study_can_be_run(path, tmp_path, pairs, tokenizer, make_model):
    study = load_study(path)
    mine: list[Override] = []
    if study.recipe not in BUILT_IN:  # of pairs and models on the Hub
        pairs.to_json(tmp_path / "pairs.jsonl")
        for part in (make_model(), tokenizer):
            part.save_pretrained(tmp_path / "model")
        models = ("model.teacher", "model.teacher_reference", "model.student", "reward_model.model.from")
        mine = [Override(key, str(tmp_path / "pairs.jsonl")) for key in ("data.train", "data.test")]
        mine += [Override(key, str(tmp_path / "model")) for key in models]
    assert study.name == path.stem
    assert study.question.endswith("?")
    assert path.read_text().startswith("# ")
    for cell in cells_of(study):
        recipe = recipe_of(study, path, cell, mine, seed=study.seed)
        check_plan(build_plan(recipe, tmp_path, study.seed))
        assert set(study.methods) < set(recipe.methods), "methods are compared with a baseline"
    assert study.seed != 100, "seed 100 is for choosing settings"


def test_each_question_of_the_paper_has_a_study():
    asked = {"alpha", "shaping", "value-temperature", "noise", "teachers", "teacher-training", "student-size", "pairs"}
    assert {path.stem for path in FILES} == asked | {"real-models", "other-family", "tokenizers"}


def test_cells_are_names_times_grid(tmp_path):
    path = write(
        tmp_path / "s.yaml",
        cells={"weak": {"teacher.dpo.max_steps": 1}, "strong": {"teacher.dpo.max_steps": 9}},
        grid={"methods.tvkd.alpha, methods.dpo.beta": [0.1, 1], "methods.tvkd.beta": [2]},
    )
    cells = cells_of(load_study(path))
    assert [cell.name for cell in cells] == [
        "weak, alpha=0.1, beta=2",
        "weak, alpha=1, beta=2",
        "strong, alpha=0.1, beta=2",
        "strong, alpha=1, beta=2",
    ]
    assert [(cell.x, cell.group) for cell in cells[:2]] == [(0.1, "weak, beta=2"), (1, "weak, beta=2")]
    assert cells[3].overrides == {
        "teacher.dpo.max_steps": 9, "methods.tvkd.alpha": 1, "methods.dpo.beta": 1, "methods.tvkd.beta": 2,
    }  # fmt: skip
    assert cells[0].file(7) == "weak_alpha=0.1_beta=2-seed-7"


def test_named_cells_along_x_form_one_line(tmp_path):
    cells = {"small": {"data.synthetic.pairs": 10}, "large": {"data.synthetic.pairs": 40}}
    found = cells_of(load_study(write(tmp_path / "s.yaml", cells=cells, grid=..., x="data.synthetic.pairs")))
    assert [(cell.x, cell.group) for cell in found] == [(10, ""), (40, "")]


def test_cell_overrides_win_over_the_command_line_and_those_over_the_study(tmp_path):
    path = write(tmp_path / "s.yaml", cells={"a": {"training.max_steps": 5}, "b": {}}, grid=..., x=...)
    study = load_study(path)
    a, b = cells_of(study)
    given = [Override.parse("teacher.dpo.max_steps=4")]
    assert recipe_of(study, path, a, given, seed=3).teacher.dpo.max_steps == 4
    assert recipe_of(study, path, a, given, seed=3).methods["tvkd"].training.max_steps == 5
    assert recipe_of(study, path, b, given, seed=3).methods["tvkd"].training.max_steps == 3
    assert recipe_of(study, path, b, given, seed=3).seed == 3


def test_a_recipe_file_is_found_beside_the_study(tmp_path):
    (tmp_path / "own.yaml").write_text(BUILT_IN["quickstart"].read_text().replace("orders: 3", "orders: 7"))
    path = write(tmp_path / "s.yaml", recipe="own.yaml", overrides={})
    study = load_study(path)
    assert recipe_of(study, path, cells_of(study)[0], [], seed=1).orders == 7


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"qestion": "?"}, [], "unknown key 'qestion'; did you mean 'question'?"),
        ({"question": ...}, [], "question is missing"),
        ({"grid": ..., "x": ...}, [], "the study has no cells"),
        ({"grid": {"methods.tvkd.alpha": []}}, [], "grid.methods.tvkd.alpha has no values"),
        ({"grid": {"methods.tvkd.alpha": [1, 1]}}, [], "grid.methods.tvkd.alpha has a value twice"),
        ({"methods": []}, [], "methods"),
        ({"methods": ["magic"]}, [], "has no method 'magic'"),
        ({"name": "a/b"}, [], "'a/b' names a directory"),
        ({"overrides": {"seed": 3}}, [], "overrides: seed is set by the study"),
        ({"cells": {"a": {"methods.tvkd.alpha": 1}}}, [], "is a key of the grid too"),
        ({"cells": {"a b": {}, "a, b": {}}, "grid": ..., "x": ...}, [], "two cells have the name"),
        ({"cells": {"a": {}}, "grid": ..., "x": "orders"}, [], "sets no number for orders"),
        ({"x": ..., "grid": {"methods.tvkd.terminal": ["last", "end"]}}, [], "terminal"),
        ({"grid": {"methods.tvkd.alfa": [1]}, "x": ...}, [], "alfa"),
        ({"recipe": "none.yaml"}, [], "no recipe at"),
        ({"metric": "beauty"}, [], "metric 'beauty' is not measured"),
        ({"overrides": {**TINY, "data.synthetic.pears": 3}}, [], "did you mean 'pairs'?"),
        ({}, ["methods.tvkd.alpha=1"], "cell 'alpha=-0.5' of the study sets methods.tvkd.alpha"),
        ({}, ["methods.tvkd={alpha: 1}"], "cell 'alpha=-0.5' of the study sets methods.tvkd.alpha"),
        ({}, ["seeds=4"], "seeds is set by the study"),
        ({}, ["nonsense"], "is not an override"),
        ({}, ["signals.value_temperature=2.0"], "needs signals.value_temperature=1.0, but it is 2.0"),
        ({}, ["--seeds", "0"], "--seeds"),
    ],
)
def test_invalid_studies_are_refused_in_one_line(tmp_path, capsys, changes, arguments, message):
    path = write(tmp_path / "s.yaml", **changes)
    status = main(["study", str(path), "--out", str(tmp_path / "out"), *arguments])
    said = capsys.readouterr().err
    assert status == 2, said
    assert message in said
    assert said.startswith("prefdistill: ")
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("- a", "is not a study"), ("a: [", "not valid YAML"), (None, "no study")]
)
def test_files_that_are_not_a_study(tmp_path, text, message):
    path = tmp_path / "s.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_study(path)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_shared_steps_run_once_and_give_the_results_of_separate_runs(finished, tmp_path):
    path, out, results = finished
    for stage in ("data", "init", "teacher-sft", "pairs", "teacher-dpo", "student-sft", "distill-dpo-0"):
        assert made(out, stage) == 1, stage
    assert made(out, "distill-tvkd-0") == 2
    study = load_study(path)
    first, cell = cells_of(study)
    separate = run_recipe(recipe_of(study, path, cell, [], seed=1), tmp_path)
    for model in ("teacher-dpo", "student-sft", "distill-dpo-0", "distill-tvkd-0"):
        file = Path("seed-1") / model / "model.safetensors"
        assert (tmp_path / file).read_bytes() == (out / "work" / cell.file(1) / file).read_bytes(), model
    assert (tmp_path / file).read_bytes() != (out / "work" / first.file(1) / file).read_bytes()
    record = read_json(out / "cells" / f"{cell.file(1)}.json")
    for part in ("methods", "differences", "margin_accuracy"):
        assert record[part] == json.loads(json.dumps(separate[part])), part
    assert [cell["x"] for cell in results["cells"]] == [-0.5, 0.5]


def test_the_record_of_a_cell_holds_its_inputs(finished):
    _, out, _ = finished
    cell = read_json(out / "cells" / "alpha=0.5-seed-1.json")
    assert cell["overrides"] == {**TINY, "methods.tvkd.alpha": 0.5}
    assert cell["recipe"]["methods"]["tvkd"]["options"]["alpha"] == 0.5
    assert cell["environment"]["packages"].keys() >= {"torch", "transformers", "trl"}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in cell["data"].values())
    assert cell["data"].keys() == {"pairs/train.jsonl", "pairs/test.jsonl", "data/demonstrations.jsonl"}
    assert cell["seconds"] > 0


def test_only_missing_and_stale_cells_run(finished, tmp_path, monkeypatch):
    path, before, results = finished
    out = tmp_path / "out"
    shutil.copytree(before, out)
    ran = []
    real = StudyRun.run_cell

    def counted(self, cell, seed, command):
        ran.append((cell.name, seed))
        return real(self, cell, seed, command)

    monkeypatch.setattr(StudyRun, "run_cell", counted)
    assert run_study(path, out) == results
    assert ran == []
    # a missing cell whose steps are all finished
    (out / "cells" / "alpha=0.5-seed-1.json").unlink()
    run_study(path, out)
    assert ran == [("alpha=0.5", 1)]
    assert all(stage["reused"] for stage in read_json(out / "cells" / "alpha=0.5-seed-1.json")["stages"])
    # from here on, no cell is run: each gets the results of a finished one
    record = read_json(out / "cells" / "alpha=0.5-seed-1.json")
    monkeypatch.setattr("prefdistill.experiment.run.run_recipe", lambda *_, **__: record)
    monkeypatch.setattr(StudyRun, "_data_digests", lambda *_: {})
    # texts are not in the key
    reworded = write(tmp_path / "again.yaml", question="What else?", x_label="weight")
    assert run_study(reworded, out)["question"] == "What else?"
    assert len(ran) == 1
    # a new value, and a new seed
    more = write(tmp_path / "more.yaml", grid={"methods.tvkd.alpha": [-0.5, 0.5, 1.5]}, x=...)
    found = run_study(more, out, seeds=2)
    assert ran[1:] == [("alpha=1.5", 1), ("alpha=-0.5", 2), ("alpha=0.5", 2), ("alpha=1.5", 2)]
    assert found["seeds"] == [1, 2]
    assert all(cell["seeds"] == [1, 2] for cell in found["cells"])
    # an input of every cell
    run_study(path, out, overrides=["teacher.dpo.max_steps=3"])
    assert ran[5:] == [("alpha=-0.5", 1), ("alpha=0.5", 1)]


def test_results_of_stale_cells_are_not_shown(finished, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    path, before, _ = finished
    out = shutil.copytree(before, tmp_path / "out")
    assert (out / "plot.svg").exists()
    monkeypatch.setattr(StudyRun, "run_cell", killed)
    with pytest.raises(KeyboardInterrupt):
        run_study(path, out, overrides=["teacher.dpo.max_steps=3"])
    assert [cell["seeds"] for cell in read_json(out / "results.json")["cells"]] == [[], []]
    assert "No results yet" in (out / "table.md").read_text()
    assert not (out / "plot.svg").exists()


def test_a_study_stops_if_a_model_changes_while_it_runs(finished, tmp_path, monkeypatch):
    """The other cells use it as well."""
    from prefdistill.experiment.inputs import ModelChanged

    def changed(self, cell, seed, command):
        tried.append(cell.name)
        raise ModelChanged("teacher has been changed")

    tried = []
    monkeypatch.setattr(StudyRun, "run_cell", changed)
    with pytest.raises(ModelChanged):
        run_study(finished[0], tmp_path / "out")
    assert len(tried) == 1


def test_a_diverged_training_is_a_failed_cell(finished, tmp_path, monkeypatch):
    """Unlike wrong input, each failure is kept in the results."""

    def diverged(self, cell, seed, command):
        raise NotFinite(f"the loss is nan at step 3 of {cell.name}")

    monkeypatch.setattr(StudyRun, "run_cell", diverged)
    with pytest.raises(CellsFailed, match=r"\d cells failed, the first .* with the loss is nan at step 3"):
        run_study(finished[0], tmp_path / "out")
    failed = read_json(tmp_path / "out" / "results.json")["failed"]
    assert failed
    assert not any(one["refused"] for one in failed)


def test_an_interrupted_study_is_resumed(finished, tmp_path, monkeypatch):
    import prefdistill.experiment.steps.students as students

    path, _, results = finished
    calls = []
    real = students.fit

    def interrupted(*args, **kwargs):
        calls.append(args[2])
        if len(calls) == 3:  # dpo and tvkd of the first cell, tvkd of the second
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(students, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(path, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out" / "cells").iterdir()] == ["alpha=-0.5-seed-1.json"]
    again = run_study(path, tmp_path / "out")
    assert calls == ["distill-dpo-0", "distill-tvkd-0", "distill-tvkd-0", "distill-tvkd-0"]
    for one, other in zip(results["cells"], again["cells"], strict=True):
        assert one["methods"] == other["methods"]


def test_a_cell_that_fails_does_not_stop_the_others(finished, tmp_path, capsys):
    """Logit values at a temperature so high that they are all alike: found only when they are there."""
    path = write(tmp_path / "s.yaml", cells={"bad": {"teacher.dpo.learning_rate": 1e30}, "good": {}}, grid=..., x=...)
    status = main(["study", str(path), "--out", str(tmp_path / "out"), "--stages", str(finished[1] / "stages")])
    assert status == 1
    assert "1 cells failed, the first (bad, seed 1)" in capsys.readouterr().err
    results = read_json(tmp_path / "out" / "results.json")
    assert [one["cell"] for one in results["failed"]] == ["bad"]
    assert [cell["seeds"] for cell in results["cells"]] == [[], [1]]
    assert "bad, seed 1: failed." in (tmp_path / "out" / "table.md").read_text()


def test_studies_share_the_pool_given_by_stages(finished, tmp_path):
    _, out, _ = finished
    path = write(tmp_path / "s.yaml", grid={"methods.tvkd.beta": [0.2]}, x=...)
    run_study(path, tmp_path / "out", stages=out / "stages")
    assert made(tmp_path / "out", "teacher-dpo") == 0
    assert made(tmp_path / "out", "distill-tvkd-0") == 1
    assert not (tmp_path / "out" / "stages").exists()


@pytest.mark.slow
def test_the_teacher_is_shared_between_student_sizes_and_numbers_of_pairs(finished, tmp_path):
    """Nor does what the student learns of depend on what its teacher was shown."""
    _, pool, _ = finished
    cells = {
        "wide": {"model.scratch.student.hidden_size": 4},
        "few": {"data.synthetic.pairs": 20},
        "noisy": {"data.synthetic.teacher_label_noise": 0.5},
    }
    out = tmp_path / "out"
    run_study(write(tmp_path / "s.yaml", cells=cells, grid=..., x=...), out, stages=pool / "stages")
    new = {
        name: {
            stage["name"] for stage in read_json(out / "cells" / f"{name}-seed-1.json")["stages"] if not stage["reused"]
        }
        for name in cells
    }
    assert not new["wide"] & {"data", "teacher-sft", "pairs", "teacher-dpo", "signals-teacher-train"}
    assert new["wide"] >= {"init", "student-sft", "distill-dpo-0"}
    assert not new["few"] & {"data", "init", "teacher-sft", "pairs", "teacher-dpo", "student-sft"}
    assert new["few"] >= {"signals-teacher-train", "distill-dpo-0", "distill-tvkd-0"}
    assert not new["noisy"] & {"data", "init", "teacher-sft", "pairs", "student-sft", "distill-dpo-0"}
    assert new["noisy"] >= {"teacher-dpo", "signals-teacher-train", "distill-tvkd-0"}
    # as if alone
    for name in cells:
        study = load_study(tmp_path / "s.yaml")
        cell = next(cell for cell in cells_of(study) if cell.name == name)
        run_recipe(recipe_of(study, tmp_path / "s.yaml", cell, [], seed=1), tmp_path / name)
        for model in ("teacher-dpo", "distill-dpo-0", "distill-tvkd-0"):
            file = Path("seed-1") / model / "model.safetensors"
            assert (tmp_path / name / file).read_bytes() == (out / "work" / f"{name}-seed-1" / file).read_bytes()


def test_the_content_of_data_files_is_in_the_key(tmp_path, data_dir):
    pairs = data_dir / "alpacaeval_pairs"
    (tmp_path / "train.jsonl.gz").write_bytes((pairs / "train.jsonl.gz").read_bytes())
    path = write(tmp_path / "s.yaml", recipe=str(ROOT / "recipes" / "local-pairs" / "tvkd.yaml"), overrides={},
                 metric="reward_accuracy")  # fmt: skip
    given = [f"data.train={tmp_path / 'train.jsonl.gz'}", f"data.test={pairs / 'test.jsonl.gz'}", "data.max_train=20"]

    def keys(*overrides):
        overrides = [Override.parse(text) for text in (*given, *overrides)]
        run = StudyRun(load_study(path), path, tmp_path / "out", tmp_path / "pool", overrides)
        run.check()
        return {at: artifact.key for at, artifact in run.artifacts.items()}

    first = keys()
    assert len(set(first.values())) == 2
    assert keys() == first
    assert keys("data.max_train=21") != first
    (tmp_path / "train.jsonl.gz").write_bytes((pairs / "test.jsonl.gz").read_bytes())
    assert keys() != first


def test_the_paths_of_data_and_models_are_not_in_the_key(tmp_path, make_model, tokenizer, pairs):
    write_jsonl(tmp_path / "pairs.jsonl", pairs.to_list())
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = write(tmp_path / "s.yaml", recipe=str(ROOT / "recipes" / "local-pairs" / "tvkd.yaml"), overrides={},
                 metric="reward_accuracy")  # fmt: skip
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "copy.jsonl")
    trainings = ["teacher.sft=null", "teacher.dpo=null", "student.sft=null", "reward_model=null"]

    def keys(model, data):
        given = [f"data.train={tmp_path / data}", f"data.test={tmp_path / data}"]
        models = [f"model.{role}={tmp_path / model}" for role in ("teacher", "student")]
        overrides = [Override.parse(text) for text in (*trainings, *given, *models)]
        run = StudyRun(load_study(path), path, tmp_path / "out", tmp_path / "pool", overrides)
        run.check()
        return {at: artifact.key for at, artifact in run.artifacts.items()}

    assert keys("model", "pairs.jsonl") == keys("copy", "copy.jsonl")


def test_the_pairs_of_the_reward_model_are_in_the_key(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(20)]
    sft = [{"prompt": f"p{i}", "completion": f"good {i}"} for i in range(20)]
    judge = {"share": 0.3, "model": {"hidden_size": 8}, "training": {"max_steps": 1}}
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test", "sft")}
    recipe = {"data": data, "model": {"teacher": "t", "student": "s"}, "reward_model": judge, "methods": {"dpo": {}}}
    recipe |= {"name": "judged", "evaluate": {"prompts": 5}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def prints(rows, sft):
        for name, lines in (("train", rows), ("test", rows[:5]), ("sft", sft)):
            write_jsonl(Path(data[name]), lines)
        with patch("prefdistill.experiment.inputs.model_key", str):
            return source_fingerprints(load_recipe(tmp_path / "recipe.yaml"), Sources())

    first = prints(rows, sft)
    assert prints(rows, sft) == first
    for i in range(6, 20):  # whichever of them the judge has
        assert prints([*rows[:i], rows[i] | {"chosen": "edited"}, *rows[i + 1 :]], sft)["train"] != first["train"]
        assert prints(rows, [*sft[:i], sft[i] | {"completion": "edited"}, *sft[i + 1 :]])["sft"] != first["sft"]


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def three_seeds(finished):
    """The finished study as if it had run three seeds: the last cell clearly above the baseline."""
    results = json.loads(json.dumps(finished[2]))
    results["seeds"] = [1, 2, 3]
    for cell, values in zip(results["cells"], ([-0.1, 0.0, 0.2], [0.3, 0.31, 0.32]), strict=True):
        cell["seeds"] = [1, 2, 3]
        told = [
            {"d": {"tvkd": {"reward": {"mean": value, "se": 9.0, "n": 5, "over": "test items"}}}} for value in values
        ]
        cell["differences"] = over_seeds(told, "d")
    return results


def test_over_seeds_is_students_t(three_seeds):
    from scipy import stats

    estimate = three_seeds["cells"][1]["differences"]["tvkd"]["reward"]
    low, high = stats.t.interval(0.95, 2, loc=0.31, scale=0.01 / 3**0.5)
    assert estimate["mean"] == pytest.approx(0.31)
    assert estimate["se"] == pytest.approx(0.01 / 3**0.5)
    assert (estimate["low"], estimate["high"]) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))
    assert (estimate["n"], estimate["over"], estimate["values"]) == (3, "seeds", [0.3, 0.31, 0.32])


def test_seeds_that_share_their_test_prompts_are_compared_as_in_one_run(tmp_path, make_model, tokenizer, pairs):
    """A study's error over seeds and prompts is that of a run of these seeds, and of its own records alone."""
    write_jsonl(tmp_path / "pairs.jsonl", pairs.to_list())
    make_model(scale=1.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({
        "name": "shared", "data": {part: str(tmp_path / "pairs.jsonl") for part in ("train", "test")},
        "model": {role: str(tmp_path / "model") for role in ("teacher", "student")},
        "methods": {"dpo": {"beta": 0.1}, "sft": {}}, "evaluate": {"prompts": 4, "max_new_tokens": 4}, "orders": 2,
        "training": {"max_steps": 2, "learning_rate": 0.01, "batch_size": 4, "micro_batch_size": 4},
    }))  # fmt: skip
    path = write(tmp_path / "study.yaml", recipe=str(recipe), overrides={}, grid=..., x=..., methods=["sft"],
                 cells={"only": {}}, seeds=2, metric="reward_accuracy")  # fmt: skip
    out = tmp_path / "out"
    results = run_study(path, out)
    run = run_recipe(load_recipe(recipe, [Override.parse("seed=1"), Override.parse("seeds=2")]), tmp_path / "run")
    (cell,) = results["cells"]
    for part in ("methods", "differences"):
        for name, estimates in run[part].items():
            for metric, expected in estimates.items():
                in_study = cell[part][name][metric]
                assert {key: in_study[key] for key in expected} == pytest.approx(expected), (part, name, metric)
                assert (in_study["n"], in_study["over"], len(in_study["values"])) == (2, "seeds", 2)
    accuracy = cell["differences"]["sft"]["reward_accuracy"]
    assert accuracy["prompts"] == len({str(row["prompt"]) for row in pairs})
    assert f"over 2 seeds and {accuracy['prompts']} test prompts" in render_markdown(results)
    shutil.rmtree(out / "work")
    shutil.rmtree(out / "stages")
    assert run_study(path, out) == results


def test_one_seed_shows_its_own_error(finished):
    _, out, results = finished
    alone = read_json(out / "cells" / "alpha=0.5-seed-1.json")["differences"]["tvkd"]["reward"]
    shown = results["cells"][1]["differences"]["tvkd"]["reward"]
    assert {key: shown[key] for key in alone} == alone
    assert shown["values"] == [alone["mean"]]
    assert "One seed" in render_markdown(results)


def test_the_answer_and_the_table(three_seeds):
    (answer,) = answers(three_seeds)
    assert answer.startswith("tvkd: above dpo in 1 of 2 cells and below it in 0")
    assert "highest +0.310 (alpha=0.5), lowest +0.033 (alpha=-0.5)" in answer
    text = render_markdown(three_seeds)
    assert "| alpha=0.5 | 3 |" in text
    assert r"+0.310 ± 0.006 \[+0.285, +0.335\]" in text
    assert "| alpha=-0.5 | tvkd | -0.100 | 0.000 | +0.200 |" in text
    assert "<b>" not in text


@pytest.mark.parametrize("x", ["methods.tvkd.alpha", None])
def test_the_page_and_the_plot(three_seeds, tmp_path, x):
    write_study({**three_seeds, "x": x}, tmp_path)
    assert read_json(tmp_path / "results.json")["x"] == x
    page = (tmp_path / "study.html").read_text()
    assert "Is it &lt;b&gt;small&lt;/b&gt;?" in page
    assert "+0.310" in page
    assert not re.search(r"(src|href)=\"https?:", page)
    root = ET.parse(tmp_path / "plot.svg").getroot()
    names = {"s": "http://www.w3.org/2000/svg"}
    assert "above dpo in 1 of 2 cells" in root.find("s:desc", names).text
    text = "".join(root.itertext())
    assert ("alpha=0.5" in text.split("</desc>")[-1]) or x
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("options", [{"color_scheme": "dark"}, {"viewport": {"width": 420, "height": 800}}])
def test_the_page_in_a_browser(three_seeds, tmp_path, open_page, options):
    write_study(three_seeds, tmp_path)
    page = open_page(tmp_path / "study.html", **options)
    assert page.get_by_role("heading", level=1).inner_text() == "Is it <b>small</b>?"
    picture = page.get_by_role("img", name="true reward, T=1, difference to dpo")
    assert picture.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    seeds = page.get_by_text("Seed by seed")
    seeds.focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("row", name="alpha=−0.5 tvkd −0.100 0.000 +0.200").is_visible()


def test_json_is_the_results(finished, capsys):
    path, out, results = finished
    status = main(["study", str(path), "--out", str(out), "--json"])
    assert status == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(results))


def test_the_built_in_recipe_is_the_quickstart():
    assert load_recipe(BUILT_IN["quickstart"]).name == "quickstart"


def script_of(name):
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / "studies" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_what_the_student_learns(finished, capsys):
    """The parts of the rewards add up to the difference that the study reports."""
    script = script_of("what_the_student_learns")
    script.main([str(finished[1] / "work" / "alpha=0.5-seed-1")])
    header, _, row = capsys.readouterr().out.strip().splitlines()
    told = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert told["method"] == "tvkd"
    reported = read_json(finished[1] / "cells" / "alpha=0.5-seed-1.json")["differences"]["tvkd"]["reward"]["mean"]
    assert float(told["reward"]) == pytest.approx(reported, abs=6e-4)


def test_what_the_value_sees(finished, capsys):
    """The script beside the studies: its regression by hand, and that it reads a run of a study."""
    import numpy as np

    script = script_of("what_the_value_sees")
    assert script.form("< 6 5 4 >") == [1, 1, 0, 0, 5]
    assert script.form("um < 6 5 well so") == [0, 0, 1, 3, 6]
    assert script.form("") == [0, 0, 0, 0, 0]
    # 3 a + noise at a right angle to it: R^2 is 9 / (9 + 4)
    a, noise = np.array([1.0, -1.0, 1.0, -1.0]), np.array([2.0, 2.0, -2.0, -2.0])
    assert script.explained(3 * a + noise, a[:, None]) == pytest.approx(9 / 13)
    script.main([str(finished[1] / "work" / "alpha=0.5-seed-1")])
    header, _, row = capsys.readouterr().out.strip().splitlines()
    shares = [float(cell) for cell in row.split("|")[2:-1]]
    assert len(shares) == header.count("|") - 2 == 3
    assert 0 <= shares[1] <= shares[0] <= 1


def test_the_pairs_of_the_study_of_real_models(tmp_path, pairs, tokenizer):
    """Every prompt is in one file, no pair is too long, and the files depend on the pairs alone."""
    script = script_of("real_models")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = list(pairs)
    for name, order in (("a", rows), ("b", rows[::-1])):
        write_jsonl(tmp_path / "pairs.jsonl", order)
        (tmp_path / name).mkdir()
        script.split_pairs(tmp_path / name, [str(tmp_path / "pairs.jsonl")], str(tmp_path / "model"), 24)
    parts = {}
    for name in ("judge", "test", "train"):
        text = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{name}.jsonl").read_text()
        parts[name] = [json.loads(line) for line in text.splitlines()]
    prompts = {name: {row["prompt"][0]["content"] for row in part} for name, part in parts.items()}
    assert all(prompts.values())
    assert len(set().union(*prompts.values())) == sum(map(len, prompts.values()))

    def tokens(row, side):
        return len(tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_dict=False))

    in_files = [row for part in parts.values() for row in part]
    fits = [row for row in rows if max(tokens(row, side) for side in ("chosen", "rejected")) <= 24]
    assert sorted(map(json.dumps, in_files)) == sorted(map(json.dumps, fits))
    assert 0 < len(fits) < len(rows)


@pytest.mark.slow
def test_the_files_of_the_study_of_real_models(tmp_path, pairs, tokenizer, make_model, capfd):
    make_model(scale=1.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", list(pairs))
    place, data = tmp_path / "files", tmp_path / "pairs.jsonl"
    model = str(tmp_path / "model")
    arguments = ["--model", model, "--layers", "1", "--other-model", model, "--other-pairs", "12"]
    for again in (False, True):
        with patch("sys.argv", ["x", str(place), str(data), *arguments]):
            script_of("real_models").main()
        assert capfd.readouterr().err.count(": reused") == 7 * again
    assert len((place / "other-train.jsonl").read_text().splitlines()) == 12
    overrides = [f"data.{part}={place / part}.jsonl" for part in ("train", "test")]
    overrides += [f"reward_model.name={place / 'judge'}", f"model.student={place / 'start'}"]
    overrides += [f"model.teacher={place / 'teacher'}", f"model.teacher_reference={tmp_path / 'model'}"]
    overrides += ["evaluate.max_new_tokens=4", "training.lora.r=2"]
    stages = tmp_path / "stages"
    results = run_study(
        ROOT / "studies" / "real-models.yaml", tmp_path / "out", overrides=overrides, seeds=1, stages=stages
    )
    assert not results["failed"]
    other = [*overrides, f"model.teacher={place / 'other-teacher'}"]
    family = run_study(
        ROOT / "studies" / "other-family.yaml", tmp_path / "other", overrides=other, seeds=1, stages=stages
    )
    assert not family["failed"]
    assert family["cells"][0]["methods"]["dpo"] == results["cells"][0]["methods"]["dpo"]
    assert family["cells"][0]["methods"]["term"] != results["cells"][0]["methods"]["term"]
    measured = results["cells"][0]["differences"]["term"]
    assert {"kl_start", "reward_accuracy", "reward_model_win_rate_start", "response_tokens"} <= measured.keys()
    assert results["cells"][0]["length_controlled_margins"]
