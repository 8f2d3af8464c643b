"""Recipes: the shipped ones load, defaults and overrides apply, every mistake is named in one line."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prefdistill.core.errors import UserError
from prefdistill.core.options import Override, validate
from prefdistill.core.yaml import as_yaml, parse_value
from prefdistill.experiment.recipe import load_recipe
from prefdistill.training.options import Training

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    [*(ROOT / "recipes").rglob("*.y*ml"), *(ROOT / "src" / "prefdistill" / "experiment" / "recipes").rglob("*.y*ml")]
)

GOOD = """
name: good
data: {train: pairs.jsonl}
model: {teacher: big, student: small}
training: {learning_rate: 1e-6, batch_size: 16, micro_batch_size: 8}
teacher:
  sft: {}
  dpo: {beta: 0.05, learning_rate: 2e-5}
student:
  sft: {epochs: 3}
methods:
  dpo: {beta: 0.2}
  tvkd: {alpha: 0.5, training: {batch_size: 32, lora: {r: 4}}}
fast:
  training.learning_rate: 5e-3
  methods.tvkd.alpha: 0.25
  data.max_train: 10
"""


NAMES = ["model.teacher=big", "model.student=small"]
NAMED = [*NAMES, "teacher.sft=null", "teacher.dpo=null", "student.sft=null"]


@pytest.fixture
def load(tmp_path):
    """Load a recipe given as text."""

    def from_text(text=GOOD, *overrides, **options):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides, **options)

    return from_text


def test_recipes_are_shipped_in_both_places():
    assert ROOT / "src" / "prefdistill" / "experiment" / "recipes" / "quickstart.yaml" in SHIPPED
    assert ROOT / "recipes" / "local-pairs" / "tvkd.yaml" in SHIPPED


def needed(path):
    """A recipe for the user's own data has to be told where they are; others name theirs."""
    if "synthetic:" in path.read_text() or path.parent.name in ("papers", "smollm2"):
        return []
    with pytest.raises(UserError, match=r"give data\.train="):
        load_recipe(path)
    return ["data.train=x", *(NAMES if path.stem == "named-models" else [])]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_recipe_loads(path, fast):
    recipe = load_recipe(path, needed(path), fast=fast)
    assert recipe.methods[recipe.baseline].control is None


def test_settings_for_models_from_scratch_are_named_where_they_apply_to_named_models(tmp_path, capsys):
    def note(path, *overrides, **options):
        load_recipe(path, ["data.train=x", *overrides], **options)
        return capsys.readouterr().err

    scratch = ROOT / "recipes" / "local-pairs" / "tvkd.yaml"
    assert (
        note(scratch)
        == note(scratch, "model.teacher=big")
        == note(ROOT / "recipes" / "named-models.yaml", *NAMES)
        == ""
    )
    said = note(scratch, *NAMED)
    for part in ("data.max_prompt_length=96", "signals.dtype=float32", "training.learning_rate=0.0002", "dpo.yaml"):
        assert part in said
    assert "a reward model of random weights" in said
    assert "sft.learning_rate" not in said
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {scratch}\nmodel: {{teacher: big, student: small}}\ndata: {{max_length: 2048}}")
    said = note(own, "data.max_prompt_length=96", "reward_model=null")
    assert "data.max" not in said
    assert "reward model" not in said
    assert "teacher.sft.learning_rate=0.002" in said
    assert "data.max_prompt_length=64" in note(own, fast=True)


def test_bf16_is_that_of_the_hardware_where_it_is_null(monkeypatch):
    import prefdistill.training.options as options

    for fast in (True, False):
        monkeypatch.setattr(options, "fast_bf16", lambda fast=fast: fast)
        assert Training(bf16=None).autocast is Training(bf16=None).cache_key()["bf16"] is fast
        assert Training(bf16=True).autocast
        assert not Training().autocast


def test_training_defaults_apply_to_every_training(load):
    recipe = load()
    assert (recipe.teacher.sft.learning_rate, recipe.teacher.sft.batch_size) == (1e-6, 16)
    assert (recipe.teacher.dpo.learning_rate, recipe.teacher.dpo.batch_size, recipe.teacher.dpo.beta) == (
        2e-5,
        16,
        0.05,
    )
    assert (recipe.student.sft.epochs, recipe.student.sft.learning_rate) == (3, 1e-6)
    dpo, tvkd = recipe.methods["dpo"], recipe.methods["tvkd"]
    assert (dpo.training.batch_size, dpo.training.lora) == (16, None)
    assert (tvkd.training.batch_size, tvkd.training.micro_batch_size, tvkd.training.lora.r) == (32, 8, 4)
    assert tvkd.training.learning_rate == 1e-6


def test_a_methods_training_is_merged_over_the_defaults(load):
    own = "methods.dpo.training={arguments: {label_smoothing_factor: 0.1}, lora: {r: 8}}"
    training = (
        load(GOOD, "training.arguments={adam_beta2: 0.95}", "training.lora={alpha: 5}", own).methods["dpo"].training
    )
    assert training.arguments == {"adam_beta2": 0.95, "label_smoothing_factor": 0.1}
    assert (training.lora.r, training.lora.alpha) == (8, 5)


@pytest.mark.parametrize("name", ["tvkd", "TVKD", "Tvkd"])
def test_method_names_in_any_case(load, name):
    methods = load(GOOD, f"methods.x={{method: {name}, alpha: 1}}", f"methods.{name.upper()}={{}}").methods
    assert (methods["x"].method, methods["TVKD"].method) == ("tvkd", "tvkd")
    assert list(load(only=[name]).methods) == ["dpo", "tvkd"]


def test_yaml_1_2(load):
    recipe = load(GOOD, "task=yes", "data.train=1:30", "methods.dpo.label=off")
    assert (recipe.task, recipe.data.train, recipe.methods["dpo"].label) == ("yes", "1:30", "off")


def test_a_method_keeps_its_own_options(load):
    methods = load(
        GOOD,
        "methods.placebo={method: tvkd, potential: shuffled, control: {kind: placebo, of: tvkd}, label: a placebo}",
    ).methods
    assert (methods["dpo"].method, methods["dpo"].options) == ("dpo", {"beta": 0.2})
    assert methods["placebo"].method == "tvkd"
    assert methods["placebo"].options == {"potential": "shuffled"}
    assert (methods["placebo"].control.kind, methods["placebo"].control.of) == ("placebo", "tvkd")


def test_a_null_stage_is_skipped(load):
    recipe = load(GOOD, "teacher.sft=null", "student=null")
    assert recipe.teacher.sft is None
    assert recipe.teacher.dpo is not None
    assert recipe.student.sft is None


def test_overrides_win_over_fast_and_fast_over_the_file(load):
    file, fast = load(), load(fast=True)
    both = load(GOOD, "training.learning_rate=7", "methods.tvkd.alpha=0", fast=True)
    for recipe, rate, alpha, rows in ((file, 1e-6, 0.5, None), (fast, 5e-3, 0.25, 10), (both, 7, 0, 10)):
        assert recipe.methods["dpo"].training.learning_rate == rate
        assert recipe.methods["tvkd"].options["alpha"] == alpha
        assert recipe.data.max_train == rows


def test_only_some_methods_and_the_baseline(load):
    text = GOOD.replace("  dpo: {beta: 0.2}\n", "  dpo: {beta: 0.2}\n  sft: {}\n  other: {method: dpo}\n")
    assert list(load(text, only=["tvkd"]).methods) == ["dpo", "tvkd"]
    assert list(load(text, "baseline=sft", only=["other"]).methods) == ["sft", "other"]
    with pytest.raises(UserError, match="no method 'nope'; it has dpo, sft, other, tvkd"):
        load(text, only=["tvkd", "nope"])
    with pytest.raises(UserError, match="no method ''"):
        load(text, only=[""])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("-1E+3", -1000.0), (".5e-3", 5e-4), ("+2e2", 200.0), ("1e3", 1000.0), ("1.5e-6", 1.5e-6),
        ("3", 3), ("0.1", 0.1), ("true", True), ("null", None), ("", None), ("e5", "e5"), ("1e", "1e"), ("nan", "nan"),
        ("'1e-6'", "1e-6"), ("1e-6x", "1e-6x"), ("org/model-1e5", "org/model-1e5"), ("[1e-6, a]", [1e-6, "a"]),
        ("{r: 4}", {"r": 4}),
    ],
)  # fmt: skip
def test_values(text, value):
    found = parse_value(text, "key")
    assert found == value
    assert type(found) is type(value)


def test_an_override_is_split_at_its_first_equals_sign():
    assert Override.parse("data.train=a=b.jsonl") == Override("data.train", "a=b.jsonl")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_saved_recipe_is_the_same_recipe(path, tmp_path):
    recipe = load_recipe(path, needed(path), fast=True)
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_words_that_look_like_numbers_survive_saving(load, tmp_path):
    words = ["task='1e5'", "data.train='7e2'", "methods.dpo.label='.5e1'"]
    recipe = load(GOOD, *words, "methods.dpo.training.arguments={a: '1e-6', b: 1e-6}")
    recipe.save(tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again == recipe
    assert again.methods["dpo"].training.arguments == {"a": "1e-6", "b": 1e-6}


# Overrides of GOOD, and a part of what is said.
BAD_OVERRIDES = [
    ("nmae=x", "unknown key 'nmae'; did you mean 'name'?"),
    ("zzz=1", "unknown key 'zzz'; known there: name, task"),
    ("data.trian=x", "unknown key 'data.trian'; did you mean 'train'?"),
    ("model.studnet=x", "unknown key 'model.studnet'; did you mean 'student'?"),
    ("model.scratch={teacher: {}, student: {}, vocab: 3}", "unknown key 'model.scratch.vocab'; did you mean"),
    ("teacher.sftt={}", "unknown key 'teacher.sftt'; did you mean 'sft'?"),
    ("teacher.sft.learning_rat=1", "unknown key 'teacher.sft.learning_rat'; did you mean 'learning_rate'?"),
    ("teacher.sft.beta=1", "unknown key 'teacher.sft.beta'"),
    ("student.dpo={}", "unknown key 'student.dpo'"),
    ("signals.batch_token=1", "unknown key 'signals.batch_token'; did you mean 'batch_tokens'?"),
    ("training.epoch=1", "training: unknown key 'epoch'; did you mean 'epochs'?"),
    ("training.lora={rank: 4}", "training: unknown key 'lora.rank'; known there: r, alpha"),
    ("methods.dpo.training.warmp=1", "unknown key 'methods.dpo.training.warmp'; did you mean 'warmup'?"),
    ("methods.tvkd.training.lora.rr=1", "unknown key 'methods.tvkd.training.lora.rr'"),
    ("evaluate.sample=1", "unknown key 'evaluate.sample'; did you mean 'samples'?"),
    ("data.synthetic.pair=1", "data.synthetic.demonstrations is missing"),
    ("name=3", "name must be a valid string, got 3"),
    ("name=../elsewhere", "'../elsewhere' names a directory"),
    ("methods.a/b={method: dpo}", "'a/b' names a directory"),
    ("methods.teacher={method: dpo}", "methods.teacher: that name is taken"),
    ("seed=0.5", "seed must be a valid integer, got 0.5"),
    ("seed=-1", "seed must be greater than or equal to 0, got -1"),
    ("seeds=0", "seeds must be greater than 0, got 0"),
    ("orders=true", "orders must be a valid integer, got True"),
    ("data.max_train=-5", "data.max_train must be greater than 0, got -5"),
    ("data.train=[a]", "data.train must be a valid string, got ['a']"),
    ("training.learning_rate=-1e-6", "training: learning_rate must be greater than 0, got -1e-06"),
    ("training.learning_rate=fast", "training: learning_rate must be a valid number, got 'fast'"),
    ("training.learning_rate=.inf", "training: learning_rate must be a finite number, got inf"),
    ("training.batch_size=1.5", "training: batch_size must be a valid integer, got 1.5"),
    ("training.report_to={a: 1}", "training: report_to must be a valid list, got {'a': 1}"),
    ("training.arguments={num_train_epochs: 3}", "training: arguments.num_train_epochs is set by epochs; leave it out"),
    ("training.arguments={packing: true}", "training: arguments.packing has no effect: batch_size counts rows"),
    ("training.lora=true", "training: lora must be a mapping of names to values, got True"),
    ("training.arguments={day: 2026-01-01}", "training: arguments.day: input was not a valid JSON value"),
    ("methods.dpo.training.max_steps=0", "methods.dpo.training.max_steps must be greater than 0, got 0"),
    ("methods.tvkd.training.lora.alpha=0.5", "methods.tvkd.training.lora.alpha must be a valid integer"),
    ("methods.dpo.first_order=-1", "methods.dpo.first_order must be greater than or equal to 0"),
    ("signals.dtype=int8", "signals.dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got 'int8'"),
    ("model.trust_remote_code=1", "model.trust_remote_code must be a valid boolean, got 1"),
    ("methods.tdpo={}", "methods.tdpo: unknown method 'tdpo'; did you mean 'dpo'?"),
    ("methods.x={method: [dpo]}", "methods.x.method must be a valid string, got ['dpo']"),
    ("methods.dpo.alpha=1", "methods.dpo: dpo has no option 'alpha'; its options: beta"),
    ("methods.dpo.beta=strong", "methods.dpo: dpo: beta must be a number, got 'strong'"),
    ("methods.dpo.beta=true", "methods.dpo: dpo: beta must be a number, got True"),
    ("methods.tvkd.alpha=.inf", "must be a finite number, got inf"),
    ("methods.dpo.beta=-0.1", "methods.dpo: dpo: beta must be positive, got -0.1"),
    ("methods.tvkd.potential=3", "methods.tvkd: tvkd: potential must be 'value', 'shuffled', "),
    ("methods.tvkd.potential=hope", "methods.tvkd: tvkd: potential must be 'value', 'shuffled', "),
    ("methods.tvkd.discount=1.5", "methods.tvkd: tvkd: discount must lie in 0..1, got 1.5"),
    ("methods.dpo.options=3", "methods.dpo.options must be a mapping of names to values, got 3"),
    ("methods.dpo=3", "methods.dpo must be a mapping of names to values, got 3"),
    ("methods=[dpo]", "methods must be a mapping of names to values, got ['dpo']"),
    ("methods={}", "methods is empty; name at least one"),
    ("methods=null", "methods is empty; name at least one"),
    ("baseline=sft", "baseline 'sft' is not among the methods: dpo, tvkd"),
    ("data.synthetic={demonstrations: 1, teacher_pairs: 1, pairs: 1, test_prompts: 1}", "data needs either `train`"),
    ("data.train=null", "data needs either `train` (pairs) or `synthetic`; give data.train="),
    ("model.student=null", "model.teacher and model.student must be named, or model.scratch"),
    ("data=null", "data must be a mapping of names to values, got None"),
    ("model=null", "model must be a mapping of names to values, got None"),
    ("training=null", "training must be a mapping of names to values, got None"),
    ("teacher=7", "teacher must be a mapping of names to values, got 7"),
    ("name", "'name' is not an override; write key=value"),
    ("=1", "'=1' is not an override; write key=value"),
    ("data.train={", "data.train: '{' is not a YAML value"),
    ("data.train=2026-99-99", "data.train: '2026-99-99' is not a YAML value"),
]  # fmt: skip

# Whole files, and a part of what is said.
BAD_FILES = [
    ("", "is not a recipe: it must be a mapping"),
    ("- dpo\n- tvkd\n", "is not a recipe: it must be a mapping"),
    ("tvkd", "is not a recipe: it must be a mapping"),
    ("data: [\n", "is not valid YAML"),
    ("a: b: c\n", "is not valid YAML"),
    ("\tname: x\n", "is not valid YAML"),
    ("name: 2026-99-99\n", "is not valid YAML"),
    ("name: !!bool perhaps\n", "is not valid YAML"),
    ("name: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ("[" * 5000, "is not valid YAML"),
    ("? [a]\n: b\n", "keys should be strings, got ('a',)"),
    ("name: x\n", "data is missing"),
    (GOOD + "5: 6\n", "keys should be strings, got 5"),
    (GOOD.replace("{train:", "{1: 2, train:"), "keys should be strings, got 1"),
    (GOOD.replace("  sft: {}", "  sft: {1: 2}"), "teacher.sft must be a mapping of names to values"),
    (GOOD.replace("  dpo: {beta: 0.2}", "  1: {}"), "methods must be a mapping of names to values"),
    (GOOD.replace("  dpo: {beta: 0.2}", '  "d\\npo": {}'), "names a directory"),
    (GOOD + "extra: &a\n  again: *a\n", "unknown key 'extra'"),
    (GOOD + "evaluate:\n", "evaluate must be a mapping of names to values, got None"),
]


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES, ids=[override for override, _ in BAD_OVERRIDES])
def test_bad_values(load, override, message):
    load()  # it is the override that is bad
    with pytest.raises(UserError) as error:
        load(GOOD, override)
    assert message in one_line(error)


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files(load, tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load(text)
    assert message in one_line(error)
    assert str(tmp_path / "recipe.yaml") in str(error.value)


@pytest.mark.parametrize(
    ("fast", "message"),
    [
        ("[a]", "fast must be a mapping"),
        ("{1: 2}", "fast must be a mapping"),
        ("{data.max_tarin: 3}", "unknown key 'data.max_tarin'; did you mean 'max_train'?"),
    ],
)
def test_bad_profiles(load, fast, message):
    with pytest.raises(UserError) as error:
        load(GOOD.partition("fast:")[0] + f"fast: {fast}\n", fast=True)
    assert message in one_line(error)


def test_a_path_that_is_not_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match="no recipe at") as error:
            load_recipe(path)
        assert str(path) in one_line(error)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(UserError, match="is not valid YAML") as error:
        load_recipe(tmp_path / "r.yaml")
    one_line(error)


def test_long_values_are_not_repeated_in_full(load):
    with pytest.raises(UserError) as error:
        load(GOOD, f"seed={'x' * 10_000}")
    assert len(one_line(error)) < 500


def test_further_known_keys_are_suggested(load):
    with pytest.raises(UserError, match="unknown key 'alpah'; did you mean 'alpha'"):
        validate(Training, {"alpah": 1}, "here", ["alpha"])


# -- random recipes ----------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        "name", "data", "train", "test", "synthetic", "model", "teacher", "student", "scratch", "sft", "dpo", "tvkd",
        "methods", "method", "options", "training", "lora", "r", "alpha", "beta", "batch_size", "arguments", "signals",
        "evaluate", "fast", "baseline", "seed", "[key]", "a.b",
    ]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    WORDS,
    st.text(max_size=3),
    st.dates(),
    st.binary(max_size=2),
)
KEYS = st.one_of(WORDS, st.text(max_size=3), st.integers(), st.none(), st.booleans())
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
# Mostly valid, so that the fuzz gets past the first check.
RECIPES = st.builds(
    lambda changes: {
        "name": "x", "data": {"train": "x"}, "model": {"teacher": "a", "student": "b"}, "methods": {"dpo": {}}
    } | changes,
    st.dictionaries(WORDS | KEYS, VALUES, max_size=3),
)  # fmt: skip


def complaint(action):
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=RECIPES | st.dictionaries(KEYS, VALUES, max_size=5) | VALUES, fast=st.booleans())
@example(recipe={"methods": {"training": {"training": {"x": 1}}}, "data": {"train": "x"}}, fast=False)
def test_random_recipes_raise_only_user_errors(tmp_path, recipe, fast):
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(recipe), encoding="utf-8")
    assert "\n" not in complaint(lambda: load_recipe(path, fast=fast, only=["dpo"]).save(tmp_path / "saved.yaml"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("abdtpo.=[]{}:,!&*'\"-_019e \n", max_size=20),
    prefix=st.sampled_from(["", "data.train=", "methods.dpo."]),
)
def test_random_overrides_raise_only_user_errors(load, text, prefix):
    assert "\n" not in complaint(lambda: load(GOOD, prefix + text))
