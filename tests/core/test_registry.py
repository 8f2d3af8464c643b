import sys
from importlib.metadata import EntryPoint

import pytest

from prefdistill.core import registry
from prefdistill.core.errors import UserError
from prefdistill.core.registry import Registry


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    return Registry("colour", "colours", {"red": 1, "pi": "math:pi", "lost": "math:nothing"})


def test_names_are_found_in_any_case(colours):
    assert colours["RED"] == 1
    assert colours.find("Red") == 1
    assert "rEd" in colours


def test_a_built_in_thing_is_imported_on_first_use(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    (tmp_path / "loaded_on_use.py").write_text("thing = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    things = Registry("thing", "things", {"one": "loaded_on_use:thing"})
    assert list(things) == ["one"]
    assert "loaded_on_use" not in sys.modules
    assert things["one"] is sys.modules["loaded_on_use"].thing


def test_a_registered_thing_is_found_and_a_taken_name_refused(colours):
    colours.register("Blue", 2)
    assert colours["blue"] == 2
    with pytest.raises(UserError, match="'red' already"):
        colours.register("red", 3)


def test_an_entry_point_of_an_installed_package_is_found(monkeypatch):
    points = [EntryPoint("Tau", "math:tau", "prefdistill.colours"), EntryPoint("red", "math:e", "prefdistill.colours")]
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or points)
    colours = Registry("colour", "colours", {"red": 1})
    assert asked == []
    assert colours["tau"] == pytest.approx(6.28, abs=0.01)
    assert colours["red"] == 1
    assert asked == ["prefdistill.colours"]


@pytest.mark.parametrize("name", ["math.pi", "math:pi"])
def test_a_dotted_name_is_imported(colours, name):
    assert colours.find(name) == pytest.approx(3.14, abs=0.01)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rod", "unknown colour 'rod'; did you mean 'red'?"),
        ("x", "unknown colour 'x'; known: red, pi, lost"),
        ("lost", "the colour 'lost' cannot be imported from math:nothing"),
        ("no_such_package.thing", "No module named 'no_such_package'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_fix(colours, name, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        colours.find(name)
