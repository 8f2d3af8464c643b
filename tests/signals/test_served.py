"""A served teacher: its signals are those of the same model here, and what a server cannot give is refused."""

import json

import numpy as np
import pytest

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.signals import Signals, extract_signals, repair_signals
from support.served import ServedModel

pytest.importorskip("openai", reason="a served teacher is asked through the openai package (extra judges)")

KINDS = ("logps", "token_logps", "topk")
EXACT = {"k": 5, "topk_coding": "float32", "shard_rows": 4}


@pytest.fixture(scope="module")
def teacher(make_model):
    return make_model(3, scale=2.0)


@pytest.fixture
def rows(pairs):
    return pairs.select(range(8))


@pytest.fixture
def serve(teacher, tokenizer, monkeypatch):
    """Start servers of the teacher; no proxy and no key of the machine's comes between."""
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    for name in (*proxies, *map(str.upper, proxies), "PREFDISTILL_TEACHER_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(form="vllm", **options):
        started.append(ServedModel(teacher, tokenizer, form, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def extract(rows, tokenizer, tmp_path):
    """Extract the signals of the served teacher into `served`."""

    def run(server, kinds=KINDS, **options):
        request = {"engine": "openai", "base_url": server.url, "retries": 0, **options}
        return extract_signals("served", rows, tokenizer, kinds, tmp_path / "served", **request)

    return run


@pytest.mark.parametrize("p", [None, 0.01])
def test_signals_of_a_served_teacher_are_those_of_the_model(serve, extract, teacher, rows, tokenizer, tmp_path, p):
    local = extract_signals(teacher, rows, tokenizer, KINDS, tmp_path / "local", p=p, **EXACT)
    served = extract(serve(), p=p, **EXACT)
    assert served.manifest["model"] == {"name": "served", "served": {"model": "served", "form": "prompt_logprobs"}}
    assert {key: served.manifest[key] for key in ("topk", "tokenizer", "truncated")} == {
        key: local.manifest[key] for key in ("topk", "tokenizer", "truncated")
    }
    for row in range(8):
        for side in ("chosen", "rejected"):
            ours, theirs = local.row(row)[side], served.row(row)[side]
            assert ours.keys() == theirs.keys()
            for name in ("logps", "token_logps", "topk_logps", "topk_rest"):
                np.testing.assert_allclose(theirs[name], ours[name], atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(theirs["topk_ids"], ours["topk_ids"])
            np.testing.assert_array_equal(theirs["topk_counts"], ours["topk_counts"])
    if p is not None:
        assert min(served.row(0)["chosen"]["topk_counts"]) < 5


def test_a_server_that_echoes_gives_log_probabilities_of_tokens(serve, extract, teacher, rows, tokenizer, tmp_path):
    server = serve("echo")
    with pytest.raises(UserError, match="no log-probabilities of the 5 most likely tokens of a prompt"):
        extract(server, **EXACT)
    local = extract_signals(teacher, rows, tokenizer, ("logps",), tmp_path / "local")
    served = extract(server, ("logps",))
    assert served.manifest["model"]["served"]["form"] == "echo"
    for row in range(8):
        assert served.row(row)["chosen"]["logps"] == pytest.approx(local.row(row)["chosen"]["logps"], abs=1e-5)


def test_servers_that_cannot_serve_are_refused(serve, extract, tmp_path):
    with pytest.raises(UserError, match=r"gives no log-probabilities of a prompt .*prompt_logprobs.*echo.*vLLM"):
        extract(serve("generated"), ("logps",))
    with pytest.raises(UserError, match=r"greater than max allowed: 4.*--max-logprobs.*give --k"):
        extract(serve(most=4), **EXACT)
    with pytest.raises(UserError, match=r"reads other tokens than it is sent \(\d+ tokens for \d+\).*--tokenizer"):
        extract(serve("bos"), **EXACT)
    assert not (tmp_path / "served").exists()


def test_an_extraction_resumes_after_a_failure_of_the_server(serve, extract, rows, tokenizer, tmp_path):
    """Two shards of 8 responses, and a request that finds out how the server answers."""
    server = serve()
    server.answers = 1 + 8 + 3
    with pytest.raises(RuntimeError, match=r"does not answer \(status 503: .*the same command resumes"):
        extract(server, **EXACT)
    assert [path.name for path in (tmp_path / "served" / "shards").iterdir()] == ["00000.parquet"]
    server.answers, answered_before = 10**9, len(server.seen)
    served = extract(server, **EXACT)
    assert len(server.seen) - answered_before == 1 + 8
    assert len(served.rows) == 8

    other = serve()
    (tmp_path / "served" / "shards" / "00001.parquet").write_bytes(b"damaged")
    ask = {"dataset": rows, "tokenizer": tokenizer}
    with pytest.raises(UserError, match="served model: give --base-url"):
        repair_signals(tmp_path / "served", **ask)
    _, damaged = repair_signals(tmp_path / "served", base_url=other.url, **ask)
    assert damaged == ["shards/00001.parquet"]
    assert len(other.seen) == 1 + 8
    assert Signals.open(tmp_path / "served").digest == served.digest


def test_the_command_asks_with_the_key_of_the_environment(serve, workdir, monkeypatch, capsys):
    monkeypatch.setenv("PREFDISTILL_TEACHER_KEY", "sk-of-the-teacher")
    server = serve()
    ask = ["signals", "--engine", "openai", "--base-url", server.url, "--model", "big", "--data", "pairs.jsonl"]
    assert main([*ask, "--tokenizer", "model", "--out", "out", "--kind", "topk", "--k", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == ["topk"]
    assert server.keys == {"Bearer sk-of-the-teacher"}
    assert {body["model"] for body in server.seen} == {"big"}
    assert not any(b"sk-of" in path.read_bytes() for path in (workdir / "out").rglob("*") if path.is_file())
    assert main([*ask, "--out", "other", "--kind", "logps"]) == 2
    assert "name the tokenizer of the served model with --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ("values", "logps", "q")}, "no logits, which values, q need; it can give logps, token_logps, topk"),
        ({"kinds": ("logprob_values",), "value_temperature": 2.0}, "no logits, which logprob_values need"),
        ({"kinds": ("topk",), "k": "vocab"}, "k=vocab is more than a server returns"),
        ({"role": "reference"}, "a reference is compared by its weights"),
        ({"bf16": True}, "bf16 is for the server to decide"),
        ({"workers": 2}, "workers applies to the engine ray"),
        ({"base_url": None}, "base_url is required by the engine openai"),
        ({"base_url": "http://x", "engine": "transformers"}, "base_url applies to the engine openai"),
        ({"base_url": "localhost:8000"}, "--base-url is not an http:// or https:// URL"),
    ],
)
def test_options_that_a_server_cannot_follow_are_refused(rows, tokenizer, tmp_path, options, words):
    request = {"kinds": ("logps",), "engine": "openai", "base_url": "http://127.0.0.1:9/v1"} | options
    with pytest.raises(UserError, match=words):
        extract_signals("served", rows, tokenizer, out=tmp_path / "out", **request)
    assert not (tmp_path / "out").exists()
