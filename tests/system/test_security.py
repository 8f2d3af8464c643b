"""The guarantees of SECURITY.md: untrusted files run no code and reach no other path, and keys are not leaked."""

import ast
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import prefdistill
from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.core.files import read_json, read_sealed, write_json, write_sealed
from prefdistill.data.truncation import Truncation
from prefdistill.methods import METHODS
from prefdistill.models.load import load_model
from prefdistill.report.study import write_study
from prefdistill.signals import Signals, extract_signals
from prefdistill.training.factory import make_trainer
from prefdistill.training.loop import fit
from prefdistill.training.options import Training

SOURCES = sorted(Path(prefdistill.__file__).parent.rglob("*.py"))
FAST = ["max_steps=1", "batch_size=2", "micro_batch_size=2"]

# -- files of the package contain no code ------------------------------------------------------------------------------


def names_in(tree):
    """Yield every imported, called or keyword name, dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            yield f"{ast.unparse(node.func)}()"
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_source_never_unpickles_unpacks_or_evaluates(source):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = set(names_in(tree)) - {"pickle.UnpicklingError"}  # an exception to catch
    modules = {name.split(".")[0] for name in names}
    assert modules.isdisjoint({"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "tarfile", "zipfile"})
    calls = {"eval()", "exec()", "compile()", "__import__()", "torch.load()", "np.load()", "os.system()", "yaml.load()"}
    assert names.isdisjoint(calls | {"allow_pickle", "shell", "shutil.unpack_archive()", "yaml.unsafe_load()"})


def test_yaml_is_read_by_a_safe_constructor():
    from ruamel.yaml.constructor import SafeConstructor

    from prefdistill.core.yaml import safe_yaml

    constructor = safe_yaml().Constructor
    assert issubclass(constructor, SafeConstructor)
    assert set(constructor.yaml_constructors) == set(SafeConstructor.yaml_constructors)
    readers = [source for source in SOURCES if "ruamel" in source.read_text(encoding="utf-8")]
    assert [source.name for source in readers] == ["yaml.py"]


def test_results_have_safe_file_types_and_contain_no_key(workdir, monkeypatch, capfd):
    secret = "hf_1234567890abcdefghij"
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "PREFDISTILL_JUDGE_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    (workdir / "recipe.yaml").write_text(
        "name: x\ndata: {train: pairs.jsonl, test: pairs.jsonl}\nmodel: {teacher: model, student: model}\n"
        "training: {max_steps: 1, batch_size: 2, micro_batch_size: 2}\nmethods: {dpo: {}, simpo: {}}\n"
        "student: {sft: {}}\n"
    )
    assert main(["run", "recipe.yaml", "--out", "run"]) == 0
    assert main(["run", "recipe.yaml", "--out", "other", "methods.dpo.bata=1"]) == 2
    out, err = capfd.readouterr()
    assert secret not in out + err
    files = [path for path in (workdir / "run").rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files}
    assert {".safetensors", ".parquet", ".json", ".jsonl"} <= suffixes
    assert suffixes <= {
        ".safetensors",
        ".parquet",
        ".json",
        ".jsonl",
        ".yaml",
        ".html",
        ".jinja",
        ".txt",
        ".md",
        ".sha256",
    }
    assert not any(secret.encode() in path.read_bytes() for path in files)


# -- pickles in untrusted files --------------------------------------------------------------------------------------


class Evil:
    """Creates a directory when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_the_evil_pickle_runs_when_loaded_unsafely(tmp_path):
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model, tokenizer, pairs):
    """The checkpoints of a training that stopped after two of four steps."""
    out = tmp_path_factory.mktemp("checkpoint")
    fit(trainer_of(out, make_model, tokenizer, pairs, max_steps=2), out, "x")
    (last,) = (out / "checkpoints").glob("checkpoint-2")
    state = read_json(last / "trainer_state.json")
    write_json(last / "trainer_state.json", state | {"max_steps": 4})
    return out / "checkpoints"


def trainer_of(out, make_model, tokenizer, pairs, max_steps=4):
    training = Training(max_steps=max_steps, batch_size=2, micro_batch_size=2, save_steps=1)
    model = make_model(num_hidden_layers=1)
    return make_trainer(METHODS["sft"](), lambda: model, pairs.select(range(8)), tokenizer, training, out)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_loading_a_checkpoint_runs_no_code(checkpoint, tmp_path, make_model, tokenizer, pairs, name):
    out = tmp_path / "out"
    shutil.copytree(checkpoint, out / "checkpoints")
    file = out / "checkpoints" / "checkpoint-2" / name
    assert file.is_file()
    torch.save(Evil(tmp_path / "ran"), file)
    mark = read_sealed(file.parent / "whole.json")
    write_sealed(file.parent / "whole.json", {"files": mark["files"] | {name: file.stat().st_size}})
    trainer = trainer_of(out, make_model, tokenizer, pairs)
    if name == "training_args.bin":  # never loaded
        fit(trainer, out, "x")
        assert trainer.state.global_step == 4
    else:
        with pytest.raises(UserError, match="checkpoint-2 is damaged, or holds more than the state of a training"):
            fit(trainer, out, "x")
    assert not (tmp_path / "ran").exists()


def test_loading_pickled_weights_runs_no_code(workdir, capsys):
    (workdir / "model" / "model.safetensors").unlink()
    torch.save(Evil(workdir / "ran"), workdir / "model" / "pytorch_model.bin")
    assert main(["sample", "--model", "model", "--data", "pairs.jsonl", "--out", "o.jsonl"]) == 2
    assert "model exists but holds no model" in capsys.readouterr().err
    assert not (workdir / "ran").exists()


def test_loading_a_pickled_adapter_runs_no_code(workdir, make_model, capsys):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model("model"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(workdir / "model" / name, workdir / "adapter")
    (workdir / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(Evil(workdir / "ran"), workdir / "adapter" / "adapter_model.bin")
    assert main(["sample", "--model", "adapter", "--data", "pairs.jsonl", "--out", "o.jsonl"]) == 2
    assert "adapter exists but holds no model" in capsys.readouterr().err
    assert not (workdir / "ran").exists()


# -- code in untrusted models -----------------------------------------------------------------------------------------

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "stranger"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokens(PreTrainedTokenizerFast):
    pass
def generate(model, *args, **kwargs):
    pathlib.Path({marker!r}).touch()
"""


@pytest.fixture(params=["stranger", "llama"])
def untrusted(request, workdir, monkeypatch):
    """A model with its own code, which creates a file; once with a model type that transformers knows."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(workdir / "modules"))
    shutil.copytree(workdir / "model", workdir / "untrusted")
    (workdir / "untrusted" / "code.py").write_text(CODE.format(marker=str(workdir / "ran")))
    (workdir / "untrusted" / "custom_generate").mkdir()
    shutil.copy(workdir / "untrusted" / "code.py", workdir / "untrusted" / "custom_generate" / "generate.py")
    config = read_json(workdir / "untrusted" / "config.json")
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    names["AutoModelForSequenceClassification"] = "code.Model"
    write_json(workdir / "untrusted" / "config.json", config | {"model_type": request.param, "auto_map": names})
    config = read_json(workdir / "untrusted" / "tokenizer_config.json")
    tokens = {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": [None, "code.Tokens"]}}
    write_json(workdir / "untrusted" / "tokenizer_config.json", config | tokens)
    (workdir / "recipe.yaml").write_text(
        "name: x\ndata: {train: pairs.jsonl}\nmodel: {teacher: untrusted, student: untrusted}\nmethods: {dpo: {}}\n"
        "training: {max_steps: 1, batch_size: 2, micro_batch_size: 2}\n"
    )
    (workdir / "questions.jsonl").write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["?"]}))
    return workdir


DATA, OUT = ["--data", "pairs.jsonl"], ["--out", "out"]
VERBS = {
    "sft": ["--model", "untrusted", *DATA, *OUT, *FAST],
    "dpo": ["--model", "untrusted", *DATA, *OUT, *FAST],
    "sample": ["--model", "untrusted", *DATA, "--out", "o.jsonl", "--max-new-tokens", "2"],
    "signals": ["--model", "untrusted", *DATA, *OUT],
    "distill": ["--student", "untrusted", "--method", "simpo", *DATA, *OUT, *FAST],
    "evaluate": ["--model", "untrusted", *DATA, "--generate", "--max-new-tokens", "2", "--out", "e.json"],
    "run": ["recipe.yaml", *OUT],
    "judge": ["answers", "--model", "untrusted", "--questions", "questions.jsonl", "--out", "a.jsonl"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_model_code_does_not_run_by_default(untrusted, capsys, verb):
    main([verb, *VERBS[verb]])
    capsys.readouterr()
    assert not (untrusted / "ran").exists()
    assert main(["evaluate", "--model", "model", *DATA, "--reward-model", "untrusted", "--out", "e.json"]) == 2
    assert not (untrusted / "ran").exists()


def test_model_code_runs_with_trust_remote_code(untrusted, capsys):
    """Check that the test above can fail."""
    main(["signals", *VERBS["signals"], "--trust-remote-code"])
    capsys.readouterr()
    assert (untrusted / "ran").exists()


@pytest.mark.parametrize("text", ["model: {trust_remote_code: true}", "fast: {model.trust_remote_code: true}"])
def test_a_recipe_cannot_enable_model_code(untrusted, capsys, text):
    (untrusted / "more.yaml").write_text(f"extends: recipe.yaml\n{text}\n")
    assert main(["run", "more.yaml", *OUT, "--fast"]) == 2
    assert "more.yaml asks to run code from the models' repositories" in capsys.readouterr().err
    assert not (untrusted / "ran").exists()
    main(["run", "recipe.yaml", *OUT, "model.trust_remote_code=true"])
    assert (untrusted / "ran").exists()


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.mkdir('ran') }}"]
)
def test_a_chat_template_cannot_escape_its_sandbox(workdir, capsys, template):
    (workdir / "model" / "chat_template.jinja").write_text(template)
    assert main(["signals", "--model", "model", *DATA, *OUT]) == 2
    assert "The chat template refuses a user and an assistant message" in capsys.readouterr().err
    assert not (workdir / "ran").exists()


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, make_model, tokenizer, pairs):
    model = make_model(num_hidden_layers=1)
    few, limits = pairs.select(range(4)), Truncation(64)
    extract_signals(model, few, tokenizer, out=tmp_path / "store", kinds=("logps",), truncation=limits)
    return tmp_path / "store"


@pytest.mark.parametrize(
    "name", ["../manifest.json", "../../00000.parquet", "/etc/passwd", "..", ".", "", "a/../00000.parquet", "\0"]
)
def test_a_manifest_cannot_name_files_outside_its_store(store, name):
    shutil.copy(store / "shards" / "00000.parquet", store.parent / "00000.parquet")
    manifest = read_sealed(store / "manifest.json")
    manifest["shards"][0]["file"] = name
    write_sealed(store / "manifest.json", manifest)
    with pytest.raises(UserError, match="which is no file of the store"):
        Signals.open(store)


@pytest.mark.parametrize("what", ["shards/00000.parquet", "shards"])
def test_a_link_out_of_a_store_is_not_followed(store, what):
    (store / what).rename(store.parent / "elsewhere")
    (store / what).symlink_to(store.parent / "elsewhere")
    with pytest.raises(UserError, match="a link that leads out of the store"):
        Signals.open(store)


def test_a_link_to_a_store_can_be_opened(store):
    (store.parent / "link").symlink_to(store)
    assert len(Signals.open(store.parent / "link")) == 4


# -- pages -------------------------------------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script></style></title></desc><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


def test_a_study_page_escapes_hostile_text(tmp_path):
    estimate = {"mean": 0.1, "se": 0.1, "n": 3, "over": EVIL, "low": 0.0, "high": 0.2, "values": [0.1]}
    cell = {
        "cell": EVIL, "group": EVIL, "x": None, "overrides": {EVIL: EVIL}, "files": [EVIL], "seeds": [1],
        "methods": {EVIL: {"reward": estimate}}, "differences": {EVIL: {"reward": estimate}},
        "margin_accuracy": {EVIL: estimate}, "shaping_std": {EVIL: [1.0]}, "warnings": [EVIL],
    }  # fmt: skip
    results = {
        "study": EVIL, "question": EVIL, "recipe": EVIL, "overrides": {EVIL: EVIL}, "metric": "reward", "x": None,
        "x_label": EVIL, "x_scale": "linear", "seeds": [1], "methods": [EVIL], "display_names": {EVIL: EVIL},
        "labels": {EVIL: EVIL}, "roles": {EVIL: {"kind": "baseline", "of": None}},
        "metrics": {"reward": {"label": EVIL, "higher_is_better": True, "format": ".3f"}},
        "cells": [cell], "failed": [{"cell": EVIL, "seed": 1, "error": EVIL}], "seconds": 1.0,
        "environments": [{EVIL: EVIL}], "data": {EVIL: [{EVIL: EVIL}]},
    }  # fmt: skip
    write_study(results, tmp_path)
    found_tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found_tags.append(tag)
            assert not any(name.startswith("on") for name, _ in attrs)

    page = (tmp_path / "study.html").read_text(encoding="utf-8")
    Tags().feed(page)
    assert {"table", "svg"} <= set(found_tags)
    assert {"script", "img", "iframe", "object", "base", "form"}.isdisjoint(found_tags)
    assert "&lt;script&gt;alert(1)" in page
    assert "Content-Security-Policy" in page
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(tmp_path / "plot.svg").iter()}
    assert {"script", "img", "image", "foreignObject"}.isdisjoint(tags)
    assert "<script" not in (tmp_path / "table.md").read_text(encoding="utf-8")
