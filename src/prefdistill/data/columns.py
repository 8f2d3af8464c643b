"""Column names of preference data."""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

SIDES = ("chosen", "rejected")  # the two responses of a preference pair
SCORES = ("score_chosen", "score_rejected")  # how good each of them is, where the data say so


def ended_column(response: str) -> str:
    """Return the name of the optional column that says whether a response has its end token; `sample` writes it."""
    return f"{response}_ended"


def tokens_column(response: str) -> str:
    """Return the name of the optional column with the number of tokens sampled for a response, end token included."""
    return f"{response}_tokens"


def ids_column(response: str) -> str:
    """Return the name of the optional column with the token ids sampled for a response, end token included."""
    return f"{response}_ids"


def check_column(response: str) -> str:
    """Return the name of the column that says of which prompt and tokens the ids are, see `data.sampled`."""
    return f"{response}_check"


def sample_columns(response: str) -> tuple[str, ...]:
    """Return the names of the columns that `sample` writes beside the text of a response."""
    return ended_column(response), tokens_column(response), ids_column(response), check_column(response)


def with_response(dataset: "Dataset", name: str, new: str) -> "Dataset":
    """Return a data set with a response under another name, and what `sample` writes beside it."""
    names = zip((name, *sample_columns(name)), (new, *sample_columns(new)), strict=True)
    return dataset.rename_columns({old: new for old, new in names if old in dataset.column_names})


TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")  # what the chat template reads beside messages
# Columns that other trainers give a meaning, and that are not read here.
MEANINGFUL = ("images", "image", "weight", "margin")


def unread_columns(columns: Iterable[str], responses: Collection[str] = SIDES) -> list[str]:
    """Return the columns of preference data that nothing reads, those that are `MEANINGFUL` first."""
    names = list(columns)
    sampled = {name for name in names if ended_column(name) in names} | {*responses, *SIDES}
    read = {"prompt", "system", *TEMPLATE_COLUMNS, *SCORES, *sampled} | {
        column for name in sampled for column in sample_columns(name)
    }
    return sorted((name for name in names if name not in read), key=lambda name: name not in MEANINGFUL)


def unread_message(unread: Collection[str]) -> str:
    """Return a line about columns that are not read."""
    lost = [f"`{name}`" for name in unread if name in MEANINGFUL]
    text = f"columns that are not read: {', '.join(unread)}"
    return text + (f"; {', '.join(lost)} would change what other trainers learn" if lost else "")
