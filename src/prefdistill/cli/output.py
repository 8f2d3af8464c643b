"""What verbs print."""

import os


def main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def show(text: str) -> None:
    """Print for a person, once. Under --json this goes to stderr; stdout is for the JSON object alone."""
    if main_process():
        print(text)
