"""The package in docs/extending.md, written to disk from the page: each part works in the CLI and the pipeline."""

import csv
import importlib
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from prefdistill.cli import main
from prefdistill.signals.needs import Need

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (toy/\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
GROUPS = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1])["project"]["entry-points"]
REGISTRIES = {
    "prefdistill.methods": "prefdistill.methods:METHODS",
    "prefdistill.kinds": "prefdistill.signals.kinds:KINDS",
    "prefdistill.metrics": "prefdistill.evaluation.metrics:METRICS",
    "prefdistill.formats": "prefdistill.data.formats:FORMATS",
    "prefdistill.verbs": "prefdistill.cli.verbs:VERBS",
}
RECIPE = """
name: toy
data: {train: pairs.tsv, test: pairs.tsv, max_length: 64}
model:
  scratch:
    vocab_size: 300
    teacher: {hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}
    student: {hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}
training: {learning_rate: 1e-3, max_steps: 2, batch_size: 4, micro_batch_size: 4}
teacher: {sft: {}, dpo: {beta: 0.1}}
student: {sft: {}}
evaluate: {prompts: 8, max_new_tokens: 8}
methods:
  dpo: {beta: 0.1}
  HINGE: {beta: 0.1}
  strong: {method: toy.method.Hinge, beta: 1.0}
"""


def registry(group):
    module, name = REGISTRIES[group].split(":")
    return getattr(importlib.import_module(module), name)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The files of the package on `sys.path`, in a directory with pairs.tsv; the registries forget it afterwards."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    for name, source in FILES.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    with (tmp_path / "pairs.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["prompt", "chosen", "rejected"])
        writer.writerows([f"say {i}", f"well said {i} and {i}", f"no {i}"] for i in range(16))
    for group in REGISTRIES:
        things = registry(group)
        monkeypatch.setattr(things, "_things", dict(things._things))
        monkeypatch.setattr(things, "_entry_points_read", False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


@pytest.fixture
def installed(toy):
    """The package with the entry points of the page, as pip installs them."""
    metadata = toy / "toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    lines = [line for group in GROUPS for line in (f"[{group}]", *(f"{n} = {v}" for n, v in GROUPS[group].items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return toy


def test_each_part_is_one_file_of_under_40_lines_and_one_entry_point():
    assert set(GROUPS) == set(REGISTRIES)
    places = {
        f"{value.partition(':')[0].replace('.', '/')}.py" for group in GROUPS.values() for value in group.values()
    }
    assert places == set(FILES)
    assert all(len(source.splitlines()) < 40 for source in FILES.values())


def test_entry_points_reach_the_whole_pipeline(installed, capsys):
    assert main(["lengths", "--data", "pairs.tsv", "--json"]) == 0  # a verb, on a data format
    assert json.loads(capsys.readouterr().out) == {"chosen": 5, "rejected": 2}
    assert main(["--help"]) == 0
    assert "lengths" in capsys.readouterr().out

    hinge = importlib.import_module("toy.method").Hinge

    class EntropyHinge(hinge):
        """Needs the signal kind of the package."""

        @property
        def needs(self):
            return (*super().needs, Need("teacher", "entropy"))

        def row_signals(self, signals):
            entropies = [signals.scalar("teacher", "entropy", side) for side in self.responses]
            assert all((entropy > 0).all() for entropy in entropies)
            return super().row_signals(signals)

    registry("prefdistill.methods").register("entropy-hinge", EntropyHinge)
    Path("recipe.yaml").write_text(RECIPE + "  entropy-hinge: {}\n")
    capsys.readouterr()
    assert main(["plan", "recipe.yaml", "--out", "run", "--json"]) == 0
    steps = {step["name"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    assert steps["signals-teacher-train"]["disk"] > 0  # the plan prices the kind that entropy-hinge needs
    assert main(["run", "recipe.yaml", "--out", "run"]) == 0, capsys.readouterr().err
    results = json.loads(Path("run/results.json").read_text())
    methods = results["methods"]
    assert {"dpo", "HINGE", "strong", "entropy-hinge"} <= set(
        methods
    )  # a method by name in any case, and by its dotted path
    assert all(0 <= methods[name]["repetition"]["mean"] <= 1 for name in methods)  # a metric
    assert "repetition" in results["differences"]["strong"]
    assert "repeated words" in Path("run/report.html").read_text(encoding="utf-8")

    student = next(path for path in sorted(Path("run").rglob("config.json")) if "strong" in str(path)).parent
    extract = ["signals", "--model", str(student), "--data", "pairs.tsv", "--kind", "entropy", "--out", "store"]
    assert main(extract) == 0, capsys.readouterr().err  # a signal kind
    from prefdistill import Signals

    store = Signals.open("store")
    assert store.kinds == ("entropy",)
    assert all(0 < store.row(3)[side]["entropy"] < 6 for side in ("chosen", "rejected"))  # log(300) is 5.7


def test_a_registered_object_is_used_like_an_entry_point(toy):
    for group, entries in GROUPS.items():
        for name, value in entries.items():
            module, attribute = value.split(":")
            thing = getattr(importlib.import_module(module), attribute)
            registry(group).register(name.upper(), thing)
            assert registry(group)[name] is thing
    from prefdistill import load_pairs

    assert load_pairs("pairs.tsv")["chosen"][1] == "well said 1 and 1"
