"""`nobs watch`."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from .._codec import SUFFIX
from .._find import find_black_box
from .._load import load
from .._names import printable
from ..errors import UnreadableDump, explain
from ._common import USUAL, given_path, json_option, print_json
from ._follow import Follower
from ._news import json_end, json_line, plain_line
from ._screen import draw, screen

EXAMPLES = """examples:
  nobs watch                         the newest run below ./crashes; waits for one
  nobs watch crashes/RUN/rank00003.blackbox
  nobs watch --once                  one picture of it, for a script or a mail
  nobs watch --json | jq .step       for a program: a line for each batch of news, and one at the end
  nobs watch > watch.log             without a terminal: a line a second

keys: arrows, PgUp, PgDn, Home, End scroll; s sorts; o or Tab shows gradients or outputs; space holds the picture; q quits

It reads the run's black box and nothing else: the training does not notice. When the run ends or dies the report is printed.
A newer run that begins below the folder meanwhile is not followed: type `nobs watch` again.
exit codes: 0, also where the run failed or somebody quit (`nobs check` tells), 2 wrong usage or an unreadable file"""

LINE_S = 1.0
"""A log gets at most a line in so many seconds."""
WAIT_S, MADE_S = 0.5, 2.0
"""So often a folder is looked into, and so long a file in it may be half made."""


def options(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    about = f"a folder: the newest run in it, or the next to come; or a black box (without: {USUAL})"
    parser.add_argument("path", type=given_path, nargs="?", default=USUAL, metavar="DIR", help=about)
    about = "how often the black box is looked at (without: %(default)s)"
    parser.add_argument("-i", "--interval", type=_seconds, default=0.25, metavar="SECONDS", help=about)
    parser.add_argument("--once", action="store_true", help="print one picture, or with --json one line, and leave")
    json_option(parser, "what is new, a line at a time,")


def _seconds(typed: str) -> float:
    with suppress(ValueError):
        if 0.01 <= float(typed) <= 3600:
            return float(typed)
    raise argparse.ArgumentTypeError(f"{typed!r} is not from 0.01 to 3600 seconds")


def run(options: argparse.Namespace) -> int:
    """Watch a run live from another terminal: loss, triggers, and all layers over the last steps."""
    try:
        with closing(_opened(options.path, not options.once)) as follower:
            if options.once:
                _print_once(follower, options.json)
            elif _follow(follower, options):
                _print_end(follower, options.json)
            else:
                again = f"nobs watch {printable(shlex.quote(str(options.path)))}"
                print(f"nobs: the run goes on; watch again: {again}", file=sys.stderr)
    except KeyboardInterrupt:  # while nothing was there to be seen, or in the middle of the report
        print(file=sys.stderr)
    return 0


def _opened(path: Path, wait: bool) -> Follower:
    """The black box that a path means, waited for where there is none yet.

    Raises:
        UnreadableDump: there is none and it should not wait, or it is no black box.
    """
    said, first_seen_s = False, math.inf
    while True:
        box = find_black_box(path) if _exists(path) or path.suffix == SUFFIX else None
        if box is not None:
            first_seen_s = min(first_seen_s, time.monotonic())
            try:
                return Follower(box)
            except UnreadableDump:  # of a recorder that makes it at this moment the first bytes come last
                if box == path or time.monotonic() - first_seen_s > MADE_S:
                    raise
        elif not wait:
            raise UnreadableDump(explain(f"watching {path}", "no black box", "one of nobs.Recorder", "nobs watch crashes"))
        elif not said:
            there = "" if _exists(path) else ", which is not there yet"
            print(f"nobs: waiting for a black box below {printable(str(path))}{there} (Ctrl-C ends)", file=sys.stderr, flush=True)
            said = True
        time.sleep(WAIT_S)


def _exists(path: Path) -> bool:
    with suppress(OSError, ValueError):  # a name too long
        return path.exists()
    return True  # whoever reads it says what is wrong


def _follow(follower: Follower, options: argparse.Namespace) -> bool:
    """Show what is new until the run is over; False where somebody would not wait for that."""
    try:
        if options.json:
            _write_lines(follower, options.interval, 0.0, lambda: print_json(json_line(follower, follower.scene())))
        elif (console := screen()) is None:
            _write_lines(follower, options.interval, LINE_S, lambda: print(plain_line(follower.scene())))
        elif not follower.over:
            return draw(follower, options.interval, console)
    except KeyboardInterrupt:
        return follower.over
    return True


def _write_lines(follower: Follower, interval_s: float, least_s: float, write: Callable[[], None]) -> None:
    """A line whenever there is news, at most one in `least_s`, until the run is over."""
    news, written_s = True, -math.inf
    while True:
        over = follower.over
        if news and (over or time.monotonic() - written_s >= least_s):
            write()
            sys.stdout.flush()
            news, written_s = False, time.monotonic()
        if over:
            return
        time.sleep(interval_s)
        news = follower.look() or news


def _print_once(follower: Follower, as_json: bool) -> None:
    scene = follower.scene()
    if as_json:
        print_json(json_line(follower, scene))
        return
    from ..render._page import print_page  # rich is not needed for --json
    from ..render.live import View, frame

    print_page(lambda glyphs, width: frame(scene, View(), width, None, glyphs))


def _print_end(follower: Follower, as_json: bool) -> None:
    """The report: the run's own if it has made one, else that of its black box."""
    path = follower.dump() or follower.path
    report = load(path)
    if as_json:
        print_json(json_end(follower, report))
        return
    from ..render.terminal import print_report  # rich is not needed for --json

    print_report(report, path)
