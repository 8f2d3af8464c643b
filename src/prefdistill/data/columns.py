"""Column names of preference data."""

from collections.abc import Collection, Iterable

SIDES = ("chosen", "rejected")  # the two responses of a preference pair
SCORES = ("score_chosen", "score_rejected")  # how good each of them is, where the data say so


def ended_column(response: str) -> str:
    """Return the name of the optional column that says whether a response has its end token; `sample` writes it."""
    return f"{response}_ended"


def tokens_column(response: str) -> str:
    """Return the name of the optional column with the number of tokens sampled for a response, end token included."""
    return f"{response}_tokens"


TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")  # what the chat template reads beside messages
# Columns that other trainers give a meaning, and that are not read here.
MEANINGFUL = ("images", "image", "weight", "margin")


def unread_columns(columns: Iterable[str], responses: Collection[str] = SIDES) -> list[str]:
    """Return the columns of preference data that nothing reads, those that are `MEANINGFUL` first."""
    names = list(columns)
    sampled = {name for name in names if ended_column(name) in names} | {*responses, *SIDES}
    read = {"prompt", "system", *TEMPLATE_COLUMNS, *SCORES, *sampled} | {
        f(name) for f in (ended_column, tokens_column) for name in sampled
    }
    return sorted((name for name in names if name not in read), key=lambda name: name not in MEANINGFUL)


def unread_message(unread: Collection[str]) -> str:
    """Return a line about columns that are not read."""
    lost = [f"`{name}`" for name in unread if name in MEANINGFUL]
    text = f"columns that are not read: {', '.join(unread)}"
    return text + (f"; {', '.join(lost)} would change what other trainers learn" if lost else "")
