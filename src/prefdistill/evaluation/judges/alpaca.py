"""AlpacaEval: which of two outputs to an instruction is better, in both orders.

The words and the rule for reading the verdict are those of an evaluator of the installed `alpaca_eval` package, whose
files are read and whose code is not run (it imports pkg_resources, which setuptools has no more), or the user's file.
"""

import importlib.util
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prefdistill.core.errors import UserError
from prefdistill.core.files import value_digest, write_json
from prefdistill.core.lock import locked
from prefdistill.core.progress import say
from prefdistill.evaluation.judges import verdicts
from prefdistill.evaluation.judges.client import FIELDS, Endpoint, Question, Reply
from prefdistill.evaluation.judges.inputs import fill, provenance, read_outputs, read_text
from prefdistill.evaluation.judges.ledger import Ledger, summary
from prefdistill.evaluation.stats import estimate

PLACES = ("instruction", "output_1", "output_2")
DEFAULT = "weighted_alpaca_eval_gpt4_turbo"  # of AlpacaEval 2.0
LABELS = ("m", "M")  # of a prompt file that says no others
ORDERS = ("first", "second")
RIDGE = 0.1  # in nats: keeps the fit finite where one side won everything, and is lost in hundreds of comparisons
RESAMPLES = 1_000


@dataclass(frozen=True)
class Evaluator:
    """How to ask and how to read: messages with places, fields of the request, reply -> preference of the second."""

    name: str
    messages: tuple[dict[str, str], ...]
    fields: dict[str, Any]
    read: Callable[[Reply], float | None]

    def question(self, about: dict[str, Any], **places: str) -> Question:
        # messages are split before they are filled: an output that holds <|im_end|> stays inside of its own
        return Question([message | {"content": fill(message["content"], places)} for message in self.messages], about)


def judge_alpaca_eval(
    endpoint: Endpoint,
    out: Path,
    *,
    answers: Path,
    against: Path,
    prompt: str = DEFAULT,
    labels: Sequence[str] | None = None,
    max_questions: int | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
) -> dict[str, Any]:
    """Win rate of outputs against others to the same instructions, both orders asked, their mean taken.

    `OUT/verdicts.jsonl` keeps every reply, `OUT/annotations.json` has the comparisons as `alpaca_eval` writes them, and
    `OUT/results.json` is returned.

    Args:
        endpoint: the judge; its fields win over the evaluator's.
        out: a directory; what is in it already is not asked again.
        answers, against: outputs of AlpacaEval's form, or files of `prefdistill sample`.
        prompt: an evaluator of the `alpaca_eval` package, or a text file with places for {instruction}, {output_1} and
            {output_2}, in ChatML or plain.
        labels: what a prompt file has the judge say for the first output, the second and, if it can, for a tie;
            default: `LABELS`.
        max_questions: as many instructions, evenly from the whole file.
        price_in, price_out: money per million tokens.

    Raises:
        UserError: if a file lacks something, or the endpoint refuses.
        RuntimeError: if no request is answered.

    Example:
        >>> judge_alpaca_eval(endpoint, Path("judged"), answers=..., against=...)           # doctest: +SKIP
    """
    begun = time.monotonic()
    evaluator = read_evaluator(prompt, labels)
    endpoint = replace(endpoint, fields=evaluator.fields | endpoint.fields)
    ours, theirs = read_outputs(answers), read_outputs(against)
    asked = [instruction for instruction in ours if instruction in theirs]
    if len(asked) < len(ours):
        lacking = next(instruction for instruction in ours if instruction not in theirs)
        raise UserError(f"{against}: no output to {len(ours) - len(asked)} instructions of {answers}: {lacking[:80]!r}")
    if max_questions is not None and max_questions < len(asked):
        asked = [asked[place * len(asked) // max_questions] for place in range(max_questions)]

    def questions(order: str) -> list[Question]:
        shown = (ours, theirs) if order == "first" else (theirs, ours)
        about = {"prompt": evaluator.name, "ours_shown": order}
        return [
            evaluator.question(about | {"instruction": i}, instruction=i, output_1=shown[0][i], output_2=shown[1][i])
            for i in asked
        ]

    with locked(out):
        ledger = Ledger(out / "verdicts.jsonl")
        both = [question for order in ORDERS for question in questions(order)]
        rows = ledger.ask(endpoint, both, evaluator.read, what="comparing")
        first, second = rows[: len(asked)], rows[len(asked) :]
        lengths = [(len(ours[i]), len(theirs[i])) for i in asked]
        results: dict[str, Any] = {"task": "alpaca-eval", "questions": len(asked), "prompt": evaluator.name}
        results["pair"] = preferences(first, second, lengths)
        results |= summary(rows, endpoint, price_in, price_out)
        answered = [row for row in rows if row["error"] is None]
        if endpoint.body.get("logprobs") and all(row["first_token"] is None for row in answered):
            results["warnings"].append(
                f"{endpoint.url} gave no log-probabilities, which {evaluator.name} needs; "
                "alpaca_eval_clf_gpt4_turbo and alpaca_eval_gpt4 do without"
            )
        results["answers"] = {
            who: provenance(path) | {"characters": estimate([len(said[i]) for i in asked])}
            for who, path, said in (("answers", answers, ours), ("against", against, theirs))
        }
        results["files"] = {"prompt": {"file": Path(prompt).name, "sha256": value_digest(list(evaluator.messages))}}
        results["seconds"] = round(time.monotonic() - begun, 3)
        results["asked_now"] = ledger.asked
        for warning in results["warnings"]:
            say(f"warning: {warning}")
        write_json(out / "annotations.json", _annotations(asked, ours, theirs, first, second, results))
        write_json(out / "results.json", results)
    return results


def preferences(
    shown_first: Sequence[dict[str, Any]], shown_second: Sequence[dict[str, Any]], lengths: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """How much our outputs are preferred, the mean of both orders; a tie is one half.

    Args:
        shown_first, shown_second: rows of the same instructions with our output first and second; "verdict" is the
            preference for the second output shown, from 0 to 1, or None.
        lengths: characters of our output and of the other.

    Returns:
        `win_rate`, `length_controlled` (see there), counts of wins, ties and losses, `consistency` (the share in which
        both orders lean to the same output, or neither leans) and `first_preferred` (the mean preference for the output
        shown first, one half for a judge without a leaning).
    """
    pairs = list(zip(shown_first, shown_second, lengths, strict=True))
    both = [(1 - a["verdict"], b["verdict"], n) for a, b, n in pairs if None not in (a["verdict"], b["verdict"])]
    worth = [(first + second) / 2 for first, second, _ in both]
    decided = [np.sign(value - 0.5) for value in worth]
    rows = [row for a, b, _ in pairs for row in (a, b)]
    errors = sum(row["error"] is not None for row in rows)
    return {
        "win_rate": estimate(worth) if worth else None,
        "length_controlled": length_controlled(worth, [ours - theirs for _, _, (ours, theirs) in both]),
        "wins": decided.count(1),
        "ties": decided.count(0),
        "losses": decided.count(-1),
        "consistency": estimate([np.sign(a - 0.5) == np.sign(b - 0.5) for a, b, _ in both]) if both else None,
        "first_preferred": estimate([(a + 1 - b) / 2 for a, b, _ in both]) if both else None,
        "left_out": len(pairs) - len(both),
        "verdicts": len(rows),
        "unparsable": sum(row["verdict"] is None for row in rows) - errors,
        "errors": errors,
    }


def length_controlled(worth: Sequence[float], longer: Sequence[float], *, seed: int = 0) -> dict[str, Any] | None:
    r"""The win rate that a logistic regression expects of outputs as long as those they are compared with.

    .. math:: P(\text{ours}) = \sigma(\theta + \varphi \tanh(\Delta / s_\Delta)), \qquad \text{result} = \sigma(\theta)

    The idea and the features are those of AlpacaEval's length-controlled win rate; its third feature, the difficulty of
    an instruction, is known for its own 805 instructions alone, and its own baselines are no part of the fit. So the
    number is not that of its leaderboard.

    Args:
        worth: preference for our output in each comparison, 0 to 1.
        longer: characters of our output less those of the other.

    Returns:
        An estimate with an interval from a bootstrap over comparisons; None for fewer than ten, or if all lengths
        differ by the same.

    Example:
        >>> round(length_controlled([1, 1, 0, 0] * 5, [9, 9, -9, -9] * 5)["mean"], 3)
        0.5
    """
    y, delta = np.asarray(worth, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    if len(y) < 10 or delta.std() == 0:
        return None
    x = np.stack([np.ones_like(y), np.tanh(delta / delta.std(ddof=1))], axis=1)
    mean = _rate(x, y)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(y), size=(RESAMPLES, len(y)))
    rates = np.array([_rate(x[rows], y[rows]) for rows in drawn])
    low, high = np.percentile(rates, [2.5, 97.5])
    return {"mean": mean, "se": float(rates.std(ddof=1)), "n": len(y), "low": float(low), "high": float(high)}


def _rate(x: np.ndarray, y: np.ndarray) -> float:
    """Newton's steps to the ridge-penalised likelihood's maximum; it is strictly concave in two unknowns."""
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (y - p) - RIDGE * weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2), slope)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + math.exp(-weights[0])))


# -- how to ask --------------------------------------------------------------------------------------------------------


def read_evaluator(prompt: str, labels: Sequence[str] | None = None) -> Evaluator:
    """An evaluator of the `alpaca_eval` package by its name, or made of a prompt file and its labels.

    Raises:
        UserError: if it is neither, or an evaluator whose verdicts cannot be read here, or one with labels.
    """
    if Path(prompt).is_file():
        labels = LABELS if labels is None else labels
        if len(labels) not in (2, 3) or len(set(labels)) < len(labels) or not all(labels):
            raise UserError(f"--labels takes two or three different words with commas between, got {','.join(labels)}")
        text = read_text(Path(prompt))
        return Evaluator(prompt, _messages(text, prompt), dict(FIELDS), partial(_by_label, labels=labels))
    if labels is not None:
        raise UserError(f"--labels goes with a prompt file, which {prompt} is not; an evaluator has labels of its own")
    directory = _package() / "evaluators_configs"
    config_path = directory / prompt / "configs.yaml"
    if "/" in prompt or not config_path.is_file():
        raise UserError(f"--prompt {prompt} is neither a file nor an evaluator of alpaca_eval, such as {DEFAULT}")
    config = next(iter(yaml.safe_load(config_path.read_text(encoding="utf-8")).values()))
    asked = {key: value for key, value in config["completions_kwargs"].items() if key != "model_name"}
    read = _reader(config)
    known = {"max_tokens", "temperature", "top_p", "logprobs", "top_logprobs"}
    if read is None or config.get("batch_size", 1) != 1 or asked.keys() - known:
        raise UserError(f"--prompt {prompt}: only evaluators that name the better output, or rank both, can be used")
    if read.func is _by_label:
        # The package asks which of two tokens is likelier. That is what a greedy reply says, without log-probabilities.
        asked = {key: value for key, value in asked.items() if "logprobs" not in key} | {"temperature": 0}
    text = (directory / config["prompt_template"]).read_text(encoding="utf-8")
    return Evaluator(prompt, _messages(text, prompt), asked, read)


def _reader(config: dict[str, Any]) -> "partial[float | None] | None":
    options = config.get("completion_parser_kwargs") or {}
    if config.get("fn_completion_parser") == "ranking_parser":
        return partial(_by_ranking, first=options.get("model_1_name", "model_1"))
    if config.get("fn_completion_parser") != "logprob_parser" or options.get("log_prob_index", "batch") != "batch":
        return None
    first = options["numerator_token"]
    others = [token for token in options["denominator_tokens"] if token != first]
    if len(others) != 1:
        return None
    by = _by_label if options.get("is_binarize", True) else _by_probability
    return partial(by, labels=(first, others[0]))


def _by_label(reply: Reply, labels: Sequence[str]) -> float | None:
    return verdicts.label(reply.reply or "", labels)


def _by_probability(reply: Reply, labels: Sequence[str]) -> float | None:
    return verdicts.label_probability(reply.first_token, labels)


def _by_ranking(reply: Reply, first: str) -> float | None:
    return verdicts.ranking(reply.reply or "", first)


def _package() -> Path:
    found = importlib.util.find_spec("alpaca_eval")  # finds it without running it
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "evaluators come with the alpaca_eval package: pip install 'prefdistill[alpaca]', or name a prompt file"
        )
    return Path(next(iter(found.submodule_search_locations)))


def _messages(text: str, where: str) -> tuple[dict[str, str], ...]:
    """The messages of a ChatML text, or plain text as one message of the user."""
    if missing := [name for name in PLACES if f"{{{name}}}" not in text]:
        raise UserError(f"{where}: no place for {{{missing[0]}}}")
    found = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, flags=re.DOTALL)
    if not found:
        return ({"role": "user", "content": text.strip()},)
    return tuple({"role": role, "content": content.strip()} for role, content in found)


def _annotations(
    asked: Sequence[str],
    ours: dict[str, str],
    theirs: dict[str, str],
    first: Sequence[dict[str, Any]],
    second: Sequence[dict[str, Any]],
    results: dict[str, Any],
) -> list[dict[str, Any]]:
    """As `alpaca_eval` writes them: output_2 is ours, the preference goes from 1 (theirs) to 2 (ours)."""
    names = {who: ", ".join(made["models"]) or made["file"] for who, made in results["answers"].items()}
    rows = []
    for i, a, b in zip(asked, first, second, strict=True):
        known = None not in (a["verdict"], b["verdict"])
        rows.append(
            {
                "instruction": i,
                "output_1": theirs[i],
                "generator_1": names["against"],
                "output_2": ours[i],
                "generator_2": names["answers"],
                "annotator": results["judge"]["model"],
                "preference": 1 + (1 - a["verdict"] + b["verdict"]) / 2 if known else None,
            }
        )
    return rows
