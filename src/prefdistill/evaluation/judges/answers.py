"""Sample a model's answers to MT-Bench's questions; the second turn sees the answer to the first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import FileArtifact, made_of
from prefdistill.core.files import jsonl, value_digest
from prefdistill.core.options import Options, takes
from prefdistill.data.truncation import Truncation
from prefdistill.evaluation.judges.inputs import read_questions
from prefdistill.evaluation.judges.options import Answering
from prefdistill.models.identity import model_key
from prefdistill.models.load import load_model, load_tokenizer, ready
from prefdistill.models.options import Loading
from prefdistill.sampling.files import sample_responses

# FastChat's temperatures by category
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


@takes(Answering)
def answer_questions(model: str, questions: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Write answers in FastChat's format, sampled at FastChat's temperature of each category (a question's own
    `required_temperature` wins). A finished file of the same request is reused; an interrupted one is resumed.

    Args:
        model: Hub name or directory.
        questions: FastChat's question.jsonl.
        out: the .jsonl file to write; its seal `OUT.meta.json` holds the request.
        options: fields of `prefdistill.evaluation.judges.options.Answering`, see docs/options.md.

    Raises:
        UserError: if a file cannot be read, a question does not fit, or `out` holds other work.

    Example:
        >>> answer_questions("my/student", Path("question.jsonl"), Path("answers.jsonl"))   # doctest: +SKIP
    """
    settings = Answering.checked("answer_questions", **options)
    if out.suffix != ".jsonl" or out.is_dir():
        raise UserError(f"{out}: --out names a file for the answers that ends in .jsonl")
    rows, variables = read_questions(questions, settings.max_questions), settings.chat_template_kwargs
    request = {
        "model": {"name": model, "key": model_key(model)},
        "model_id": settings.name or Path(model).name,
        "questions": value_digest(rows),
        "max_new_tokens": settings.max_new_tokens,
        "max_length": settings.max_length,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "dtype": settings.dtype,
        **({"chat_template_kwargs": variables} if variables else {}),
        "temperatures": {str(row["question_id"]): temperature(row) for row in rows},
    }
    artifact = FileArtifact("answers", out, request, "judge answers")
    with artifact.session() as seal:
        if seal is None:
            tokenizer = load_tokenizer(model, trust_remote_code=settings.trust_remote_code)
            loaded = ready(load_model(model, **settings.part(Loading)))
            sampling = {
                "max_new_tokens": settings.max_new_tokens,
                "truncation": Truncation(settings.max_length),
                "batch_size": settings.batch_size,
                "seed": settings.seed,
            }
            answers, counts = _sample_answers(loaded, tokenizer, rows, artifact.parts, sampling, variables)
            text = jsonl(_answer_rows(artifact.request, answers))
            seal = artifact.seal(lambda path: path.write_text(text, encoding="utf-8"), counts)
    return {"out": str(out), **{key: seal[key] for key in ("answers", "tokens", "ended_share")}}


def temperature(question: dict[str, Any]) -> float:
    """Return the temperature of the question's category, unless it has its own."""
    return float(question.get("required_temperature", TEMPERATURES.get(question["category"], OTHER_TEMPERATURE)))


def _sample_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[dict[str, Any]],
    parts: Path,
    options: dict[str, Any],
    variables: Options,
) -> tuple[dict[Any, list[str]], dict[str, Any]]:
    """Return the answers to each question, and the counts for the seal."""
    answers: dict[Any, list[str]] = {q["question_id"]: [] for q in questions}
    tokens, ended, count = 0, 0.0, 0
    for turn in range(max(len(q["turns"]) for q in questions)):
        for degree in sorted({temperature(q) for q in questions}):
            group = [q for q in questions if temperature(q) == degree and len(q["turns"]) > turn]
            if not group:
                continue
            part = parts / f"turn{turn + 1}-temperature{degree:g}.jsonl"
            prompts = [_conversation(q["turns"][: turn + 1], answers[q["question_id"]]) for q in group]
            inputs = {"chat_template_kwargs": variables} if variables else {}
            rows = [{"prompt": prompt, **inputs} for prompt in prompts]
            sampled = sample_responses(model, Dataset.from_list(rows), tokenizer, part, temperature=degree, **options)
            if len(sampled) < len(group):
                raise UserError(
                    f"turn {turn + 1}: {len(group) - len(sampled)} conversations leave no room for an answer; "
                    "raise --max-length"
                )
            for q, completion in zip(group, sampled["completion"], strict=True):
                answers[q["question_id"]].append(completion[0]["content"])
            counts = made_of(part)
            tokens, ended = tokens + counts["tokens"], ended + counts["ended_share"] * len(group)
            count += len(group)
    return answers, {"answers": count, "tokens": tokens, "ended_share": round(ended / count, 6)}


def _conversation(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answers, turns[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return messages


def _answer_rows(request: dict[str, Any], answers: dict[Any, list[str]]) -> list[dict[str, Any]]:
    return [
        {
            "question_id": question_id,
            "answer_id": value_digest([request, question_id])[:22],
            "model_id": request["model_id"],
            "choices": [{"index": 0, "turns": turns}],
        }
        for question_id, turns in answers.items()
    ]
