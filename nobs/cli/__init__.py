"""`nobs` and `python -m nobs`: dumps and black boxes, read again. stdout carries the answer, stderr the rest.

One module a command: `run` answers and gives the exit code, its docstring is the help, `options` declares what may be typed.
Nothing here needs torch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .._launch import installed_version
from .._names import printable
from ..errors import NobsError, reason
from . import check, diff, export, merge, plot, recover, show, watch

_EXAMPLES = """examples:
  nobs show                                the newest run below ./crashes: its dump, or its black box
  nobs show RUN --layer conv1              all that is known of a layer
  nobs show DUMP --json | jq .failure      for another program
  nobs diff RUN1 RUN2                      which layers differ first, step by step
  nobs merge crashes                       all ranks of a run: which rank, layer and step first
  nobs recover crashes                     the report that a killed process could not write
  nobs watch                               the newest run, live
  nobs check crashes && deploy             whether anything failed
  nobs plot DUMP -o crash.png
  nobs export DUMP -f trace                for Perfetto; or as CSV, npz, for TensorBoard

exit codes: 0 fine, 1 `check` found a failure, 2 wrong usage or a file that cannot be read or written"""


class Command(Protocol):
    """What a module of a command has."""

    EXAMPLES: str

    def options(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, options: argparse.Namespace) -> int: ...


COMMANDS: dict[str, Command] = {
    "show": show,
    "merge": merge,
    "plot": plot,
    "diff": diff,
    "check": check,
    "recover": recover,
    "export": export,
    "watch": watch,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    _prepare_stdout()
    try:
        try:
            options = _parser().parse_args(argv)
            command: Callable[[argparse.Namespace], int] = options.command
            return command(options)
        finally:
            sys.stdout.flush()  # here, where what goes wrong can still be said
    except NobsError as error:
        print("nobs:", "\n".join(map(printable, str(error).split("\n"))), file=sys.stderr)
        return 2
    except BrokenPipeError:  # `nobs show dump | head` has seen enough
        _silence_stdout()
        return 0
    except OSError as error:
        _silence_stdout()
        print(f"nobs: cannot write to stdout: {reason(error)}", file=sys.stderr)
        return 2


def _prepare_stdout() -> None:
    """A stdout that takes any layer name, also where it is closed or knows ASCII only; closed, stderr swallows."""
    if sys.stdout is None or sys.stdout.closed:
        sys.stdout = io.StringIO()
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    """Nothing more goes to stdout, so that the interpreter does not complain about it at its end."""
    with contextlib.suppress(OSError):  # one that is no file has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    def described(about: str, examples: str) -> dict[str, Any]:
        return {"description": about, "epilog": examples, "formatter_class": argparse.RawDescriptionHelpFormatter}

    parser = argparse.ArgumentParser(prog="nobs", **described("Read what the flight recorder wrote.", _EXAMPLES))
    parser.add_argument("-V", "--version", action="version", version=f"nobs {installed_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        about = module.run.__doc__ or ""
        command = commands.add_parser(name, help=about.splitlines()[0], **described(about, module.EXAMPLES))
        module.options(command)
        command.set_defaults(command=module.run)
    return parser
