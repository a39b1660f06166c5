"""The command line: `sfumato COMMAND ...`, one file a command in this folder.

A command called `x-y` is the function `x_y` in `x_y.py`, one called `x` is the function
`x(arguments: list[str])` in `x.py`; the first line of its docstring is its line in the help.
Heavy libraries are imported after the arguments are checked, so that `--help` answers at once.

Exit codes: 0 done; 1 unforeseen error; 2 wrong input (`UserError`, or arguments that do not
parse); 3 a value that is not finite (`NumericalError`); 130 stopped with Ctrl-C. Errors are one
sentence on stderr; `SFUMATO_DEBUG=1` adds the traceback.
"""

import os
import sys
from collections.abc import Sequence

from sfumato.errors import NumericalError, UserError, unknown

CODES: dict[type[BaseException], int] = {UserError: 2, NumericalError: 3, KeyboardInterrupt: 130}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: Arguments without the program's name; None: the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _dispatch(words)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # the reader has gone (`sfumato info fashion | head`): nothing left to say, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("SFUMATO_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        print(f"sfumato: {_sentence(error)}", file=sys.stderr)
        return next((code for kind, code in CODES.items() if isinstance(error, kind)), 1)


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
        return "stopped"
    if isinstance(error, (UserError, NumericalError)):
        return text
    return (
        f"unforeseen {type(error).__name__}: {text or 'no message'} (SFUMATO_DEBUG=1 shows where)"
    )
