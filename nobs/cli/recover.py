"""`nobs recover`."""

from __future__ import annotations

import argparse
import sys

from .. import _codec
from .._load import dump_of, find_black_box, load
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
    if box is None:
        raise UnreadableDump(
            explain(f"reading {options.path}", "a folder without black boxes", "a run of nobs.Recorder", "nobs recover crashes")
        )
    path = None if options.force else dump_of(box)
    if path is not None:
        report = load(path)
        print(f"nobs: the report is there already: {path}; add --force for another", file=sys.stderr)
    else:
        report = load(box)
        path = write(report, box.parent)
    if options.json:
        print(_codec.dumps(report), end="")
        return 0
    from ..render.terminal import print_report  # rich is not needed for --json

    print_report(report, path)
    return 0
