"""`nobs show` and `nobs plot`: a dump, read again. stdout carries the answer, stderr the rest.

Exit codes: 0 fine, 2 wrong usage or a file that cannot be read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import _codec
from ._launch import installed_version
from ._load import find, load
from .errors import NobsError, reason

_EXAMPLES = """examples:
  nobs show crashes                        the newest dump below ./crashes
  nobs show DUMP --json | jq .failure      for another program
  nobs plot DUMP -o crash.png

exit codes: 0 fine, 2 wrong usage or a file that cannot be read or written"""

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    _prepare_stdout()
    try:
        try:
            options = _parser().parse_args(argv)
            command: Command = options.command
            return command(options)
        finally:
            sys.stdout.flush()  # here, where what goes wrong can still be said
    except NobsError as error:
        print(f"nobs: {error}", file=sys.stderr)
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


def _show(options: argparse.Namespace) -> int:
    """Print the report of a dump."""
    dump = find(options.path)
    report = load(dump)
    if options.json:
        print(_codec.dumps(report), end="")
        return 0
    from .render.terminal import print_report  # rich is not needed for --json

    print_report(report, dump)
    return 0


def _plot(options: argparse.Namespace) -> int:
    """Draw a dump as PNG."""
    dump = find(options.path)
    report = load(dump)
    out = options.output or dump.with_suffix(".png")
    if out == dump:
        print(f"nobs: {out} is the dump itself; type -o FILE for another name", file=sys.stderr)
        return 2
    if out.suffix.lower() != ".png":
        print(f"nobs: {out}: pictures are PNG files; type -o {out.name or 'crash'}.png", file=sys.stderr)
        return 2
    from .render.figure import save_png  # matplotlib takes a second

    try:
        if options.output and out.exists() and not options.force:
            print(f"nobs: {out} exists; add --force to write over it, or -o FILE for another name", file=sys.stderr)
            return 2
        save_png(report, out)
    except (OSError, ValueError) as error:  # a name with a NUL, numbers that no axis can hold
        print(f"nobs: cannot write {out}: {reason(error)}", file=sys.stderr)
        return 2
    print(out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nobs",
        description="Read the dumps of the flight recorder.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"nobs {installed_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help=_show.__doc__, description=_show.__doc__)
    show.add_argument("--json", action="store_true", help="print the dump as JSON, and nothing else")
    show.set_defaults(command=_show)
    plot = commands.add_parser("plot", help=_plot.__doc__, description=_plot.__doc__)
    plot.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to; beside the dump without it")
    plot.add_argument("-f", "--force", action="store_true", help="write over a file that exists")
    plot.set_defaults(command=_plot)
    for command in (show, plot):
        command.add_argument("path", type=Path, metavar="DUMP", help="a dump, or a folder: the newest dump in it")
    return parser
