"""Run a command line: parse it, call its verb, print the result, turn errors into an exit status and a message."""

import errno
import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prefdistill import __version__
from prefdistill.cli.flags import CONTEXT, Call, command
from prefdistill.cli.output import main_process
from prefdistill.cli.verbs import GROUPS, ON_SEVERAL, VERBS
from prefdistill.core.errors import UserError
from prefdistill.core.processes import require_one_process
from prefdistill.core.progress import quiet_libraries
from prefdistill.core.text import printable, surrogate

# Some typers carry their own click: this is the error of a bad command line in either.
UsageError: type[Any] = typer.BadParameter.__mro__[1]
OK, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
HELP = (
    "Preference distillation for small language models: from pairs, a teacher and a student to an aligned student and "
    "a comparison report with controls and confidence intervals."
)


class Commands(Mapping[str, Any]):
    """The commands of the verbs that start with some words; a command is built when it is looked up."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        names = [name.removeprefix(prefix) for name in VERBS if name.startswith(prefix)]
        self.names = list(dict.fromkeys(name.partition(" ")[0] for name in names))

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        if self.prefix + name in VERBS:
            return command(self.prefix + name, VERBS[self.prefix + name])
        return group(name, GROUPS.get(name, ""), f"{self.prefix}{name} ")

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def group(name: str, help: str, prefix: str = "") -> Any:
    """The command of a group of verbs, or of all with an empty prefix."""
    app = typer.Typer(
        name=name,
        help=help,
        cls=TyperGroup,
        add_completion=False,
        rich_markup_mode=None,
        context_settings=CONTEXT,
    )
    app.callback(invoke_without_command=not prefix)(_version if not prefix else lambda: None)
    commands = typer.main.get_command(app)
    commands.commands = Commands(prefix)  # type: ignore[attr-defined]
    return commands


def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def call(arguments: list[str]) -> int:
    """Run a command line and return its exit status."""
    try:
        if invalid := [text for text in arguments if surrogate(text) is not None]:
            raise UserError(f"{invalid[0]!a} is not valid UTF-8; rename the file or change the argument")
        root = group("prefdistill", HELP)
        parsed = root.main(args=arguments or ["--help"], prog_name="prefdistill", standalone_mode=False)
    except UserError as error:
        return _fail(str(error), WRONG_INPUT, debug=False)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        return _fail(f"{error.format_message()}{hint}", WRONG_INPUT, debug=False)
    return run(parsed) if isinstance(parsed, Call) else int(parsed or OK)


def run(parsed: Call) -> int:
    """Run a verb and return its exit status."""
    quiet_libraries()
    try:
        with redirect_stdout(sys.stderr) if parsed.as_json else nullcontext():
            options = parsed.options()
            if parsed.name not in ON_SEVERAL:
                require_one_process(f"`prefdistill {parsed.name}`")
            result = parsed.verb(options)
        if parsed.as_json and main_process():
            print(json.dumps(result, ensure_ascii=False))
        return WRONG_INPUT if result.get("ok") is False else OK  # a verb that checks has found an error
    except UserError as error:
        return _fail(str(error), WRONG_INPUT, parsed.debug)
    except KeyboardInterrupt:
        print("prefdistill: interrupted; finished work is kept, the same command resumes it", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if parsed.debug:
            raise
        return _failure(error)


def _failure(error: Exception) -> int:
    """The exit status of what went wrong while running."""
    from prefdistill.core.files import disk_full

    filename, reason = getattr(error, "filename", None), " ".join(str(error).split())
    if disk_full(error):
        where = f" for {filename}" if filename else ""
        return _fail(f"no room on the disk{where} ({reason}); free some, and the same command resumes", FAILED)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return _fail(f"{str(filename)[:60]}...: the name is too long; give a shorter one", WRONG_INPUT)
    if isinstance(error, PermissionError) and filename:
        return _fail(f"{filename}: permission denied; use another path, or check its owner and mode", WRONG_INPUT)
    name = type(error).__name__
    return _fail(f"{name}: {reason or name}\n(--debug shows where)", FAILED)


def _fail(message: str, status: int, debug: bool = False) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    lines = map(printable, message.split("\n"))  # names and text of files may hold control characters
    print("prefdistill:", "\n".join(lines), file=sys.stderr)
    return status
