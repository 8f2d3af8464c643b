"""What several verbs share: help texts, and fields of their sections."""

import sys
from typing import Annotated

from pydantic import Field

from prefdistill.core.options import Argument, Section

PAIRS = "Preference pairs: Hub name (org/name#split), directory, .jsonl, .jsonl.gz, .parquet, .csv or .json."
MODEL = "Hub name or directory of the model."


class Overridable(Section):
    """A verb with `KEY=VALUE` arguments."""

    overrides: Annotated[tuple[str, ...], Argument("KEY=VALUE")] = Field(
        (), description="Overrides, e.g. training.learning_rate=1e-6"
    )


def command_line() -> str:
    return " ".join(["prefdistill", *sys.argv[1:]])
