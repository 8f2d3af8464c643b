"""AlpacaEval: which of two outputs to an instruction is better, asked in both orders.

The prompt and the parser come from an evaluator of the installed `alpaca_eval` package, whose files are read but whose
code is not run (it imports pkg_resources, which setuptools has dropped), or from the user's prompt file.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefdistill.core.errors import UserError
from prefdistill.core.files import value_digest, write_json
from prefdistill.core.options import takes
from prefdistill.core.yaml import read_yaml
from prefdistill.evaluation.judges import verdicts
from prefdistill.evaluation.judges.client import FIELDS, Endpoint, Question, Reply
from prefdistill.evaluation.judges.inputs import evenly, fill, read_outputs, read_text
from prefdistill.evaluation.judges.ledger import Ledger, judge, outcome_counts
from prefdistill.evaluation.judges.options import AlpacaEval
from prefdistill.evaluation.length import length_controlled
from prefdistill.evaluation.stats import estimate

FIELD_NAMES = ("instruction", "output_1", "output_2")
DEFAULT = AlpacaEval.model_fields["prompt"].default
LABELS = ("m", "M")  # default for a prompt file
ORDERS, SIDES = ("first", "second"), ("answers", "against")


@dataclass(frozen=True)
class Evaluator:
    """Messages with fields to fill, request fields, and a parser: reply -> preference for the second output."""

    name: str
    messages: tuple[dict[str, str], ...]
    fields: dict[str, Any]
    read: Callable[[Reply], verdicts.Verdict]

    def question(self, about: dict[str, Any], **fields: str) -> Question:
        # messages are split before they are filled: an output with <|im_end|> in it stays inside its message
        return Question([message | {"content": fill(message["content"], fields)} for message in self.messages], about)


@takes(AlpacaEval)
def judge_alpaca_eval(endpoint: Endpoint, out: Path, **options: Any) -> dict[str, Any]:
    """Compute the win rate of outputs against others to the same instructions, the mean of both orders.

    Writes `OUT/verdicts.jsonl` (every reply), `OUT/annotations.json` (the comparisons in `alpaca_eval`'s format) and
    `OUT/results.json`, which is returned.

    Args:
        endpoint: the judge; its fields win over the evaluator's.
        out: a directory; verdicts that are in it already are reused.
        options: fields of `prefdistill.evaluation.judges.options.AlpacaEval`.

    Raises:
        UserError: if a file is incomplete, or the endpoint refuses.
        RuntimeError: if no request is answered.

    Example:
        >>> judge_alpaca_eval(endpoint, Path("judged"), answers=..., against=...)           # doctest: +SKIP
    """
    settings = AlpacaEval.checked("judge_alpaca_eval", **options)
    evaluator = read_evaluator(settings.prompt, settings.labels)
    endpoint = replace(endpoint, fields=evaluator.fields | endpoint.fields)
    outputs = {"answers": read_outputs(settings.answers), "against": read_outputs(settings.against)}
    missing = [instruction for instruction in outputs["answers"] if instruction not in outputs["against"]]
    if missing:
        where = f"{len(missing)} instructions of {settings.answers}"
        raise UserError(f"{settings.against}: no output to {where}: {missing[0][:80]!r}")
    shared = evenly(list(outputs["answers"]), settings.max_questions)

    def questions(order: str) -> list[Question]:
        first, second = (outputs[who] for who in (SIDES if order == "first" else SIDES[::-1]))
        about = {"prompt": evaluator.name, "ours_shown": order}
        return [
            evaluator.question(about | {"instruction": i}, instruction=i, output_1=first[i], output_2=second[i])
            for i in shared
        ]

    prompt_digest = value_digest(list(evaluator.messages))

    def work(ledger: Ledger, sources: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        both = [question for order in ORDERS for question in questions(order)]
        rows = ledger.ask(endpoint, both, evaluator.read, what="comparing")
        shown_first, shown_second = rows[: len(shared)], rows[len(shared) :]
        lengths = [(len(outputs["answers"][i]), len(outputs["against"][i])) for i in shared]
        warnings = []
        if endpoint.body.get("logprobs") and all(row["first_token"] is None for row in rows):
            warnings = [
                f"{endpoint.url} gave no log-probabilities, which {evaluator.name} needs; "
                "alpaca_eval_clf_gpt4_turbo and alpaca_eval_gpt4 do without"
            ]
        for who, source in sources.items():
            source["characters"] = estimate([len(outputs[who][i]) for i in shared])
        names = {who: ", ".join(source["models"]) or source["file"] for who, source in sources.items()}
        annotations = [  # in alpaca_eval's format: output_2 is of --answers, which preference 2 is for
            {
                "instruction": i,
                "output_1": outputs["against"][i],
                "generator_1": names["against"],
                "output_2": outputs["answers"][i],
                "generator_2": names["answers"],
                "annotator": endpoint.model,
                "preference": None if None in (a, b) else 1 + (1 - a + b) / 2,
            }
            for i, first, second in zip(shared, shown_first, shown_second, strict=True)
            for a, b in [(first["verdict"], second["verdict"])]
        ]
        write_json(out / "annotations.json", annotations)
        results = {
            "questions": len(shared),
            "prompt": evaluator.name,
            "pair": preferences(shown_first, shown_second, lengths),
            "files": {"prompt": {"file": Path(settings.prompt).name, "sha256": prompt_digest}},
            "warnings": warnings,
        }
        return results, rows

    labels = None if settings.labels is None else list(settings.labels)
    request = {"prompt": prompt_digest, "labels": labels, "instructions": value_digest(shared)}
    files = {"answers": settings.answers, "against": settings.against}
    return judge("alpaca-eval", out, endpoint, settings, request, files, work)


def preferences(
    shown_first: Sequence[dict[str, Any]], shown_second: Sequence[dict[str, Any]], lengths: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return how much our outputs are preferred, the mean of both orders; a tie is one half.

    Args:
        shown_first, shown_second: rows of the same instructions with our output first and second; "verdict" is the
            preference for the second output shown, from 0 to 1, or None.
        lengths: characters of our output and of the other.

    Returns:
        `win_rate`, `length_controlled` (see there), counts of wins, ties and losses, `consistency` (the share in which
        both orders prefer the same output, or neither does) and `first_preferred` (the mean preference for the output
        shown first, one half for a judge without position bias).
    """
    pairs = list(zip(shown_first, shown_second, lengths, strict=True))
    both = [(1 - a["verdict"], b["verdict"], n) for a, b, n in pairs if None not in (a["verdict"], b["verdict"])]
    scores = [(first + second) / 2 for first, second, _ in both]
    decided = [np.sign(score - 0.5) for score in scores]
    rows = [row for a, b, _ in pairs for row in (a, b)]
    return {
        "win_rate": estimate(scores) if scores else None,
        "length_controlled": length_controlled(scores, [a - b for _, _, (a, b) in both]),
        "wins": decided.count(1),
        "ties": decided.count(0),
        "losses": decided.count(-1),
        "consistency": estimate([np.sign(a - 0.5) == np.sign(b - 0.5) for a, b, _ in both]) if both else None,
        "first_preferred": estimate([(a + 1 - b) / 2 for a, b, _ in both]) if both else None,
        "left_out": len(pairs) - len(both),
        **outcome_counts(rows),
    }


# -- how to ask --------------------------------------------------------------------------------------------------------


def read_evaluator(prompt: str, labels: Sequence[str] | None = None) -> Evaluator:
    """Return an evaluator of the `alpaca_eval` package by its name, or one built from a prompt file and its labels.

    Raises:
        UserError: if it is neither, an evaluator whose verdicts cannot be parsed here, or an evaluator with labels.
    """
    if Path(prompt).is_file():
        labels = LABELS if labels is None else labels
        if len(labels) not in (2, 3) or len(set(labels)) < len(labels) or not all(labels):
            raise UserError(f"--labels takes two or three different words, comma-separated, got {','.join(labels)}")
        text = read_text(Path(prompt))
        return Evaluator(prompt, _messages(text, prompt), dict(FIELDS), _by_label(labels))
    if labels is not None:
        raise UserError(f"--labels goes with a prompt file, which {prompt} is not; an evaluator has labels of its own")
    directory = _package() / "evaluators_configs"
    config_path = directory / prompt / "configs.yaml"
    if "/" in prompt or not config_path.is_file():
        raise UserError(f"--prompt {prompt} is neither a file nor an evaluator of alpaca_eval, such as {DEFAULT}")
    config = next(iter(read_yaml(config_path, "config", "reinstall alpaca_eval", "prompt_template").values()))
    fields = {key: value for key, value in config["completions_kwargs"].items() if key != "model_name"}
    read, asks_for_label = _reader(config)
    known = {"max_tokens", "temperature", "top_p", "logprobs", "top_logprobs"}
    if read is None or config.get("batch_size", 1) != 1 or fields.keys() - known:
        raise UserError(f"--prompt {prompt}: only evaluators that name the better output, or rank both, can be used")
    if asks_for_label:
        # the package asks which of two tokens is likelier; a greedy reply says the same without log-probabilities
        fields = {key: value for key, value in fields.items() if "logprobs" not in key} | {"temperature": 0}
    text = (directory / config["prompt_template"]).read_text(encoding="utf-8")
    return Evaluator(prompt, _messages(text, prompt), fields, read)


Reader = Callable[[Reply], verdicts.Verdict]


def _by_label(labels: Sequence[str]) -> Reader:
    return lambda reply: verdicts.read_label(reply.text, labels)


def _reader(config: dict[str, Any]) -> tuple[Reader | None, bool]:
    """Return what parses the replies to an evaluator, None for one that is not supported, and whether it is a label."""
    options = config.get("completion_parser_kwargs") or {}
    if config.get("fn_completion_parser") == "ranking_parser":
        return lambda reply: verdicts.read_ranking(reply.text, options.get("model_1_name", "model_1")), False
    if config.get("fn_completion_parser") != "logprob_parser" or options.get("log_prob_index", "batch") != "batch":
        return None, False
    first = options["numerator_token"]
    labels = (first, *(token for token in options["denominator_tokens"] if token != first))
    if len(labels) != 2:
        return None, False
    if options.get("is_binarize", True):
        return _by_label(labels), True
    return lambda reply: verdicts.read_label_probability(reply.text, reply.first_token, labels), False


def _package() -> Path:
    spec = importlib.util.find_spec("alpaca_eval")  # does not run it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "evaluators come with the alpaca_eval package: pip install 'prefdistill[alpaca]', or name a prompt file"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _messages(text: str, where: str) -> tuple[dict[str, str], ...]:
    """Return the messages of a ChatML text, or plain text as one user message."""
    if missing := [name for name in FIELD_NAMES if f"{{{name}}}" not in text]:
        raise UserError(f"{where}: the prompt has no {{{missing[0]}}}")
    messages = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, flags=re.DOTALL)
    if not messages:
        return ({"role": "user", "content": text.strip()},)
    return tuple({"role": role, "content": content.strip()} for role, content in messages)
