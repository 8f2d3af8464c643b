"""The working directory of most tests of verbs."""

import datasets
import pytest

from support.pairs import write_jsonl


@pytest.fixture
def place(tmp_path, monkeypatch, make_model, tokenizer, pairs):
    """A working directory with pairs and a tiny model, and things that are neither."""
    datasets.disable_progress_bars()  # the command does so through the environment, before it imports datasets
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ndata: {train: nowhere.jsonl}\nmodel: {teacher: model, student: model}\nmethods: {dpo: {}}\n"
    )
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path
