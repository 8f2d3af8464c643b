"""The pages: links lead somewhere, the README can be read once, and its commands are those that CI runs."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_a_file_and_a_heading(page):
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):  # another site
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_readme_is_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ("prefdistill quickstart", "python3 -m venv .venv && "),
        ("pytest", "python3 -m venv .venv && "),
        ("-m slow", ".venv/bin/python -m pytest "),
    ],
)
def test_the_first_line_of_the_readme_with_these_words_is_a_command(words, start):
    """`.ci/run` runs these lines."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if words in line).startswith(start)


def test_every_page_can_be_reached_from_the_readme():
    seen, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
        queue += [(page.parent / link.partition("#")[0]).resolve() for link in links if not re.match(r"\w+:|#", link)]
    assert set(PAGES) <= seen


COMMAND = re.compile(r"^(?: {4}|# +)?prefdistill ((?:.*\\\n)*.*)$", re.MULTILINE)
CONTINUED = re.compile(r"\\\n(?:# +)?")


def commands():
    """Yield the commands of all pages, and of the comments in recipes and studies, as (file, arguments)."""
    for file in [*PAGES, *sorted(ROOT.glob("recipes/**/*.yaml")), *sorted(ROOT.glob("studies/*.yaml"))]:
        text = file.read_text(encoding="utf-8")
        code = "\n".join(FENCE.findall(text)) + "\n".join(re.findall(r"^ {4}prefdistill (?:.*\\\n)*.*$", text, re.M))
        for command in COMMAND.findall(code if file.suffix == ".md" else text):
            arguments = shlex.split(re.sub(r"\s#.*", "", CONTINUED.sub(" ", command)))
            if "..." not in arguments:
                yield pytest.param(arguments, id=f"{file.name} {' '.join(arguments)}"[:80])


@pytest.mark.parametrize("arguments", commands())
def test_commands_of_the_pages_are_valid(arguments, monkeypatch):
    """They parse, every flag and override exists, and the recipe can be loaded."""
    from prefdistill.cli.app import HELP, group
    from prefdistill.cli.flags import key_values
    from prefdistill.cli.verbs.train import method_and_training
    from prefdistill.core.options import Override, validate
    from prefdistill.experiment.recipe import load_recipe
    from prefdistill.experiment.study.load import load_study, recipe_of
    from prefdistill.experiment.study.options import cells_of
    from prefdistill.training.options import DPOTraining, Training

    monkeypatch.chdir(ROOT)
    call = group("prefdistill", HELP).main(args=arguments, prog_name="prefdistill", standalone_mode=False)
    options = call.options()
    if arguments[0] == "run":
        load_recipe(options.recipe, list(options.overrides))
    elif arguments[0] == "study":
        study = load_study(options.file, recipe=str(options.recipe.resolve()) if options.recipe else None)
        for cell in cells_of(study):
            recipe_of(study, options.file, cell, [Override.parse(text) for text in options.overrides], seed=1)
    elif arguments[0] == "distill":
        method_and_training(options)
    elif arguments[0] in ("sft", "dpo"):
        validate(
            DPOTraining if arguments[0] == "dpo" else Training,
            key_values(options.overrides, "training"),
            "command line",
        )


def test_the_recipe_of_the_page_can_be_loaded(tmp_path):
    from prefdistill.experiment.recipe import load_recipe

    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    recipe = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "named-models.yaml").write_text((ROOT / "recipes" / "named-models.yaml").read_text(encoding="utf-8"))
    (tmp_path / "my.yaml").write_text(recipe)
    loaded = load_recipe(tmp_path / "my.yaml")
    assert loaded.methods["tvkd-shuffled"].control.of == loaded.headline.method == "tvkd"


def test_the_options_page_is_current():
    """If it is not: python -m prefdistill.cli.options_page > docs/options.md"""
    from prefdistill.cli.options_page import options_page

    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == options_page()


def test_the_python_example_trains(tmp_path, monkeypatch, make_model, tokenizer, pairs):
    """The block of docs/stages.md, as it is."""
    for name, seed in (("teacher", 1), ("student", 0)):
        make_model(seed, num_hidden_layers=1).save_pretrained(tmp_path / "my" / name)
        tokenizer.save_pretrained(tmp_path / "my" / name)
    pairs.to_json(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    assert names["trainer"].state.global_step > 0


def test_the_reading_path_names_functions_where_they_are():
    """In docs/architecture.md, `name` (file) says that the file defines the name."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)(?:\.(\w+))?`\s\(([\w/]+\.py)\)", page)
    assert len(named) > 12
    for name, attribute, file in named:
        source = (ROOT / "src" / "prefdistill" / file).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) ({name}|{attribute or name})\b", source), (name, file)
