"""MT-Bench: grades of single answers and pairwise comparisons, turn by turn.

A grade is a number from 1 to 10. A comparison is asked in both orders and counts as a win only if both orders agree;
otherwise it is a tie, so that a judge that prefers the first answer shown decides nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefdistill.core.errors import UserError
from prefdistill.core.files import file_digest, value_digest
from prefdistill.core.options import takes
from prefdistill.evaluation.judges.client import FIELDS, Endpoint, Question
from prefdistill.evaluation.judges.inputs import Prompt, read_answers, read_prompts, read_questions
from prefdistill.evaluation.judges.ledger import Ledger, judge, outcome_counts
from prefdistill.evaluation.judges.options import MTBench
from prefdistill.evaluation.judges.verdicts import read_rating, read_winner
from prefdistill.evaluation.stats import estimate

WITH_REFERENCE = ("math", "reasoning", "coding")  # categories with a reference answer
ORDERS = ("first", "second")  # the position at which our answer is shown
KINDS = ("single", "pair")
FOR_THE_FIRST = {"A": 1.0, "B": 0.0, "C": 0.5}
# (kind, has a reference, turn) -> the prompt's name in FastChat's file, and the fields it must have
PROMPTS = {
    ("single", False, 1): ("single-v1", ("question", "answer")),
    ("single", True, 1): ("single-math-v1", ("question", "answer", "ref_answer_1")),
    ("single", False, 2): ("single-v1-multi-turn", ("question_1", "answer_1", "question_2", "answer_2")),
    ("single", True, 2): (
        "single-math-v1-multi-turn",
        ("question_1", "answer_1", "question_2", "answer_2", "ref_answer_1", "ref_answer_2"),
    ),
    ("pair", False, 1): ("pair-v2", ("question", "answer_a", "answer_b")),
    ("pair", True, 1): ("pair-math-v1", ("question", "answer_a", "answer_b", "ref_answer_1")),
    ("pair", False, 2): (
        "pair-v2-multi-turn",
        ("question_1", "answer_a_1", "answer_b_1", "question_2", "answer_a_2", "answer_b_2"),
    ),
    ("pair", True, 2): (
        "pair-math-v1-multi-turn",
        ("question_1", "answer_a_1", "answer_b_1", "question_2", "answer_a_2", "answer_b_2", "ref_answer_1"),
    ),
}


@takes(MTBench)
def judge_mt_bench(endpoint: Endpoint, out: Path, **options: Any) -> dict[str, Any]:
    """Have the answers to MT-Bench's questions judged; write `OUT/verdicts.jsonl` (every reply) and `OUT/results.json`,
    and return the latter.

    Args:
        endpoint: the judge.
        out: a directory; verdicts that are in it already are reused.
        options: fields of `prefdistill.evaluation.judges.options.MTBench`.

    Returns:
        `{"single": {"answers": scores, "against": scores, "difference": estimate}, "pair": {...}, "judge", ...}`, where
        every estimate is over questions.

    Raises:
        UserError: if a file is incomplete, or the endpoint refuses.
        RuntimeError: if no request is answered.

    Example:
        >>> judge_mt_bench(endpoint, Path("judged"), questions=..., prompts=..., references=..., answers=...)
        ... # doctest: +SKIP
    """
    settings = MTBench.checked("judge_mt_bench", **options)
    endpoint = replace(endpoint, fields={**FIELDS, **endpoint.fields})
    kinds = settings.kinds or (KINDS if settings.against else KINDS[:1])
    if "pair" in kinds and settings.against is None:
        raise UserError("--kind pair compares two files of answers; give the other one with --against")
    questions = read_questions(settings.questions, settings.max_questions)
    files = {"answers": settings.answers} | ({"against": settings.against} if settings.against else {})
    turns = {who: read_answers(path, questions, "answer") for who, path in files.items()}
    judge_prompts = _prompts(settings.prompts, kinds)
    needed = [q for q in questions if q["category"] in WITH_REFERENCE]
    references = read_answers(settings.references, needed, "reference answer") if needed else {}
    bench = _Bench(questions, judge_prompts, references, turns)
    inputs = {name: getattr(settings, name) for name in ("questions", "prompts", "references")}
    digests = {name: file_digest(path) for name, path in inputs.items()}

    def work(ledger: Ledger, sources: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        results: dict[str, Any] = {"questions": len(questions)}
        verdict_rows: list[dict[str, Any]] = []
        if "single" in kinds:
            graded = [(who, q) for who in files for q in bench.single(who)]
            requests = [question for _, question in graded]
            rows = ledger.ask(endpoint, requests, lambda reply: read_rating(reply.text), what="grading")
            by_who = {who: [r for r, (w, _) in zip(rows, graded, strict=True) if w == who] for who in files}
            results["single"] = {who: grades(own) for who, own in by_who.items()}
            if settings.against:
                results["single"]["difference"] = grade_difference(by_who["answers"], by_who["against"])
            verdict_rows += rows
        if "pair" in kinds:
            requests = [question for order in ORDERS for question in bench.pair(order)]
            rows = ledger.ask(endpoint, requests, lambda reply: read_winner(reply.text), what="comparing")
            half = len(rows) // 2
            results["pair"] = comparisons(rows[:half], rows[half:])
            verdict_rows += rows
        for who, source in sources.items():
            source["characters"] = bench.characters(who)
        results["files"] = {name: {"file": path.name, "sha256": digests[name]} for name, path in inputs.items()}
        return results, verdict_rows

    request = {"kinds": list(kinds), **digests, "questions": value_digest(questions)}
    return judge("mt-bench", out, endpoint, settings, request, files, work)


def grades(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean rating of all turns, of each turn and of each category; replies without a rating are left out.

    Args:
        rows: `{"question_id", "turn", "category", "verdict": rating or None, "outcome", "reasoning_cut"}` each.
    """
    rows = list(rows)
    rated = [row for row in rows if row["verdict"] is not None]
    return {
        "score": _mean(rated),
        "turns": _by(rated, "turn"),
        "categories": _by(rated, "category"),
        **outcome_counts(rows),
    }


def grade_difference(answers: Sequence[dict[str, Any]], against: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the mean difference of the ratings where both exist; the rows are of the same turns, in order."""
    pairs = zip(answers, against, strict=True)
    both = [(a, b) for a, b in pairs if a["verdict"] is not None and b["verdict"] is not None]
    return _mean([a | {"verdict": a["verdict"] - b["verdict"]} for a, b in both])


def comparisons(shown_first: Sequence[dict[str, Any]], shown_second: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count wins, ties and losses of our answers, each comparison asked in both orders.

    Args:
        shown_first, shown_second: rows of the same turns, with our answer as A and as B; "verdict" is A, B, C or None.

    Returns:
        `win_rate` counts a tie as one half. `consistency` is the share of comparisons in which both orders name the
        same answer, or both a tie; `first_preferred` is the share of all decided verdicts that name the answer shown
        first, one half for a judge without position bias.
    """
    pairs = list(zip(shown_first, shown_second, strict=True))
    both = [(a, b) for a, b in pairs if a["verdict"] is not None and b["verdict"] is not None]
    as_ours = [(FOR_THE_FIRST[a["verdict"]], 1 - FOR_THE_FIRST[b["verdict"]]) for a, b in both]
    scores = [
        a | {"verdict": first if first == second else 0.5}
        for (a, _), (first, second) in zip(both, as_ours, strict=True)
    ]
    agreed = [a | {"verdict": float(first == second)} for (a, _), (first, second) in zip(both, as_ours, strict=True)]
    decided = [
        row | {"verdict": float(row["verdict"] == "A")} for pair in both for row in pair if row["verdict"] != "C"
    ]
    counts = Counter(row["verdict"] for row in scores)
    return {
        "win_rate": _mean(scores),
        "wins": counts[1.0],
        "ties": counts[0.5],
        "losses": counts[0.0],
        "turns": _by(scores, "turn"),
        "categories": _by(scores, "category"),
        "consistency": _mean(agreed),
        "first_preferred": _mean(decided),
        "left_out": len(pairs) - len(both),
        **outcome_counts([row for pair in pairs for row in pair]),
    }


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return an estimate over questions: the turns of one question are not independent."""
    if not rows:
        return None
    return estimate([row["verdict"] for row in rows], [str(row["question_id"]) for row in rows])


def _by(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    return {str(name): _mean([row for row in rows if row[key] == name]) for name in dict.fromkeys(r[key] for r in rows)}


def _prompts(path: Path, kinds: Sequence[str]) -> dict[tuple[str, bool, int], Prompt]:
    required = {key: value for key, value in PROMPTS.items() if key[0] in kinds}
    prompts = read_prompts(path, [name for name, _ in required.values()])
    for name, fields in required.values():
        prompts[name].require(fields, path)
    return {key: prompts[name] for key, (name, _) in required.items()}


@dataclass(frozen=True)
class _Bench:
    """Questions, prompts by kind, reference and turn, reference answers, and answers by side."""

    questions: Sequence[dict[str, Any]]
    prompts: dict[tuple[str, bool, int], Prompt]
    references: dict[Any, list[str]]
    answers: dict[str, dict[Any, list[str]]]

    def turns(self, kind: str) -> Iterator[tuple[Any, Prompt, dict[str, str], dict[str, Any]]]:
        """Yield each turn of each question: its id, prompt, the fields that do not depend on answers, and labels."""
        for q in self.questions:
            reference = self.references[q["question_id"]] if q["category"] in WITH_REFERENCE else []
            for turn in range(1, len(q["turns"]) + 1):
                prompt = self.prompts[kind, bool(reference), turn]
                fields = _numbered("question", q["turns"]) | _numbered("ref_answer", reference)
                about = {
                    "question_id": q["question_id"],
                    "category": q["category"],
                    "turn": turn,
                    "prompt": prompt.name,
                }
                yield q["question_id"], prompt, fields, about

    def single(self, who: str) -> list[Question]:
        """Return the requests to grade the answers of one side."""
        return [
            Question(prompt.messages(fields | _numbered("answer", self.answers[who][name])), about)
            for name, prompt, fields, about in self.turns("single")
        ]

    def pair(self, order: str) -> list[Question]:
        """Return the requests to compare the sides, with our answers as A ("first") or as B."""
        a, b = ("answers", "against") if order == "first" else ("against", "answers")
        requests = []
        for name, prompt, fields, about in self.turns("pair"):
            fields |= _numbered("answer_a", self.answers[a][name]) | _numbered("answer_b", self.answers[b][name])
            requests.append(Question(prompt.messages(fields), about | {"ours_shown": order}))
        return requests

    def characters(self, who: str) -> dict[str, Any]:
        """Return the mean length of the judged turns: judges prefer long answers."""
        turns = [
            (str(q["question_id"]), len(turn))
            for q in self.questions
            for turn in self.answers[who][q["question_id"]][: len(q["turns"])]
        ]
        return estimate([length for _, length in turns], [name for name, _ in turns])


def _numbered(name: str, texts: Sequence[str]) -> dict[str, str]:
    """Return the fields NAME, of the first text, and NAME_1, NAME_2, ..."""
    return ({name: texts[0]} if texts else {}) | {f"{name}_{n}": text for n, text in enumerate(texts, start=1)}
