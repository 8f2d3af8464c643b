"""AlpacaEval: win rates of outputs by a prompt file and by the evaluators of the package."""

import gzip
import json

import numpy as np
import pytest

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.data.load import load_prompts
from prefdistill.evaluation.judges.alpaca import judge_alpaca_eval, length_controlled, read_evaluator
from prefdistill.evaluation.judges.client import Endpoint
from support.judges import completion, jsonl

pytest.importorskip("openai", reason="judges are asked through the openai package (extra judges)")

PROMPT = (
    "<|im_start|>system\nBe fair.\n<|im_end|>\n"
    "<|im_start|>user\n{instruction}\n1: {output_1}\n2: {output_2}\n<|im_end|>"
)


@pytest.fixture
def outputs(tmp_path):
    """Twelve instructions with our outputs, every other one longer, and theirs in the form of `prefdistill sample`."""
    ours = [{"instruction": f"do {i}", "output": "o" * (5 + 9 * (i % 2)), "generator": "us"} for i in range(12)]
    theirs = [
        {
            "prompt": [{"role": "user", "content": f"do {i}"}],
            "completion": [{"role": "assistant", "content": "{output_1}" if i == 3 else "t" * (9 + i % 2)}],
        }
        for i in range(12)
    ]
    (tmp_path / "ours.json").write_text(json.dumps(ours))
    (tmp_path / "prompt.txt").write_text(PROMPT)
    return {
        "answers": tmp_path / "ours.json",
        "against": jsonl(tmp_path / "theirs.jsonl", theirs),
        "prompt": str(tmp_path / "prompt.txt"),
    }


def shown(text):
    first, second = text.split("\n1: ")[1].split("\n2: ")
    return first, second


def longer(text, _):
    first, second = shown(text)
    return "m" if len(first) > len(second) else "M"


def test_win_rate_of_outputs_by_a_prompt_file(judge, outputs, tmp_path):
    server = judge(longer)
    found = judge_alpaca_eval(Endpoint(server.url, "j"), tmp_path / "out", **outputs)
    pair = found["pair"]
    assert (pair["win_rate"]["mean"], pair["wins"], pair["ties"], pair["losses"]) == (0.5, 6, 0, 6)
    assert pair["consistency"]["mean"] == 1
    assert pair["first_preferred"]["mean"] == 0.5
    assert len(server.seen) == 24
    assert all(body["max_tokens"] == 2048 and body["temperature"] == 0 for body in server.seen)
    assert server.seen[0]["messages"][0] == {"role": "system", "content": "Be fair."}
    assert any("1: oooooooooooooo\n2: {output_1}" in body["messages"][1]["content"] for body in server.seen)
    kept = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [row["preference"] for row in kept] == [1, 2] * 6
    assert (kept[0]["generator_1"], kept[0]["generator_2"], kept[3]["output_1"]) == ("theirs.jsonl", "us", "{output_1}")
    again = judge_alpaca_eval(Endpoint(server.url, "j"), tmp_path / "out", **outputs)
    assert (again["asked_now"], again["pair"]) == (0, pair)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_outputs_are_read_from_every_file_type_of_sample(suffix, judge, outputs, tmp_path):
    server = judge(longer)
    plain = judge_alpaca_eval(Endpoint(server.url, "j"), tmp_path / "out", **outputs)
    packed = tmp_path / f"theirs{suffix}"
    rows = load_prompts(str(outputs["against"]))
    with packed.open("wb") as file:
        if suffix == ".parquet":
            rows.to_parquet(file)
        else:
            file.write(gzip.compress(outputs["against"].read_bytes()))
    found = judge_alpaca_eval(Endpoint(server.url, "j"), tmp_path / "out", **outputs | {"against": packed})
    assert (found["asked_now"], found["pair"]) == (0, plain["pair"])  # the same words


def test_exchanging_the_outputs_reverses_the_win_rate(judge, outputs, tmp_path):
    server = judge(lambda text, _: longer(text, 0) if "do 1" in text else "M")
    endpoint = Endpoint(server.url, "j")
    there = judge_alpaca_eval(endpoint, tmp_path / "there", **outputs)["pair"]
    swapped = outputs | {"answers": outputs["against"], "against": outputs["answers"]}
    back = judge_alpaca_eval(endpoint, tmp_path / "back", **swapped)["pair"]
    assert there["win_rate"]["mean"] == pytest.approx(1 - back["win_rate"]["mean"])
    assert there["length_controlled"]["mean"] == pytest.approx(1 - back["length_controlled"]["mean"])
    assert there["first_preferred"]["mean"] == back["first_preferred"]["mean"] < 0.5
    assert there["ties"] == back["ties"] == 9  # where it always names the second


def test_a_thinking_judge_of_outputs(judge, outputs, tmp_path):
    """What it drafts while it thinks is not read; a reply that only thinks has no preference."""
    server = judge(lambda text, _: "<think>m, [[m]]?" if "do 1" in text else "<think>m? [[m]]</think>\n**M**")
    found = judge_alpaca_eval(Endpoint(server.url, "j"), tmp_path / "out", **outputs)
    assert found["pair"]["win_rate"]["n"] == 9
    assert found["pair"]["first_preferred"]["mean"] == 0
    assert found["pair"]["outcomes"] == {"parsed": 18, "no_verdict": 6, "contradictory": 0, "reasoning_cut": 24}
    assert found["requests"]["outcomes"] == found["pair"]["outcomes"]


def test_labels_of_a_prompt_file(judge, outputs, tmp_path):
    server = judge(lambda text, _: "[[C]]" if "do 1" in text else "Hm.")
    found = judge_alpaca_eval(Endpoint(server.url, "j"), tmp_path / "out", **outputs, labels=["A", "B", "C"])
    assert found["pair"]["win_rate"] == found["pair"]["win_rate"] | {"mean": 0.5, "n": 3}
    assert (found["pair"]["unparsable"], found["pair"]["left_out"]) == (18, 9)
    assert found["pair"]["outcomes"] == {"parsed": 6, "no_verdict": 18, "contradictory": 0, "reasoning_cut": 0}
    with pytest.raises(UserError, match="--labels takes two or three different words"):
        read_evaluator(outputs["prompt"], ["A"])


def test_invalid_outputs_are_refused(outputs, tmp_path, capsys):
    def said(**changed):
        given = [f"--{name}={value}" for name, value in (outputs | changed).items()]
        where = ["--url=http://localhost:1/v1", "--judge-model=j", f"--out={tmp_path / 'out'}"]
        assert main(["judge", "alpaca-eval", *given, *where]) == 2
        return capsys.readouterr().err

    few = jsonl(tmp_path / "few.jsonl", [{"instruction": "do 1", "output": ""}])
    assert "few.jsonl: no output to 11 instructions of" in said(against=few)
    assert "a second output to the same" in said(answers=jsonl(tmp_path / "b", [{"instruction": "", "output": ""}] * 2))
    two = [{"prompt": [{"role": "user", "content": "x"}] * 2, "completion": "y"}]
    assert "row 0: give `instruction` and `output`" in said(answers=jsonl(tmp_path / "c", two))
    (tmp_path / "d.txt").write_text("{instruction} {output_1}")
    assert "d.txt: the prompt has no {output_2}" in said(prompt=tmp_path / "d.txt")


def test_the_length_controlled_rate_matches_a_logistic_regression():
    """Against scipy's minimiser of the same penalised likelihood, and on data that follow the model."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    delta = rng.normal(200, 300, size=4_000)
    x = np.tanh(delta / delta.std(ddof=1))
    y = (rng.random(4_000) < 1 / (1 + np.exp(-(-0.4 + 1.5 * x)))).astype(float)

    def loss(weights):
        z = weights[0] + weights[1] * x
        return np.sum(np.logaddexp(0, z) - y * z) + 0.05 * np.sum(weights**2)

    found = length_controlled(y, delta)
    assert found["mean"] == pytest.approx(1 / (1 + np.exp(-minimize(loss, [0, 0]).x[0])), abs=1e-5)
    truth = 1 / (1 + np.exp(0.4))
    assert found["low"] < truth < found["high"] < y.mean()
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * found["se"], rel=0.1)
    assert length_controlled([1.0] * 20, np.arange(20))["mean"] < 1
    assert length_controlled([1.0] * 9, np.arange(9)) is None
    assert length_controlled([1.0] * 20, [3] * 20) is None


@pytest.fixture
def package():
    import importlib.util

    if importlib.util.find_spec("alpaca_eval") is None:
        pytest.skip("the evaluators of the alpaca_eval package are not installed (extra alpaca)")


def test_evaluators_of_the_package(package, judge, outputs, tmp_path):
    def logprobs(text, _):
        top = [
            {"token": t, "logprob": float(np.log(p)), "bytes": None} for t, p in (("M", 0.6), ("m", 0.2), ("x", 0.2))
        ]
        return completion("M", logprobs={"content": [{**top[0], "top_logprobs": top}], "refusal": None})

    server = judge(logprobs)
    files = {name: outputs[name] for name in ("answers", "against")}
    found = judge_alpaca_eval(Endpoint(server.url, "j"), tmp_path / "weighted", **files, max_questions=4)
    assert found["pair"]["win_rate"]["mean"] == 0.5
    assert found["pair"]["first_preferred"]["mean"] == pytest.approx(0.25)
    assert found["pair"]["ties"] == 4
    body = server.seen[0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["model"]) == (1, True, 5, "j")
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert '"output": """oooo' in body["messages"][1]["content"]

    plain = judge(lambda *_: "M")
    found = judge_alpaca_eval(Endpoint(plain.url, "j"), tmp_path / "none", **files, max_questions=4)
    assert found["pair"]["win_rate"] is None
    assert "gave no log-probabilities" in found["warnings"][-1]
    plain.seen.clear()
    endpoint = Endpoint(plain.url, "j")
    files["prompt"] = "alpaca_eval_clf_gpt4_turbo"
    found = judge_alpaca_eval(endpoint, tmp_path / "greedy", **files, max_questions=4)
    assert (found["pair"]["ties"], found["pair"]["consistency"]["mean"]) == (4, 0)
    assert plain.seen[0].keys() == {"model", "messages", "max_tokens", "temperature"}
    assert (plain.seen[0]["max_tokens"], plain.seen[0]["temperature"]) == (1, 0)

    ranked = judge(lambda *_: "[{'model': 'model_2', 'rank': 1}, {'model': 'model_1', 'rank': 2}]")
    files["prompt"] = "alpaca_eval_gpt4"
    found = judge_alpaca_eval(Endpoint(ranked.url, "j"), tmp_path / "ranked", **files, max_questions=4)
    assert found["pair"]["first_preferred"]["mean"] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_thing", "neither a file nor an evaluator"),
        ("../evaluators_configs", "neither a file nor an evaluator"),
        ("alpaca_eval_gpt4_turbo_fn", "only evaluators that name the better output"),
        ("alpaca_eval_cot_gpt4_turbo_fn", "only evaluators"),
        ("weighted_alpaca_eval_cot_gpt4_turbo", "only evaluators"),
        ("lmsys_gpt4", "only evaluators"),
        ("alpaca_farm_greedy_gpt4", "only evaluators"),
    ],
)
def test_unusable_evaluators_are_refused(name, message, package):
    with pytest.raises(UserError, match=message):
        read_evaluator(name)
