"""Read the inputs of a judge: FastChat's questions, prompts and answers, AlpacaEval's outputs."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, StrictFloat, StrictInt, StrictStr, ValidationError

from prefdistill.core.errors import UserError
from prefdistill.core.file_artifact import made_of
from prefdistill.core.files import file_digest
from prefdistill.core.progress import say
from prefdistill.core.text import surrogate
from prefdistill.data import sources


@dataclass(frozen=True)
class Prompt:
    """A prompt for a judge, with {fields} for what is judged."""

    name: str
    system: str
    template: str

    def messages(self, fields: Mapping[str, str]) -> list[dict[str, str]]:
        """Return a system message, unless it is empty, and a user message."""
        system = [{"role": "system", "content": fill(self.system, fields)}] if self.system.strip() else []
        return [*system, {"role": "user", "content": fill(self.template, fields)}]

    def require(self, names: Sequence[str], where: Path | str) -> None:
        if missing := [name for name in names if f"{{{name}}}" not in self.template]:
            raise UserError(f"{where}: the prompt {self.name!r} has no {{{missing[0]}}}")


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Return the template with each {name} replaced, in one pass: other braces, as in an answer, stay.

    Example:
        >>> fill("{question} {x}: {answer}", {"question": "Why?", "answer": "{question}"})
        'Why? {x}: {question}'
    """
    names = "|".join(map(re.escape, fields))
    return re.sub(rf"\{{({names})\}}", lambda match: fields[match[1]], template)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl, .jsonl.gz or .parquet file, or of a JSON file that holds a list of them."""
    packed = path.name.endswith((".jsonl.gz", ".parquet")) and path.is_file()  # other types that `sample` writes
    rows: list[Any] = list(sources.read_rows(str(path))) if packed else _json_rows(path)
    if not rows:
        raise UserError(f"{path}: there are no rows in it")
    for place, row in enumerate(rows):
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {place}: not a JSON object")
        if surrogate(json.dumps(row, ensure_ascii=False, default=str)) is not None:
            raise UserError(f"{path}, row {place}: it holds half a surrogate pair (\\ud800 to \\udfff); fix the text")
    return rows


def _json_rows(path: Path) -> list[Any]:
    text = read_text(path)
    # not str.splitlines: it also splits at characters that JSON allows inside strings
    pieces = [(0, text)] if text.lstrip().startswith("[") else list(enumerate(text.split("\n")))
    rows: list[Any] = []
    for line, piece in pieces:
        try:
            value = json.loads(piece) if piece.strip() else []
        except (ValueError, RecursionError) as error:
            within, reason = (error.lineno, error.msg) if isinstance(error, json.JSONDecodeError) else (1, str(error))
            raise UserError(f"{path}, line {line + within}: not valid JSON ({reason})") from error
        rows += value if isinstance(value, list) else [value]
    return rows


def evenly(rows: list[Any], most: int | None) -> list[Any]:
    """Return at most `most` rows, evenly spaced over all of them."""
    return rows if most is None or most >= len(rows) else [rows[n * len(rows) // most] for n in range(most)]


class _Question(BaseModel):
    question_id: StrictInt | StrictStr
    category: StrictStr
    turns: list[StrictStr] = Field(min_length=1)
    required_temperature: StrictFloat | StrictInt = Field(0, ge=0, le=sys.float_info.max)


# what is wrong with a row, by the field that is
_ADVICE = {
    "question_id": "a question has a `question_id` of its own, a whole number or text",
    "category": "a question has a `category`",
    "turns": "a question has `turns`, a list of texts",
    "required_temperature": "`required_temperature` is a finite number, 0 or more; or leave it out",
}


def read_questions(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Return questions with `question_id`, `category`, `turns` and, optionally, `required_temperature`; at most `most`,
    evenly spaced over the file.
    """
    rows, seen = read_rows(path), set()
    for place, row in enumerate(rows):
        try:
            question = _Question.model_validate(row)
        except ValidationError as error:
            raise UserError(f"{path}, row {place}: {_ADVICE[str(error.errors()[0]['loc'][0])]}") from error
        if len(question.turns) > 2:
            count = len(question.turns)
            raise UserError(f"{path}, row {place}: {count} turns; the judge's prompts are for one and two")
        if question.question_id in seen:
            raise UserError(f"{path}, row {place}: {_ADVICE['question_id']}")
        seen.add(question.question_id)
    return evenly(rows, most)


def read_prompts(path: Path, names: Sequence[str]) -> dict[str, Prompt]:
    """Return the named prompts of a file with `name`, `system_prompt` and `prompt_template`."""
    prompts = {}
    for place, row in enumerate(read_rows(path)):
        name, system, template = row.get("name"), row.get("system_prompt") or "", row.get("prompt_template")
        if not (isinstance(name, str) and isinstance(system, str) and isinstance(template, str)):
            raise UserError(
                f"{path}, row {place}: a prompt has `name`, `prompt_template` and, if any, `system_prompt`, all text"
            )
        prompts[name] = Prompt(name, system, template)
    if missing := [name for name in names if name not in prompts]:
        raise UserError(f"{path}: no prompt {missing[0]!r}; it has {', '.join(prompts)}")
    return {name: prompts[name] for name in names}


def read_answers(path: Path, questions: Sequence[dict[str, Any]], what: str) -> dict[Any, list[str]]:
    """Return the turns of the first choice for each question, from FastChat's answer files."""
    answers: dict[Any, list[str]] = {}
    for place, row in enumerate(read_rows(path)):
        try:
            turns = row["choices"][0]["turns"]
            answers[row["question_id"]] = turns
            if not (isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)):
                raise TypeError
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f'{path}, row {place}: an answer is {{"question_id": ..., "choices": [{{"turns": ["...", "..."]}}]}}'
            ) from error
    missing = [q["question_id"] for q in questions if len(answers.get(q["question_id"], [])) < len(q["turns"])]
    if missing:
        listed = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{path}: no {what} to all turns of {len(missing)} questions ({listed})")
    return answers


def read_outputs(path: Path) -> dict[str, str]:
    """Return instruction -> output, from AlpacaEval's files (`instruction`, `output`) or those of `prefdistill sample`
    (`prompt`, `completion`).
    """
    outputs: dict[str, str] = {}
    rows = read_rows(path)
    if unseen := [name for name in ("tools", "documents") if any(row.get(name) for row in rows)]:
        say(f"{path}: the judge does not see {' and '.join(unseen)}, with which the responses were sampled")
    for place, row in enumerate(rows):
        if "instruction" in row and "output" in row:
            instruction, output = row["instruction"], row["output"]
        elif "prompt" in row and "completion" in row:
            instruction, output = _text(row["prompt"]), _text(row["completion"])
        else:
            instruction = output = None
        if not (isinstance(instruction, str) and isinstance(output, str)):
            raise UserError(
                f"{path}, row {place}: give `instruction` and `output`, or `prompt` and `completion`, one message each"
            )
        if instruction in outputs:
            raise UserError(f"{path}, row {place}: a second output to the same instruction; keep one")
        outputs[instruction] = output
    return outputs


def _text(value: Any) -> Any:
    """Return plain text, or the text of a conversation of one message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return value[0].get("content")
    return value


def provenance(path: Path) -> dict[str, Any]:
    """Return the digest of an answer file, the models it names and, if `prefdistill` wrote it, its request."""
    rows = read_rows(path)
    names = {str(row[key]) for row in rows for key in ("model_id", "generator") if row.get(key)}
    source: dict[str, Any] = {"file": path.name, "sha256": file_digest(path), "models": sorted(names)}
    if seal := made_of(path):
        source["made_from"] = seal.get("request")
    return source
