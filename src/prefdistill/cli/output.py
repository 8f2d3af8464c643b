"""What verbs print, and the check that a verb runs in one process."""

import os

from prefdistill.core.processes import require_one_process


def main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def show(text: str) -> None:
    """Print for a person, once. Under --json this goes to stderr; stdout is for the JSON object alone."""
    if main_process():
        print(text)


def one_process(verb: str) -> None:
    """Refuse to run under `accelerate launch` or torchrun, for verbs whose processes would write the same files."""
    require_one_process(f"`prefdistill {verb}`")
