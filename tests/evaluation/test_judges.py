"""Judges: grades and comparisons, failing endpoints, resuming, counts."""

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.evaluation.judges.client import Endpoint
from prefdistill.evaluation.judges.mt_bench import PROMPTS, comparisons, judge_mt_bench
from support.judges import Handler, answers, completion, jsonl

pytest.importorskip("openai", reason="judges are asked through the openai package (extra judges)")

SOON = {"retry-after-ms": "10"}
KEY = "sk-very-secret-0123456789"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a verse.", "Now in prose."]},
    {"question_id": 101, "category": "math", "turns": ["2 + 3?", "Times {answer}?"]},
    {"question_id": 141, "category": "stem", "turns": ["Why is the sky blue?", "And at dusk?"]},
]


@pytest.fixture
def bench(tmp_path):
    """Questions, prompts with FastChat's fields, a reference, and answers of two systems."""
    prompts = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": " ".join(f"<{p}>{{{p}}}</{p}>" for p in places)}
        for name, places in PROMPTS.values()
    ]
    ids = [q["question_id"] for q in QUESTIONS]
    return {
        "questions": jsonl(tmp_path / "question.jsonl", QUESTIONS),
        "prompts": jsonl(tmp_path / "prompts.jsonl", prompts),
        "references": answers(tmp_path / "reference.jsonl", {101: ["5", "50 is right"]}),
        "answers": answers(tmp_path / "ours.jsonl", {i: [f"long answer to {i}", f"longer answer {i}"] for i in ids}),
        "against": answers(tmp_path / "theirs.jsonl", {i: [f"short {i}", f"brief {i}"] for i in ids}),
    }


def single(bench):
    return {name: path for name, path in bench.items() if name != "against"}


def rows_of(out):
    return [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]


def test_grades_use_the_prompts_of_the_category_and_average_over_questions(judge, bench, tmp_path):
    server = judge(lambda text, _: "Fine. [[9]]" if "ref_answer_1" in text else "So so. [[4]]")
    found = judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "out", **single(bench), price_in=10, price_out=100)
    assert found["single"]["answers"]["score"] == found["single"]["answers"]["score"] | {
        "mean": pytest.approx((9 * 2 + 4 * 4) / 6),
        "n": 3,
    }
    assert found["single"]["answers"]["categories"]["math"]["mean"] == 9
    assert found["single"]["answers"]["turns"]["2"]["mean"] == pytest.approx(17 / 3)
    assert found["tokens"] == {"in": 600, "out": 60}
    assert found["cost"] == pytest.approx((600 * 10 + 60 * 100) / 1e6)
    assert found["judge"]["served_as"] == ["judge-2026-01"]
    assert found["judge"]["fingerprints"] == ["fp_1"]
    assert found["requests"]["errors"] == found["requests"]["unparsable"] == 0
    assert found["answers"]["answers"]["models"] == ["ours"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found))
    texts = sorted(body["messages"][1]["content"] for body in server.seen)
    assert texts == sorted(
        [
            "<question>Write a verse.</question> <answer>long answer to 81</answer>",
            "<question>Why is the sky blue?</question> <answer>long answer to 141</answer>",
            "<question>2 + 3?</question> <answer>long answer to 101</answer> <ref_answer_1>5</ref_answer_1>",
            "<question_1>Write a verse.</question_1> <answer_1>long answer to 81</answer_1> "
            "<question_2>Now in prose.</question_2> <answer_2>longer answer 81</answer_2>",
            "<question_1>Why is the sky blue?</question_1> <answer_1>long answer to 141</answer_1> "
            "<question_2>And at dusk?</question_2> <answer_2>longer answer 141</answer_2>",
            "<question_1>2 + 3?</question_1> <answer_1>long answer to 101</answer_1> "
            "<question_2>Times {answer}?</question_2> <answer_2>longer answer 101</answer_2> "
            "<ref_answer_1>5</ref_answer_1> <ref_answer_2>50 is right</ref_answer_2>",
        ]
    )
    assert all(body["temperature"] == 0 and body["max_tokens"] == 2048 for body in server.seen)
    assert all(body["messages"][0] == {"role": "system", "content": "Judge."} for body in server.seen)


def test_fields_of_the_endpoint_override_the_defaults(judge, bench, tmp_path):
    server = judge(lambda *_: "[[5]]")
    for name, fields in (("more", {"temperature": 1, "seed": 3}), ("none", {"temperature": None, "max_tokens": None})):
        judge_mt_bench(Endpoint(server.url, "j", fields), tmp_path / name, **single(bench))
    asked = [{key: value for key, value in body.items() if key not in ("model", "messages")} for body in server.seen]
    assert asked == [{"temperature": 1, "max_tokens": 2048, "seed": 3}] * 6 + [{}] * 6


def prefers_longer(text, _):
    told = {letter: "".join(re.findall(rf"<answer_{letter}\w*>(.*?)</", text)) for letter in "ab"}
    return f"[[{'A' if len(told['a']) > len(told['b']) else 'B'}]]"


def test_a_judge_that_always_says_A_gives_only_ties(judge, bench, tmp_path):
    server = judge(lambda *_: "[[A]]")
    found = judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "out", **bench, kinds=["pair"])["pair"]
    assert found["win_rate"]["mean"] == 0.5
    assert (found["wins"], found["ties"], found["losses"]) == (0, 6, 0)
    assert found["consistency"]["mean"] == 0
    assert found["first_preferred"]["mean"] == 1
    assert len(server.seen) == 12


def test_comparisons_are_symmetric_under_exchange(judge, bench, tmp_path):
    server = judge(prefers_longer)
    endpoint = Endpoint(server.url, "j")
    there = judge_mt_bench(endpoint, tmp_path / "there", **bench, kinds=["pair"])["pair"]
    swapped = bench | {"answers": bench["against"], "against": bench["answers"]}
    back = judge_mt_bench(endpoint, tmp_path / "back", **swapped, kinds=["pair"])["pair"]
    assert (there["wins"], there["ties"], there["losses"]) == (6, 0, 0)
    assert (back["wins"], back["ties"], back["losses"]) == (0, 0, 6)
    assert there["consistency"]["mean"] == back["consistency"]["mean"] == 1
    assert there["first_preferred"]["mean"] == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_exchanging_the_answers_reverses_any_verdicts(seed):
    """With the systems exchanged, the same replies give one minus the win rate."""
    rng = np.random.default_rng(seed)

    def rows(letters):
        return [
            {
                "question_id": i // 2,
                "turn": 1 + i % 2,
                "category": "c",
                "verdict": v,
                "outcome": "parsed" if v else "no_verdict",
                "reasoning_cut": False,
            }
            for i, v in enumerate(letters)
        ]

    a, b = (list(rng.choice(["A", "B", "C", None], size=40)) for _ in range(2))
    there, back = comparisons(rows(a), rows(b)), comparisons(rows(b), rows(a))
    assert there["win_rate"]["mean"] == pytest.approx(1 - back["win_rate"]["mean"])
    assert (there["wins"], there["ties"]) == (back["losses"], back["ties"])
    assert there["consistency"]["mean"] == back["consistency"]["mean"]
    naive = []
    for x, y in zip(a, b, strict=True):
        if x and y:
            naive.append({("A", "B"): 1.0, ("B", "A"): 0.0}.get((x, y), 0.5))
    assert there["win_rate"]["mean"] == pytest.approx(np.mean(naive))
    assert there["left_out"] == 40 - len(naive)


def test_replies_without_a_verdict_are_counted_and_left_out(judge, bench, tmp_path):
    replies = {"Write a verse.": "[[8]]", "2 + 3?": "Rating: 8/10", "Why is": "[[11]]"}
    server = judge(lambda text, _: next(reply for start, reply in replies.items() if start in text))
    found = judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "out", **single(bench))
    own = found["single"]["answers"]
    assert (own["score"]["mean"], own["score"]["n"], own["unparsable"], own["errors"]) == (8, 1, 4, 0)
    assert "math" not in own["categories"]
    assert found["warnings"] == ["4 of 6 replies hold no verdict; they are left out"]
    assert {row["reply"] for row in rows_of(tmp_path / "out")} == set(replies.values())


def test_results_count_the_outcomes_of_replies(judge, bench, tmp_path):
    """Two questions state one rating, once beside reasoning; one states two; reasoning without an end has none."""
    replies = {
        "Write a verse.": "<think>a draft: [[2]]</think>Rating: [[8]]",
        "2 + 3?": "Rating: [[3]]\nRating: [[4]]",
        "Why is": "<think>it may be a [[5]]",
    }
    server = judge(lambda text, _: next(reply for start, reply in replies.items() if start in text))
    found = judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "out", **single(bench))
    outcomes = {"parsed": 2, "no_verdict": 2, "contradictory": 2, "reasoning_cut": 4}
    own = found["single"]["answers"]
    assert own["score"]["mean"] == 8
    assert own["outcomes"] == found["requests"]["outcomes"] == outcomes
    assert own["unparsable"] == found["requests"]["unparsable"] == 4
    assert found["warnings"] == [
        "4 of 6 replies hold no single verdict, 2 of them state two that differ; they are left out"
    ]
    compared = judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "pairs", **bench, kinds=["pair"])
    assert compared["pair"]["outcomes"] == outcomes | {
        "parsed": 0,
        "no_verdict": 12,
        "contradictory": 0,
        "reasoning_cut": 8,
    }


def test_a_judge_that_never_rates_gives_no_score(judge, bench, tmp_path):
    server = judge(lambda *_: completion("I think", finish_reason="length"))
    found = judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "out", **bench)
    assert found["single"]["answers"]["score"] is found["single"]["difference"] is found["pair"]["win_rate"] is None
    assert found["requests"]["unparsable"] == found["requests"]["unparsable_at_token_limit"] == 24
    assert "24 of them truncated at the token limit" in found["warnings"][0]


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        ((429, {"retry-after": "0.1"}, b'{"error": {"message": "slow down"}}'), "slow down"),
        ((429, SOON, b""), "status 429"),
        ((500, SOON, b"<html>oops</html>"), "status 500"),
        ((503, SOON | {"content-type": "application/json"}, b"{}"), "status 503"),
        ("hang", "no reply within 0.3 s"),
    ],
    ids=["429-retry-after", "429", "500", "503", "never"],
)
def test_transient_failures_are_retried_and_others_recorded_as_errors(trouble, error, judge, bench, tmp_path):
    asked, retries = Counter(), 1 if trouble == "hang" else 4

    def passing(text, _):
        asked[text] += 1
        return trouble if "Write a verse." in text or asked[text] == 1 else "[[5]]"

    server = judge(passing)
    endpoint = Endpoint(server.url, "j", timeout=0.3, retries=retries, concurrency=6)
    found = judge_mt_bench(endpoint, tmp_path / "out", **single(bench))
    own = found["single"]["answers"]
    assert (own["errors"], own["score"]["mean"], own["score"]["n"]) == (2, 5, 2)
    assert found["requests"]["retries"] == 4 + 2 * retries
    assert "2 of 6 requests failed" in found["warnings"][0]
    kept = [row["error"] for row in rows_of(tmp_path / "out") if row["error"]]
    assert len(kept) == 2
    assert all(error in text for text in kept)
    assert sorted(asked.values()) == [2, 2, 2, 2, retries + 1, retries + 1]


def test_retry_after_is_respected(judge, bench, tmp_path):
    times = []

    def busy_once(_, number):
        times.append(time.monotonic())
        return (429, {"retry-after": "1"}, b"") if number == 1 else "[[5]]"

    judge_mt_bench(
        Endpoint(judge(busy_once).url, "j", concurrency=1), tmp_path / "out", **single(bench), max_questions=1
    )
    assert times[1] - times[0] >= 1


@pytest.mark.parametrize(
    ("garbage", "error"),
    [
        ((200, {"content-type": "text/html"}, b"<html>Sign in</html>"), "holds no choices"),
        ((200, {"content-type": "application/json"}, b"{not json"), "no chat completion"),
        ((200, {"content-type": "application/json"}, b"[]"), "holds no choices"),
        ((200, {"content-type": "application/json"}, b"[" * 9_000), "no chat completion"),
        ((200, {"content-type": "application/json"}, b'{"choices": []}'), "holds no choices"),
        (
            (200, {"content-type": "application/json"}, b'{"choices": [{"message": {"content": 5}}]}'),
            "holds no choices",
        ),
        ((200, {"content-type": "application/json"}, b'{"choices": [3]}'), "holds no choices"),
        ((200, {"content-type": "application/json"}, b'"\xff\xfe'), "no chat completion"),
        ((200, {"content-type": "application/json"}, b" " * 20_000), "longer than 10,000 bytes"),
        ((500, {"content-type": "application/json"}, b" " * 20_000), "longer than 10,000 bytes"),
        ((400, {}, b'{"error": "max_tokens is not supported"}'), "status 400"),
    ],
)
def test_an_invalid_reply_is_an_error_row_and_not_retried(garbage, error, judge, bench, tmp_path):
    server = judge(lambda text, _: garbage if "Write a verse." in text else "[[5]]")
    endpoint = Endpoint(server.url, "j", max_bytes=10_000, retries=2)
    found = judge_mt_bench(endpoint, tmp_path / "out", **single(bench))
    assert found["single"]["answers"]["errors"] == 2
    assert len(server.seen) == 6
    assert all(error in row["error"] for row in rows_of(tmp_path / "out") if row["error"])


def test_an_endless_body_is_given_up(judge, bench, tmp_path):
    """Each read is in time, the whole body is not."""

    class Dripping(Handler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            while not self.server.over.wait(0.05):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    return

    server = judge(None)
    server.RequestHandlerClass = Dripping
    with pytest.raises(RuntimeError, match=r"none of 2 requests .* was answered, .* incomplete after 0.8 s"):
        judge_mt_bench(
            Endpoint(server.url, "j", timeout=0.4, retries=0), tmp_path / "out", **single(bench), max_questions=1
        )


def test_a_server_may_omit_all_optional_fields(judge, bench, tmp_path):
    server = judge(
        lambda *_: (200, {"content-type": "application/json"}, b'{"choices":[{"message":{"content":"[[5]]"}}]}')
    )
    found = judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "out", **single(bench), price_in=1, price_out=1)
    assert found["single"]["answers"]["score"]["mean"] == 5
    assert (found["tokens"], found["cost"], found["judge"]["served_as"]) == ({"in": 0, "out": 0}, 0, [])
    assert found["warnings"] == ["6 replies came without token counts: tokens and cost are too low"]


def test_lone_surrogates_can_be_written(judge, bench, tmp_path):
    server = judge(lambda *_: (200, {"content-type": "application/json"}, completion("[[5]] \ud800")[2]))
    found = judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "out", **single(bench))
    assert found["single"]["answers"]["score"]["mean"] == 5


def test_a_rerun_asks_only_what_is_missing_or_failed(judge, bench, tmp_path):
    out, broken = tmp_path / "out", [True]
    server = judge(lambda text, _: (400, {}, b"") if broken[0] and "Write a verse." in text else "[[5]]")
    endpoint = Endpoint(server.url, "j")
    first = judge_mt_bench(endpoint, out, **single(bench))
    assert (first["asked_now"], first["requests"]["errors"], len(server.seen)) == (6, 2, 6)
    broken[0] = False
    second = judge_mt_bench(endpoint, out, **single(bench))
    assert (second["asked_now"], second["requests"]["errors"], len(server.seen)) == (2, 0, 8)
    third = judge_mt_bench(endpoint, out, **single(bench))
    assert (third["asked_now"], len(server.seen)) == (0, 8)
    assert third["single"] == second["single"]
    assert third["tokens"] == {"in": 600, "out": 60}
    renamed = jsonl(
        tmp_path / "question.jsonl", [q | {"category": q["category"].replace("stem", "sky")} for q in QUESTIONS]
    )
    fourth = judge_mt_bench(endpoint, out, **single(bench) | {"questions": renamed})
    assert (fourth["asked_now"], list(fourth["single"]["answers"]["categories"])) == (0, ["writing", "math", "sky"])
    with (out / "verdicts.jsonl").open("a") as file:
        file.write('{"key": "torn", "rep')
    judge_mt_bench(Endpoint(server.url, "other"), out, **single(bench))
    assert len(server.seen) == 14  # another judge is another verdict
    assert len(rows_of(out)) == 14
    changed = answers(
        tmp_path / "ours.jsonl", {81: ["new", "new"], 101: ["n", "n"], 141: ["long answer to 141", "new"]}
    )
    judge_mt_bench(endpoint, out, **(single(bench) | {"answers": changed}))
    assert len(server.seen) == 14 + 5


def test_verdicts_of_another_url_are_reused_with_a_note(judge, bench, tmp_path, capsys):
    first, second = judge(lambda *_: "[[5]]"), judge(lambda *_: "[[6]]")
    for url in (first.url, first.url):
        judge_mt_bench(Endpoint(url, "j"), tmp_path / "out", **single(bench))
    assert "are reused" not in capsys.readouterr().err
    judge_mt_bench(Endpoint(second.url, "j"), tmp_path / "out", **single(bench))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"6 verdicts are reused that {first.url} gave, not {second.url}; for new ones give another --out" in line
    assert second.seen == []


# -- the key -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", Endpoint.key_variables)
def test_the_key_is_sent_and_written_nowhere(variable, judge, bench, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv(variable, KEY)

    def echo(text, number):
        if "Write a verse." in text:
            return 400, {}, f"{'x' * (290 if 'question_1' in text else 0)} wrong key {KEY}".encode()
        return f"{KEY} [[5]]" if number % 2 else completion("[[5]]")

    server = judge(echo)
    out = tmp_path / "out"
    status = main(command(bench, server.url, out, "--json", "--debug"))
    told = "".join(capfd.readouterr())
    assert status == 0
    assert server.keys == {f"Bearer {KEY}"}
    assert variable in told
    written = "".join(path.read_text() for path in out.rglob("*") if path.is_file())
    assert "wrong key ***" in written
    assert KEY[:4] not in written + told + caplog.text + repr(Endpoint(server.url, "j"))


def test_the_variable_of_the_judge_comes_first_and_no_key_is_needed(judge, bench, tmp_path, monkeypatch):
    server = judge(lambda *_: "[[5]]")
    judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "none", **single(bench))
    assert server.keys == {"Bearer none"}
    server.keys.clear()
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("PREFDISTILL_JUDGE_KEY", f" {KEY}\n")
    judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "own", **single(bench))
    assert server.keys == {f"Bearer {KEY}"}
    monkeypatch.setenv("PREFDISTILL_JUDGE_KEY", f"{KEY}é")
    with pytest.raises(
        UserError, match=r"^PREFDISTILL_JUDGE_KEY holds characters that are not valid in a key"
    ) as caught:
        judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "bad", **single(bench))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}", f"http://host/v1#{KEY}", f"ftp://{KEY}", KEY, ""]
)
def test_urls_with_secrets_are_refused_and_not_shown(url):
    with pytest.raises(UserError) as caught:
        Endpoint(url, "j")
    assert KEY not in str(caught.value)


# -- the command -------------------------------------------------------------------------------------------------------


def command(bench, url, out, *more):
    files = [f"--{name}={bench[name]}" for name in ("questions", "prompts", "references", "answers")]
    return ["judge", "mt-bench", *files, f"--url={url}", "--judge-model=j", f"--out={out}", *more]


def test_the_command_prints_scores_or_one_json_object(judge, bench, tmp_path, capsys):
    server = judge(lambda text, number: prefers_longer(text, number) if "answer_a" in text else "[[7]]")
    more = [f"--against={bench['against']}", "--price-in=1", "--price-out=2", "max_tokens=null", "seed=3"]
    assert main(command(bench, server.url, tmp_path / "out", *more)) == 0
    told = capsys.readouterr().out
    assert "answers: score               7.000   95 %: 7.000 to 7.000   (3 questions)" in told
    assert "win rate                     1.000" in told
    assert "6 wins, 0 ties, 0 losses, 0 left out" in told
    assert "24 verdicts (0 unparsable, 0 errors), 2,400 + 240 tokens, cost 0.00288" in told
    assert all("max_tokens" not in body and body["seed"] == 3 for body in server.seen)
    assert main(command(bench, server.url, tmp_path / "out", *more, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["asked_now"] == 0


@pytest.mark.parametrize(
    ("trouble", "status", "message"),
    [
        ((401, {}, b'{"error": {"message": "no such key"}}'), 2, "refuses: status 401"),
        ((404, {}, b"not here"), 2, "does the address end as it should"),
        ((400, {}, b"bad field"), 1, "none of 6 requests"),
    ],
)
def test_an_endpoint_that_fails_every_request(trouble, status, message, judge, bench, tmp_path, capsys):
    server = judge(lambda *_: trouble)
    assert main(command(bench, server.url, tmp_path / "out", "--concurrency=1")) == status
    assert message in capsys.readouterr().err
    assert len(server.seen) == (1 if status == 2 else 6)
    assert not (tmp_path / "out" / "results.json").exists()


def test_no_server(bench, tmp_path, capsys, judge):
    server = judge(None)
    server.close()
    assert main(command(bench, server.url, tmp_path / "out", "--retries=0")) == 1
    assert "no connection" in capsys.readouterr().err


def test_invalid_input_is_refused(bench, tmp_path, capsys):
    def said(*more, **changed):
        assert main(command(bench | changed, "http://localhost:1/v1", tmp_path / "out", *more)) == 2
        return capsys.readouterr().err

    few = answers(tmp_path / "few.jsonl", {81: ["a", "b"], 101: ["a"]})
    assert "few.jsonl: no answer to all turns of 2 questions (101, 141)" in said(answers=few)
    assert "no reference answer to all turns of 1 questions (101)" in said(
        references=answers(tmp_path / "x", {1: ["a"]})
    )
    assert "no prompt 'single-v1'; it has x" in said(
        prompts=jsonl(tmp_path / "p.jsonl", [{"name": "x", "prompt_template": ""}])
    )
    bad = [{"name": name, "prompt_template": "{question}"} for name, _ in PROMPTS.values()]
    assert "has no {answer}" in said(prompts=jsonl(tmp_path / "q.jsonl", bad))
    assert "cannot be read: No such file" in said(questions=tmp_path / "none.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"question_id": 1}\n{"a"\n')
    assert "broken.jsonl, line 2: not valid JSON" in said(questions=tmp_path / "broken.jsonl")
    assert "--kind pair compares two files" in said("--kind=pair")
    assert "--kind must be 'single' or 'pair', got 'triple'" in said("--kind=triple")
    assert "messages cannot be set" in said("messages=1")
    assert not (tmp_path / "out").exists()


def test_an_interruption_keeps_the_finished_verdicts(judge, bench, tmp_path):
    """Ctrl-C with requests in flight ends at once; the next run resumes."""
    slow = [True]
    server = judge(lambda _, number: "hang" if slow[0] and number > 2 else "[[5]]")
    code = "import sys; from prefdistill.cli import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.Popen(
        [sys.executable, "-c", code, *command(bench, server.url, tmp_path / "out", "--concurrency=2")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 180  # to import everything on a busy machine
    while len(server.seen) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(server.seen) == 4
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=60)  # less than the two minutes that a request may take
    assert run.returncode == 130
    assert "the same command resumes it" in told
    assert len(rows_of(tmp_path / "out")) == 2
    slow[0] = False
    found = judge_mt_bench(Endpoint(server.url, "j"), tmp_path / "out", **single(bench))
    assert found["asked_now"] == 4


def test_every_judge_verb_has_help_with_an_example(capsys):
    for verb in ("answers", "mt-bench", "alpaca-eval"):
        assert main(["judge", verb, "--help"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"Example: prefdistill judge {verb} " in out
        assert "--json" in out
    assert "PREFDISTILL_JUDGE_KEY" in out
    assert main(["judge"]) == 2
    assert "Missing command" in capsys.readouterr().err
