"""Loading pairs, finding the response in a templated conversation, and batching."""

import copy
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefdistill.core.errors import UserError
from prefdistill.data import truncation as reasons
from prefdistill.data.batches import PairCollator
from prefdistill.data.encode import encode_pairs
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.load import load_messages, load_pairs
from prefdistill.data.messages import pair_texts
from prefdistill.data.template import end_token_ids
from prefdistill.data.truncation import Truncation
from support.tokenizer_styles import STYLES, make_tokenizer

UNLIMITED = Truncation(max_length=None)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def conversation(prompt, chosen, rejected):
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def plain(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def encode(rows, tokenizer, truncation=UNLIMITED):
    encoded, dropped = encode_pairs(Dataset.from_list(rows), tokenizer, truncation)
    return list(encoded), dropped


def template(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


# ---- Loading


PAIRS = [
    {**conversation("Hi?", "Hello.", "No."), "score_chosen": 1, "score_rejected": 0.25, "source": "a"},
    {**conversation("Où ?", "Là 🙂", "\n"), "score_chosen": 0.5, "score_rejected": -3, "source": "b"},
]


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
        encode_pairs(load_pairs(str(tmp_path / name)), make_tokenizer("llama3"), UNLIMITED)
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


def test_messages_that_differ_in_their_keys_and_extra_columns_of_mixed_types_are_kept(tmp_path):
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
            ", row 0: there is half a character in it (\\ud800 to \\udfff). Fix or remove it.",
        ),
    ],
)
def test_what_is_wrong_with_pairs_is_said(tmp_path, lines, message):
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
        (
            {"prompt": "Q", "completion": [assistant("A")]},
            f": row 0 ('prompt') is plain text and row 0 ('completion') {FORMS}",
        ),
    ],
)
def test_what_is_wrong_with_messages_is_said(tmp_path, row, message):
    path = write_jsonl(tmp_path / "sft.jsonl", [row])
    with pytest.raises(UserError) as raised:
        load_messages(path)
    assert str(raised.value) == f"{path}{message}"


def test_what_is_wrong_with_the_source_is_said(tmp_path, monkeypatch):
    def refuse(name, split):
        raise ConnectionError(f"cannot reach {name} {split}\nmore")

    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "pairs.csv").write_text("prompt,chosen\n")
    (tmp_path / "broken.parquet").write_bytes(b"no")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(Path(pairs).read_bytes())[:40])
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "empty").mkdir()
    DatasetDict({"train": Dataset.from_list(PAIRS)}).save_to_disk(tmp_path / "splits")
    types = ".jsonl, .jsonl.gz, .parquet"
    cases = {
        f"{pairs}#test": ": a file has no splits. Leave out '#test'.",
        str(tmp_path / "nothing.jsonl"): f"no such file or directory. Give a {types} file, a directory, "
        "or a Hub name such as org/name.",
        "nothing.jsonl": "no such file or directory. Give a",
        "data/nothing.jsonl": "no such file or directory. Give a",
        str(tmp_path / "pairs.csv"): f"unknown file type. Give a {types} file.",
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


# ---- Tokenising: what a response is


@pytest.mark.parametrize("style", STYLES)
def test_end_tokens(style):
    tokenizer = make_tokenizer(style)
    expected = {STYLES[style].eos, STYLES[style].end} - {""}
    assert end_token_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids(list(expected)))


def test_end_tokens_without_a_template():
    tokenizer = make_tokenizer("llama3")
    without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end_of_text|>")
    assert end_token_ids(without) == {tokenizer.eos_token_id}


def contents(style):
    """Text of any kind, the end token's own text and newlines and spaces at the edges included."""
    pieces = st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from([STYLES[style].end, "\n", " ", "The capital of France", "🙂", "\n\n", "東京"]),
    )
    return st.lists(pieces, max_size=4).map("".join)


def assert_row_is_the_conversation(row, encoded, tokenizer, style):
    """What the tokens of one encoded row must be, from the template's text and the style's own description."""
    prompt_text = template(tokenizer, row["prompt"], add_generation_prompt=True)
    end = tokenizer.convert_tokens_to_ids(style.end)
    for name in ("chosen", "rejected"):
        ids, offsets = encoded[f"{name}_ids"], encoded[f"{name}_offsets"]
        text = template(tokenizer, row["prompt"] + row[name])
        assert text.endswith(style.end + style.trailing)
        text = text[: len(text) - len(style.trailing)]
        assert encoded["prompt_ids"] + ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[-1] == end
        assert encoded[f"{name}_ended"] is True
        assert ids.count(end) == text[len(prompt_text) :].count(style.end)
        if style.bos:
            assert (encoded["prompt_ids"] + ids).count(tokenizer.bos_token_id) == style.writes_bos
        assert len(offsets) == len(ids)
        assert offsets == sorted(offsets)
        assert offsets[-1] == len(text) - len(prompt_text)
        for t, offset in enumerate(offsets, 1):
            until = tokenizer.decode(ids[:t])
            assert until == text[len(prompt_text) :][:offset] or until.endswith("\ufffd")  # within a character


@pytest.mark.parametrize("style", ["llama3", "chatml", "gemma", "zephyr", "phi3", "chatml_bare"])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_conversation_is_its_own_tokens_or_is_refused(style, data):
    text = contents(style)
    rows = data.draw(st.lists(st.builds(conversation, text, text, text), min_size=5, max_size=20))
    tokenizer = make_tokenizer(style)
    rows = [conversation("What?", "Hello.", ""), *rows]  # at least one row without surprises
    encoded, dropped = encode(rows, tokenizer)
    assert encoded[0]["row"] == 0
    for row in encoded:
        assert_row_is_the_conversation(rows[row["row"]], row, tokenizer, STYLES[style])
    # Refused rows are those whose tokens do not start with the tokens of the prompt, and no others.
    refused = []
    for index, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        wholes = [
            tokenizer.apply_chat_template(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")
        ]
        if any(whole[: len(prompt)] != prompt for whole in wholes):
            refused.append(index)
    assert sorted({*range(len(rows))} - {row["row"] for row in encoded}) == refused
    assert len(dropped) == len(refused)
    assert set(dropped.counts) <= {reasons.TOKENS_MERGE}
    if style in ("llama3", "gemma"):  # these trim the content, so nothing can merge
        assert not dropped


def test_multi_turn_prompts_and_two_message_responses():
    tokenizer = make_tokenizer("llama3")
    rows = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, user("Q"), assistant("A"), user("R")],
            "chosen": [assistant("one"), assistant("two")],
            "rejected": [assistant("three")],
        }
    ]
    [row], dropped = encode(rows, tokenizer)
    assert not dropped
    text = tokenizer.decode(row["chosen_ids"])
    assert text == "one<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
    assert tokenizer.decode(row["prompt_ids"]).count("A<|eot_id|>") == 1


def test_keys_that_a_message_does_not_have_stay_hidden_from_the_template():
    source = make_tokenizer("chatml")
    names = "{% if message.name is defined %}({{ message.name }}){% endif %}"
    tokenizer = type(source)(
        tokenizer_object=source.backend_tokenizer,
        eos_token=source.eos_token,
        chat_template=source.chat_template.replace("{{ message['content'] }}", names + "{{ message['content'] }}"),
    )
    rows = [{**conversation("Q", "A", "B"), "prompt": [{**user("Q"), "name": name}]} for name in ("Ann", None)]
    encoded, _ = encode(rows, tokenizer)
    texts = [tokenizer.decode(row["prompt_ids"]) for row in encoded]
    assert ["(Ann)Q" in text for text in texts] == [True, False]
    assert "(" not in texts[1]


def test_an_end_token_inside_the_content_does_not_cut_it():
    tokenizer = make_tokenizer("chatml")
    [row], _ = encode([conversation("Q", "a<|im_end|>\nb<|im_end|>\n", "<|im_end|>")], tokenizer)
    assert tokenizer.decode(row["chosen_ids"]) == "a<|im_end|>\nb<|im_end|>\n<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "<|im_end|><|im_end|>"
    assert row["chosen_ended"]
    assert row["rejected_ended"]


def test_offsets_slice_the_text_into_tokens():
    tokenizer = make_tokenizer("gemma")
    [row], _ = encode([conversation("Q", "The sea\nis wide, 123!", "ok")], tokenizer)
    text = "The sea\nis wide, 123!<end_of_turn>"
    starts = [0, *row["chosen_offsets"][:-1]]
    pieces = [text[a:b] for a, b in zip(starts, row["chosen_offsets"], strict=True)]
    assert pieces == [tokenizer.decode([token]) for token in row["chosen_ids"]]
    assert len(pieces) > 5
    assert "".join(pieces) == text


def test_template_without_an_end_token_gives_responses_that_have_not_ended():
    tokenizer = make_tokenizer("no_end")
    [row], dropped = encode([conversation("Q", "Paris", "Rome\n"), conversation("Q", "", "Rome")], tokenizer)
    assert tokenizer.decode(row["chosen_ids"]) == "Paris"
    assert tokenizer.decode(row["rejected_ids"]) == "Rome\n"
    assert row["chosen_ended"] is row["rejected_ended"] is False
    assert (dropped.counts, dropped.first_rows) == ({reasons.RESPONSE_EMPTY: 1}, {reasons.RESPONSE_EMPTY: 1})


def test_rows_are_refused_where_the_response_cannot_be_told_from_the_prompt():
    with pytest.raises(UserError) as raised:
        encode([conversation("Q", "A", "B"), conversation("Q", "", "B")], make_tokenizer("not_a_prefix"))
    assert str(raised.value) == (
        "No row is left: dropped 2 rows: the chat template renders the prompt differently when a response follows "
        "(2, first row 0). Change the data, the chat template or the lengths."
    )
    tokenizer = make_tokenizer("chatml")
    rows = [conversation("Q", "A", "B"), conversation("Q", "A", "\nB"), conversation("Q", "\n\nA", "B")]
    encoded, dropped = encode(rows, tokenizer)
    assert [row["row"] for row in encoded] == [0]
    assert (len(dropped), dropped.first_rows) == (2, {reasons.TOKENS_MERGE: 1})
    assert str(dropped) == "dropped 2 rows: the tokenizer merges tokens across the end of the prompt (2, first row 1)"
    system = {**conversation("Q", "A", "B"), "prompt": [{"role": "system", "content": "s"}, user("Q")]}
    encoded, dropped = encode([system, rows[0]], make_tokenizer("gemma"))
    assert [row["row"] for row in encoded] == [1]
    assert str(dropped) == "dropped 1 row: the chat template refuses its messages (1, first row 0)"


def test_the_padding_token_does_not_matter():
    rows = [conversation("Q", "A", "BCD"), conversation("Q", "<|im_end|>", "")]
    same, other = make_tokenizer("chatml"), make_tokenizer("chatml", pad="<|pad|>")
    assert same.pad_token_id == same.eos_token_id != other.pad_token_id
    texts = []
    for tokenizer in (same, other):
        encoded, _ = encode(rows, tokenizer)
        batch = PairCollator(tokenizer.pad_token_id)(encoded)
        kept = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        texts.append([tokenizer.decode(ids) for ids in kept])
        assert all(text.endswith("<|im_end|>") for text in texts[-1])
        prompts = sum(2 * len(row["prompt_ids"]) for row in encoded)
        assert batch["attention_mask"].sum() == prompts + batch["lengths"].sum()
    assert texts[0] == texts[1]


# ---- Tokenising: plain text


def test_plain_text_gets_the_tokenizers_special_tokens_and_one_eos():
    rows = [plain("The capital", " of France", " of France</s>"), plain("", "x", ""), plain("a\n", "\nb", "c")]
    for adds_eos in (False, True):
        tokenizer = make_tokenizer("zephyr", adds_eos=adds_eos)
        encoded, dropped = encode(rows, tokenizer)
        assert [tokenizer.decode(row["prompt_ids"]) for row in encoded] == ["<s>The capital", "<s>"]
        assert [tokenizer.decode(row["chosen_ids"]) for row in encoded] == [" of France</s>", "x</s>"]
        assert [tokenizer.decode(row["rejected_ids"]) for row in encoded] == [" of France</s>", "</s>"]
        assert all(row["chosen_ended"] and row["rejected_ended"] for row in encoded)
        assert encoded[0]["chosen_offsets"][-2:] == [len(" of France"), len(" of France</s>")]
        assert (dropped.counts, dropped.first_rows) == ({reasons.TOKENS_MERGE: 1}, {reasons.TOKENS_MERGE: 2})


def test_plain_prompt_that_ends_with_eos_keeps_it():
    tokenizer = make_tokenizer("zephyr")
    [row], _ = encode([plain("a</s>", "b", "c")], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<s>a</s>"


def test_plain_prompt_without_tokens_is_dropped():
    encoded, dropped = encode([plain("", "x", "y"), plain("Q", "x", "y")], make_tokenizer("chatml"))
    assert [row["row"] for row in encoded] == [1]
    assert dropped.counts == {reasons.PROMPT_EMPTY: 1}


@pytest.mark.parametrize("form", [conversation, plain])
def test_tokens_are_those_of_trls_dpo_trainer(tmp_path, form):
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    tokenizer = make_tokenizer("chatml_bare" if form is conversation else "zephyr")
    rows = [
        form("What is the capital?", " Paris.", " Rome"),
        form("Write a poem.", "The sea is wide,\nthe sea is blue 🙂", ""),
        form("naïve café", "東京" + tokenizer.eos_token, " \t x"),
    ]
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), **size)
    trainer = DPOTrainer(
        model=LlamaForCausalLM(config),
        ref_model=LlamaForCausalLM(config),
        args=DPOConfig(output_dir=str(tmp_path), max_length=None, report_to=[], use_cpu=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    encoded, dropped = encode(rows, tokenizer)
    assert not dropped
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [{name: row[name] for name in columns} for row in encoded] == [
        {name: row[name] for name in columns} for row in trainer.train_dataset
    ]


# ---- Responses that were sampled


def answered(content, ended=None, *, form=conversation):
    row = form("What is the capital?", content, "x")
    row = {"prompt": row["prompt"], "student_response": row["chosen"]}
    return row if ended is None else row | {"student_response_ended": ended}


def encode_answers(rows, tokenizer, truncation=UNLIMITED):
    encoded, dropped = encode_pairs(Dataset.from_list(rows), tokenizer, truncation, responses=("student_response",))
    assert set(encoded.column_names) == {
        "row", "prompt_ids", *(f"student_response_{part}" for part in ("ids", "offsets", "ended"))
    }  # fmt: skip
    return [{name.removeprefix("student_response_"): value for name, value in row.items()} for row in encoded], dropped


@pytest.mark.parametrize("style", [*(name for name in STYLES if STYLES[name].end and name != "not_a_prefix"), "plain"])
def test_a_response_that_was_cut_is_the_ended_one_without_its_end_token(style):
    form = plain if style == "plain" else conversation
    tokenizer = make_tokenizer("zephyr" if style == "plain" else style)
    text = "Paris, the\n\ncapital 🙂"
    (unsaid,), _ = encode_answers([answered(text, form=form)], tokenizer)
    rows = [answered(text, flag, form=form) for flag in (True, False)]
    (ended, cut), dropped = encode_answers(rows, tokenizer)
    assert not dropped
    assert {**unsaid, "row": 0} == ended
    assert (ended["ended"], cut["ended"]) == (True, False)
    assert ended["ids"][-1] in end_token_ids(tokenizer)
    assert cut["prompt_ids"] == ended["prompt_ids"]
    assert cut["ids"] == ended["ids"][:-1]
    assert tokenizer.decode(cut["ids"]) == text
    assert cut["offsets"] == ended["offsets"][:-1]
    assert cut["offsets"][-1] == len(text)
    # the same tokens as of a pair
    pair, _ = encode([form("What is the capital?", text, "x")], tokenizer)
    assert pair[0]["chosen_ids"] == ended["ids"]


def test_what_the_template_writes_before_its_end_token_is_not_of_a_response_that_was_cut():
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "\n<|im_end|>")
    (ended, cut), _ = encode_answers([answered("Paris", flag) for flag in (True, False)], tokenizer)
    assert tokenizer.decode(ended["ids"]) == "Paris\n<|im_end|>"
    assert tokenizer.decode(cut["ids"]) == "Paris"
    assert cut["ended"] is False


def test_a_response_that_was_cut_may_be_cut_again_and_one_without_tokens_is_dropped():
    tokenizer = make_tokenizer("chatml")
    rows = [answered("one two three four", False), answered("one two three four", True), answered("", False)]
    whole, dropped = encode_answers(rows, tokenizer)
    assert dropped.counts == {reasons.RESPONSE_EMPTY: 1}
    assert dropped.first_rows == {reasons.RESPONSE_EMPTY: 2}
    room = len(whole[0]["prompt_ids"]) + len(whole[0]["ids"])
    for less, kept, ended in ((0, 0, False), (1, 1, False), (-1, 0, True)):
        found, _ = encode_answers(rows[:2], tokenizer, Truncation(max_length=room - less))
        assert found[0]["ids"] == whole[0]["ids"][: len(whole[0]["ids"]) - kept]
        assert (found[0]["ended"], found[1]["ended"]) == (False, ended)


def test_the_responses_asked_for_are_those_encoded():
    """Also where the same rows were encoded before, for others."""
    tokenizer = make_tokenizer("chatml")
    row = {**conversation("Q?", "yes", "no"), "student_response": [assistant("perhaps")], "note": "kept out"}
    data = Dataset.from_list([row])
    both, _ = encode_pairs(data, tokenizer, UNLIMITED)
    one, _ = encode_pairs(data, tokenizer, UNLIMITED, responses=("rejected",))
    mixed, _ = encode_pairs(data, tokenizer, UNLIMITED, responses=("student_response", "chosen"))
    assert "student_response_ids" not in both.column_names
    assert {name for name in one.column_names if name.endswith("_ids")} == {"prompt_ids", "rejected_ids"}
    assert one[0]["rejected_ids"] == both[0]["rejected_ids"]
    assert mixed[0]["chosen_ids"] == both[0]["chosen_ids"]
    assert tokenizer.decode(mixed[0]["student_response_ids"]) == "perhaps<|im_end|>"


def test_the_fingerprint_is_of_the_responses_that_are_read():
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


def test_sampled_rows_are_loaded_without_being_pairs(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [answered("Paris", True), answered("Rome", False)])
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
        ({"student_response": "text"}, "is plain text and"),
    ],
)
def test_what_is_wrong_with_sampled_rows_is_said(tmp_path, change, message):
    path = write_jsonl(tmp_path / "own.jsonl", [answered("Paris", True) | change])
    with pytest.raises(UserError) as raised:
        load_pairs(path, responses=("student_response",))
    assert message in str(raised.value)


# ---- Truncation


def test_truncation_by_hand():
    tokenizer = make_tokenizer("zephyr")  # a token for each digit, and BOS in front of plain text
    row = plain("4567", "890", "8")
    [whole], _ = encode([row], tokenizer)
    prompt, chosen, rejected = whole["prompt_ids"], whole["chosen_ids"], whole["rejected_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (len(prompt), len(chosen), len(rejected)) == (5, 4, 2)
    assert prompt[0] == bos
    assert chosen[-1] == rejected[-1] == eos
    cases = {  # (max_length, max_prompt_length) -> prompt, chosen, rejected, ended
        (9, None): (prompt, chosen, rejected, (True, True)),
        (8, None): (prompt, chosen[:3], rejected, (False, True)),
        (6, None): (prompt, chosen[:1], rejected[:1], (False, False)),
        (None, 6): (prompt, chosen, rejected, (True, True)),
        (None, 5): (prompt, chosen, rejected, (True, True)),
        (None, 3): ([bos, *prompt[-2:]], chosen, rejected, (True, True)),
        (6, 3): ([bos, *prompt[-2:]], chosen[:3], rejected, (False, True)),
        (2, 1): ([bos], chosen[:1], rejected[:1], (False, False)),
    }
    for lengths, expected in cases.items():
        [cut], dropped = encode([row], tokenizer, Truncation(*lengths))
        ended = (cut["chosen_ended"], cut["rejected_ended"])
        assert (cut["prompt_ids"], cut["chosen_ids"], cut["rejected_ids"], ended) == expected, lengths
        for name in ("chosen", "rejected"):
            assert cut[f"{name}_offsets"] == whole[f"{name}_offsets"][: len(cut[f"{name}_ids"])]
        assert not dropped
    with pytest.raises(UserError, match=r"^No row is left: dropped 1 row: the prompt leaves no room for a response"):
        encode([row], tokenizer, Truncation(5))


def test_truncation_without_bos_keeps_the_end_only():
    tokenizer = make_tokenizer("chatml")
    [cut], _ = encode([plain("4567", "8", "9")], tokenizer, Truncation(None, 2))
    assert tokenizer.decode(cut["prompt_ids"]) == "67"


def test_a_cut_right_after_an_end_token_inside_the_content_has_not_ended():
    tokenizer = make_tokenizer("zephyr")
    [cut], _ = encode([plain("4", "5</s>6", "7")], tokenizer, Truncation(4))
    assert tokenizer.decode(cut["chosen_ids"]) == "5</s>"
    assert cut["chosen_ended"] is False


def test_truncation_drops_only_the_rows_without_room():
    rows = [plain("456", "7", "8"), plain("4", "7", "8"), plain("4567", "7", "8")]
    encoded, dropped = encode(rows, make_tokenizer("zephyr"), Truncation(4))
    assert [row["row"] for row in encoded] == [1]
    assert (dropped.counts, dropped.first_rows) == (
        {reasons.PROMPT_TOO_LONG: 2},
        {reasons.PROMPT_TOO_LONG: 0},
    )


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((4, 4), "max_prompt_length (4) leaves no room for a response: give less than max_length (4)."),
        ((0, None), "max_length is 0. Give at least 1, or none for no limit."),
        ((None, -1), "max_prompt_length is -1. Give at least 1, or none for no limit."),
    ],
)
def test_impossible_truncation_is_refused(lengths, message):
    with pytest.raises(UserError) as raised:
        Truncation(*lengths)
    assert str(raised.value) == message


# ---- Tokenising: what is asked of the tokenizer, the data and the machine


def test_what_the_tokenizer_lacks_is_said():
    tokenizer = make_tokenizer("llama3")
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)

    class Slow:
        is_fast = False

    for rows, lacking, message in [
        ([plain("p", "c", "r")], Slow(), "does not report character offsets"),
        ([conversation("p", "c", "r")], bare, "has no chat template"),
        ([plain("p", "c", "r")], bare, "has no EOS token"),
    ]:
        with pytest.raises(UserError, match=message):
            encode(rows, lacking)
    with pytest.raises(UserError, match="The data set: no column 'rejected'; it has 'prompt', 'chosen'"):
        encode([{"prompt": "p", "chosen": "c"}], tokenizer)
    with pytest.raises(UserError, match="The data set: there are no rows in it"):
        encode_pairs(Dataset.from_list(PAIRS).select([]), tokenizer, UNLIMITED)
    tokenizer = make_tokenizer("gemma")
    refusing = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template="{{ raise_exception('no') }}"
    )
    with pytest.raises(UserError, match=r"refuses a user and an assistant message \(no\)"):
        end_token_ids(refusing)


def test_processes_and_batches_do_not_change_the_result():
    rows = [conversation(f"Q{i}", "A" * (i % 40), "\n" if i % 5 == 0 else "B") for i in range(1, 1203)]
    dataset, tokenizer = Dataset.from_list(rows), make_tokenizer("chatml")
    one, one_dropped = encode_pairs(dataset, tokenizer, Truncation(32))
    two, two_dropped = encode_pairs(dataset, tokenizer, Truncation(32), num_proc=2)
    assert one.to_dict() == two.to_dict()
    assert one_dropped == two_dropped
    assert (len(one_dropped), one_dropped.first_rows) == (240, {reasons.TOKENS_MERGE: 4})
    assert one["row"][:5] == [0, 1, 2, 3, 5]


def test_rows_of_a_saved_data_set_that_was_made_again_are_the_new_ones(tmp_path):
    """The fingerprint is that of the code that made them, and what was mapped before lies beside the old rows."""
    answers = tmp_path / "answers.txt"
    source = Dataset.from_list([{"prompt": "p", "rejected": "no"}])

    def longest():
        source.map(lambda row: {**row, "chosen": answers.read_text()}).save_to_disk(str(tmp_path / "saved"))
        return load_pairs(str(tmp_path / "saved")).map(lambda row: {"size": len(row["chosen"])})["size"][0]

    for answer in ("short", "a longer one"):
        answers.write_text(answer)
        assert longest() == len(answer)
    assert not list((tmp_path / "saved").glob("cache-*"))


# ---- Real data


def test_every_pair_of_a_real_data_set_encodes():
    root = Path(os.environ.get("PREFDISTILL_DATA") or Path(__file__).parents[3] / "shared" / "data")
    file = root / "alpacaeval_pairs" / "test.jsonl.gz"
    if not file.exists():
        pytest.skip(f"{file} is not there; set PREFDISTILL_DATA to the folder that holds alpacaeval_pairs")
    dataset = load_pairs(str(file))
    assert len(dataset) == 625
    tokenizer = make_tokenizer("llama3")
    encoded, dropped = encode_pairs(dataset, tokenizer, UNLIMITED)
    assert not dropped, str(dropped)
    assert encoded["row"][:] == list(range(625))
    for index in range(0, 625, 50):
        content = dataset[index]["chosen"][0]["content"].strip()
        assert tokenizer.decode(encoded[index]["chosen_ids"]) == content + "<|eot_id|>"
        assert encoded[index]["chosen_offsets"][-2:] == [len(content), len(content + "<|eot_id|>")]


@pytest.mark.parametrize("source", ["pairs.parquet", "directory"])
def test_another_file_of_the_same_name_and_time_is_read_anew(tmp_path, source):
    """Archives and copies keep times; a cache that goes by them would give the rows of the older file."""
    (tmp_path / "directory").mkdir()
    file = tmp_path / ("pairs.parquet" if source == "pairs.parquet" else "directory/0.parquet")
    for chosen in ("old", "new"):
        Dataset.from_list([plain("a", chosen, "c")]).to_parquet(file)
        os.utime(file, (1e9, 1e9))
        assert load_pairs(str(tmp_path / source))["chosen"][:] == [chosen]
