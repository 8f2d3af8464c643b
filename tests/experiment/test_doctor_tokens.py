"""Doctor checks of templates and tokens: one fault per row of the table, and the findings it gives."""

import pytest
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
)

from prefdistill.data.encode import encode_pairs, reading_of
from prefdistill.data.load import load_pairs
from prefdistill.data.truncation import Truncation
from prefdistill.experiment.doctor import as_text, examine
from support.doctor import (
    GENERATE,
    HEADER,
    LONG,
    SYSTEM,
    TAIL,
    checks_found,
    clean,
    copy_of,
    edited,
    finding_of,
    model_of,
    plain,
    templated,
    tokenizer_of_style,
    turns,
    word_tokenizer,
    write,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")


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
        {"tokens.equal-after-cut"},
        3,
    ),
    ("a token across the boundary", MERGING, None, LONG, {"tokens.merge"}, 0),
    ("a prompt without tokens", UNASKED, None, LONG, {"tokens.prompt-empty", "data.empty-prompt"}, 3),
    ("a response without tokens", UNSAID, None, LONG, {"tokens.response-empty", "data.empty-response"}, 3),
    ("a tokenizer without offsets", plain(clean()), lambda _: ByT5Tokenizer(), LONG, {"template.unusable"}, None),
    ("a block that generation opens", clean(), tokenizer_of_style("not_a_prefix"), LONG, {"template.differs"}, 0),
    (
        "the date",
        clean(),
        templated("{{ strftime_now('%Y') }}" + HEADER + TAIL + GENERATE),
        LONG,
        {"template.date"},
        None,
    ),
    (
        "sampled text that the template rewrites",
        edited({3: {"chosen": "a [note] here", "chosen_ids": [1, 2], "chosen_check": 1}}),
        templated(HEADER.replace("m['content']", "m['content'] | replace('[note]', '')") + TAIL + GENERATE),
        LONG,
        {"template.sampled"},
        3,
    ),
    (
        "system messages that are refused",
        SYSTEM,
        tokenizer_of_style("gemma"),
        LONG,
        {"template.refused", "template.system"},
        0,
    ),
    ("no end token", clean(), tokenizer_of_style("no_end"), LONG, {"template.no-end", "tokens.end-missing"}, 0),
    ("no BOS", clean(), tokenizer_of_style("zephyr"), LONG, {"tokens.bos-missing"}, 0),
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
    ("unknown words", plain(clean()), word_tokenizer, LONG, {"tokens.unknown"}, 0),
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
        tokenizer_of_style("llama3"),
        LONG,
        {"tokens.equal-responses", "data.near-equal-responses"},
        3,
    ),
    ("an EOS that plain text lacks", plain(clean()), tokenizer_of_style("chatml"), LONG, set(), None),
]


@pytest.mark.parametrize(
    ("rows", "change", "truncation", "checks", "row"), [c[1:] for c in TOKENS], ids=[c[0] for c in TOKENS]
)
def test_each_token_check_finds_its_fault_and_nothing_else(tmp_path, tokenizer, rows, change, truncation, checks, row):
    tokenizer.save_pretrained(tmp_path / "as-it-was")
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path / "as-it-was")
    model = model_of(change(own) if change else own, tmp_path / "model")
    checkup = examine(write(tmp_path / "pairs.jsonl", rows), student=model, truncation=truncation)
    assert checks_found(checkup) - {"data.length-bias", "data.extreme-length"} == checks
    for check in checks:
        finding = finding_of(checkup, check)
        assert finding.fix
        if finding.rows:
            assert finding.rows[0] == row


NOTES = [
    ("stripped text", edited({3: {"chosen": " spaced\n"}}), tokenizer_of_style("llama3"), "template.strips"),
    ("padding with the end token", clean(), tokenizer_of_style("chatml"), "template.pad-is-end"),
    ("an end token other than EOS", clean(), tokenizer_of_style("phi3"), "template.end-not-eos"),
    ("a template without system messages", clean(), tokenizer_of_style("gemma"), "template.system"),
]


@pytest.mark.parametrize(("rows", "make", "check"), [case[1:] for case in NOTES], ids=[case[0] for case in NOTES])
def test_tokenizer_notes(tmp_path, rows, make, check):
    model = model_of(make(None), tmp_path / "model")
    checkup = examine(write(tmp_path / "pairs.jsonl", rows), student=model, truncation=LONG)
    assert checks_found(checkup) - {"data.length-bias"} == set()
    assert finding_of(checkup, check).severity == "note"


@pytest.mark.parametrize("limits", [(40, None), (60, 20), (25, 12)])
def test_truncation_counts_match_training(tmp_path, tokenizer, limits):
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
    sides = {side: sum(row[f"{side}_truncated"] for row in cut) for side in ("chosen", "rejected")}
    if cuts := [f for f in checkup.findings if f.check == "tokens.response-cut"]:
        assert "(chosen in {chosen} rows, rejected in {rejected})".format(**sides) in cuts[0].message
    reading = reading_of(cut, dropped)
    assert checkup.facts["train"]["read"] == {**reading.to_json(), "text": str(reading)}
    assert f"read: {str(reading)[:60]}" in as_text(checkup)


SPEAKS = HEADER + "{{ m.thinking }}" + TAIL + "{% if think %}{{ tools }}{% endif %}" + GENERATE
TOOLS = [{"name": "add"}]


@pytest.mark.parametrize(
    ("template", "keys", "inputs", "findings"),
    [
        (SPEAKS, {"thinking": "hm", "name": "eve"}, {}, {("template.unread-keys", "note", "name")}),
        (
            HEADER + TAIL + GENERATE,
            {"thinking": "hm", "name": "eve"},
            {},
            {("template.unread-keys", "warning", "thinking"), ("template.unread-keys", "note", "name")},
        ),
        (SPEAKS, {}, {"tools": TOOLS}, {("template.unread-input", "warning", "`tools`")}),  # only with `think`
        (SPEAKS, {}, {"tools": TOOLS, "chat_template_kwargs": {"think": True}}, set()),
        (SPEAKS, {}, {"chat_template_kwargs": {"think": False}}, set()),  # changes nothing, but is read
        (
            SPEAKS,
            {},
            {"chat_template_kwargs": {"thin": True}, "documents": [{"text": "x"}]},
            {("template.unread-variable", "warning", "'thin'"), ("template.unread-input", "warning", "`documents`")},
        ),
    ],
    ids=["a read key", "no read key", "tools", "read tools", "a default", "a misspelt variable"],
)
def test_what_the_template_does_not_read_is_named(tmp_path, tokenizer, template, keys, inputs, findings):
    rows = [row | {"chosen": [row["chosen"][0] | keys]} | inputs for row in clean()]
    model = model_of(copy_of(tokenizer, tmp_path, chat_template=template), tmp_path / "model")
    checkup = examine(write(tmp_path / "rows.jsonl", rows), student=model, truncation=LONG)
    named = [f for f in checkup.findings if f.check.startswith("template.unread")]
    assert {(f.check, f.severity) for f in named} == {finding[:2] for finding in findings}
    for check, severity, name in findings:
        (finding,) = [f for f in named if (f.check, f.severity) == (check, severity)]
        assert name in finding.message
        assert (finding.count, finding.of) == (12, 12)
