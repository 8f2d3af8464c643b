"""Files with anything in them: a reader gives what it should or refuses with a UserError, and does nothing else."""

import copy
import functools
import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prefdistill
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_sealed, write_json, write_sealed
from prefdistill.core.yaml import as_yaml, read_yaml
from prefdistill.data.load import load_messages, load_pairs, load_prompts
from prefdistill.data.truncation import Truncation
from prefdistill.experiment.recipe import Recipe, load_recipe, read_recipe
from prefdistill.experiment.study.load import load_study
from prefdistill.experiment.study.options import Study
from prefdistill.signals import Signals, extract_signals
from prefdistill.signals.store import SignalSet

ROOT = Path(__file__).parents[2]
QUICKSTART = Path(prefdistill.__file__).parent / "experiment/recipes/quickstart.yaml"
RECIPES = [*sorted((ROOT / "recipes").rglob("*.yaml")), QUICKSTART]
OUTCOMES: Counter[tuple[str, bool]] = Counter()  # how often something came out
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


@pytest.fixture(autouse=True)
def accepts_some_and_refuses_some():
    """In each test: else it would prove little."""
    OUTCOMES.clear()
    yield
    for kind in {kind for kind, _ in OUTCOMES}:
        assert OUTCOMES[kind, True] > 0
        assert OUTCOMES[kind, False] > 0


def complete(path):
    """A shipped recipe with what it leaves to the command line."""
    recipe = read_recipe(path)
    if not recipe["data"].get("synthetic"):
        recipe["data"]["train"] = "pairs.jsonl"
        recipe["model"] = {**recipe.get("model", {}), "teacher": "a", "student": "b", "teacher_reference": None}
    return recipe


@functools.cache  # read by the tests that use them, and not while all tests are collected
def recipes():
    return [complete(path) for path in RECIPES]


@functools.cache
def recipe_texts():
    return [as_yaml(recipe) for recipe in recipes()]


@functools.cache
def studies():
    return [read_yaml(path, "study", "", "") for path in STUDIES]


fuzz = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), max_examples=150
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["dpo", "tvkd", "..", "/etc/passwd", "all", "1e400", "\0", "a: b", "0", "-1"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def leaf_paths(value, path=()):
    """Where there is something in a tree, inner nodes included."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaf_paths(inner, (*path, key))


@st.composite
def mutated(draw, trees):
    """One of the trees, which a function gives, with one to three parts replaced, removed, or under another name."""
    tree = copy.deepcopy(draw(st.sampled_from(trees())))
    for _ in range(draw(st.integers(1, 3))):
        places = list(leaf_paths(tree))
        if not places:
            break
        *above, last = draw(st.sampled_from(places))
        parent = tree
        for key in above:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if action == "replace":
            parent[last] = draw(values)
        elif action == "remove" or isinstance(parent, list):
            del parent[last]
        else:
            parent[draw(st.text(max_size=6))] = parent.pop(last)
    return tree


@st.composite
def garbled(draw, texts):
    """One of the texts, which a function gives, with a few characters cut out, put in, or turned."""
    text = draw(st.sampled_from(texts()))
    for _ in range(draw(st.integers(1, 4))):
        a = draw(st.integers(0, len(text)))
        b = min(len(text), a + draw(st.integers(0, 12)))
        text = (
            text[:a]
            + draw(
                st.sampled_from(["", "\t", "&a ", "*a", "!!python/name:os.system", "{", "]", ": ", "\n- ", "\u2028"])
            )
            + text[b:]
        )
    return text


def read(reader, path, kind):
    """What came out, if anything did."""
    try:
        found = reader(path)
    except UserError:
        OUTCOMES[kind.__name__, False] += 1
        return None
    assert isinstance(found, kind)
    OUTCOMES[kind.__name__, True] += 1
    return found


@fuzz
@given(mutated(recipes), st.booleans())
def test_mutated_recipes(tmp_path, recipe, fast):
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(recipe), encoding="utf-8")
    found = read(lambda path: load_recipe(path, fast=fast), path, Recipe)
    if found:  # and what was made of it says the same again
        found.save(path)
        overrides = ["model.trust_remote_code=true"] if found.model.trust_remote_code else []
        assert load_recipe(path, overrides, only=["all"]) == found


@fuzz
@given(garbled(recipe_texts))
def test_garbled_recipes(tmp_path, text):
    (tmp_path / "recipe.yaml").write_bytes(text.encode("utf-8", errors="replace"))
    read(load_recipe, tmp_path / "recipe.yaml", Recipe)


@fuzz
@given(mutated(studies))
def test_mutated_studies(tmp_path, study):
    (tmp_path / "study.yaml").write_text(as_yaml(study), encoding="utf-8")
    read(load_study, tmp_path / "study.yaml", Study)


messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name"]),
        st.sampled_from(["user", "assistant", "system", "", None, 3]),
        max_size=3,
    ),
    max_size=3,
)
cells = st.one_of(
    st.text(max_size=5),
    st.just([{"role": "user", "content": "a"}]),
    st.just([{"role": "assistant", "content": "b"}]),
    st.just([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    messages,
    values,
)
columns = st.sampled_from(
    ["prompt", "chosen", "rejected", "messages", "completion", "score_chosen", "chosen_ended", "x"]
)


whole = st.fixed_dictionaries({name: st.text(max_size=5) for name in ("prompt", "chosen", "rejected", "completion")})
rows = st.one_of(whole, whole, whole, st.dictionaries(columns, cells, max_size=5), values)


@settings(fuzz, max_examples=250)
@given(st.lists(rows, max_size=4), st.sampled_from([load_pairs, load_messages, load_prompts]))
def test_random_rows(tmp_path, rows, reader):
    datasets.disable_progress_bars()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read(lambda path: reader(str(path)), path, datasets.Dataset)
    if found is not None:
        assert len(found) == len(rows)
        assert "prompt" in found.column_names


LINES = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3


@settings(fuzz, max_examples=100)
@given(garbled(lambda: [LINES]), st.sampled_from(["rows.jsonl", "rows.jsonl.gz", "rows.parquet"]))
def test_garbled_rows(tmp_path, text, name):
    datasets.disable_progress_bars()
    (tmp_path / name).write_bytes(text.encode("utf-8", errors="replace"))
    read(lambda path: load_pairs(str(path)), tmp_path / name, datasets.Dataset)


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_model, tokenizer, pairs):
    out = tmp_path_factory.mktemp("store") / "store"
    model = make_model(num_hidden_layers=1)
    extract_signals(
        model, pairs.select(range(4)), tokenizer, out=out, kinds=("values", "logps"), truncation=Truncation(64)
    )
    return out


@settings(fuzz, max_examples=400)
@given(st.data())
def test_mutated_manifests(store, tmp_path, pairs, data):
    manifest = data.draw(mutated(lambda: [read_sealed(store / "manifest.json")]))
    place = tmp_path / "store"
    shutil.copytree(store, place, dirs_exist_ok=True)
    if isinstance(manifest, dict):  # with a checksum that fits, so that what it says is looked at
        write_sealed(place / "manifest.json", manifest)
    else:
        write_json(place / "manifest.json", manifest)
    found = read(Signals.open, place, Signals)
    if found is not None:  # what can be opened can be looked at, or is refused where it does not fit
        rows = pairs.select(range(4))
        signals = read(lambda store: SignalSet.of([store], rows), found, SignalSet)
        assert signals is None or list(signals.rows) == [0, 1, 2, 3]


@settings(fuzz, max_examples=60)
@given(st.data())
def test_garbled_manifests(store, tmp_path, data):
    text = data.draw(garbled(lambda: [(store / "manifest.json").read_text()]))
    place = tmp_path / "store"
    shutil.copytree(store, place, dirs_exist_ok=True)
    (place / "manifest.json").write_text(text)
    read(Signals.open, place, Signals)
