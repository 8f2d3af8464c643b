"""The one exception that stands for a mistake in what the user gave us."""


class UserError(ValueError):
    """What is wrong, where, and how to fix it. The command line prints it and exits with status 2."""
