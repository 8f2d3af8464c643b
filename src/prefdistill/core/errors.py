"""The exception for wrong input."""


class UserError(ValueError):
    """The user's input is wrong: what is wrong, where, and how to fix it. The command line exits with status 2.

    Args:
        messages: what is wrong; several are numbered, in one line.
        where: the source of the input, such as a file, in front of the messages.

    Example:
        >>> print(UserError("seed is -1", "name is missing", where="recipe.yaml"))
        recipe.yaml: (1) seed is -1 (2) name is missing
    """

    def __init__(self, *messages: str, where: str = "") -> None:
        super().__init__(*messages)
        self.messages, self.where = messages, where

    def __str__(self) -> str:
        text = self.messages[0] if self.messages else ""
        if len(self.messages) > 1:
            text = " ".join(f"({number}) {message}" for number, message in enumerate(self.messages, 1))
        return f"{self.where}: {text}" if self.where else text
