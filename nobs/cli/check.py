"""`nobs check`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._codec import facts
from .._find import last_words
from .._load import load
from .._names import printable
from .._schema import Report
from ._common import USUAL, given_path, json_option, print_json

EXAMPLES = """examples:
  nobs check crashes/RUN && echo the run is fine
  nobs check sweep/*                 several runs
  nobs check --json | jq .failed

Of a folder the newest run is judged, each rank by what it told last. Failed is what a trigger saw, what an exception, a death or
SIGTERM ended, and where NaN or Inf stand; a run that goes on is fine so far.

exit codes: 0 nothing failed, 1 something did, 2 wrong usage or an unreadable file"""


def options(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    about = f"dumps, black boxes or folders (without: {USUAL})"
    parser.add_argument("paths", type=given_path, nargs="*", metavar="PATH", help=about)
    json_option(parser, "the verdict")


def run(options: argparse.Namespace) -> int:
    """Say whether a run failed; exit code 1 if it did."""
    files = [file for path in options.paths or [USUAL] for file in last_words(path)]
    reports = {file: load(file) for file in files}
    failed = {file: report for file, report in reports.items() if report.failed}
    if options.json:
        told, report = next(iter((failed or reports).items()))
        print_json({**_plain(told, report), "failed": bool(failed), "checked": [_plain(*pair) for pair in reports.items()]})
        return int(bool(failed))
    for file, report in (failed or reports).items():
        print(_line(file, report))
    if len(reports) > 1:
        print(f"{len(failed)} of {len(reports)} failed")
    return int(bool(failed))


def _line(file: Path, report: Report) -> str:
    steps = report.history.steps
    span = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no steps"
    damaged = report.run.get("records_damaged")
    parts = [" ".join(report.summary().split()), span, *([f"records damaged: {damaged}"] if damaged else []), str(file)]
    return f"{'failed' if report.failed else 'fine'}: {printable('; '.join(parts))}"


def _plain(file: Path, report: Report) -> dict[str, Any]:
    damaged = report.run.get("records_damaged", 0)
    return {"failed": report.failed, "path": str(file), "summary": report.summary(), "records_damaged": damaged, **facts(report)}
