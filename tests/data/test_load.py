"""Loading pairs, messages and prompts, and their fingerprints."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.load import load_messages, load_pairs
from prefdistill.data.messages import pair_texts
from prefdistill.data.truncation import Truncation
from support.pairs import assistant, conversation, plain, user, write_jsonl
from support.tokenizer_styles import make_tokenizer


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")


PAIRS = [
    {**conversation("Hi?", "Hello.", "No."), "score_chosen": 1, "score_rejected": 0.25, "source": "a"},
    {**conversation("Où ?", "Là 🙂", "\n"), "score_chosen": 0.5, "score_rejected": -3, "source": "b"},
]


def sampled_row(content, ended=None, *, form=conversation):
    row = form("What is the capital?", content, "x")
    row = {"prompt": row["prompt"], "student_response": row["chosen"]}
    return row if ended is None else row | {"student_response_ended": ended}


IMPLICIT = [
    {
        "chosen": [user("Q"), assistant("A"), user("R"), assistant("B")],
        "rejected": [user("Q"), assistant("A"), user("R"), assistant("C")],
    },
    {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
]


def test_every_format_gives_the_same_pairs_and_fingerprint(tmp_path):
    jsonl = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    zipped = tmp_path / "pairs.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(jsonl).read_bytes()))
    dataset = load_pairs(jsonl)
    dataset.to_parquet(tmp_path / "pairs.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset.select([0]), "test": dataset}).save_to_disk(tmp_path / "splits")
    files = tmp_path / "files"
    files.mkdir()
    write_jsonl(files / "train.jsonl", PAIRS[:1])
    write_jsonl(files / "test.jsonl", PAIRS)
    loaded = {
        "gz": load_pairs(str(zipped)),
        "parquet": load_pairs(str(tmp_path / "pairs.parquet")),
        "saved": load_pairs(str(tmp_path / "saved")),
        "splits": load_pairs(f"{tmp_path / 'splits'}#test"),
        "files": load_pairs(str(files), split="test"),
    }
    for name, other in loaded.items():
        assert list(other) == list(dataset) == PAIRS, name
        assert data_fingerprint(other) == data_fingerprint(dataset), name
    assert len(load_pairs(str(tmp_path / "splits"))) == len(load_pairs(str(files))) == 1


def test_fingerprint_depends_on_texts_order_and_scores_only():
    dataset = Dataset.from_list(PAIRS)
    fingerprint = data_fingerprint(dataset)
    assert fingerprint == data_fingerprint(dataset.remove_columns("source"))
    with_empty_key = [{**row, "prompt": [{**row["prompt"][0], "name": None}]} for row in PAIRS]
    assert fingerprint == data_fingerprint(Dataset.from_list(with_empty_key))
    whole = [Dataset.from_list([{**PAIRS[0], "score_chosen": n, "score_rejected": n}]) for n in (1, 1.0)]
    assert data_fingerprint(whole[0]) == data_fingerprint(whole[1])
    changed = [
        dataset.select([1, 0]),
        dataset.select([0]),
        dataset.remove_columns("score_chosen"),
        dataset.rename_columns({"chosen": "rejected", "rejected": "chosen"}),
        Dataset.from_list([{**PAIRS[0], "score_chosen": 1.5}, PAIRS[1]]),
        Dataset.from_list([{**PAIRS[0], "prompt": [user("Hi? ")]}, PAIRS[1]]),
    ]
    assert len({fingerprint, *map(data_fingerprint, changed)}) == 1 + len(changed)


def test_loading_and_encoding_write_nothing_next_to_the_source(tmp_path):
    Dataset.from_list(IMPLICIT).save_to_disk(tmp_path / "implicit")
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "pairs")
    before = sorted(tmp_path.rglob("*"))
    for name in ("implicit", "pairs"):
        encode_pairs(load_pairs(str(tmp_path / name)), make_tokenizer("llama3"), Truncation(None))
    assert sorted(tmp_path.rglob("*")) == before


def test_implicit_prompt_is_the_shared_start(tmp_path):
    dataset = load_pairs(write_jsonl(tmp_path / "c.jsonl", IMPLICIT))
    assert dataset[0]["prompt"] == [user("Q"), assistant("A"), user("R")]
    assert dataset["chosen"][:] == [[assistant("B")], [assistant("A")]]
    assert dataset["rejected"][:] == [[assistant("C")], [assistant("B")]]
    dataset = load_pairs(
        write_jsonl(tmp_path / "p.jsonl", [{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    )
    assert dataset[0] == plain("The sky is", " blue.", " green.")


def test_extra_message_keys_and_columns_of_mixed_types_are_kept(tmp_path):
    rows = [
        {**PAIRS[0], "note": 1},
        {**PAIRS[1], "prompt": [{**user("x"), "name": "Ann"}], "note": "text", "extra": [1]},
    ]
    dataset = load_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert dataset["note"][:] == [1, "text"]
    assert dataset["extra"][:] == [None, [1]]
    assert dataset[0]["prompt"] == PAIRS[0]["prompt"]
    assert dataset[1]["prompt"] == rows[1]["prompt"]


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        (
            {"messages": [user("Q"), assistant("A"), user("R"), assistant("B")]},
            [user("Q"), assistant("A"), user("R")],
            [assistant("B")],
        ),
        ({"prompt": "Q", "completion": "A", "id": 1}, "Q", "A"),
        ({"prompt": [user("Q")], "completion": [assistant("A")]}, [user("Q")], [assistant("A")]),
        ({"prompt": "Q", "completion": [assistant("A")]}, [user("Q")], [assistant("A")]),
        ({"prompt": [user("Q")], "completion": "A"}, [user("Q")], [assistant("A")]),
        (conversation("Q", "A", "B"), [user("Q")], [assistant("A")]),
        (IMPLICIT[1], [user("Q")], [assistant("A")]),
        ({"messages": [user("Q"), assistant("A")], **plain("other", "text", "here")}, [user("Q")], [assistant("A")]),
    ],
)
def test_messages_become_prompt_and_completion(tmp_path, row, prompt, completion):
    dataset = load_messages(write_jsonl(tmp_path / "sft.jsonl", [row]))
    assert list(dataset) == [{"prompt": prompt, "completion": completion}]


GOOD = json.dumps(plain("p", "c", "r"))


TALK = json.dumps(conversation("p", "c", "r"))


TYPES = "must be text or a list of messages with a text `role` and `content`, not"


FORMS = "is a list of messages. Use one form in all rows and columns."


A_PAIR = "A pair has `prompt`, `chosen`, `rejected`; the prompt may be the start of both others."


NO_ANSWER = "'messages' must be a prompt and then an assistant message. Fix or remove the row."


NO_START = "'chosen' and 'rejected' do not start alike. Add a `prompt` column."


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [GOOD, "", "{'a': 1}"],
            ", line 3: not valid JSON (column 2: Expecting property name enclosed in double quotes)."
            " Fix or remove the line.",
        ),
        (
            [GOOD, GOOD[:20]],
            ", line 2: not valid JSON (column 17: Unterminated string starting at). Fix or remove the line.",
        ),
        ([GOOD, "[1]"], ", line 2: a line must be a JSON object, not [1]."),
        ([""], ": there are no rows in it. Give data with at least one row."),
        (
            ['{"prompt": "p", "response": "c"}'],
            f": no column 'chosen', 'rejected'; it has 'prompt', 'response'. {A_PAIR}",
        ),
        (['{"chosen": "c"}'], f": no column 'rejected'; it has 'chosen'. {A_PAIR}"),
        ([GOOD, '{"prompt": "p", "chosen": "c"}'], f", row 1: 'rejected' {TYPES} None."),
        ([GOOD.replace('"c"', "3")], f", row 0: 'chosen' {TYPES} 3."),
        ([GOOD, GOOD.replace('"c"', "3")], f", row 1: 'chosen' {TYPES} 3."),
        ([GOOD.replace('"p"', "[]")], f", row 0: 'prompt' {TYPES} []."),
        ([TALK.replace('"p"', "7")], f", row 0: 'prompt' {TYPES} [{{'content': 7, 'role': 'user'}}]."),
        ([GOOD, GOOD, TALK, GOOD], f": row 0 ('prompt') is plain text and row 2 ('prompt') {FORMS}"),
        (
            [TALK, TALK.replace('[{"role": "assistant", "content": "c"}]', '"c"')],
            f": row 1 ('chosen') is plain text and row 0 ('prompt') {FORMS}",
        ),
        (
            [TALK, TALK.replace('"content": "p"}', '"content": "p"}, {"role": "assistant", "content": "a"}')],
            ", row 1: the prompt ends with an assistant message. End it with the turn to answer.",
        ),
        (
            [TALK, TALK.replace('"assistant", "content": "r"', '"user", "content": "r"')],
            ", row 1: 'rejected' has a message with the role 'user'."
            " Keep assistant messages only; what comes before them belongs to the prompt.",
        ),
        (['{"chosen": "a b", "rejected": "a c"}', '{"chosen": "one", "rejected": "two"}'], f", row 1: {NO_START}"),
        (['{"chosen": "", "rejected": ""}'], f", row 0: {NO_START}"),
        (
            [GOOD[:-1] + ', "score_chosen": "high"}'],
            ": column 'score_chosen' must hold numbers, it holds string. Convert or rename it.",
        ),
        (
            [GOOD.replace('"p"', '"\\ud800"')],
            ", row 0: it holds an unpaired surrogate (\\ud800 to \\udfff). Fix or remove it.",
        ),
    ],
)
def test_errors_of_pairs(tmp_path, lines, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        load_pairs(str(path))
    assert str(raised.value) == f"{path}{message}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "text"}, ", row 0: 'messages' must be a list of messages, not 'text'."),
        ({"messages": [user("Q")]}, f", row 0: {NO_ANSWER}"),
        ({"messages": [assistant("A")]}, f", row 0: {NO_ANSWER}"),
        (
            {"prompt": "Q"},
            ": no column 'completion'; it has 'prompt'. SFT data has `messages`, or `prompt` and `completion`.",
        ),
    ],
)
def test_errors_of_messages(tmp_path, row, message):
    path = write_jsonl(tmp_path / "sft.jsonl", [row])
    with pytest.raises(UserError) as raised:
        load_messages(path)
    assert str(raised.value) == f"{path}{message}"


def test_errors_of_sources(tmp_path, monkeypatch):
    def refuse(name, split):
        raise ConnectionError(f"cannot reach {name} {split}\nmore")

    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "pairs.tsv").write_text("prompt,chosen\n")
    (tmp_path / "broken.parquet").write_bytes(b"no")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(Path(pairs).read_bytes())[:40])
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "empty").mkdir()
    DatasetDict({"train": Dataset.from_list(PAIRS)}).save_to_disk(tmp_path / "splits")
    types = ".jsonl, .jsonl.gz, .parquet, .csv, .json"
    cases = {
        f"{pairs}#test": ": a file has no splits. Leave out '#test'.",
        str(tmp_path / "nothing.jsonl"): f"no such file or directory. Give a {types} file, a directory, "
        "or a Hub name such as org/name.",
        "nothing.jsonl": "no such file or directory. Give a",
        "data/nothing.jsonl": "no such file or directory. Give a",
        str(tmp_path / "pairs.tsv"): f"unknown file type. Give a {types} file.",
        str(tmp_path / "broken.parquet"): "not a readable Parquet file. Write it again (",
        str(tmp_path / "broken.jsonl.gz"): "cannot be read. Write it again (EOFError: ",
        str(tmp_path / "latin.jsonl"): ", line 1: not valid JSON ('utf-8' codec can't decode",
        str(tmp_path / "empty"): "no split 'train' could be loaded from this directory. Check its files (",
        f"{tmp_path / 'splits'}#dev": "no split 'dev'. Name one of its splits after '#': train.",
    }
    for source, message in cases.items():
        with pytest.raises(UserError) as raised:
            load_pairs(source)
        assert message in str(raised.value), source
        assert str(raised.value).startswith(source.partition("#")[0]), source
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError) as raised:
        load_pairs("org/name#test")
    assert str(raised.value) == (
        "org/name#test: no such file or directory, and loading it from the Hub failed. Check the name "
        "(ConnectionError: cannot reach org/name test)."
    )


def test_hub_name_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, split: asked.append((name, split)) or Dataset.from_list(PAIRS)
    )
    assert list(load_pairs("org/na.me")) == PAIRS
    load_pairs("org/na.me", split="dev")
    load_pairs("org/na.me#test", split="dev")
    assert asked == [("org/na.me", "train"), ("org/na.me", "dev"), ("org/na.me", "test")]


def test_importing_the_module_is_cheap():
    code = "import sys, prefdistill.data.load; print({'torch', 'datasets', 'transformers', 'trl'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_pair_texts_yields_texts_of_plain_and_conversational_pairs():
    message = {"role": "user", "content": "q"}
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {
            "prompt": [message],
            "chosen": [{"role": "assistant", "content": "a"}],
            "completion": "of no part",
            "rejected": None,
        },
    ]
    assert list(pair_texts(rows)) == ["p", "c", "r", "q", "a"]


def test_fingerprint_covers_only_the_requested_responses():
    rows = [{**row, "student_response": [assistant("A")], "student_response_ended": True} for row in PAIRS]
    data = Dataset.from_list(rows)
    assert data_fingerprint(data) == data_fingerprint(Dataset.from_list(PAIRS))  # what others read changes nothing
    own = data_fingerprint(data, ("student_response",))
    assert own == data_fingerprint(data.remove_columns(["chosen", "rejected", "score_chosen"]), ("student_response",))
    chosen = data_fingerprint(data, ("chosen",))
    assert chosen == data_fingerprint(data.remove_columns(["rejected", "score_chosen"]), ("chosen",))
    cut = [{**row, "student_response_ended": i == 0} for i, row in enumerate(rows)]
    changed = [
        data_fingerprint(data),
        chosen,
        data_fingerprint(data, ("student_response", "chosen")),
        data_fingerprint(data.select([1, 0]), ("student_response",)),
        data_fingerprint(Dataset.from_list(cut), ("student_response",)),
        data_fingerprint(data.remove_columns("student_response_ended"), ("student_response",)),
    ]
    assert len({own, *changed}) == 1 + len(changed)


def test_sampled_rows_need_not_be_pairs(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [sampled_row("Paris", True), sampled_row("Rome", False)])
    found = load_pairs(path, responses=("student_response",))
    assert found["student_response_ended"][:] == [True, False]
    with pytest.raises(UserError, match="no column 'chosen', 'rejected'; it has"):
        load_pairs(path)
    for name, fix in (("teacher_response", "prefdistill sample --column teacher_response"), ("chosen", "A pair has")):
        with pytest.raises(UserError, match=rf"no column '{name}'; it has .*{fix}"):
            load_pairs(path, responses=(name,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_response_ended": "yes"}, "column 'student_response_ended' must hold true or false, it holds string"),
        ({"student_response": 3}, "row 0: 'student_response' must be text or a list of messages"),
        ({"student_response": [{"role": "user", "content": "x"}]}, "row 0: 'student_response' has a message with the"),
    ],
)
def test_errors_of_sampled_rows(tmp_path, change, message):
    path = write_jsonl(tmp_path / "own.jsonl", [sampled_row("Paris", True) | change])
    with pytest.raises(UserError) as raised:
        load_pairs(path, responses=("student_response",))
    assert message in str(raised.value)


def test_a_rebuilt_saved_data_set_gives_its_new_rows(tmp_path):
    """The fingerprint of `datasets` depends on the code, so its cache files may hold older rows."""
    answers = tmp_path / "answers.txt"
    source = Dataset.from_list([{"prompt": "p", "rejected": "no"}])

    def longest():
        source.map(lambda row: {**row, "chosen": answers.read_text()}).save_to_disk(str(tmp_path / "saved"))
        return load_pairs(str(tmp_path / "saved")).map(lambda row: {"size": len(row["chosen"])})["size"][0]

    for answer in ("short", "a longer one"):
        answers.write_text(answer)
        assert longest() == len(answer)
    assert not list((tmp_path / "saved").glob("cache-*"))


@pytest.mark.parametrize("source", ["pairs.parquet", "directory"])
def test_a_new_file_of_the_same_name_and_time_is_not_taken_from_a_cache(tmp_path, source):
    """Archives and copies preserve times; a cache keyed by them would give the rows of the older file."""
    (tmp_path / "directory").mkdir()
    file = tmp_path / ("pairs.parquet" if source == "pairs.parquet" else "directory/0.parquet")
    for chosen in ("old", "new"):
        Dataset.from_list([plain("a", chosen, "c")]).to_parquet(file)
        os.utime(file, (1e9, 1e9))
        assert load_pairs(str(tmp_path / source))["chosen"][:] == [chosen]
