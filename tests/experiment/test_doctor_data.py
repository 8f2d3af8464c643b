"""Doctor checks of data: one fault per row of the table, and the finding it gives."""

import gzip
import json
import re

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prefdistill.core.errors import UserError
from prefdistill.data.load import load_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.experiment.doctor import as_text, examine
from prefdistill.experiment.doctor.characters import garbled
from prefdistill.experiment.doctor.findings import excerpt
from prefdistill.experiment.doctor.pairs import read_pairs
from support.doctor import (
    LONG,
    checks_found,
    clean,
    edited,
    finding_of,
    model_of,
    plain,
    scored,
    text_of,
    turns,
    write,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")


SWAPPED = {"chosen": clean()[3]["rejected"], "rejected": clean()[3]["chosen"], "prompt": clean()[3]["prompt"]}


LONGER = {i: {"chosen": "so many more words than the other one has " * 2, "rejected": "few"} for i in range(12)}

TALK = [{"chosen": "word " * n, "rejected": "word " * (600 - n)} for n in (290, 310)]


DATA = [  # what is broken, rows, check, severity, the rows it is found in
    ("a broken line", [*clean()[:2], '{"prompt": ', *clean()[3:]], "data.json", "error", [2]),
    ("a line that is no object", [*clean()[:5], "[1, 2]", *clean()[6:]], "data.json", "error", [5]),
    ("a column that is missing", [{"question": "a", "chosen": "b"}], "data.columns", "error", []),
    ("no rows", [], "data.empty-file", "error", []),
    ("a number for a response", edited({4: {"chosen": 7}}), "data.values", "error", [4]),
    ("a message without a role", edited({4: {"prompt": [{"content": "x"}]}}), "data.values", "error", [4]),
    ("some plain rows", [*clean()[:9], *plain(clean()[9:])], "data.mixed", "error", [9, 10, 11]),
    (
        "rows of both forms and plain ones",
        [*clean()[:2], *plain(clean()[2:3]), {**clean()[3], "chosen": "plain"}, *clean()[4:]],
        "data.mixed",
        "error",
        [2, 3],
    ),
    (
        "a row of both forms",
        [*clean()[:4], {**clean()[4], "chosen": "plain"}, *clean()[5:]],
        "data.mixed",
        "error",
        [4],
    ),
    ("a user in the response", edited({1: {"chosen": turns("user")}}), "data.roles", "error", [1]),
    ("an answered prompt", edited({6: {"prompt": turns("user", "assistant")}}), "data.roles", "error", [6]),
    (
        "a response without a prompt",
        [{k: r[k] for k in ("chosen", "rejected")} for r in clean()],
        "data.prompt",
        "error",
        [0, 1, 2, 3, 4],
    ),
    ("a human", edited({2: {"prompt": turns("human")}}), "data.turns", "warning", [2]),
    ("a late system message", edited({2: {"prompt": turns("user", "system", "user")}}), "data.turns", "warning", [2]),
    ("two questions in a row", edited({2: {"prompt": turns("user", "user")}}), "data.turns", "warning", [2]),
    (
        "two answers in a row",
        edited({2: {"prompt": turns("user", "assistant", "assistant", "user")}}),
        "data.turns",
        "warning",
        [2],
    ),
    (
        "a response of two messages",
        edited({2: {"chosen": turns("assistant", "assistant")}}),
        "data.turns",
        "warning",
        [2],
    ),
    (
        "an answer before any question",
        edited({2: {"prompt": turns("assistant", "user")}}),
        "data.turns",
        "warning",
        [2],
    ),
    (
        "an empty response",
        edited({0: {"rejected": ""}, 7: {"chosen": " \n"}}),
        "data.empty-response",
        "warning",
        [0, 7],
    ),
    ("an empty prompt", edited({3: {"prompt": " "}}), "data.empty-prompt", "warning", [3]),
    ("equal responses", edited({3: {"chosen": "x y", "rejected": "x y"}}), "data.equal-responses", "warning", [3]),
    ("a pair twice", [*clean(), clean()[5]], "data.duplicate-pairs", "warning", [12]),
    (
        "responses that differ in punctuation",
        edited({3: {"chosen": "Yes,  indeed!", "rejected": "yes indeed"}}),
        "data.near-equal-responses",
        "warning",
        [3],
    ),
    (
        "a pair twice but for a space",
        [*clean(), {**clean()[5], "chosen": [{"role": "assistant", "content": text_of(clean()[5]["chosen"]) + " "}]}],
        "data.near-duplicates",
        "warning",
        [12],
    ),
    ("a pair both ways", [*clean(), SWAPPED], "data.both-labels", "warning", [3, 12]),
    ("a score in words", edited({3: {"score_chosen": "high"}}), "data.scores", "error", [3]),
    ("a score that is NaN", edited({3: {"score_rejected": float("nan")}}), "data.scores", "error", [3]),
    ("a score of 400 digits", edited({3: {"score_chosen": 10**400}}), "data.scores", "error", [3]),
    ("an end that is a word", edited({3: {"chosen_ended": "yes"}}), "data.ended", "error", [3]),
    ("a number that Arrow cannot hold", edited({3: {"id": 10**30}}), "data.refused", "error", []),
    ("scores the other way", edited({3: {"score_chosen": 0.5}}), "data.scores-turned", "warning", [3]),
    ("half an emoji in a role", edited({3: {"prompt": turns("\ud83d", "user")}}), "data.surrogate", "error", [3]),
    ("half an emoji elsewhere", edited({3: {"source": "\ud83d"}}), "data.surrogate", "error", [3]),
    ("half an emoji", edited({3: {"chosen": "ha \ud83d ha"}}), "data.surrogate", "error", [3]),
    ("a lost character", edited({3: {"prompt": "caf\ufffd or tea, which one?"}}), "data.replacement", "warning", [3]),
    ("a bell", edited({3: {"rejected": "ding \x07 dong"}}), "data.control", "warning", [3]),
    (
        "mojibake",
        edited({3: {"chosen": "I donâ€™t like it"}, 4: {"chosen": "un cafÃ©"}}),
        "data.garbled",
        "warning",
        [3, 4],
    ),
    (
        "two normal forms",
        edited({3: {"chosen": "cafe\u0301"}, 4: {"chosen": "caf\u00e9"}}),
        "data.normal-form",
        "warning",
        [3],
    ),
    (
        "Korean in two forms",
        edited({3: {"chosen": "\u1112\u1161\u11ab"}, 4: {"chosen": "\ud55c"}}),
        "data.normal-form",
        "warning",
        [3],
    ),
    ("a Bengali vowel in two parts", edited({3: {"chosen": "\u0995\u09c7\u09be"}}), "data.normal-form", "note", [3]),
    ("one normal form", edited({3: {"chosen": "cafe\u0301"}}), "data.normal-form", "note", [3]),
    ("a zero-width space", edited({3: {"chosen": "in\u200bvisible"}}), "data.invisible", "note", [3]),
    ("a whole book", edited({3: {"prompt": "word " * 2000}}), "data.extreme-length", "warning", [3]),
    (
        "a long prompt beside a longer response",
        edited({i: {**TALK[i % 2], **({"prompt": "word " * 200} if i == 3 else {})} for i in range(12)}),
        "data.extreme-length",
        "warning",
        [3],
    ),
    (
        "a row without a preference",
        [
            {
                "prompt": r["prompt"],
                "response_1": r["chosen"],
                "response_2": r["rejected"],
                "preference_strength": i - 3,
            }
            for i, r in enumerate(plain(clean()))
        ],
        "data.left-out",
        "note",
        [3],
    ),
    ("longer is better", edited(LONGER), "data.length-bias", "warning", []),
    (
        "prompts that come again",
        [*clean(), {**clean()[2], "chosen": turns("assistant")}],
        "data.repeated-prompts",
        "note",
        [2, 12],
    ),
]


@pytest.mark.parametrize(
    ("rows", "check", "severity", "hit"), [case[1:] for case in DATA], ids=[case[0] for case in DATA]
)
def test_each_data_check_finds_its_fault_and_nothing_else(tmp_path, rows, check, severity, hit):
    checkup = examine(write(tmp_path / "pairs.jsonl", rows))
    finding = finding_of(checkup, check)
    assert (finding.severity, [*finding.rows]) == (severity, hit)
    assert finding.count == len(hit) or len(hit) in (0, 5)
    assert finding.fix
    assert bool(finding.example) == bool(hit)
    assert checks_found(checkup) == ({check} if severity != "note" else set())
    assert checkup.ok == (severity != "error")
    as_text(checkup).encode()  # can be printed, whatever the data hold


def test_clean_data_has_no_errors_or_warnings(tmp_path, tokenizer):
    model = model_of(tokenizer, tmp_path / "model")
    train, test = write(tmp_path / "a.jsonl", clean()), write(tmp_path / "b.jsonl", clean(first=100))
    checkup = examine(train, test, teacher=model, student=model, truncation=LONG, out=tmp_path)
    assert checks_found(checkup) == set()
    assert checkup.ok
    assert checks_found(checkup, "note") == {"data.length-bias", "machine.memory", "machine.disk"}
    assert checkup.facts["train"]["kept"]["pairs"] == 12


def test_a_missing_file_does_not_stop_the_other_checks(tmp_path):
    checkup = examine("nowhere.jsonl", write(tmp_path / "b.jsonl", edited({3: {"rejected": ""}})))
    assert checks_found(checkup) == {"data.file", "data.empty-response"}
    assert "nowhere.jsonl: no such file or directory" in finding_of(checkup, "data.file").message


def test_broken_lines_count_as_rows(tmp_path):
    rows = [clean()[0], "{", "nonsense", *edited({3: {"chosen": ""}})[3:]]
    checkup = examine(write(tmp_path / "pairs.jsonl", rows))
    broken = finding_of(checkup, "data.json")
    assert (broken.count, broken.of, broken.rows) == (2, 12, (1, 2))
    assert broken.example.startswith("row 1: line 2: not valid JSON (column ")
    assert finding_of(checkup, "data.empty-response").rows == (3,)


@pytest.mark.parametrize(
    ("form", "values", "taken"),
    [
        ("jsonl", (True, True), False),
        ("jsonl", (1.0, True), True),  # Arrow makes a column of numbers of it
        ("jsonl", (True, 1.0), False),
        ("jsonl", (1, True), False),
        ("parquet", (True, True), False),
        ("parquet", (1.0, True), True),
    ],
)
def test_booleans_among_scores_are_judged_as_the_loader_does(tmp_path, form, values, taken):
    rows, source = scored(*values), tmp_path / f"pairs.{form}"
    if form == "jsonl":
        write(source, rows)
    else:
        Dataset.from_list(rows).to_parquet(source)
    errors = [(f.check, f.message) for f in examine(str(source)).findings if f.severity == "error"]
    if taken:
        assert (errors, load_pairs(str(source))["score_chosen"][:]) == ([], [1.0, 1.0])
    else:
        with pytest.raises(UserError) as refused:
            load_pairs(str(source))
        assert errors == [("data.refused", str(refused.value))]


def test_column_names_are_escaped_in_messages(tmp_path):
    checkup = examine(write(tmp_path / "pairs.jsonl", [{"\x1b[31m": 1, "\ud800": 2, "prompt": "a"}]))
    text = as_text(checkup)
    text.encode()
    assert "no column chosen, rejected; it has \\x1b[31m" in " ".join(text.split())


def test_leaked_pairs_and_prompts_are_found(tmp_path):
    shared = {**clean()[4], "prompt": [{"role": "user", "content": "  QUESTION 4:  what of bread? "}]}
    train = write(tmp_path / "a.jsonl", clean())
    test = write(tmp_path / "b.jsonl", [*clean(first=50), clean()[7], shared])
    checkup = examine(train, test)
    assert checks_found(checkup) == {"data.leaked-pairs", "data.leaked-prompts"}
    pairs, prompts = finding_of(checkup, "data.leaked-pairs"), finding_of(checkup, "data.leaked-prompts")
    assert (pairs.severity, pairs.rows, prompts.severity, prompts.rows) == ("error", (12,), "warning", (13,))
    assert prompts.example.startswith("row 13: as row 4 of train:")


@pytest.mark.parametrize("form", ["jsonl.gz", "parquet", "directory"])
def test_gzip_parquet_and_directories_are_read(tmp_path, form):
    rows = edited({3: {"rejected": ""}})
    if form == "parquet":
        Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
        source = tmp_path / "pairs.parquet"
    else:
        (tmp_path / "dir").mkdir()
        source = tmp_path / "dir" / "train.jsonl.gz"
        source.write_bytes(gzip.compress("\n".join([*map(json.dumps, rows), "{"]).encode()))
        source = source.parent if form == "directory" else source
    expected = {"data.empty-response"} | ({"data.json"} if form != "parquet" else set())
    assert checks_found(examine(str(source))) == expected


def test_a_shared_start_becomes_the_prompt(tmp_path):
    rows = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in clean()]
    checkup = examine(write(tmp_path / "pairs.jsonl", rows))
    assert checks_found(checkup) == set()
    assert checkup.facts["train"]["prompts"] == 12


@pytest.mark.parametrize(("pairs", "severity"), [(5, "note"), (12, "warning")])
def test_unanimous_pairs_are_a_length_bias_only_if_there_are_many(tmp_path, pairs, severity):
    # by chance five of five are as likely as 2 in 32, twelve of twelve as 2 in 4,096
    told = finding_of(examine(write(tmp_path / "pairs.jsonl", edited(LONGER)[:pairs])), "data.length-bias")
    assert (told.severity, told.count, told.of) == (severity, pairs, pairs)


def test_length_bias_is_in_characters_if_no_pair_can_be_tokenised(tmp_path, tokenizer):
    rows = [{**row, "prompt": ""} for row in plain(clean())]
    checkup = examine(write(tmp_path / "pairs.jsonl", rows), student=model_of(tokenizer, tmp_path / "m"))
    sizes = [np.mean([len(row[name]) for row in rows]) for name in ("chosen", "rejected")]
    assert (
        "({:,.0f} against {:,.0f} characters on average)".format(*sizes)
        in finding_of(checkup, "data.length-bias").message
    )


def test_length_bias_error_is_over_prompts(tmp_path):
    chosen = ["a longer response", "a response"]
    rows = [{"prompt": f"q {i % 4}", "chosen": chosen[i % 4 == 0], "rejected": chosen[i % 4 != 0]} for i in range(80)]
    told = finding_of(examine(write(tmp_path / "pairs.jsonl", rows)), "data.length-bias")
    error = float(re.search(r"longer in 75.0% ± ([\d.]+)%", told.message)[1]) / 100
    # four prompts that each agree with themselves are four observations: sqrt(.75 * .25 / 4), not sqrt(.. / 80)
    assert error == pytest.approx((0.75 * 0.25 / 4) ** 0.5, rel=0.1)
    assert told.severity == "note"
    alone = finding_of(examine(write(tmp_path / "one.jsonl", [{**rows[0], "rejected": "x"}] * 2)), "data.length-bias")
    assert "100.0% of the pairs" in alone.message  # of one prompt nothing is known
    assert alone.severity == "note"


@pytest.mark.parametrize(
    "text",
    ["À LA UNE «LIBERTÉ»", "SÃO PAULO", "naïve café", "Ærø ÅÄÖ", "ÂNGELA", "3 € – “quoted” … ’tis", "ÐÑÒ", "🙂 東京"],
)
def test_real_letters_are_not_mojibake(text):
    assert garbled(text) is None


@pytest.mark.parametrize("text", ["it’s", "“quoted”", "naïve", "5 °C", "🙂", "a – b", "Größe", "10 €"])
def test_common_mojibake_is_found(text):
    raw = text.encode()
    assert garbled("".join(bytes([b]).decode("cp1252", errors="ignore") or chr(b) for b in raw)) is not None


@pytest.mark.parametrize("text", ["a" * 500, "\x1b[31mred", "\ud800", "\u202eoverride"])
def test_excerpts_are_short_and_printable(text):
    shown = excerpt(text)
    assert shown.isprintable()
    assert len(shown) <= 90
    shown.encode()


def messages():
    message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": texts()})
    return st.lists(message, max_size=3)


def texts():
    return st.text(st.characters(exclude_categories=()), max_size=20)


def anything():
    return st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts(), messages(), st.just([[1], {}]))


ROWS = st.fixed_dictionaries(
    {},
    optional={
        name: anything()
        for name in ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "chosen_ended", "source")
    },
)


@pytest.fixture(scope="module")
def some_model(tokenizer, tmp_path_factory):
    return model_of(tokenizer, tmp_path_factory.mktemp("some") / "model")


@settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
@given(rows=st.lists(st.one_of(ROWS, st.sampled_from(["{", "[]", "1"])), max_size=6))
@example(rows=[{"prompt": 1, **dict.fromkeys(("chosen", "rejected"), [{"role": "user", "content": ""}] * 2)}])
def test_any_file_gives_findings_and_not_a_crash(some_model, tmp_path_factory, rows):
    source = write(tmp_path_factory.getbasetemp() / "any.jsonl", rows)
    checkup = examine(source, source, student=some_model, truncation=Truncation(20, 5))
    json.dumps(checkup.to_json(), ensure_ascii=False).encode()
    as_text(checkup).encode()
    if checks_found(checkup, "error") <= {"data.leaked-pairs"}:
        assert len(load_pairs(source)) == checkup.facts["train"]["pairs"]
    elif checks_found(checkup, "error") & {"data.json", "data.values", "data.roles", "data.mixed", "data.columns"}:
        with pytest.raises(UserError):
            load_pairs(source)


def test_real_pairs(data_dir):
    train, test = (str(data_dir / "alpacaeval_pairs" / f"{split}.jsonl.gz") for split in ("train", "test"))
    checkup = examine(train, test)
    assert checkup.ok
    near = {"data.near-duplicates", "data.near-equal-responses"}
    assert checks_found(checkup) == {"data.duplicate-pairs", "data.length-bias", *near}  # prompts are not shared
    with gzip.open(train) as file:
        rows = [json.loads(line) for line in file]
    keys = [json.dumps([row[name] for name in ("prompt", "chosen", "rejected")]) for row in rows]
    told = {(f.check, f.data): f for f in checkup.findings}
    assert told["data.duplicate-pairs", "train"].count == len(keys) - len(set(keys))
    longer = np.mean([len(text_of(row["chosen"])) > len(text_of(row["rejected"])) for row in rows])
    assert told["data.length-bias", "train"].count == pytest.approx(longer * len(rows))
    assert told["data.repeated-prompts", "train"].severity == "note"


@pytest.mark.parametrize(
    ("changes", "check", "severity"),
    [
        ({"margin": 2.0}, "data.unread", "warning"),
        ({"weight": 2.0}, None, None),
        ({"tools": [{"type": "function"}]}, None, None),
        ({"note": 1}, "data.unread", "note"),
        ({"system": "be kind"}, "data.shape", "note"),
        ({}, None, None),
    ],
    ids=["a margin", "a weight that a method reads", "tools", "an unknown column", "a system column", "none"],
)
def test_columns_that_are_not_read_and_other_shapes_are_named(tmp_path, changes, check, severity):
    pair = {"prompt": turns("user"), "chosen": turns("assistant"), "rejected": turns("assistant")}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair | changes) + "\n")
    _, findings = read_pairs(str(path), "train", reads=["weight"])
    assert [(finding.check, finding.severity) for finding in findings] == ([(check, severity)] if check else [])


MARKED = {  # what is done to one side of the pairs, and the form that only this side has, or only the other
    "thinking": (lambda text: f"<think>hm</think>{text}", "starts with `<think> hm </think>`", True),
    "a stock phrase": (lambda text: f"As an AI, I say: {text}", "starts with `As an AI`", True),
    "an ending": (lambda text: f"{text} I hope this helps", "ends with `hope this helps`", True),
    "end punctuation": (lambda text: text.rstrip("."), "ends with end punctuation", False),
    "formatting": (lambda text: f"**{text}**", "has bold text", True),
    "a list": (lambda text: f"- {text}", "has a list", True),
    "another alphabet": (lambda _: "\u0434\u0430, \u043a\u043e\u0442.", "is in Cyrillic letters", True),
    "another language": (lambda text: text.replace("words", "mots"), "contains `words`", False),
    "white space": (lambda text: f" {text}", "starts with white space", True),
}  # fmt: skip


@pytest.mark.parametrize(("mark", "form", "marked_has"), MARKED.values(), ids=MARKED.keys())
def test_a_form_of_one_side_is_found(tmp_path, mark, form, marked_has):
    rows = plain([*clean(), *clean(12)])
    for row in rows[1:]:  # all but one
        row["chosen"] = mark(row["chosen"])
    finding = finding_of(examine(write(tmp_path / "pairs.jsonl", rows)), "data.one-sided")
    shares = ("96%", "0%") if marked_has else ("4%", "100%")
    assert "{} ({} of chosen, {} of rejected)".format(form, *shares) in finding.message
    assert (finding.severity, finding.count, finding.of, finding.rows) == ("warning", 23, 24, (1, 2, 3, 4, 5))
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert finding_of(examine(write(tmp_path / "swapped.jsonl", swapped)), "data.one-sided").count == 23
    few = examine(write(tmp_path / "few.jsonl", rows[:19]))
    assert "data.one-sided" not in checks_found(few)


def test_cut_samples_of_one_side_are_found(tmp_path):
    rows = [{**row, "rejected_ended": False} for row in [*clean(), *clean(12)]]
    finding = finding_of(examine(write(tmp_path / "pairs.jsonl", rows)), "data.one-sided")
    assert "was cut while it was sampled (0% of chosen, 100% of rejected)" in finding.message
    assert "data.one-sided" not in checks_found(examine(write(tmp_path / "clean.jsonl", [*clean(), *clean(12)])))
