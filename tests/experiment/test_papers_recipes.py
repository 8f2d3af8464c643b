"""The papers' recipes: loaded and planned without network, on small data with the columns of their data sets."""

import copy

import pytest

from prefdistill.core.errors import UserError
from prefdistill.core.options import leaves
from prefdistill.data.encoder import Encoder
from prefdistill.experiment.doctor import examine
from prefdistill.experiment.plan import build_plan
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.show_plan import plan_recipe
from prefdistill.methods import METHODS
from support.doctor import model_of
from support.pairs import assistant, user, write_jsonl
from support.tiny_runs import ROOT
from support.tokenizer_styles import make_tokenizer

PAPERS = ROOT / "recipes" / "papers"
NAMES = sorted(path.stem for path in PAPERS.glob("*.yaml"))
OF_METHODS = [name for name in NAMES if (PAPERS / f"{name}.yaml").read_text().startswith("extends: base.yaml\nname")]
OF_METHODS = [name for name in OF_METHODS if "methods:" in (PAPERS / f"{name}.yaml").read_text()]
DOCUMENTED = ("name", "task", "baseline", "headline")


def settings(name):
    return leaves(load_recipe(PAPERS / f"{name}.yaml").model_dump())


def changed(one, other):
    """Return the first two parts of the keys whose values differ."""
    both = settings(one), settings(other)
    keys = {key for key in both[0] | both[1] if both[0].get(key, both) != both[1].get(key, both)}
    return {".".join(key.split(".")[:2]) for key in keys} - {*DOCUMENTED}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model in each family's place, and rows with the columns of each data set."""
    root = tmp_path_factory.mktemp("papers")
    tokenizer = copy.deepcopy(make_tokenizer("llama3"))
    tokenizer.chat_template = None  # a base model
    model_of(tokenizer, root / "model", max_position_embeddings=2048)
    chats = [
        [user(f"What is {subject}?"), assistant("Something."), user("And then?"), assistant(f"{ending} {subject}")]
        for subject, ending in (("ink", "A liquid,"), ("bread", "Food:"), ("the sea", "Water;"))
    ]
    write_jsonl(
        root / "dpo-mix-7k",
        [
            {"dataset": "a", "chosen": chat, "rejected": [*chat[:-1], assistant("No.")], "chosen_rating": 5.0}
            for chat in chats
        ],
    )
    write_jsonl(
        root / "helpsteer2",
        [
            {"prompt": chat[0]["content"], "chosen": [chat[0], chat[3]], "rejected": [chat[0], assistant("No.")]}
            for chat in chats
        ],
    )
    write_jsonl(root / "deita", [{"prompt": "x", "prompt_id": "1", "messages": chat} for chat in chats])
    write_jsonl(
        root / "dolly",
        [{"instruction": f"Say {i}.", "context": "", "response": f"{i}", "category": "qa"} for i in range(3)],
    )
    for name in ("dpo-mix-7k", "helpsteer2", "deita", "dolly"):
        (root / name).rename(root / f"{name}.jsonl")
    return root


def local(name, place):
    """Return the overrides that put small files and models in the place of those on the Hub."""
    data = load_recipe(PAPERS / f"{name}.yaml").data
    files = {"argilla/dpo-mix-7k": "dpo-mix-7k", "gx-ai-architect/HelpSteer2_DPO": "helpsteer2"}
    files |= {"HuggingFaceH4/deita-10k-v0-sft#train_sft": "deita", "databricks/databricks-dolly-15k": "dolly"}
    sources = {key: getattr(data, key) for key in ("train", "test", "sft")}
    changes = [
        f"data.{key}={place / files[source.removesuffix('#test')]}.jsonl" for key, source in sources.items() if source
    ]
    return [*changes, f"model.teacher={place / 'model'}", f"model.student={place / 'model'}"]


def test_a_recipe_differs_from_another_in_the_method_alone_or_in_the_models_or_the_data():
    methods = {run.method for run in load_recipe(PAPERS / "base.yaml", only=["all"]).methods.values()}
    assert methods == set(METHODS)
    assert {"tvkd", "adpa-plus", "dckd", "simpo"} <= set(OF_METHODS)
    for name in OF_METHODS:
        own = set(load_recipe(PAPERS / f"{name}.yaml").methods) - {"dpo"}
        assert changed("base", name) == {f"methods.{method}" for method in own}, name
        assert name in own
    models = {"model.teacher", "model.student", "model.chat_template"}
    assert changed("base", "mistral-danube2") == models
    assert changed("mistral-danube2", "mistral-danube3") == {"model.student"}
    for name, other in (("llama", "base"), ("danube2", "mistral-danube2"), ("danube3", "mistral-danube3")):
        assert changed(other, f"helpsteer2-{name}") == {"data.train", "data.test"}
    assert changed("dpkd-gpt2-120m", "dpkd-gpt2-340m") == {"model.student"}
    assert changed("dpkd-opt-1.3b", "dpkd-opt-6.7b") == {"model.student"}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_planned_on_rows_of_its_data_set(place, tmp_path, name):
    recipe = load_recipe(PAPERS / f"{name}.yaml", local(name, place))
    steps = {step["name"]: step for step in plan_recipe(recipe, tmp_path / "run")["steps"]}
    assert {step["kind"] for step in steps.values()} >= {"sft", "distill"}
    for method in recipe.methods:
        trained = steps[f"distill-{method}-0"]
        assert trained["rows"] == 3 * recipe.methods[method].training.epochs
        assert trained["tokens"] > 0
    assert not (tmp_path / "run").exists()


def test_base_models_read_conversations_in_the_form_that_the_recipe_names(place, tmp_path, capsys):
    """Also what the doctor says, and that the text of the template is part of the keys."""
    recipe = load_recipe(PAPERS / "tvkd.yaml", local("tvkd", place))
    plan = build_plan(recipe, tmp_path, 0)
    tokenizer = plan.context.tokenizer.tokenizer
    assert plan.context.tokenizer_of("teacher").tokenizer is tokenizer
    assert Encoder(tokenizer).text([user("Hi ")]) == make_tokenizer("llama3").apply_chat_template(
        [user("Hi ")], tokenize=False, add_generation_prompt=True
    )
    assert not [f for f in examine(recipe=recipe, out=tmp_path).findings if f.check == "template.missing"]

    plain = load_recipe(PAPERS / "tvkd.yaml", [*local("tvkd", place), "model.chat_template=plain"])
    other = build_plan(plain, tmp_path, 0)
    assert Encoder(other.context.tokenizer.tokenizer).text([user("Hi")]).endswith("User:\nHi\n\nAssistant:\n")
    keys, others = ({step.name: step.key for step in one.steps} for one in (plan, other))
    assert not set(keys.items()) & set(others.items())
    nowhere = load_recipe(PAPERS / "tvkd.yaml", [*local("tvkd", place), "model.chat_template=nowhere.jinja"])
    with pytest.raises(UserError, match=r"no chat template at 'nowhere.jinja'"):
        plan_recipe(nowhere, tmp_path)
