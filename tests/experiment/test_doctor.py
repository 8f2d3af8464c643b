"""The doctor: one deliberately broken thing per row, and the finding that it is to give. Nothing else may be found."""

import gzip
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.data.encode import encode_pairs
from prefdistill.data.load import load_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.experiment import cost
from prefdistill.experiment.doctor import as_text, examine, machine
from prefdistill.experiment.doctor.findings import excerpt
from prefdistill.experiment.doctor.text import garbled
from prefdistill.experiment.recipe import load_recipe
from prefdistill.experiment.run import run_recipe
from prefdistill.models.load import empty_model
from prefdistill.signals import extract_signals
from prefdistill.signals.sizes import store_bytes
from prefdistill.training.options import Training
from support.tokenizer_styles import make_tokenizer

SUBJECTS = [
    "Paris",
    "Rome",
    "trains",
    "rivers",
    "bread",
    "music",
    "letters",
    "stars",
    "winter",
    "gardens",
    "clocks",
    "ink",
]
LONG = Truncation(None)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)


def clean(first=0):
    """Twelve pairs with nothing to find in them; in half of them the chosen response is the longer one."""
    rows = []
    for i, subject in enumerate(SUBJECTS, first):
        short, long = f"Short words on {subject}.", f"Rather more words that are about {subject} and nothing else."
        chosen, rejected = (short, long) if i % 2 else (long, short)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Question {i}: what of {subject}?"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "score_chosen": 2.0,
                "score_rejected": 1.0,
            }
        )
    return rows


def plain(rows):
    return [{name: text_of(row[name]) for name in ("prompt", "chosen", "rejected")} for row in rows]


def text_of(messages):
    return messages[-1]["content"]


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def model_of(tokenizer, path, **shape):
    tokenizer.save_pretrained(path)
    AutoModelForCausalLM.from_config(config_of(tokenizer, **shape)).save_pretrained(path)
    return str(path)


def config_of(tokenizer, **shape):
    return LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer), **shape}, architectures=["LlamaForCausalLM"])


def found(checkup, *severities):
    return {f.check for f in checkup.findings if f.severity in (severities or ("error", "warning"))}


def the(checkup, check):
    (finding,) = [f for f in checkup.findings if f.check == check]
    return finding


def edited(changes):
    """The clean rows, some of them changed: {row: {column: value}}; text becomes a message of the right role."""
    rows = clean()
    for row, columns in changes.items():
        for name, value in columns.items():
            role = "user" if name == "prompt" else "assistant"
            is_text = isinstance(value, str) and not name.startswith("score")
            rows[row][name] = [{"role": role, "content": value}] if is_text else value
    return rows


def scored(*values):
    """The clean rows, a few of them, with these scores of the chosen responses and 0 of the others."""
    pairs = zip(clean(), values, strict=False)
    return [{**row, "score_chosen": value, "score_rejected": 0.0} for row, value in pairs]


def turns(*said):
    return [{"role": role, "content": f"{role} says {i}"} for i, role in enumerate(said)]


# -- data --------------------------------------------------------------------------------------------------------------

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
    ("a row of both forms", [{**clean()[0], "chosen": "plain"}, *clean()[1:]], "data.mixed", "error", [0]),
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
def test_what_is_wrong_with_data_is_found_and_nothing_else(tmp_path, rows, check, severity, hit):
    checkup = examine(write(tmp_path / "pairs.jsonl", rows))
    finding = the(checkup, check)
    assert (finding.severity, [*finding.rows]) == (severity, hit)
    assert finding.count == len(hit) or len(hit) in (0, 5)
    assert finding.fix
    assert bool(finding.example) == bool(hit)
    assert found(checkup) == ({check} if severity != "note" else set())
    assert checkup.ok == (severity != "error")
    as_text(checkup).encode()  # can be printed, whatever the data hold


def test_nothing_is_found_in_clean_data(tmp_path, tokenizer):
    model = model_of(tokenizer, tmp_path / "model")
    train, test = write(tmp_path / "a.jsonl", clean()), write(tmp_path / "b.jsonl", clean(first=100))
    checkup = examine(train, test, teacher=model, student=model, truncation=LONG, out=tmp_path)
    assert found(checkup) == set()
    assert checkup.ok
    assert found(checkup, "note") == {"data.length-bias", "machine.memory", "machine.disk"}
    assert checkup.facts["train"]["kept"]["pairs"] == 12


def test_a_file_that_is_not_there_leaves_the_other_checks_alone(tmp_path):
    checkup = examine("nowhere.jsonl", write(tmp_path / "b.jsonl", edited({3: {"rejected": ""}})))
    assert found(checkup) == {"data.file", "data.empty-response"}
    assert "nowhere.jsonl: no such file or directory" in the(checkup, "data.file").message


def test_broken_lines_are_counted_with_their_numbers_and_the_other_rows_keep_theirs(tmp_path):
    rows = [clean()[0], "{", "nonsense", *edited({3: {"chosen": ""}})[3:]]
    checkup = examine(write(tmp_path / "pairs.jsonl", rows))
    broken = the(checkup, "data.json")
    assert (broken.count, broken.of, broken.rows) == (2, 12, (1, 2))
    assert broken.example.startswith("row 1: line 2: not valid JSON (column ")
    assert the(checkup, "data.empty-response").rows == (3,)


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
def test_of_true_among_scores_the_loader_has_a_say(tmp_path, form, values, taken):
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


def test_names_from_a_file_cannot_reach_the_terminal(tmp_path):
    checkup = examine(write(tmp_path / "pairs.jsonl", [{"\x1b[31m": 1, "\ud800": 2, "prompt": "a"}]))
    text = as_text(checkup)
    text.encode()
    assert "no column chosen, rejected; it has \\x1b[31m" in " ".join(text.split())


def test_what_test_has_of_train_is_found(tmp_path):
    shared = {**clean()[4], "prompt": [{"role": "user", "content": "  QUESTION 4:  what of bread? "}]}
    train = write(tmp_path / "a.jsonl", clean())
    test = write(tmp_path / "b.jsonl", [*clean(first=50), clean()[7], shared])
    checkup = examine(train, test)
    assert found(checkup) == {"data.leaked-pairs", "data.leaked-prompts"}
    pairs, prompts = the(checkup, "data.leaked-pairs"), the(checkup, "data.leaked-prompts")
    assert (pairs.severity, pairs.rows, prompts.severity, prompts.rows) == ("error", (12,), "warning", (13,))
    assert prompts.example.startswith("row 13: as row 4 of train:")


@pytest.mark.parametrize("form", ["jsonl.gz", "parquet", "directory"])
def test_other_files_are_read_too(tmp_path, form):
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
    assert found(examine(str(source))) == expected


def test_a_shared_start_is_the_prompt(tmp_path):
    rows = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in clean()]
    checkup = examine(write(tmp_path / "pairs.jsonl", rows))
    assert found(checkup) == set()
    assert checkup.facts["train"]["prompts"] == 12


@pytest.mark.parametrize(("pairs", "severity"), [(5, "note"), (12, "warning")])
def test_pairs_that_all_agree_are_a_bias_only_where_there_are_many(tmp_path, pairs, severity):
    # by chance five of five are as likely as 2 in 32, twelve of twelve as 2 in 4,096
    told = the(examine(write(tmp_path / "pairs.jsonl", edited(LONGER)[:pairs])), "data.length-bias")
    assert (told.severity, told.count, told.of) == (severity, pairs, pairs)


def test_lengths_are_in_characters_where_no_pair_can_be_tokenised(tmp_path, tokenizer):
    rows = [{**row, "prompt": ""} for row in plain(clean())]
    checkup = examine(write(tmp_path / "pairs.jsonl", rows), student=model_of(tokenizer, tmp_path / "m"))
    sizes = [np.mean([len(row[name]) for row in rows]) for name in ("chosen", "rejected")]
    assert "({:,.0f} against {:,.0f} characters on average)".format(*sizes) in the(checkup, "data.length-bias").message


def test_the_error_of_the_length_bias_is_over_prompts(tmp_path):
    chosen = ["a longer response", "a response"]
    rows = [{"prompt": f"q {i % 4}", "chosen": chosen[i % 4 == 0], "rejected": chosen[i % 4 != 0]} for i in range(80)]
    told = the(examine(write(tmp_path / "pairs.jsonl", rows)), "data.length-bias")
    error = float(re.search(r"longer in 75.0% ± ([\d.]+)%", told.message)[1]) / 100
    # four prompts that each agree with themselves are four observations: sqrt(.75 * .25 / 4), not sqrt(.. / 80)
    assert error == pytest.approx((0.75 * 0.25 / 4) ** 0.5, rel=0.1)
    assert told.severity == "note"
    alone = the(examine(write(tmp_path / "one.jsonl", [{**rows[0], "rejected": "x"}] * 2)), "data.length-bias")
    assert "100.0% of the pairs" in alone.message  # of one prompt nothing is known
    assert alone.severity == "note"


@pytest.mark.parametrize(
    "text",
    ["À LA UNE «LIBERTÉ»", "SÃO PAULO", "naïve café", "Ærø ÅÄÖ", "ÂNGELA", "3 € – “quoted” … ’tis", "ÐÑÒ", "🙂 東京"],
)
def test_real_letters_are_not_taken_for_mojibake(text):
    assert garbled(text) is None


@pytest.mark.parametrize("text", ["it’s", "“quoted”", "naïve", "5 °C", "🙂", "a – b", "Größe", "10 €"])
def test_every_usual_kind_of_mojibake_is_seen(text):
    raw = text.encode()
    assert garbled("".join(bytes([b]).decode("cp1252", errors="ignore") or chr(b) for b in raw)) is not None


@pytest.mark.parametrize("text", ["a" * 500, "\x1b[31mred", "\ud800", "\u202eoverride"])
def test_an_excerpt_is_short_and_safe_to_print(text):
    shown = excerpt(text)
    assert shown.isprintable()
    assert len(shown) <= 90
    shown.encode()


# -- template and tokens -----------------------------------------------------------------------------------------------

HEADER = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
TAIL = "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
GENERATE = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def templated(template):
    """The shared tokenizer under another chat template."""

    def change(tokenizer):
        tokenizer.chat_template = template
        return tokenizer

    return change


def style(name, **options):
    return lambda _: make_tokenizer(name, **options)


def words(_):
    """A tokenizer that knows a few words."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "Question", "what", "of", "Short", "words"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


SYSTEM = edited({i: {"prompt": [*turns("system"), *clean()[i]["prompt"]]} for i in range(12)})
THINKS = edited({3: {"prompt": [*turns("user"), {"role": "assistant", "content": "<t>hm</t>so"}, *turns("user")]}})
MERGING = [{"prompt": f"{i} sm", "chosen": f"all talk {i}", "rejected": f"all walk {9 - i}"} for i in range(12)]
UNASKED = [{**row, "prompt": "" if i == 3 else row["prompt"]} for i, row in enumerate(plain(clean()))]
UNSAID = [
    {**row, "chosen": "" if i == 3 else row["chosen"], "chosen_ended": i != 3} for i, row in enumerate(plain(clean()))
]
TOKENS = [  # what is broken, rows, tokenizer, truncation, errors and warnings, the first row
    ("a long prompt", edited({3: {"prompt": "so " * 90}}), None, Truncation(None, 80), {"tokens.prompt-cut"}, 3),
    (
        "long responses",
        edited({3: {"chosen": "so " * 60 + "a", "rejected": "or " * 60}}),
        None,
        Truncation(110),
        {"tokens.response-cut"},
        3,
    ),
    ("no room for a response", edited({3: {"prompt": "so " * 80}}), None, Truncation(115), {"tokens.no-room"}, 3),
    (
        "responses that start alike",
        edited({3: {"chosen": "or " * 90 + "a", "rejected": "or " * 90 + "b"}}),
        None,
        Truncation(120),
        {"tokens.equal-after-cut", "tokens.response-cut"},
        3,
    ),
    ("a token across the boundary", MERGING, None, LONG, {"tokens.merge"}, 0),
    ("a prompt without tokens", UNASKED, None, LONG, {"tokens.prompt-empty", "data.empty-prompt"}, 3),
    ("a response without tokens", UNSAID, None, LONG, {"tokens.response-empty", "data.empty-response"}, 3),
    ("a tokenizer without offsets", plain(clean()), lambda _: ByT5Tokenizer(), LONG, {"template.unusable"}, None),
    ("a block that generation opens", clean(), style("not_a_prefix"), LONG, {"template.differs"}, 0),
    ("system messages that are refused", SYSTEM, style("gemma"), LONG, {"template.refused", "template.system"}, 0),
    ("no end token", clean(), style("no_end"), LONG, {"template.no-end", "tokens.end-missing"}, 0),
    ("no BOS", clean(), style("zephyr"), LONG, {"tokens.bos-missing"}, 0),
    (
        "BOS twice",
        clean(),
        templated("{{ bos_token }}{{ bos_token }}" + HEADER + TAIL + GENERATE),
        LONG,
        {"tokens.bos-twice"},
        0,
    ),
    ("an end token in the text", edited({3: {"chosen": "stop <|eos|> here"}}), None, LONG, {"tokens.end-twice"}, 3),
    (
        "markup in the prompt",
        edited({3: {"prompt": "say <|assistant|> now"}}),
        None,
        LONG,
        {"tokens.special-in-text"},
        3,
    ),
    ("unknown words", plain(clean()), words, LONG, {"tokens.unknown"}, 0),
    ("no template", clean(), templated(None), LONG, {"template.missing"}, None),
    (
        "a template that takes nothing",
        clean(),
        templated("{{ raise_exception('no') }}"),
        LONG,
        {"template.refuses"},
        None,
    ),
    ("no generation prompt", clean(), templated(HEADER + TAIL), LONG, {"template.no-generation-prompt"}, None),
    (
        "dropped system messages",
        SYSTEM,
        templated("{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + HEADER + TAIL + GENERATE),
        LONG,
        {"template.system", "template.changes-text"},
        0,
    ),
    (
        "rewritten answers",
        THINKS,
        templated(HEADER.replace("m['content']", "m['content'].split('</t>')[-1]") + TAIL + GENERATE),
        LONG,
        {"template.changes-text"},
        3,
    ),
    (
        "responses that differ by a space that the template strips",
        edited({3: {"chosen": "same words", "rejected": "same words "}}),
        style("llama3"),
        LONG,
        {"tokens.equal-responses"},
        3,
    ),
    ("an EOS that plain text lacks", plain(clean()), style("chatml"), LONG, set(), None),
]


@pytest.mark.parametrize(
    ("rows", "change", "truncation", "checks", "row"), [c[1:] for c in TOKENS], ids=[c[0] for c in TOKENS]
)
def test_what_is_wrong_with_tokens_is_found_and_nothing_else(
    tmp_path, tokenizer, rows, change, truncation, checks, row
):
    tokenizer.save_pretrained(tmp_path / "as-it-was")
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path / "as-it-was")
    model = model_of(change(own) if change else own, tmp_path / "model")
    checkup = examine(write(tmp_path / "pairs.jsonl", rows), student=model, truncation=truncation)
    assert found(checkup) - {"data.length-bias", "data.extreme-length"} == checks
    for check in checks:
        finding = the(checkup, check)
        assert finding.fix
        if finding.rows:
            assert finding.rows[0] == row


NOTES = [
    ("stripped text", edited({3: {"chosen": " spaced\n"}}), style("llama3"), "template.strips"),
    ("padding with the end token", clean(), style("chatml"), "template.pad-is-end"),
    ("an end token other than EOS", clean(), style("phi3"), "template.end-not-eos"),
    ("a template without system messages", clean(), style("gemma"), "template.system"),
]


@pytest.mark.parametrize(("rows", "make", "check"), [case[1:] for case in NOTES], ids=[case[0] for case in NOTES])
def test_what_is_good_to_know_of_a_tokenizer_is_a_note(tmp_path, rows, make, check):
    model = model_of(make(None), tmp_path / "model")
    checkup = examine(write(tmp_path / "pairs.jsonl", rows), student=model, truncation=LONG)
    assert found(checkup) - {"data.length-bias"} == set()
    assert the(checkup, check).severity == "note"


@pytest.mark.parametrize("limits", [(40, None), (60, 20), (25, 12)])
def test_truncation_is_that_of_training(tmp_path, tokenizer, limits):
    truncation = Truncation(*limits)
    rows = [{**row, "prompt": [{"role": "user", "content": "so " * i}]} for i, row in enumerate(clean(), 1)]
    source, model = write(tmp_path / "pairs.jsonl", rows), model_of(tokenizer, tmp_path / "model")
    checkup = examine(source, student=model, truncation=truncation)
    count = {finding.check: finding.count for finding in checkup.findings}
    whole, _ = encode_pairs(load_pairs(source), tokenizer, LONG)
    cut, dropped = encode_pairs(load_pairs(source), tokenizer, truncation)
    whole = {row["row"]: row for row in whole}
    assert count.get("tokens.no-room", 0) == len(dropped)
    assert count.get("tokens.response-cut", 0) == sum(
        any(len(row[f"{s}_ids"]) < len(whole[row["row"]][f"{s}_ids"]) for s in ("chosen", "rejected")) for row in cut
    )
    if limits[1]:
        assert count["tokens.prompt-cut"] == sum(len(row["prompt_ids"]) > limits[1] for row in whole.values())
    kept = checkup.facts["train"]["kept"]["response_tokens"]
    assert kept == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in cut)


# -- vocabularies ------------------------------------------------------------------------------------------------------


def loaded(tokenizer, tmp_path, **changes):
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    for name, value in changes.items():
        setattr(copy, name, value)
    return copy


def more_tokens(tokenizer):
    tokenizer.add_tokens(["<|tool|>"])
    return tokenizer


def other_pieces(tokenizer, at="e"):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(at, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def with_eos(tokenizer):
    tokenizer.eos_token = "<|bos|>"
    return tokenizer


VOCABULARIES = [
    ("another tokenizer", lambda _: make_tokenizer("chatml"), {}, "vocabulary.conflict", "error"),
    ("more tokens", more_tokens, {}, "vocabulary.extra", "note"),
    ("another EOS", with_eos, {}, "vocabulary.special", "warning"),
    ("another template", templated(HEADER + TAIL + "{{ '' }}" + GENERATE), {}, "vocabulary.template", "warning"),
    ("other pieces", other_pieces, {}, "vocabulary.reading", "warning"),
    ("padded rows", lambda t: t, {"vocab_size": 384}, "vocabulary.rows-padded", "note"),
    ("too few rows", lambda t: t, {"vocab_size": 300}, "vocabulary.rows-missing", "error"),
    ("too few positions", lambda t: t, {"max_position_embeddings": 30}, "model.positions", "error"),
]


@pytest.mark.parametrize(
    ("change", "shape", "check", "severity"), [c[1:] for c in VOCABULARIES], ids=[c[0] for c in VOCABULARIES]
)
def test_what_differs_between_teacher_and_student_is_found(tmp_path, tokenizer, change, shape, check, severity):
    student = model_of(tokenizer, tmp_path / "student")
    teacher = model_of(change(loaded(tokenizer, tmp_path)), tmp_path / "teacher", **shape)
    checkup = examine(write(tmp_path / "pairs.jsonl", clean()), student=student, teacher=teacher, truncation=LONG)
    assert the(checkup, check).severity == severity
    also = {"vocabulary.special", "vocabulary.template"} if check == "vocabulary.conflict" else set()
    assert found(checkup) - also == ({check} if severity != "note" else set())


def test_other_pieces_have_the_rows_of_the_data_where_some_are_refused(tmp_path):
    rows = [*SYSTEM[:2], *clean()[2:4]]  # trains and rivers
    student = make_tokenizer("gemma")
    teacher = other_pieces(loaded(student, tmp_path), at="v")
    models = [model_of(student, tmp_path / "student"), model_of(teacher, tmp_path / "teacher")]
    finding = the(examine(write(tmp_path / "pairs.jsonl", rows), None, models[1], models[0]), "vocabulary.reading")
    assert (finding.rows, finding.count, finding.of) == ((3,), 1, 2)
    assert finding.example == f"row 3: {text_of(rows[3]['chosen'])}"


def test_a_conflict_says_how_much_differs(tmp_path, tokenizer):
    other = make_tokenizer("chatml")
    student, teacher = model_of(tokenizer, tmp_path / "a"), model_of(other, tmp_path / "b")
    finding = the(examine(student=student, teacher=teacher), "vocabulary.conflict")
    a, b = tokenizer.get_vocab(), other.get_vocab()
    assert finding.count == sum(a[t] != b[t] if t in b else a[t] in b.values() for t in a)
    assert finding.of == len(a)


def test_a_teacher_lends_its_template(tmp_path, tokenizer):
    student = model_of(loaded(tokenizer, tmp_path, chat_template=None), tmp_path / "student")
    teacher = model_of(tokenizer, tmp_path / "teacher")
    checkup = examine(write(tmp_path / "pairs.jsonl", clean()), student=student, teacher=teacher, truncation=LONG)
    assert the(checkup, "template.lent").severity == "note"
    assert found(checkup) == set()
    assert checkup.facts["train"]["kept"]["pairs"] == 12


def test_a_model_that_is_not_there_is_a_finding(tmp_path, tokenizer):
    source = write(tmp_path / "pairs.jsonl", clean())
    assert found(examine(source, student=str(tmp_path / "nowhere"))) == {"model.shape"}
    model_of(tokenizer, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    assert found(examine(source, student=str(tmp_path / "bare"))) == {"model.tokenizer"}
    tokenizer.save_pretrained(tmp_path / "headless")
    assert found(examine(source, student=str(tmp_path / "headless"))) == {"model.shape"}


def behead(file):
    save_file({name: value for name, value in load_file(file).items() if name != "lm_head.weight"}, file)


WEIGHTS = {
    "none": (lambda file: file.unlink(), "no file named model.safetensors"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "incomplete metadata, file not fully covered"),
    "no head": (behead, "1 weights are missing, the first is lm_head.weight"),
}


@pytest.mark.parametrize(("damage", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_not_whole_are_a_finding(tmp_path, tokenizer, damage, message):
    whole, damaged = (model_of(tokenizer, tmp_path / name) for name in ("whole", "damaged"))
    damage(tmp_path / "damaged" / "model.safetensors")
    for role in ("student", "teacher"):
        assert found(examine(**{role: whole})) == set()
        finding = the(examine(**{role: damaged}), "model.weights")
        assert finding.severity == "error"
        assert finding.message.startswith(f"{role}: {damaged} exists but holds no model")
        assert message in finding.message
    recipe = recipe_for(tmp_path, tokenizer, f"model.student={damaged}")
    assert found(examine(recipe=recipe)) == {"model.weights"}
    recipe = recipe_for(tmp_path, tokenizer, "teacher.dpo=null", f"model.teacher_reference={damaged}")
    assert the(examine(recipe=recipe), "model.weights").message.startswith("teacher reference: ")


# -- memory and disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "check", "severity"),
    [
        ({"memory_there": ("cpu", 10**12, 10**12), "disk_there": 10**12}, "machine.memory", "note"),
        ({"memory_there": ("cpu", 10**5, 10**12), "disk_there": 10**12}, "machine.memory", "warning"),
        ({"memory_there": ("cuda", 10**5, 10**5), "disk_there": 10**12}, "machine.memory", "error"),
        ({"memory_there": ("cpu", 10**12, 10**12), "disk_there": 10**5}, "machine.disk", "error"),
    ],
)
def test_what_the_run_needs_is_held_against_what_is_there(tmp_path, tokenizer, monkeypatch, there, check, severity):
    for name, value in there.items():
        monkeypatch.setattr(machine, name, lambda *_, value=value: value)
    model = model_of(tokenizer, tmp_path / "model")
    checkup = examine(write(tmp_path / "pairs.jsonl", clean()), student=model, teacher=model, truncation=LONG)
    assert the(checkup, check).severity == severity
    assert found(checkup) == ({check} if severity != "note" else set())


def test_a_container_can_have_the_memory_back_that_only_holds_files(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))
    for name, text in (("max", "1000000\n"), ("current", "900000\n"), ("stat", "anon 100000\ninactive_file 700000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine.memory_there() == ("cpu", 800_000, 1_000_000)
    (tmp_path / "memory.stat").unlink()
    assert machine.memory_there() == ("cpu", 100_000, 1_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_there()[2] > 1_000_000


def test_a_place_where_nothing_can_be_written_is_an_error(tmp_path, tokenizer):
    (tmp_path / "file").write_text("x")
    model = model_of(tokenizer, tmp_path / "model")
    checkup = examine(
        write(tmp_path / "pairs.jsonl", clean()), student=model, truncation=LONG, out=tmp_path / "file" / "x"
    )
    assert the(checkup, "machine.place").severity == "error"
    assert found(checkup) == {"machine.place"}


def test_a_model_that_no_machine_holds_is_planned_without_being_made(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "huge")
    huge = config_of(tokenizer, hidden_size=65536, intermediate_size=262144, num_hidden_layers=200)
    huge.save_pretrained(tmp_path / "huge")
    checkup = examine(student=str(tmp_path / "huge"))
    assert "model.weights" in found(checkup)  # it is a directory, in which they should be
    assert the(checkup, "machine.memory").severity == "error"
    assert checkup.facts["models"]["student"]["parameters"] > 10**13


def test_training_takes_what_adam_takes(tmp_path, tokenizer, make_model):
    make_model().save_pretrained(tmp_path / "model")
    empty, model = empty_model(str(tmp_path / "model")), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert empty.num_parameters() == model.num_parameters()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for key, t in state.items() if key.startswith("exp_avg")]
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
    assert cost.training_bytes(empty, Training(), "float32") == sum(t.nbytes for t in held)
    lora = Training.model_validate({"lora": {"r": 2}})
    assert cost.weight_bytes(empty, "float32") < cost.training_bytes(empty, lora, "float32")
    assert cost.training_bytes(empty, lora, "float32") < cost.training_bytes(empty, Training(), "float32")


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": ("values", "logps")},
        {"kinds": ("values",), "positions": "endpoints"},
        {"kinds": ("values", "q"), "value_dtype": "float16"},
        {"kinds": ("topk",), "k": 8},
        {"kinds": ("topk",), "k": 8, "topk_coding": "float32"},
        {"kinds": ("topk",), "k": "vocab"},
    ],
    ids=str,
)
def test_the_size_of_signals_is_foretold(tmp_path, tokenizer, make_model, options):
    draw = np.random.default_rng(0)
    text = lambda: " ".join(draw.choice(SUBJECTS, draw.integers(10, 40)))  # noqa: E731
    pairs = Dataset.from_list([{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(60)])
    store = extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "store", truncation=LONG, **options)
    size = sum(path.stat().st_size for path in (tmp_path / "store" / "shards").iterdir())
    encoded, _ = encode_pairs(pairs, tokenizer, LONG)
    tokens = sum(len(ids) for side in ("chosen", "rejected") for ids in encoded[f"{side}_ids"])
    options = dict(options)
    packed = options.pop("topk_coding", None) != "float32" and options.get("k") != "vocab"
    told = store_bytes(options.pop("kinds"), tokens, 2 * len(store), len(tokenizer), packed=packed, **options)
    assert size - 6_000 < told < 2 * size  # a file has a footer, and what it compresses is left out


# -- all of them -------------------------------------------------------------------------------------------------------


def test_every_check_has_a_row_here_and_a_line_in_the_docs():
    root = Path(__file__).parents[2]
    doctor = root / "src/prefdistill/experiment/doctor"
    source = "".join(path.read_text(encoding="utf-8") for path in doctor.glob("*.py"))
    checks = set(re.findall(r'"((?:data|tokens|template|vocabulary|model|machine|recipe)\.[a-z-]+)"', source))
    assert len(checks) > 50
    tests, docs = Path(__file__).read_text(encoding="utf-8"), (root / "docs/doctor.md").read_text(encoding="utf-8")
    assert {check for check in checks if f'"{check}"' not in tests} == set()
    assert {check for check in checks if not re.search(f"`({check}|{check.partition('.')[2]})`", docs)} == set()


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
def test_nothing_in_a_file_makes_the_doctor_fall_over(some_model, tmp_path_factory, rows):
    source = write(tmp_path_factory.getbasetemp() / "any.jsonl", rows)
    checkup = examine(source, source, student=some_model, truncation=Truncation(20, 5))
    json.dumps(checkup.to_json(), ensure_ascii=False).encode()
    as_text(checkup).encode()
    if found(checkup, "error") <= {"data.leaked-pairs"}:
        assert len(load_pairs(source)) == checkup.facts["train"]["pairs"]
    elif found(checkup, "error") & {"data.json", "data.values", "data.roles", "data.mixed", "data.columns"}:
        with pytest.raises(UserError):
            load_pairs(source)


# -- recipes and the command -------------------------------------------------------------------------------------------

RECIPE = """
name: planned
data: {{train: {train}, test: {test}, max_length: 200}}
model: {{teacher: {model}, student: {model}}}
teacher: {{dpo: {{beta: 0.1}}}}
methods:
  dpo: {{}}
  tvkd: {{}}
  dckd: {{}}
  wpo: {{}}
  seqkd: {{}}
  tvkd-lora: {{method: tvkd, training: {{lora: {{r: 2}}}}}}
"""


def recipe_for(tmp_path, tokenizer, *overrides, rows=None):
    model = model_of(tokenizer, tmp_path / "model")
    train = write(tmp_path / "train.jsonl", rows or clean())
    test = write(tmp_path / "test.jsonl", clean(first=100))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(train=train, test=test, model=model))
    return load_recipe(tmp_path / "recipe.yaml", overrides)


def test_a_recipe_is_planned_stage_by_stage(tmp_path, tokenizer):
    checkup = examine(recipe=recipe_for(tmp_path, tokenizer), out=tmp_path / "runs" / "x")
    assert found(checkup) == set()
    memory, disk = checkup.facts["memory"], checkup.facts["disk"]
    n = checkup.facts["models"]["student"]["parameters"]
    assert memory["training tvkd"] == 16 * n
    assert memory["training wpo"] == memory["training the teacher's DPO"] == 20 * n  # they hold their reference
    assert 4 * n < memory["training tvkd-lora"] < 16 * n
    assert disk["weights of dpo"] == 4 * n
    assert disk["checkpoints while training"] == 2 * 12 * n
    assert any(key.startswith("signals of the teacher on train") and "topk" in key for key in disk)
    assert any(key.startswith("signals of the reference on test") for key in disk)
    assert "sampled responses, at most" in disk
    assert not (tmp_path / "runs").exists()
    assert "training dpo, tvkd, dckd, seqkd" in as_text(checkup)  # they take the same


def test_checkpoints_that_are_kept_need_their_place(tmp_path, tokenizer):
    recipe = recipe_for(tmp_path, tokenizer, "training.arguments.save_total_limit=3")
    facts = examine(recipe=recipe, out=tmp_path / "runs").facts
    parameters = facts["models"]["student"]["parameters"]
    assert facts["disk"]["checkpoints while training"] == (3 + 1) * 12 * parameters


def test_a_judge_is_planned_too(tmp_path, tokenizer):
    judge = f"{{model: {json.dumps(SMALL)}, training: {{epochs: 1}}}}"
    asked = [f"reward_model={judge}", "evaluate.prompts=4"]
    memory = examine(recipe=recipe_for(tmp_path, tokenizer, *asked)).facts["memory"]
    head = SMALL["hidden_size"] * (len(tokenizer) - 1)  # one score in place of the vocabulary
    assert memory["training the reward model"] == memory["training dpo"] - 16 * head
    named = examine(
        recipe=recipe_for(tmp_path, tokenizer, asked[1], f"reward_model={{name: {tmp_path}/model, training: {{}}}}")
    )
    assert "it is a language model" in the(named, "model.shape").message


def test_a_judge_need_not_be_able_to_write(tmp_path, tokenizer):
    shape = {"num_labels": 1, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    judge = DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, **shape))
    judge.config.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    asked = [f"reward_model={{name: {tmp_path}/judge, training: {{}}}}", "evaluate.prompts=4"]
    checkup = examine(recipe=recipe_for(tmp_path, tokenizer, *asked))
    assert found(checkup) == set()
    assert checkup.facts["memory"]["reading the reward model"] == 4 * judge.num_parameters()


FROM_SCRATCH = f"model={{scratch: {{vocab_size: 300, teacher: {json.dumps(SMALL)}, student: {json.dumps(SMALL)}}}}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.arguments={save_total_limit: many}"], "save_total_limit must be a valid integer"),
        (["training.lora={target_modules: [nope]}"], "training.lora: Target modules {'nope'} not found"),
        ([FROM_SCRATCH, "model.scratch.student.hiden_size=8"], "model.scratch.student: .* did you mean 'hidden_size'"),
        ([FROM_SCRATCH, "model.scratch.teacher.hidden_act=nope"], "model.scratch.teacher: .* there is no 'nope'"),
        (
            ["reward_model={model: {hiden_size: 8}, training: {}}", "evaluate.prompts=4"],
            "reward_model.model: .* did you mean 'hidden_size'",
        ),
    ],
)
def test_a_value_of_a_recipe_that_cannot_be_is_a_finding_beside_the_others(tmp_path, tokenizer, overrides, message):
    recipe = recipe_for(tmp_path, tokenizer, *overrides, rows=edited({1: {"chosen": ""}}))
    checkup = examine(recipe=recipe, out=tmp_path / "runs")
    assert found(checkup) == {"recipe.check", "data.empty-response"}
    assert re.search(message, the(checkup, "recipe.check").message)


def test_a_run_takes_the_disk_that_is_planned(tmp_path, tokenizer):
    methods = """{
      dckd: {training: {lora: {r: 2}}}, tvkd: {}, dpo: {start: tvkd},
      adpa-plus: {method: adpa, start: dckd, rounds: 2}, seqkd: {}}"""
    recipe = recipe_for(
        tmp_path,
        tokenizer,
        FROM_SCRATCH,
        "training={max_steps: 1, batch_size: 4}",
        "signals={topk_coding: float32, k: 64}",
        "sampling.max_new_tokens=60",
        f"methods={methods}",
    )
    plan = examine(recipe=recipe, out=tmp_path / "run").facts["disk"]
    run_recipe(recipe, tmp_path / "run")
    there = {path.name: path for path in (tmp_path / "run" / "seed-0").iterdir()}

    signals = {re.match(r"signals of the (.+) on (\w+) ", name): size for name, size in plan.items()}
    stores = {name for name in there if name.startswith("signals-")}
    for told, size in signals.items():
        if told:
            start = f"signals-{told[1].replace(' ', '_')}-{told[2]}"
            mine = {name for name in stores if f"{name}-".startswith(f"{start}-")}
            shards = [shard.stat().st_size for name in mine for shard in there[name].rglob("*.parquet")]
            assert 0 < sum(shards) < size + 6_000 * len(shards)  # a file has a footer
            stores -= mine
    assert stores == set()

    weights = [path for directory in there.values() for path in directory.rglob("*.safetensors")]
    held = sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in weights)
    assert held == sum(size for name, size in plan.items() if name.startswith("weights of "))


def test_what_a_run_would_refuse_is_an_error(tmp_path, tokenizer):
    recipe = recipe_for(tmp_path, tokenizer, "methods.dpo.training.batch_size=6")
    finding = the(examine(recipe=recipe), "recipe.check")
    assert finding.severity == "error"
    assert "batch_size=6 is not a multiple" in finding.message


def test_models_from_scratch_are_planned_too(tmp_path):
    checkup = examine(
        recipe=load_recipe(Path(__file__).parents[2] / "src/prefdistill/experiment/recipes/quickstart.yaml")
    )
    assert checkup.ok
    assert {"teacher", "student"} <= set(checkup.facts["models"])
    assert "reading the teacher" in checkup.facts["memory"]


def test_status_and_json(tmp_path, tokenizer, capsys):
    model = model_of(tokenizer, tmp_path / "model")
    good, bad = write(tmp_path / "a.jsonl", edited({1: {"chosen": ""}})), write(tmp_path / "b.jsonl", ["{"])
    assert main(["doctor", "--data", good, "--student", model, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    finding = next(f for f in told["findings"] if f["check"] == "data.empty-response")
    assert finding == {
        "check": "data.empty-response",
        "severity": "warning",
        "message": "a response has no text",
        "fix": "Remove these rows.",
        "count": 1,
        "of": 12,
        "rows": [1],
        "example": "row 1: chosen is ''",
        "data": "train",
    }
    assert main(["doctor", "--data", bad, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main(["doctor", "--data", bad]) == 2
    assert capsys.readouterr().out.rstrip().endswith("1 error, 0 warnings, 0 notes")


def test_options_win_over_the_recipe(tmp_path, tokenizer, capsys):
    recipe_for(tmp_path, tokenizer)
    other = write(tmp_path / "other.jsonl", edited({2: {"chosen": ""}}))
    arguments = [
        "doctor",
        "--recipe",
        "recipe.yaml",
        "--data",
        other,
        "--max-length",
        "50",
        "--json",
        "data.max_test=5",
    ]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["train"]["source"] == other
    assert told["facts"]["test"]["rows"] == 5
    assert {f["check"] for f in told["findings"] if f["severity"] == "warning"} >= {
        "data.empty-response",
        "tokens.response-cut",
    }


@pytest.mark.parametrize("arguments", [[], ["--data", "a.jsonl", "x=1"], ["--recipe", "nowhere.yaml"]])
def test_there_must_be_something_to_look_at(arguments, capsys):
    assert main(["doctor", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_to_look_at():
    with pytest.raises(UserError, match="nothing to look at"):
        examine()


# -- real data ---------------------------------------------------------------------------------------------------------


def test_real_pairs(data_dir):
    train, test = (str(data_dir / "alpacaeval_pairs" / f"{split}.jsonl.gz") for split in ("train", "test"))
    checkup = examine(train, test)
    assert checkup.ok
    assert found(checkup) == {"data.duplicate-pairs", "data.length-bias"}  # prompts are not shared
    with gzip.open(train) as file:
        rows = [json.loads(line) for line in file]
    keys = [json.dumps([row[name] for name in ("prompt", "chosen", "rejected")]) for row in rows]
    told = {(f.check, f.data): f for f in checkup.findings}
    assert told["data.duplicate-pairs", "train"].count == len(keys) - len(set(keys))
    longer = np.mean([len(text_of(row["chosen"])) > len(text_of(row["rejected"])) for row in rows])
    assert told["data.length-bias", "train"].count == pytest.approx(longer * len(rows))
    assert told["data.repeated-prompts", "train"].severity == "note"
