"""Docstring examples run and can be pasted: each imports the names that its module does not define."""

import doctest
import importlib
from pathlib import Path

import pytest

import prefdistill

ROOT = Path(prefdistill.__file__).parent
FILES = sorted(file for file in ROOT.rglob("*.py") if ">>> " in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_examples_run(file):
    module = importlib.import_module(".".join(file.relative_to(ROOT.parent).with_suffix("").parts))
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    tests = [test for test in doctest.DocTestFinder().find(module, globs=own) if test.examples]
    expected = file.read_text(encoding="utf-8").count(">>> ")
    assert sum(len(test.examples) for test in tests) == expected, "an example is where doctest does not find it"
    runner, report = doctest.DocTestRunner(verbose=False), []
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
