"""Sample a model's answers to MT-Bench's questions; the second turn sees the answer to the first."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.core.files import atomic_path, file_digest, jsonl, read_json, sweep, value_digest, write_json
from prefdistill.core.lock import LOCK, locked
from prefdistill.core.progress import say
from prefdistill.data.encode import Truncation
from prefdistill.evaluation.judges.inputs import read_questions
from prefdistill.models.identity import model_key
from prefdistill.models.load import load_model, load_tokenizer, ready
from prefdistill.sampling.files import REQUEST, made_of, sample_responses, sidecar
from prefdistill.signals.store import check_same_request

# FastChat's, by category; others are asked at the last
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7


def answer_questions(
    model: str,
    questions: Path,
    out: Path,
    *,
    name: str | None = None,
    max_questions: int | None = None,
    max_new_tokens: int = 1024,
    max_length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Answers in FastChat's format, drawn at FastChat's temperature of each category (a question's own
    `required_temperature` wins). A finished file of the same request is left as it is; an interrupted one goes on.

    Args:
        model: Hub name or directory.
        questions: FastChat's question.jsonl.
        out: the .jsonl file to write; beside it `OUT.meta.json` says what it was made from.
        name: the `model_id` of the answers; default: the last part of the model's name.
        max_questions: as many, evenly from the whole file.
        max_new_tokens: of each answer.
        max_length: of conversation and answer together, in tokens; a longer conversation keeps its end.
        batch_size: answers generated together.
        seed: of the draws.
        dtype: of the weights.
        trust_remote_code: let the model's repository run its own code.

    Raises:
        UserError: if a file cannot be read, a question does not fit, or something else is in the place of `out`.

    Example:
        >>> answer_questions("my/student", Path("question.jsonl"), Path("answers.jsonl"))   # doctest: +SKIP
    """
    if out.suffix != ".jsonl" or out.is_dir():
        raise UserError(f"{out}: --out names a file for the answers that ends in .jsonl")
    asked = read_questions(questions, max_questions)
    request = {
        "model": {"name": model, "key": model_key(model)},
        "model_id": name or Path(model).name,
        "questions": value_digest(asked),
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": dtype,
        "temperatures": {str(row["question_id"]): temperature(row) for row in asked},
    }
    parts = out.with_name(f"{out.name}.parts")
    with locked(parts):
        for file in (out, sidecar(out)):
            sweep(out.parent, file.name)
        if out.exists():
            made = made_of(out)
            if not made:
                raise UserError(
                    f"{out} is there and is not as `prefdistill judge answers` wrote it; give another --out"
                )
            check_same_request("answers", out, made["request"], request)
            say(f"answers: {out} reused")
        else:
            if (parts / REQUEST).is_file():
                check_same_request("unfinished answers", parts, read_json(parts / REQUEST), request)
            tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
            loaded = ready(load_model(model, dtype=dtype, trust_remote_code=trust_remote_code))
            options = {
                "max_new_tokens": max_new_tokens,
                "truncation": Truncation(max_length),
                "batch_size": batch_size,
                "seed": seed,
            }
            write_json(parts / REQUEST, request)
            try:
                said, counts = _ask(loaded, tokenizer, asked, parts, options)
            except UserError:
                if {path.name for path in parts.iterdir()} <= {LOCK, REQUEST}:  # nothing to go on with
                    (parts / REQUEST).unlink()
                raise
            made = _write(out, request, said, counts)
        for path in parts.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    return {"out": str(out), **{key: made[key] for key in ("answers", "tokens", "ended_share")}}


def temperature(question: dict[str, Any]) -> float:
    """That of the question's category, unless it has its own."""
    return float(question.get("required_temperature", TEMPERATURES.get(question["category"], OTHER_TEMPERATURE)))


def _ask(
    model: Any, tokenizer: Any, asked: Sequence[dict[str, Any]], parts: Path, options: dict[str, Any]
) -> tuple[dict[Any, list[str]], dict[str, Any]]:
    """The answers of each question, and what is to be counted of them."""
    said: dict[Any, list[str]] = {q["question_id"]: [] for q in asked}
    tokens, ended, answers = 0, 0.0, 0
    for turn in range(max(len(q["turns"]) for q in asked)):
        for degree in sorted({temperature(q) for q in asked}):
            group = [q for q in asked if temperature(q) == degree and len(q["turns"]) > turn]
            if not group:
                continue
            part = parts / f"turn{turn + 1}-temperature{degree:g}.jsonl"
            rows = [{"prompt": _conversation(q["turns"][: turn + 1], said[q["question_id"]])} for q in group]
            found = sample_responses(model, Dataset.from_list(rows), tokenizer, part, temperature=degree, **options)
            if len(found) < len(group):
                raise UserError(
                    f"turn {turn + 1}: {len(group) - len(found)} conversations leave no room for an answer; "
                    "raise --max-length"
                )
            for q, completion in zip(group, found["completion"], strict=True):
                said[q["question_id"]].append(completion[0]["content"])
            told = read_json(sidecar(part))
            tokens, ended = tokens + told["tokens"], ended + told["ended_share"] * len(group)
            answers += len(group)
    return said, {"answers": answers, "tokens": tokens, "ended_share": round(ended / answers, 6)}


def _conversation(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    told = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answers, turns[1:], strict=True):
        told += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return told


def _write(out: Path, request: dict[str, Any], said: dict[Any, list[str]], counts: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "question_id": name,
            "answer_id": value_digest([request, name])[:22],
            "model_id": request["model_id"],
            "choices": [{"index": 0, "turns": turns}],
        }
        for name, turns in said.items()
    ]
    with atomic_path(out) as temporary:  # the answers are there only when what they were made from is
        temporary.write_text(jsonl(rows), encoding="utf-8")
        made = {"request": request, **counts, "sha256": file_digest(temporary)}
        write_json(sidecar(out), made)
    return made
