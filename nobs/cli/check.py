"""`nobs check`."""

from __future__ import annotations

import argparse

from .._codec import plain_failure
from .._names import printable
from ._common import json_option, opened, path_option, print_json

EXAMPLES = """examples:
  nobs check crashes/RUN && echo the run is fine
  nobs check --json | jq .failed

exit codes: 0 nothing failed, 1 something did (a trigger, an exception, a death), 2 wrong usage or an unreadable file"""


def options(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    path_option(parser)
    json_option(parser, "the verdict")


def run(options: argparse.Namespace) -> int:
    """Say whether a run failed; exit code 1 if it did."""
    path, report = opened(options.path)
    if options.json:
        verdict = {
            "failed": report.failed,
            "path": str(path),
            "reason": report.reason,
            "summary": report.summary(),
            "exception": report.exception,
            "failure": report.failure and plain_failure(report.failure),
            "findings": [vars(finding) for finding in report.findings],
        }
        print_json(verdict)
    else:
        steps = report.history.steps
        span = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no steps"
        print(f"{'failed' if report.failed else 'fine'}: {printable(report.summary())}; {span}; {printable(str(path))}")
    return int(report.failed)
