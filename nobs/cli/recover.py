"""`nobs recover`."""

from __future__ import annotations

import argparse
import sys

from .. import _codec
from .._find import dump_of, find_black_box
from .._load import is_black_box, load
from .._names import printable
from .._publish import write
from ..errors import UnreadableDump, explain
from ._common import json_option, path_option

EXAMPLES = """examples:
  nobs recover                       of the newest run below ./crashes
  nobs recover crashes/RUN/rank00000.blackbox"""


def options(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    path_option(parser)
    parser.add_argument("-f", "--force", action="store_true", help="write a report where the run's own, or an earlier one, lies")
    json_option(parser, "the report")


def run(options: argparse.Namespace) -> int:
    """Write the report that a crash could not write, from the black box: JSON and PNG beside it, and print it."""
    box = find_black_box(options.path)
    if box is None or not is_black_box(box):
        got = "a folder without black boxes" if box is None else "no black box"
        raise UnreadableDump(explain(f"recovering {options.path}", got, "one of nobs.Recorder", "nobs show PATH, for a dump"))
    path = None if options.force else dump_of(box)
    report = load(path or box)
    if path is not None:
        print(f"nobs: the report is there already: {printable(str(path))}; add --force for another", file=sys.stderr)
    elif report.reason == "running" and not options.force:  # it would stand for the run when that has long gone on, or died
        print("nobs: the run goes on, and nothing was written; add --force for a report of it as it stands", file=sys.stderr)
    else:
        path = write(report, box.parent, box.stem)
    if options.json:
        print(_codec.dumps(report), end="")
        return 0
    from ..render.terminal import print_report  # rich is not needed for --json

    print_report(report, path or box)
    return 0
