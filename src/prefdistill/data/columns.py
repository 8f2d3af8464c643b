"""Column names of preference data."""

SIDES = ("chosen", "rejected")  # the two responses of a preference pair
SCORES = ("score_chosen", "score_rejected")  # how good each of them is, where the data say so


def ended_column(response: str) -> str:
    """Return the name of the optional column that says whether a response has its end token; `sample` writes it."""
    return f"{response}_ended"


def tokens_column(response: str) -> str:
    """Return the name of the optional column with the number of tokens sampled for a response, end token included."""
    return f"{response}_tokens"
