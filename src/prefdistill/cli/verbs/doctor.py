"""`prefdistill doctor`: checks before a run."""

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from prefdistill.cli.output import show
from prefdistill.cli.verbs.common import Overridable
from prefdistill.core.errors import UserError
from prefdistill.core.options import Options, Override
from prefdistill.data.options import Columns, Data, Lengths
from prefdistill.models.options import Form, Models, Trust


class DoctorFlags(Overridable, Trust, Columns):
    data: str | None = Data.redefault("train", None)
    test: str | None = Data.redefault("test", None)
    teacher: str | None = Models.redefault("teacher", None)
    student: str | None = Models.redefault("student", None)
    teacher_tokenizer: str | None = Models.redefault("teacher_tokenizer", None)
    teacher_chat_template: str | None = Models.redefault("teacher_chat_template", None)
    teacher_system_prompt: str | None = Models.redefault("teacher_system_prompt", None)
    teacher_response_prefix: str | None = Models.redefault("teacher_response_prefix", None)
    teacher_template_kwargs: Options = Field(
        default_factory=dict, description=Models.model_fields["teacher_template_kwargs"].description
    )
    recipe: Path | None = Field(None, description="Recipe (YAML) whose run is planned; the flags win over it.")
    out: Path = Field(Path("runs"), description="Where the run will write; its disk is checked.")
    max_length: PositiveInt | None = Field(
        None, description="Tokens of prompt and response; default: the recipe's, or 1024."
    )
    max_prompt_length: PositiveInt | None = Lengths.redefault("max_prompt_length", None)


def doctor(options: DoctorFlags) -> dict[str, Any]:
    """Check data, chat template, token boundaries, vocabularies, memory and disk before anything runs. No weights are
    loaded. Status 2 if something is wrong, 0 if there are only warnings and notes. KEY=VALUE is for the recipe.

    Example: prefdistill doctor --data pairs.jsonl --test test.jsonl --teacher my/teacher --student my/student
    """
    if options.overrides and options.recipe is None:
        raise UserError(f"{options.overrides[0]!r} is an override of a recipe; give --recipe with it")
    student: Any = options.student
    if student is not None and student.lstrip().startswith("{"):
        from prefdistill.core.yaml import parse_value

        student = parse_value(student, "--student")
    form = Form(**{name: getattr(options, f"teacher_{name}") for name in Form.model_fields})
    if options.recipe is None:
        from prefdistill.data.truncation import Truncation
        from prefdistill.experiment.doctor import as_text, examine

        checkup = examine(
            options.data,
            options.test,
            options.teacher,
            student,
            Truncation(options.max_length or 1024, options.max_prompt_length),
            out=options.out,
            trust_remote_code=options.trust_remote_code,
            columns=options,
            teacher_tokenizer=options.teacher_tokenizer,
            teacher_form=form,
        )
    else:
        from prefdistill.experiment.recipe import load_recipe

        flags = {
            "data.train": options.data,
            "data.test": options.test,
            "data.columns": options.columns or None,
            "data.chat_template_kwargs": options.chat_template_kwargs or None,
            "data.max_length": options.max_length,
            "data.max_prompt_length": options.max_prompt_length,
            "model.teacher": options.teacher,
            "model.student": student,
            "model.teacher_tokenizer": options.teacher_tokenizer,
            **{f"model.teacher_{name}": value for name, value in form if value != getattr(Form(), name)},
            "model.trust_remote_code": options.trust_remote_code or None,
        }
        changes = [Override(key, value) for key, value in flags.items() if value is not None]
        recipe = load_recipe(options.recipe, [*options.overrides, *changes])
        from prefdistill.experiment.doctor import as_text, examine

        checkup = examine(recipe=recipe, out=options.out)
    show(as_text(checkup))
    return checkup.to_json()
