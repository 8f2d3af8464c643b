"""Whole runs on the built-in task: what they write, reuse, resume, repair and rebuild."""

import json
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefdistill.core.files import file_digest, read_sealed, write_sealed
from prefdistill.core.parts import write_checksum
from prefdistill.data.load import load_pairs
from prefdistill.evaluation.results import Role
from prefdistill.evaluation.verdict import verdict_of
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.report.load import PANELS, load_run
from prefdistill.signals import Signals
from support.tiny_runs import QUICKSTART, TINY, rebuilt, stages, stop


def test_the_quickstart_has_every_method_and_control(finished):
    out, results = finished
    controls = ["tvkd-shuffled", "tvkd-reversed-shuffled", "oracle-margin", "dpo-other-order"]
    methods = ["sft-chosen", "dpo", "tvkd", "tvkd-reversed", *controls]
    assert list(results["methods"]) == ["teacher", "start", *methods]
    assert list(results["differences"]) == [name for name in methods if name != "dpo"]
    for name in methods:
        for metric in ("reward", "reward_greedy", "win_rate_start", "reward_accuracy"):
            assert results["methods"][name][metric]["n"] == 2, (name, metric)
            assert results["methods"][name][metric]["over"] == "data orders"
    assert results["methods"]["start"]["win_rate_start"]["mean"] == 0.5
    assert {"shaping return", "teacher log-prob", "teacher Q (raw logits)", "teacher implicit reward"} <= set(
        results["margin_accuracy"]
    )
    assert [name for name, role in results["roles"].items() if Role(**role).is_control] == controls
    assert (results["roles"]["teacher"]["kind"], results["roles"]["start"]["kind"]) == ("teacher", "start")
    assert results["headline"] == {"metric": "reward", "method": "tvkd"}
    assert results["verdict"] == verdict_of(results)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))


def test_a_run_directory_holds_what_the_interface_names(finished):
    out, results = finished
    for name in ("recipe.yaml", "environment.json", "results.json", "report.html"):
        assert (out / name).stat().st_size > 100, name
    logged = [json.loads(line) for line in (out / "seed-0" / "distill-tvkd-1" / "metrics.jsonl").open()]
    assert logged
    assert "report" in (out / "report.html").read_text()
    assert all(stage["seconds"] >= 0 and not stage["reused"] for stage in results["stages"])
    assert all((out / stage["directory"] / "stage.json").is_file() for stage in results["stages"])
    trained = next(stage for stage in results["stages"] if stage["name"] == "distill-tvkd-1")
    labels = {"kind": "distill", "role": "student", "method": "tvkd", "order": 1, "round": 1}
    assert labels.items() <= trained.items()
    again = load_recipe(out / "recipe.yaml")
    assert again.methods.keys() == load_recipe(QUICKSTART, TINY).methods.keys()


def test_every_panel_of_the_report_is_logged_by_some_training(finished):
    curves = load_run(finished[0])["curves"]
    assert {panel for stage in curves.values() for panel in stage} == set(PANELS)


def test_everything_is_reused_by_the_same_recipe(copy, finished):
    results = run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert all(stages(results).values())
    assert results["methods"] == finished[1]["methods"]
    assert results["differences"] == finished[1]["differences"]


def test_an_interrupted_repair_resumes(copy, finished, monkeypatch):
    shard = copy / "seed-0" / "signals-teacher-test" / "store" / "shards" / "00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with monkeypatch.context() as cut:
        cut.setattr("prefdistill.experiment.steps.signals.extract_signals", stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert not shard.exists()
    results = run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert results["methods"] == finished[1]["methods"]
    assert shard.read_bytes() == whole


def test_results_of_another_recipe_are_removed_before_a_rebuild(copy, monkeypatch):
    names = {"results.json", "report.html"}
    monkeypatch.setattr("prefdistill.experiment.steps.students.fit", stop)
    run_recipe(load_recipe(QUICKSTART, TINY), copy)  # the same recipe: nothing is trained
    assert names <= {path.name for path in copy.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(QUICKSTART, [*TINY, "methods.tvkd.alpha=-9"]), copy)
    assert load_recipe(copy / "recipe.yaml").methods["tvkd"].options["alpha"] == -9
    assert names.isdisjoint(path.name for path in copy.iterdir())


def test_a_damaged_store_of_a_finished_stage_is_repaired(copy, finished, capsys):
    shard = copy / "seed-0" / "signals-teacher-test" / "store" / "shards" / "00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    results = run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert "00000.parquet is damaged (its checksum differs); rebuilding it" in capsys.readouterr().err
    assert shard.read_bytes() == whole
    assert set(stages(results).values()) == {True}
    assert results["methods"] == finished[1]["methods"]


def test_only_dependants_of_a_changed_option_are_rebuilt(copy):
    results = run_recipe(load_recipe(QUICKSTART, [*TINY, "methods.tvkd.alpha=0.2"]), copy)
    assert rebuilt(results) == {"distill-tvkd-0", "distill-tvkd-1", "evaluate-tvkd-0", "evaluate-tvkd-1"}


def test_an_interrupted_run_resumes_with_the_same_results(finished, tmp_path, monkeypatch):
    import prefdistill.experiment.steps.students as students

    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    real = students.fit
    monkeypatch.setattr(students, "fit", interrupted)
    recipe = load_recipe(QUICKSTART, TINY, only=["tvkd"])
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    results = run_recipe(recipe, tmp_path / "run")
    reused = stages(results)
    assert reused["teacher-dpo"]
    assert reused["distill-dpo-0"]
    assert not reused["distill-dpo-1"]
    for name in ("dpo", "tvkd"):  # the very same numbers as in a run that was left alone
        assert results["methods"][name] == finished[1]["methods"][name]


def test_two_seeds_are_two_pipelines(tmp_path):
    results = run_recipe(load_recipe(QUICKSTART, [*TINY, "seeds=2", "orders=1"], only=["tvkd"]), tmp_path / "run")
    assert results["seeds"] == [0, 1]
    assert results["methods"]["tvkd"]["reward"]["over"] == "seeds"
    assert results["differences"]["tvkd"]["reward"]["n"] == 2
    first, second = (tmp_path / "run" / f"seed-{seed}" / "pairs" / "train.jsonl" for seed in (0, 1))
    assert first.read_text() != second.read_text()


def test_results_are_removed_before_steps_are_taken_from_a_pool(mine, tmp_path, monkeypatch):
    out, recipe = tmp_path / "run", mine / "recipe.yaml"
    for changed in ([], ["training.learning_rate=0.02"]):
        run_recipe(load_recipe(recipe, changed), out, pool=tmp_path / "pool")
    monkeypatch.setattr("prefdistill.experiment.run._results", stop)
    (out / "recipe.yaml").write_text(load_recipe(recipe).as_yaml())  # as if another run had seen to that
    (out / "seed-0" / "signals-teacher-test" / "stage.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(recipe), out, pool=tmp_path / "pool")
    assert not (out / "results.json").exists()


def test_results_are_removed_before_the_data_changes_anything(mine, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run_recipe(load_recipe(mine / "recipe.yaml"), out)
    pairs = load_pairs(str(mine / "pairs.parquet"))
    pairs.select(range(len(pairs) - 1)).to_parquet(str(mine / "pairs.parquet"))
    monkeypatch.setattr("prefdistill.experiment.steps.signals.extract_signals", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(mine / "recipe.yaml"), out)
    assert not (out / "results.json").exists()
    assert not (out / "report.html").exists()


def give_other_ids(store):
    """Have the signals of a store be of the token ids of other texts, as of a chat template that prints the date."""
    shard = store / "shards" / "00000.parquet"
    table = pq.read_table(shard)
    other = pa.array(table["chosen_ids_crc32"].to_numpy() ^ 1)
    pq.write_table(table.set_column(table.column_names.index("chosen_ids_crc32"), "chosen_ids_crc32", other), shard)
    write_checksum(shard, file_digest(shard))
    manifest = read_sealed(store / "manifest.json")
    manifest["shards"][0]["sha256"] = file_digest(shard)
    write_sealed(store / "manifest.json", manifest)


def test_signals_of_other_token_ids_are_extracted_again_where_a_step_is_to_run(copy, finished, capsys):
    store = copy / "seed-0" / "signals-reference-train" / "store"
    digest = Signals.open(store).digest
    give_other_ids(store)
    run_recipe(load_recipe(QUICKSTART, TINY), copy)  # nothing is to run: all stays
    assert Signals.open(store).digest != digest
    shutil.rmtree(copy / "seed-0" / "evaluate-dpo-0")
    capsys.readouterr()
    results = run_recipe(load_recipe(QUICKSTART, TINY), copy)
    said = capsys.readouterr().err
    assert "signals-reference-train: the reference signals" in said
    assert said.count("extracting them again") == 1
    assert Signals.open(store).digest == digest
    assert rebuilt(results) == {"evaluate-dpo-0"}
    assert results["methods"] == finished[1]["methods"]


@pytest.mark.parametrize("removed", [["manifest.json"], ["request.json", "manifest.json"]])
def test_signals_that_are_extracted_again_survive_an_interruption(copy, finished, monkeypatch, removed):
    store = copy / "seed-0" / "signals-reference-train" / "store"
    digest = Signals.open(store).digest
    give_other_ids(store)
    shutil.rmtree(copy / "seed-0" / "evaluate-dpo-0")

    def interrupted(place):
        for name in removed:
            (place / name).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr("prefdistill.experiment.steps.signals.shutil", SimpleNamespace(rmtree=interrupted))
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load_recipe(QUICKSTART, TINY), copy)
    assert rebuilt(run_recipe(load_recipe(QUICKSTART, TINY), copy)) == {"evaluate-dpo-0"}
    assert Signals.open(store).digest == digest
    assert {path.name for path in store.parent.iterdir()} == {"stage-request.json", "stage.json", "store"}


def test_a_repair_meets_shards_of_other_token_ids(copy, finished, capsys):
    store = copy / "seed-0" / "signals-reference-train" / "store"
    digest = Signals.open(store).digest
    give_other_ids(store)
    (store / "manifest.json").unlink()
    assert set(stages(run_recipe(load_recipe(QUICKSTART, TINY), copy)).values()) == {True}
    assert "extracting them again" in capsys.readouterr().err
    assert Signals.open(store).digest == digest
