"""The command line: verb -> options -> function."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run a command in this process and return its exit status.

    0 done, 2 the input is wrong, 1 it failed while running, 130 interrupted.
    """
    from prefdistill.cli.app import call

    return call(sys.argv[1:] if argv is None else argv)
