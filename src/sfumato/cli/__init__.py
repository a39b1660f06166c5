"""The command line: `sfumato COMMAND ...`, one file a command in this folder.

A command called `x-y` is the function `x_y` in `x_y.py`, one called `x` is the function
`x(arguments: list[str])` in `x.py`; the first line of its docstring is its line in the help.
Heavy libraries are imported after the arguments are checked, so that `--help` answers at once.

Exit codes: 0 done; 1 unforeseen error; 2 wrong input (`UserError`, arguments that do not parse, or
files and memory that the system refuses); 3 a value that is not finite (`NumericalError`); 130
stopped with Ctrl-C, 129 by SIGHUP, 143 by SIGTERM. Errors are one sentence on stderr;
`SFUMATO_DEBUG=1` adds the traceback.
"""

import codecs
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress

from sfumato.errors import NumericalError, Stopped, UserError, system_error, unknown

CODES: dict[type[BaseException], int] = {UserError: 2, NumericalError: 3, KeyboardInterrupt: 130}
NARROWEST = 40
"""Fewest columns for which help and tables are laid out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: Arguments without the program's name; None: the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _prepare_streams()
    try:
        try:
            _dispatch(words)
        except SystemExit:  # of the parser, after a help or a complaint
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # the reader has gone (`sfumato info fashion | head`): nothing left to say, not even at exit
        _discard_output()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("SFUMATO_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        reported = system_error(error) or error
        with suppress(OSError):  # stderr may be closed, or on a full disk
            print(f"sfumato: {_sentence(reported)}", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # the error may be that of stdout
            _discard_output()
        if isinstance(error, Stopped):
            return 128 + error.signal
        return next((code for kind, code in CODES.items() if isinstance(reported, kind)), 1)


def _prepare_streams() -> None:
    """Let every text be printed, on every terminal, and without one."""
    codecs.register_error(_printable.__name__, _printable)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller (`>&-`)
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # else a test's or a notebook's
            stream.reconfigure(errors=_printable.__name__)
    columns = shutil.get_terminal_size().columns
    if columns < NARROWEST or "COLUMNS" in os.environ:
        # on 0 columns rich prints nothing, on 1 the parser's help does not end
        os.environ["COLUMNS"] = str(max(columns, NARROWEST))


def _printable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode names that are not UTF-8 as their bytes, and what else does not fit as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def _discard_output() -> None:
    """Drop text that stdout still holds, and whatever is printed later.

    Else Python would try to write it at exit, and complain.
    """
    with suppress(OSError, ValueError):  # no file: a test's, or a notebook's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> None:
    from sfumato.registry import find, names

    if not arguments:
        print(_overview(), file=sys.stderr)
        raise UserError("no command was given: name one of those above")
    command, *rest = arguments
    if command in ("-h", "--help"):
        print(_overview())
    elif command in ("-V", "--version"):
        from sfumato import __version__

        print(f"sfumato {__version__}")
    elif command.replace("-", "_") not in names("cli"):
        raise unknown("command", command, [name.replace("_", "-") for name in names("cli")])
    else:
        find("cli", command.replace("-", "_"))(rest)


def _overview() -> str:
    from sfumato.registry import find, names

    width = max(map(len, names("cli")))
    commands = [
        f"  {name.replace('_', '-'):<{width}}  {find('cli', name).__doc__.splitlines()[0]}\n"
        for name in names("cli")
    ]
    return (
        "usage: sfumato COMMAND ...\n\nLatent diffusion: train, sample, measure.\n\n"
        f"commands:\n{''.join(commands)}\n"
        "`sfumato COMMAND --help` lists the options of a command.\n"
        "`sfumato --version` prints the version."
    )


def _sentence(error: BaseException) -> str:
    """The text of an error, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return text or "stopped"
    if isinstance(error, (UserError, NumericalError)):
        return text
    return (
        f"unforeseen {type(error).__name__}: {text or 'no message'} (SFUMATO_DEBUG=1 shows where)"
    )
