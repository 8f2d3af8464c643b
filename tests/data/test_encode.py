"""Encoding pairs: chat templates, token boundaries, end tokens, truncation."""

import copy

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefdistill.core.errors import UserError
from prefdistill.data import truncation as reasons
from prefdistill.data.batches import PairCollator
from prefdistill.data.encode import encode_pairs, reading_of
from prefdistill.data.load import load_pairs
from prefdistill.data.template import end_token_ids
from prefdistill.data.truncation import Truncation
from support.pairs import assistant, conversation, plain, user
from support.tokenizer_styles import STYLES, make_tokenizer


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")


PAIRS = [
    {**conversation("Hi?", "Hello.", "No."), "score_chosen": 1, "score_rejected": 0.25, "source": "a"},
    {**conversation("Où ?", "Là 🙂", "\n"), "score_chosen": 0.5, "score_rejected": -3, "source": "b"},
]


UNLIMITED = Truncation(max_length=None)


def encode(rows, tokenizer, truncation=UNLIMITED):
    encoded, dropped = encode_pairs(Dataset.from_list(rows), tokenizer, truncation)
    return list(encoded), dropped


def template(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


# ---- Responses of conversations


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
    """Check the tokens of an encoded row against the template's text and the description of the style."""
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
def test_encoded_conversations_decode_to_the_templates_text_or_are_dropped(style, data):
    text = contents(style)
    rows = data.draw(st.lists(st.builds(conversation, text, text, text), min_size=5, max_size=20))
    tokenizer = make_tokenizer(style)
    rows = [conversation("What?", "Hello.", ""), *rows]  # at least one row without surprises
    encoded, dropped = encode(rows, tokenizer)
    assert encoded[0]["row"] == 0
    for row in encoded:
        assert_row_is_the_conversation(rows[row["row"]], row, tokenizer, STYLES[style])
    # Dropped rows are exactly those whose tokens do not start with the tokens of the prompt.
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


def test_null_message_keys_do_not_reach_the_template():
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


def test_an_end_token_inside_the_content_does_not_end_the_response():
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


def test_rows_without_a_clear_token_boundary_are_dropped():
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


# ---- Plain text


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
def test_tokens_equal_those_of_trls_dpo_trainer(tmp_path, form):
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


# ---- Sampled responses


def sampled_row(content, ended=None, *, form=conversation):
    row = form("What is the capital?", content, "x")
    row = {"prompt": row["prompt"], "student_response": row["chosen"]}
    return row if ended is None else row | {"student_response_ended": ended}


def encode_sampled(rows, tokenizer, truncation=UNLIMITED):
    encoded, dropped = encode_pairs(Dataset.from_list(rows), tokenizer, truncation, responses=("student_response",))
    assert set(encoded.column_names) == {
        "row", "prompt_ids", "prompt_truncated",
        *(f"student_response_{p}" for p in ("ids", "offsets", "ended", "truncated", "text_start", "text_end"))
    }  # fmt: skip
    return [{name.removeprefix("student_response_"): value for name, value in row.items()} for row in encoded], dropped


@pytest.mark.parametrize("style", [*(name for name in STYLES if STYLES[name].end and name != "not_a_prefix"), "plain"])
def test_a_cut_response_has_the_tokens_of_the_ended_one_without_its_end_token(style):
    form = plain if style == "plain" else conversation
    tokenizer = make_tokenizer("zephyr" if style == "plain" else style)
    text = "Paris, the\n\ncapital 🙂"
    (unsaid,), _ = encode_sampled([sampled_row(text, form=form)], tokenizer)
    rows = [sampled_row(text, flag, form=form) for flag in (True, False)]
    (ended, cut), dropped = encode_sampled(rows, tokenizer)
    assert not dropped
    assert {**unsaid, "row": 0} == ended
    assert (ended["ended"], cut["ended"]) == (True, False)
    assert ended["ids"][-1] in end_token_ids(tokenizer)
    assert cut["prompt_ids"] == ended["prompt_ids"]
    assert cut["ids"] == ended["ids"][:-1]
    assert tokenizer.decode(cut["ids"]) == text
    assert cut["offsets"] == ended["offsets"][:-1]
    assert cut["offsets"][-1] == len(text)
    # the same tokens as in a pair
    pair, _ = encode([form("What is the capital?", text, "x")], tokenizer)
    assert pair[0]["chosen_ids"] == ended["ids"]


def test_text_before_the_end_token_is_not_part_of_a_cut_response():
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "\n<|im_end|>")
    (ended, cut), _ = encode_sampled([sampled_row("Paris", flag) for flag in (True, False)], tokenizer)
    assert tokenizer.decode(ended["ids"]) == "Paris\n<|im_end|>"
    assert tokenizer.decode(cut["ids"]) == "Paris"
    assert cut["ended"] is False


def test_cut_responses_can_be_truncated_and_empty_ones_are_dropped():
    tokenizer = make_tokenizer("chatml")
    rows = [sampled_row("one two three four", False), sampled_row("one two three four", True), sampled_row("", False)]
    whole, dropped = encode_sampled(rows, tokenizer)
    assert dropped.counts == {reasons.RESPONSE_EMPTY: 1}
    assert dropped.first_rows == {reasons.RESPONSE_EMPTY: 2}
    room = len(whole[0]["prompt_ids"]) + len(whole[0]["ids"])
    for less, kept, ended in ((0, 0, False), (1, 1, False), (-1, 0, True)):
        found, _ = encode_sampled(rows[:2], tokenizer, Truncation(max_length=room - less))
        assert found[0]["ids"] == whole[0]["ids"][: len(whole[0]["ids"]) - kept]
        assert (found[0]["ended"], found[1]["ended"]) == (False, ended)


def test_only_the_requested_responses_are_encoded():
    """Also if the same rows were encoded before with other responses."""
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


# ---- Truncation


def test_truncation_by_hand():
    tokenizer = make_tokenizer("zephyr")  # a token for each digit, and BOS in front of plain text
    row = plain("4567", "890", "1")
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
        for name in ("prompt", "chosen", "rejected"):
            assert cut[f"{name}_truncated"] is (len(cut[f"{name}_ids"]) < len(whole[f"{name}_ids"]))
        assert not dropped
    with pytest.raises(UserError, match=r"^No row is left: dropped 1 row: the prompt leaves no room for a response"):
        encode([row], tokenizer, Truncation(5))


def test_pairs_that_truncation_makes_equal_are_dropped_and_truncated_ones_are_counted():
    rows = [plain("4", "567", "569"), plain("4", "567", "567"), plain("4", "56", "7"), plain("456", "7", "8")]
    tokenizer = make_tokenizer("zephyr")
    encoded, dropped = encode_pairs(
        Dataset.from_list(rows), tokenizer, Truncation(4, 3)
    )  # a prompt of two tokens, or of three; BOS included
    assert dropped.counts == {reasons.EQUAL_AFTER_CUT: 1}
    assert [row["row"] for row in encoded] == [1, 2, 3]  # the user's own equal pair stays
    reading = reading_of(encoded, dropped)
    assert (reading.rows, reading.kept, reading.prompts, reading.responses) == (4, 3, 1, 3)
    assert str(reading) == (
        "dropped 1 row: chosen and rejected are equal after truncation (1, first row 0); prompts truncated: 1; "
        "rows with a truncated response: 3; 3 of 4 rows are read"
    )
    _, dropped = encode_pairs(Dataset.from_list(rows), tokenizer, Truncation(4, 3), responses=("chosen",))
    assert not dropped  # a response alone
    whole = reading_of(*encode_pairs(Dataset.from_list(rows), tokenizer, UNLIMITED))
    assert whole.complete
    assert str(whole) == "4 of 4 rows are read"


def test_truncation_without_bos_keeps_the_end_only():
    tokenizer = make_tokenizer("chatml")
    [cut], _ = encode([plain("4567", "8", "9")], tokenizer, Truncation(None, 2))
    assert tokenizer.decode(cut["prompt_ids"]) == "67"


def test_truncation_after_an_end_token_inside_the_content_has_not_ended():
    tokenizer = make_tokenizer("zephyr")
    [cut], _ = encode([plain("4", "5</s>6", "7")], tokenizer, Truncation(4))
    assert tokenizer.decode(cut["chosen_ids"]) == "5</s>"
    assert cut["chosen_ended"] is False


def test_truncation_drops_only_rows_without_room():
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
def test_invalid_truncation_is_refused(lengths, message):
    with pytest.raises(UserError) as raised:
        Truncation(*lengths)
    assert str(raised.value) == message


# ---- Tokenizers, processes, real data


def test_errors_of_tokenizers():
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


def test_every_pair_of_a_real_data_set_encodes(data_dir):
    dataset = load_pairs(str(data_dir / "alpacaeval_pairs" / "test.jsonl.gz"))
    assert len(dataset) == 625
    tokenizer = make_tokenizer("llama3")
    encoded, dropped = encode_pairs(dataset, tokenizer, UNLIMITED)
    assert not dropped, str(dropped)
    assert encoded["row"][:] == list(range(625))
    for index in range(0, 625, 50):
        content = dataset[index]["chosen"][0]["content"].strip()
        assert tokenizer.decode(encoded[index]["chosen_ids"]) == content + "<|eot_id|>"
        assert encoded[index]["chosen_offsets"][-2:] == [len(content), len(content + "<|eot_id|>")]
