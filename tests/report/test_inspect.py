"""The token view: what the page holds is what the stores say, and it works in a browser, whatever the text is."""

import base64
import copy
import json
import os
import re
import struct
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.data.columns import SIDES
from prefdistill.data.encode import encode_pairs
from prefdistill.data.fingerprint import data_fingerprint
from prefdistill.data.load import load_pairs
from prefdistill.data.messages import pair_texts
from prefdistill.data.truncation import Truncation
from prefdistill.losses import shaping_return
from prefdistill.methods import METHODS
from prefdistill.models.form import apply_form
from prefdistill.models.identity import tokenizer_identity
from prefdistill.models.load import load_tokenizer
from prefdistill.models.options import Form
from prefdistill.models.scratch import random_model, train_tokenizer
from prefdistill.report.packed import MISSING, Pieces, finest, quantised, quantised_steps, width_of
from prefdistill.report.token_data import Field, Weights, _scale, token_logps, token_psi
from prefdistill.report.tokens import write_token_view
from prefdistill.signals import Signals, extract_signals
from prefdistill.signals.shards import Shard
from prefdistill.signals.store import SignalSet
from support.texts import sentence

ALERT = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


# -- reading a page without its script, from what packed.py says -------------------------------------------------------


class Page:
    """The data of a page, decoded in Python."""

    def __init__(self, path):
        self.html = path.read_text(encoding="utf-8")
        self.scripts = dict(re.findall(r'<script type="application/[\w-]+" id="(\w+)">(.*?)</script>', self.html, re.S))
        self.page = json.loads(self.scripts["page"])
        self.index, self.table = json.loads(self.bytes("index")), json.loads(self.bytes("pieces"))
        self.pairs = []
        for number in range(-(-len(self.index["row"]) // self.page["block"])):
            self.pairs += self._block(number)

    def bytes(self, name):
        return zlib.decompress(base64.b64decode(self.scripts[name]))

    def _block(self, number):
        data, first = self.bytes(f"block{number}"), number * self.page["block"]
        lengths = self.index["tokens"][first : first + self.page["block"]]
        (size,) = struct.unpack_from("<I", data)
        head, offset, count = json.loads(data[4 : 4 + size]), 4 + size, sum(map(sum, lengths))

        def planes(width):
            nonlocal offset
            parts = np.frombuffer(data, np.uint8, count * width, offset).reshape(width, count).astype(np.int64)
            offset += count * width
            return sum(part << 8 * i for i, part in enumerate(parts))

        pieces = planes(self.page["width"])
        fields = [planes(2).astype(np.uint16).astype(np.int16) for _ in self.page["fields"]]
        own = {}
        if self.page["own"]:
            own["student_shared"] = planes(1)
            count = sum(map(sum, self.index["own"]["tokens"][first : first + self.page["block"]]))
            own |= {"pieces": planes(self.page["width"]), "shared": planes(1)}
            own["steps"] = planes(2).astype(np.uint16).astype(np.int16)
        assert offset == len(data)
        start = own_start = 0
        for i, both in enumerate(lengths):
            pair = {"prompt": head["prompts"][head["which"][i]]}
            for number, (side, n) in enumerate(zip(SIDES, both, strict=True)):
                part = slice(start, start + n)
                pair[side] = {"pieces": pieces[part], "fields": [field[part] for field in fields]}
                start += n
                if own:
                    own_part = slice(own_start, own_start + self.index["own"]["tokens"][first + i][number])
                    pair[side]["own"] = {name: own[name][own_part] for name in ("pieces", "shared", "steps")}
                    pair[side]["student_shared"] = own["student_shared"][part]
                    own_start = own_part.stop
            yield pair

    def text(self, at, side):
        return "".join(self.table["texts"][piece] for piece in self.pairs[at][side]["pieces"])

    def ids(self, at, side):
        return [self.table["ids"][piece] for piece in self.pairs[at][side]["pieces"]]

    def field(self, role, kind):
        return next(i for i, f in enumerate(self.page["fields"]) if (f["role"], f["kind"]) == (role, kind))

    def path(self, at, side, kind="values"):
        field = self.field("teacher", kind)
        steps = self.pairs[at][side]["fields"][field] * 2.0 ** self.index["steps"][at][field]
        return self.index[f"{kind}_start"][side][at] + np.cumsum([0, *steps])

    def logps(self, at, side, role="teacher"):
        field = self.field(role, "logps")
        raw = self.pairs[at][side]["fields"][field]
        return np.where(raw == MISSING, np.nan, raw * 2.0 ** self.index["steps"][at][field])


@pytest.fixture(scope="module")
def stores(tmp_path_factory, make_model, tokenizer, pairs):
    """Signals of four models about the same pairs; the teacher's topk is the whole vocabulary, exact."""
    root = tmp_path_factory.mktemp("stores")

    def make(name, seed, kinds, role, **options):
        options = {"truncation": Truncation(32), **options}
        return extract_signals(make_model(seed), pairs, tokenizer, kinds=kinds, out=root / name, role=role, **options)

    teacher = make("teacher", 0, ("values", "logps"), "teacher")
    topk = make("topk", 0, ("topk",), "teacher", k="vocab")
    return {
        "teacher": teacher,
        "topk": topk,
        "sft": make("sft", 1, ("logps", "topk"), "teacher_reference", ids_from=topk),
        "reference": make("reference", 2, ("logps",), "reference"),
        "student": make("student", 3, ("logps",), "student"),
    }


@pytest.fixture(scope="module")
def full(stores, pairs, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "full.html"
    return out, write_token_view(pairs, list(stores.values()), out, tokenizer)


# -- the data ----------------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_store_and_psi_adds_up(full, stores):
    page, store = Page(full[0]), stores["teacher"]
    scale = next(mode["scale"] for mode in page.page["modes"] if mode["show"] == "psi")
    assert page.index["row"] == list(range(24))
    for at in page.index["row"]:
        for side, n, ended, psi in zip(
            SIDES, *(page.index[name][at] for name in ("tokens", "ended")), page.index["psi"]["values"][at], strict=True
        ):
            row = store.row(at)[side]
            assert (n, ended) == (row["tokens"], row["ended"])
            path = page.path(at, side)
            np.testing.assert_allclose(path, row["values"], atol=scale / 2_000)
            want = shaping_return(torch.tensor(row["values"])[None], torch.tensor([n]), ended=torch.tensor([ended]))
            assert psi == pytest.approx(float(want), abs=1e-5)
            assert token_psi(row["values"], ended).sum() == pytest.approx(psi, abs=1e-4)
            assert token_psi(path, ended).sum() == pytest.approx(psi, abs=scale / 1_000)
    assert page.index["peak"][3] == pytest.approx(
        max(np.abs(token_psi(r["values"], r["ended"])).max() for r in store.row(3).values()), rel=1e-5
    )


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("terminal", ["last", "bootstrap", "zero"])
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_psi_of_tokens_adds_up_to_the_shaping_return(ended, terminal, discount):
    values = np.array([3.0, -1.0, 4.5, 2.0])
    whole = shaping_return(torch.tensor(values)[None], torch.tensor([3]), discount, terminal, torch.tensor([ended]))
    assert token_psi(values, ended, discount, terminal).sum() == pytest.approx(float(whole))


def test_psi_by_hand():
    values = [1.0, 3.0, 2.5, 7.0]
    np.testing.assert_allclose(token_psi(values, True), [2, -0.5, 0])
    np.testing.assert_allclose(token_psi(values, False), [2, -0.5, 4.5])
    np.testing.assert_allclose(token_psi(values, True, terminal="zero"), [2, -0.5, -2.5])
    np.testing.assert_allclose(token_psi(values, True, 0.5, "bootstrap"), [0.5, -1.75, 1.0])


def test_text_and_tokens_are_those_of_the_data(full, pairs, tokenizer):
    page = Page(full[0])
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation(32))
    for at, row in enumerate(encoded):
        assert "".join(page.pairs[at]["prompt"]) == tokenizer.decode(row["prompt_ids"])
        assert page.pairs[at]["prompt"][1] == tokenizer.bos_token  # special tokens stand by themselves
        for side in SIDES:
            assert page.ids(at, side) == row[f"{side}_ids"]
            assert page.text(at, side) == tokenizer.decode(row[f"{side}_ids"])
    assert [page.table["texts"][i] for i in page.table["special"]] == [tokenizer.eos_token]


def test_token_log_probs_are_those_of_the_model(full, make_model, pairs, tokenizer):
    page, model = Page(full[0]), make_model(0)
    encoded, _ = encode_pairs(pairs, tokenizer, Truncation(32))
    for at in (0, 7, 23):
        for number, side in enumerate(SIDES):
            prompt, response = encoded[at]["prompt_ids"], encoded[at][f"{side}_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            np.testing.assert_allclose(page.logps(at, side), logps, atol=2e-3)
            assert page.index["logps"]["teacher"][at][number] == pytest.approx(float(logps.sum()), abs=1e-3)


def test_stored_token_logps_are_shown_of_every_token(stores, make_model, pairs, tokenizer, tmp_path):
    """Rather than the top-k's, which lack some."""
    options = {"truncation": Truncation(32)}
    few = extract_signals(make_model(0), pairs, tokenizer, ("topk",), tmp_path / "few", k=3, **options)
    exact = extract_signals(make_model(0), pairs, tokenizer, ("token_logps",), tmp_path / "exact", **options)
    base = extract_signals(
        make_model(1), pairs, tokenizer, ("token_logps",), tmp_path / "base", role="teacher_reference", **options
    )
    made = write_token_view(pairs, [few, exact, base], tmp_path / "exact.html", tokenizer)
    assert made["shows"] == ["teacher.logp", "teacher_reference.logp", "teacher.ratio"]
    page = Page(tmp_path / "exact.html")
    assert page.page["kept"] == {}
    for at in range(24):
        for side in SIDES:
            np.testing.assert_allclose(page.logps(at, side), exact.row(at)[side]["token_logps"], atol=2e-3)
            np.testing.assert_allclose(
                page.logps(at, side, "teacher_reference"), base.row(at)[side]["token_logps"], atol=2e-3
            )


def test_a_token_that_was_not_kept_has_no_log_prob(stores, make_model, pairs, tokenizer, tmp_path):
    few = extract_signals(make_model(0), pairs, tokenizer, ("topk",), tmp_path / "few", truncation=Truncation(32), k=3)
    write_token_view(pairs, [few], tmp_path / "few.html", tokenizer)
    page, kept = Page(tmp_path / "few.html"), 0
    for at in range(24):
        for side in SIDES:
            ids = page.ids(at, side)
            there = [token in row for token, row in zip(ids, few.row(at)[side]["topk_ids"].reshape(-1, 3), strict=True)]
            assert np.isfinite(page.logps(at, side)).tolist() == there
            kept += sum(there)
    assert 0 < kept < sum(map(sum, page.index["tokens"]))
    row = few.row(0)["chosen"]
    never = 1 + max(int(row["topk_ids"].max()), *page.ids(0, "chosen"))
    only = SignalSet.of([few], pairs).at(np.array([0]))
    missing = token_logps(only, Field("logps", "teacher", "topk"), "chosen", [np.full(row["tokens"], never)])
    assert np.isnan(missing[0]).all()
    assert _scale([part[np.isfinite(part)] for part in missing]) == 1.0  # a page of such tokens can be made
    assert page.page["kept"] == {"teacher": "the 3 most likely"}


def test_truncated_tokens_are_counted(make_model, pairs, tokenizer, tmp_path):
    short = Truncation(12, 6)
    store = extract_signals(make_model(), pairs, tokenizer, out=tmp_path / "short", truncation=short)
    write_token_view(pairs, [store], tmp_path / "short.html", tokenizer)
    page = Page(tmp_path / "short.html")
    whole, _ = encode_pairs(pairs, tokenizer, Truncation(None))
    cut, _ = encode_pairs(pairs, tokenizer, short)
    for at in range(24):
        assert page.index["prompt_cut"][at] == len(whole[at]["prompt_ids"]) - len(cut[at]["prompt_ids"])
        assert page.index["prompt_tokens"][at] == len(cut[at]["prompt_ids"])
        lost = [len(whole[at][f"{side}_ids"]) - len(cut[at][f"{side}_ids"]) for side in SIDES]
        assert page.index["cut"][at] == lost
        assert page.index["ended"][at] == [not n for n in lost]
    assert max(page.index["prompt_cut"]) > 0
    assert "--max-length 12 --max-prompt-length 6" in page.html


def test_rows_without_signals_and_pairs_beyond_the_most(make_model, pairs, tokenizer, tmp_path):
    long = {"prompt": [{"role": "user", "content": "the small teacher " * 40}]}
    rows = [*pairs.select(range(3)), {**pairs[3], **long}, *pairs.select(range(4, 9))]
    data = Dataset.from_list(rows)
    store = extract_signals(make_model(), data, tokenizer, out=tmp_path / "s", truncation=Truncation(32))
    made = write_token_view(data, [store], tmp_path / "p.html", tokenizer, max_pairs=5)
    page = Page(tmp_path / "p.html")
    assert page.index["row"] == [0, 1, 2, 4, 5]
    assert (made["pairs"], made["rows"]) == (5, 9)
    assert "1 of 9 rows have no signals (the prompt leaves no room" in page.html
    assert "The first 5 pairs; 3 more are left out" in page.html
    np.testing.assert_allclose(page.path(3, "chosen"), store.row(4)["chosen"]["values"], atol=0.01)


def test_the_page_offers_what_is_stored_and_names_the_rest(stores, make_model, pairs, tokenizer, tmp_path, full):
    def shows(*given):
        made = write_token_view(pairs, list(given), tmp_path / "p.html", tokenizer)
        return made["shows"], re.findall(r"<dt>([^<]*)</dt><dd><code>([^<]*)</code>", Page(tmp_path / "p.html").html)

    assert full[1]["shows"] == ["values.psi", "values.V", "teacher.logp", "teacher_reference.logp", "teacher.ratio"]
    assert "Not in these signals" not in full[0].read_text()
    keys, missing = shows(stores["reference"])
    assert keys == []
    assert [what for what, _ in missing][:2] == [
        "V and ψ of every token",
        "the teacher&#39;s log-probability of each token",
    ]
    assert "--model TEACHER --data &#39;a data set in memory&#39; --kind values --max-length 32" in missing[0][1]
    ends = {"out": tmp_path / "ends", "truncation": Truncation(32), "positions": "endpoints"}
    ends = extract_signals(make_model(), pairs, tokenizer, ("values",), **ends)
    keys, missing = shows(ends, stores["reference"])
    assert keys == []
    assert missing[0][0] == "V and ψ of every token (these signals hold the endpoints only)"
    assert Page(tmp_path / "p.html").index["psi"]["values"] == Page(full[0]).index["psi"]["values"]  # Psi it has


def test_stores_of_other_data_or_tokens_are_refused(stores, pairs, tokenizer, tmp_path):
    out = tmp_path / "p.html"
    with pytest.raises(UserError, match="made from other data"):
        write_token_view(pairs.select(range(20)), [stores["teacher"]], out, tokenizer)
    other = train_tokenizer(["other words " * 9], vocab_size=300)
    with pytest.raises(UserError, match="the reference signals were made with another tokenizer"):
        write_token_view(pairs, [stores["reference"]], out, other)
    with pytest.raises(UserError, match="no signals: give a store"):
        write_token_view(pairs, [], out, tokenizer)
    with pytest.raises(UserError, match="two signal stores"):
        write_token_view(pairs, [stores["teacher"], stores["teacher"]], out, tokenizer)
    with pytest.raises(UserError, match="is a directory; --out names the file"):
        write_token_view(pairs, [stores["teacher"]], tmp_path, tokenizer)
    assert not out.exists()


def test_the_same_signals_make_the_same_page(full, stores, pairs, tokenizer, tmp_path):
    write_token_view(pairs, list(stores.values()), tmp_path / "again.html", tokenizer)
    assert (tmp_path / "again.html").read_bytes() == full[0].read_bytes()


# -- a teacher with other tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def across(make_model, pairs, tokenizer, tmp_path_factory):
    """The page of a teacher for a student with finer tokens; the store; the student's tokenizer."""
    root = tmp_path_factory.mktemp("across")
    student = train_tokenizer([sentence(20, k)[1::2] for k in range(50)], vocab_size=290)
    student.chat_template = "[student] " + student.chat_template
    options = {"kinds": ("values", "logps"), "out": root / "teacher", "truncation": Truncation(90)}
    store = extract_signals(make_model(0), pairs, tokenizer, **options)
    write_token_view(pairs, [store], root / "across.html", student)
    return root / "across.html", store, student


def test_the_page_of_a_teacher_with_other_tokens_has_both_tokenisations(across, pairs):
    out, store, _ = across
    page = Page(out)
    assert 0 < len(page.index["row"]) < 24  # the two truncate others at different characters
    assert "rows have no signals (the teacher's tokens" in page.html.replace("&#39;", "'")
    scale = next(mode["scale"] for mode in page.page["modes"] if mode["show"] == "V")
    flags = []
    for at, row in enumerate(page.index["row"]):
        for number, side in enumerate(SIDES):
            text, own, teacher = pairs[row][side][0]["content"], page.pairs[at][side]["own"], store.row(row)[side]
            assert len(own["pieces"]) == teacher["tokens"]
            pieces = [page.table["texts"][piece] for piece in own["pieces"]]
            assert "".join(pieces) == text
            start = page.index["values_start"][side][at]
            values = start + np.cumsum([0, *own["steps"]]) * 2.0 ** page.index["own"]["steps"][at]
            np.testing.assert_allclose(values, teacher["values"], atol=scale / 500)
            assert page.index["psi"]["values"][at][number] == pytest.approx(
                token_psi(teacher["values"], teacher["ended"]).sum(), abs=1e-4
            )
            # the same places in the text on both sides, and the same values there
            student_ends = np.cumsum([len(page.table["texts"][piece]) for piece in page.pairs[at][side]["pieces"]])
            shared, own_shared = page.pairs[at][side]["student_shared"].astype(bool), own["shared"].astype(bool)
            ends = np.cumsum([len(piece) for piece in pieces])
            assert np.minimum(student_ends[shared], len(text)).tolist() == ends[own_shared].tolist()
            np.testing.assert_allclose(page.path(at, side)[1:][shared], values[1:][own_shared], atol=scale / 250)
            flags += [*shared]
    assert 0.1 < np.mean(flags) < 0.9
    assert page.page["own"]["shared"] == pytest.approx(np.mean(flags))


def test_a_students_store_names_the_tokenizer(across, pairs, tmp_path):
    out, teacher, student = across
    student.save_pretrained(tmp_path / "student")
    named = load_tokenizer(str(tmp_path / "student"))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"out": tmp_path / "r", "role": "reference", "truncation": Truncation(90)}
    reference = extract_signals(random_model(named, shape, 2), pairs, named, ("logps",), **options)
    write_token_view(pairs, [teacher, reference], tmp_path / "p.html")
    page, alone = Page(tmp_path / "p.html"), Page(out)
    assert page.page["own"] == alone.page["own"]
    assert page.ids(0, "chosen") == alone.ids(0, "chosen")
    assert str(tmp_path / "student") in page.html


def test_what_is_of_the_teachers_tokens_is_named_and_commands_have_its_form(make_model, pairs, tokenizer, tmp_path):
    plain = apply_form(copy.deepcopy(tokenizer), Form(chat_template="plain", system_prompt="Be brief."))
    store = extract_signals(make_model(0), pairs, plain, ("topk", "logps"), tmp_path / "t", k=3)
    write_token_view(pairs, [store], tmp_path / "p.html", tokenizer)
    html = (tmp_path / "p.html").read_text().replace("&#39;", "'")
    assert "Not shown, because it is of other tokens than the student's: topk of the teacher." in html
    form = "--chat-template plain --system-prompt 'Be brief.'"
    commands = [text for text in re.findall(r"<code>(prefdistill signals [^<]*)</code>", html) if "_SFT_" in text]
    assert form in commands[0]  # the teacher's reference reads as the teacher does
    assert f"--kind values {form}" in html
    assert "--role student --kind logps --out" in html


def test_both_tokenisations_in_a_browser(across, open_page):
    page = ready(open_page(across[0]))
    assert "teacher and student have this state" in page.locator("#legend").inner_text()
    own = page.locator("#chosen-own .t")
    n = own.count()
    assert f"{n} tokens" in page.locator("#chosen-own-facts").inner_text()
    page.locator("#chosen .t.apart").first.hover()
    assert "no shared state after it" in readout(page)
    assert page.locator("#chosen-own .t.with").count() == 1
    own.nth(2).hover()
    assert "teacher's own" in readout(page)
    assert page.locator("#chosen .t.with").count() >= 1
    page.locator("#chosen-own").focus()
    page.keyboard.press("End")
    assert f"{n} of {n}" in readout(page)
    assert page.locator("#chosen .t.with").last.get_attribute("data-t") == str(page.locator("#chosen .t").count() - 1)
    page.keyboard.press("2")
    assert re.search(r"V [−\d.]+ → [−\d.]+", readout(page))
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


# -- packing -----------------------------------------------------------------------------------------------------------


def test_rounded_paths_do_not_drift():
    path = np.random.default_rng(0).normal(size=5_000).cumsum()
    (steps,), exponent = quantised_steps([path], finest(2.0))
    assert 2.0**exponent == 2.0 / 2**11
    np.testing.assert_allclose(np.cumsum(steps) * 2.0**exponent, path[1:] - path[0], atol=2.0**exponent / 2 + 1e-9)
    (steps,), exponent = quantised_steps([path * 1e6], finest(2.0))  # a larger step where numbers are large
    np.testing.assert_allclose(np.cumsum(steps) * 2.0**exponent, 1e6 * (path[1:] - path[0]), atol=2.0**exponent)


def test_rounded_numbers_and_those_that_are_missing():
    codes, exponent = quantised(np.array([-0.25, np.nan, -31.0, 0.0]), -9)
    assert exponent == -9
    assert codes.tolist() == [-128, MISSING, -15_872, 0]
    codes, exponent = quantised(np.array([-1e4, np.nan]), -9)
    assert codes[0] * 2.0**exponent == pytest.approx(-1e4, rel=1e-4)
    assert codes[1] == MISSING
    assert quantised(np.array([np.nan]), -9)[1] == -9


def test_tokens_that_share_a_character_stand_on_the_first():
    pieces = Pieces()
    assert pieces.number([7, 8, 9, 7], "é!x", [1, 1, 2, 3]).tolist() == [0, 1, 2, 3]
    table, places = pieces.ranked(np.array([1, 5, 2, 5]))
    assert table == [(8, ""), (7, "x"), (9, "!"), (7, "é")]
    assert places.tolist() == [3, 0, 2, 1]
    assert [width_of(n) for n in (1, 256, 257, 65_536, 65_537)] == [1, 1, 2, 2, 3]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(stores, pairs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def test_the_command(place, stores, capsys):
    store = str(stores["teacher"].shards[0].source.parents[1])
    given = ["inspect", "--data", "pairs.jsonl", "--signals", store]
    assert main([*given, "--out", "a.html", "--tokenizer", "tokenizer", "--max-pairs", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "out": "a.html",
        "pairs": 7,
        "rows": 24,
        "bytes": (place / "a.html").stat().st_size,
        "shows": ["values.psi", "values.V"],
    }
    assert main([*given, "--out", "b.html", "--tokenizer", "tokenizer", "--terminal", "zero", "--alpha", "-1"]) == 0
    assert "24 of 24 pairs" in capsys.readouterr().out
    page = Page(place / "b.html")
    assert page.page["weights"] == {"alpha": -1.0, "beta": 0.1, "discount": 1.0, "terminal": "zero"}
    ended = stores["teacher"].row(0)["chosen"]
    assert page.index["psi"]["values"][0][0] == pytest.approx(-float(ended["values"][0]), rel=1e-5)
    assert main([*given, "--out", "c.html"]) == 2  # a tokenizer that was only in memory has no name
    assert "--tokenizer" in capsys.readouterr().err
    assert not (place / "c.html").exists()


# -- in a browser ------------------------------------------------------------------------------------------------------


def ready(page):
    page.wait_for_selector("html[data-ready]", state="attached")
    return page


def rows_in_list(page):
    return [text[1:] for text in page.locator(".option .row").all_inner_texts()]


def readout(page):
    return page.locator("#readout").inner_text()


def test_a_pair_is_chosen_by_click_and_by_key(full, open_page):
    page = ready(open_page(full[0], "#5"))
    assert page.locator("#name").inner_text() == "Pair #5"
    page.select_option("#sort", "data")
    page.locator("#name", has_text="Pair #0").wait_for()
    assert rows_in_list(page)[:3] == ["0", "1", "2"]
    page.locator(".option", has_text="#3").first.click()
    page.locator("#name", has_text="Pair #3").wait_for()
    assert page.url.endswith("#3")
    page.keyboard.press("j")
    page.locator("#name", has_text="Pair #4").wait_for()
    page.keyboard.press("k")
    page.locator("#name", has_text="Pair #3").wait_for()
    page.locator("#list").focus()
    page.keyboard.press("End")
    page.locator("#name", has_text="Pair #23").wait_for()
    assert page.locator('[aria-selected="true"] .row').inner_text() == "#23"
    assert page.locator("#next").is_disabled()
    page.locator("#previous").click()
    page.locator("#name", has_text="Pair #22").wait_for()
    page.evaluate("location.hash = '#7'")
    page.locator("#name", has_text="Pair #7").wait_for()


def test_sorting_and_searching(full, open_page, pairs):
    data, page = Page(full[0]).index, ready(open_page(full[0]))
    margins = [a - b for a, b in data["psi"]["values"]]
    order = sorted(range(24), key=lambda at: (margins[at], at))
    assert rows_in_list(page)[:5] == [str(at) for at in order[:5]]  # those that Psi orders against the label first
    assert page.locator("#name").inner_text() == f"Pair #{order[0]}"
    page.select_option("#sort", "long")
    longest = sorted(range(24), key=lambda at: (-sum(data["tokens"][at]), at))
    page.locator("#name", has_text=f"Pair #{longest[0]}").wait_for()
    assert rows_in_list(page)[:5] == [str(at) for at in longest[:5]]
    text = pairs[11]["chosen"][0]["content"]
    page.keyboard.press("/")
    page.keyboard.type(text.upper())
    page.locator("#found", has_text=" of 24 pairs").wait_for()
    assert "11" in rows_in_list(page)
    assert all(text in str(pairs[int(row)]) for row in rows_in_list(page))
    page.keyboard.press("Escape")
    page.locator("#found", has_text="24 pairs").wait_for()
    page.fill("#search", "#2")
    page.locator("#found", has_text="5 of 24").wait_for()
    assert sorted(rows_in_list(page)) == ["2", "20", "21", "22", "23"]


def test_colours_numbers_and_ranks(full, open_page, stores):
    page = ready(open_page(full[0], "#4"))
    for number, side in enumerate(SIDES):
        row = stores["teacher"].row(4)[side]
        psi = token_psi(row["values"], row["ended"])
        largest = np.argsort(-np.abs(psi), kind="stable")[:3]
        tokens = page.locator(f"#{side} .t")
        assert tokens.count() == row["tokens"]
        for rank, t in enumerate(largest):
            assert tokens.nth(int(t)).get_attribute("data-rank") == "①②③"[rank]
            tint = re.search(r" ([pn])\d", tokens.nth(int(t)).get_attribute("class"))
            assert tint
            assert tint[1] == ("p" if psi[t] > 0 else "n")
        assert page.locator(f"#{side} .top").count() == min(3, np.count_nonzero(psi))
        t = int(largest[0])
        tokens.nth(t).hover()
        shown = re.search(r"ψ ([+−][\d.]+)", readout(page))
        assert float(shown[1].replace("−", "-")) == pytest.approx(psi[t], abs=0.02)
        before, after = re.search(r"V ([−\d.]+) → ([−\d.]+)", readout(page)).groups()
        assert [float(x.replace("−", "-")) for x in (before, after)] == pytest.approx(
            row["values"][t : t + 2], abs=0.02
        )
        cells = page.locator("#numbers tbody tr").first.locator("td").all_inner_texts()
        assert float(cells[number].replace("−", "-")) == pytest.approx(psi.sum(), abs=0.006)


def test_the_mode_is_switched_by_key_and_by_click(full, open_page):
    page = ready(open_page(full[0], "#4"))
    assert page.locator("#modes input:checked").get_attribute("value") == "values.psi"
    classes = page.locator("#chosen .t").evaluate_all("nodes => nodes.map(node => node.className)")
    page.keyboard.press("3")
    assert page.locator("#modes input:checked").get_attribute("value") == "teacher.logp"
    assert "log-probability of this token" in page.locator("#legend").inner_text()
    other = page.locator("#chosen .t").evaluate_all("nodes => nodes.map(node => node.className)")
    assert other != classes
    assert not any(re.search(r" p\d", name) for name in other)  # no log-probability is above zero
    page.locator("#modes label", has_text="log-ratio").click()
    assert page.locator("#modes input:checked").get_attribute("value") == "teacher.ratio"
    page.keyboard.press("1")
    assert page.locator("#chosen .t").evaluate_all("nodes => nodes.map(node => node.className)") == classes


def test_tokens_by_keyboard_and_marks(full, open_page):
    page = ready(open_page(full[0], "#8"))
    n = page.locator("#chosen .t").count()
    page.keyboard.press("c")
    assert readout(page).lower().startswith(f"chosen 1 of {n}")
    page.keyboard.press("ArrowRight")
    assert f"2 of {n}" in readout(page)
    page.keyboard.press("End")
    assert f"{n} of {n}" in readout(page)
    assert "after the end token" in readout(page)
    page.keyboard.press("Shift+ArrowLeft")
    assert page.locator(".t.at.top").count() == 1
    page.keyboard.press("r")
    assert readout(page).lower().startswith("rejected 1 of")
    assert page.locator("#plot .cursor").get_attribute("visibility") == "visible"
    page.keyboard.press("w")
    assert page.locator("#marks").is_checked()
    assert page.locator("#chosen .dot").count() > 0
    assert page.locator("#prompt .special").first.is_visible()
    page.keyboard.press("t")
    assert not page.locator("#prompt .special").first.is_visible()
    page.keyboard.press("?")
    page.locator("#shortcuts").uncheck()
    page.keyboard.press("t")
    assert not page.locator("#template").is_checked()  # single letters are off now


def test_margins_and_the_plot_have_words(full, open_page, stores):
    page = ready(open_page(full[0], "#6"))
    table = page.locator("#numbers").inner_text()
    rows = {role: stores[name].row(6) for name, role in (("student", "student"), ("reference", "reference"))}
    ratio = [float(rows["student"][side]["logps"]) - float(rows["reference"][side]["logps"]) for side in SIDES]
    line = next(line for line in table.splitlines() if line.startswith("student's log-ratio")).replace("−", "-")
    numbers = [float(x) for x in re.findall(r"[+-]?\d+\.\d+", line)]
    assert numbers == pytest.approx([*ratio, ratio[0] - ratio[1], 0.1, 0.1 * (ratio[0] - ratio[1])], abs=0.011)
    label = page.locator("#plot svg").get_attribute("aria-label")
    assert label.startswith("V over tokens: chosen goes from ")
    assert page.locator("#plot path.line").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(full, open_page, scheme):
    """Contrast of the text against every tint of the scale, at least 4.5 (WCAG AA)."""
    page = ready(open_page(full[0], color_scheme=scheme))
    found = page.evaluate(
        """() => {
          const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
          const over = (...colours) => {
            for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          const style = getComputedStyle(document.body);
          const tints = [...document.querySelectorAll("#legend .t")].map(n => getComputedStyle(n).backgroundColor);
          return {page: over(style.backgroundColor), text: over(style.color),
                  tints: tints.map(tint => over(style.backgroundColor, tint))};
        }"""
    )

    def luminance(colour):
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    assert (luminance(found["page"]) < 0.2) == (scheme == "dark")
    for tint in [found["page"], *found["tints"]]:
        dark, light = sorted([luminance(tint), luminance(found["text"])])
        assert (light + 0.05) / (dark + 0.05) > 4.5
    assert len({tuple(tint) for tint in found["tints"]}) == 17  # every step of the scale can be told apart


def test_a_narrow_window_does_not_scroll_sideways(full, open_page):
    page = ready(open_page(full[0], viewport={"width": 360, "height": 800}))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


HOSTILE = [
    (ALERT, ALERT + "<!--", "]]>" + ALERT),
    ("שלום, מה שלומך?", "مرحبا بالعالم", "\u202eabc\u202c \u2066x\u2069"),
    ("control", "a\x00b\x07\x1b[31mred\x7f\u009b", "tab\there\r\nnew\n\n\nlines\u2028end"),
    ("long", "x" * 5_000, "W" + "o" * 300 + "w 🙂👩‍👩‍👧 e\u0301"),
    ("empty", "", "   "),
    ("{{ 7*7 }} ${7*7} &amp; &lt;b&gt;", "&#x3C;script&#x3E;", "__proto__ constructor"),
]


@pytest.fixture
def hostile(make_model, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in HOSTILE
    ]
    tokenizer = train_tokenizer(["plain words"], vocab_size=270)
    data = Dataset.from_list(rows)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = random_model(tokenizer, shape, 0)
    store = extract_signals(model, data, tokenizer, out=tmp_path / "s", truncation=Truncation(6_000))
    store.manifest["model"]["name"] = ALERT
    store.manifest["data"]["name"] = f"{ALERT}\udcff"  # a file name that is not UTF-8
    write_token_view(data, [store], tmp_path / "hostile.html", tokenizer)
    return tmp_path / "hostile.html"


def test_text_stays_text(hostile, open_page):
    html = hostile.read_bytes().decode()  # is UTF-8
    assert "alert" not in html.replace("&gt;alert(1)&lt;", "").replace("onerror=alert(2)&gt;", "").replace(
        'role="alert"', ""
    )
    page = ready(open_page(hostile, "#0"))
    for at, texts in enumerate(HOSTILE):
        page.evaluate(f"location.hash = '#{at}'")
        page.locator("#name", has_text=f"Pair #{at}").wait_for()
        for side, text in zip(SIDES, texts[1:], strict=True):
            shown = page.locator(f"#{side}").evaluate(
                "box => [...box.querySelectorAll('.t:not(.special)')].map(n => { const copy = n.cloneNode(true);"
                "copy.querySelectorAll('.mark').forEach(m => m.remove()); return copy.textContent; }).join('')"
            )
            plain = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "", text)
            kept = re.sub(r"◦|U\+[0-9A-F]{4}", "", shown)
            assert kept == plain, (at, side)
        assert page.locator("script").count() == 5
        assert page.locator("img").count() == 0
    assert page.locator("#name").inner_text() == "Pair #5"
    page.evaluate("location.hash = '#4'")
    page.locator("#chosen", has_text="[empty]").wait_for()
    assert "[whitespace only]" in page.locator("#rejected").inner_text()
    page.evaluate("location.hash = '#1'")
    page.locator("#rejected", has_text="U+202E").wait_for()  # what turns text around is shown, not obeyed
    page.evaluate("location.hash = '#2'")
    page.locator("#chosen", has_text="U+0000").wait_for()


def test_a_script_that_is_not_ours_does_not_run(full, browser, tmp_path):
    """The content security policy, should all else fail."""
    html, refused = full[0].read_text(encoding="utf-8"), []
    (tmp_path / "evil.html").write_text(html.replace("<main", "<script>document.title = 'ran'</script><main"))
    page = browser.new_page()
    page.on("console", lambda message: refused.append(message.text))
    page.goto((tmp_path / "evil.html").as_uri())
    assert ready(page).title() != "ran"
    assert ["Content Security Policy" in text for text in refused] == [True]
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.querySelector('main').innerHTML = '<b>x</b>'")
    page.context.close()


def test_a_pair_that_is_not_there(full, open_page):
    page = ready(open_page(full[0], "#400"))
    assert "no pair #400" in page.locator("#state").inner_text()


# -- 5,000 pairs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1_000, pytest.param(5_000, marks=pytest.mark.slow)])
def large(request, tmp_path_factory):
    """Many pairs of lengths and word frequencies like those of real ones, values as a random walk."""
    rng, n = np.random.default_rng(0), request.param
    letters = np.array(list("etaoinshrdlucmfw"))
    words = np.array(sorted({"".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(6_000)}))
    tokenizer = train_tokenizer([" ".join(words[i : i + 50]) for i in range(0, len(words), 50)], vocab_size=6_000)
    often = 1 / np.arange(2, len(words) + 2)
    often /= often.sum()

    def texts(mean):
        lengths = np.clip(rng.lognormal(np.log(mean), 0.6, n).astype(int), 1, 420)
        return [
            " " + " ".join(part)
            for part in np.split(rng.choice(words, lengths.sum(), p=often), np.cumsum(lengths)[:-1])
        ]

    columns = {"prompt": texts(30), "chosen": texts(120), "rejected": texts(70)}
    data = Dataset.from_dict(columns)
    encoded, _ = encode_pairs(data, tokenizer, Truncation(1024))
    table = {"row": pa.array(range(n))}
    for side in SIDES:
        lengths = np.array([len(ids) for ids in encoded[f"{side}_ids"]])
        flat = rng.normal(0, 2, (lengths + 1).sum()).astype(np.float32)
        offsets = pa.array(np.cumsum([0, *(lengths + 1)]).astype(np.int32))
        table[f"{side}_tokens"] = pa.array(lengths)
        table[f"{side}_ended"] = pa.array(encoded[f"{side}_ended"][:])
        table[f"{side}_values"] = pa.ListArray.from_arrays(offsets, pa.array(flat + 30))
        table[f"{side}_logps"] = pa.array(-3.0 * lengths)
    file = pa.BufferOutputStream()
    pq.write_table(pa.table(table), file)
    manifest = {
        "role": "teacher",
        "kinds": ["logps", "values"],
        "responses": list(SIDES),
        "positions": "all",
        "topk": {},
        "model": {"name": "made/up"},
        "tokenizer": tokenizer_identity(tokenizer),
        "data": {"name": "made up", "rows": n, "fingerprint": data_fingerprint(data)},
        "truncation": {"max_length": 1024, "max_prompt_length": None},
        "dropped": {"reasons": {}, "rows": []},
    }
    out = tmp_path_factory.mktemp("large") / "large.html"
    write_token_view(data, [Signals(manifest, [Shard(file.getvalue())])], out, tokenizer)
    return out, n, int(sum(len(i) for side in SIDES for i in encoded[f"{side}_ids"]))


def test_many_pairs_are_a_small_file(large):
    """25 MB for 5,000."""
    out, n, tokens = large
    assert tokens > 300 * n
    assert out.stat().st_size < 5e3 * n


def test_many_pairs_open_at_once(large, browser):
    """In two seconds of the page's own time; on a machine that has time for it, by the clock as well."""
    seconds, work = [], []
    for _ in range(3):
        busy = os.getloadavg()[0] > len(os.sched_getaffinity(0)) - 0.5 if hasattr(os, "sched_getaffinity") else True
        context = browser.new_context()
        page = context.new_page()
        metrics = context.new_cdp_session(page)
        metrics.send("Performance.enable", {"timeDomain": "threadTicks"})
        start = time.perf_counter()
        page.goto(large[0].as_uri())
        ready(page)
        seconds.append(time.perf_counter() - start)
        found = {metric["name"]: metric["value"] for metric in metrics.send("Performance.getMetrics")["metrics"]}
        work.append(found["TaskDuration"])
        context.close()
    assert 0.01 < min(work) < 2, work
    assert busy or min(seconds) < 2, seconds


def test_a_long_list_is_drawn_where_it_is_looked_at(large, open_page):
    page = ready(open_page(large[0]))
    assert page.locator(".option").count() < 50
    page.locator("#list").focus()
    page.keyboard.press("End")
    page.locator("#where", has_text=f"{large[1]:,} of {large[1]:,}").wait_for()
    assert page.locator('[aria-selected="true"]').count() == 1


def test_real_pairs(data_dir, make_model, tmp_path):
    """Chat text with code, tables and other scripts: what the page says is the text of the data."""
    data = load_pairs(str(data_dir / "alpacaeval_pairs" / "test.jsonl.gz")).select(range(60))
    tokenizer = train_tokenizer(pair_texts(data), vocab_size=2_000)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    store = extract_signals(random_model(tokenizer, shape, 0), data, tokenizer, out=tmp_path / "s")
    write_token_view(data, [store], tmp_path / "p.html", tokenizer)
    page = Page(tmp_path / "p.html")
    for at, row in enumerate(page.index["row"]):
        for number, side in enumerate(SIDES):
            text = page.text(at, side)
            whole = data[row][side][0]["content"]
            assert text.removesuffix(tokenizer.eos_token) == whole[: len(text)] or page.index["cut"][at][number]
            assert whole.startswith(text.removesuffix(tokenizer.eos_token))


def test_weights_are_those_of_the_method():
    assert vars(Weights()) == {name: getattr(METHODS["tvkd"](), name) for name in vars(Weights())}
