"""A report on its way out: JSON, picture, terminal. Each by itself: what fails costs nothing of the rest, and nothing raises."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from . import _codec, _launch
from ._history import History
from ._names import safe_text
from ._ring import RingBuffer
from ._schema import Failure, Report
from .diagnosis import diagnose

log = logging.getLogger("nobs")


def report_and_publish(
    ring: RingBuffer, run: Path, reason: str, failure: Failure | None = None, exception: str | None = None
) -> Report:
    """Make the report of a ring, write it and print it. Whatever goes wrong on the way, there is a report."""
    try:
        report = report_of(ring, reason, failure, exception)
    except Exception as error:
        _complain("could not make a report", error)
        empty = History.of((), ring.row.table)
        report = Report(empty, reason, "", _launch.installed_version(), failure, exception=exception)
    publish(report, run)
    return report


def report_of(ring: RingBuffer, reason: str, failure: Failure | None = None, exception: str | None = None) -> Report:
    """The history of a ring with what failed in it and what was found out about it."""
    try:
        history = ring.history()
    except Exception:  # the device is gone: what has arrived lies in host memory
        history = ring.history(wait=False)
    report = replace(ring.report(reason, history), failure=failure, exception=exception)
    try:
        decay = report.run.get("second_moment_decay")
        known = decay if isinstance(decay, float) else None
        return replace(report, findings=diagnose(history, failure, exception=exception, second_moment_decay=known))
    except Exception as error:  # a history without a diagnosis is still the history
        _complain("could not diagnose the failure", error)
        return report


def publish(report: Report, run: Path) -> Path | None:
    """Write the files, then print the report to stderr, on rank 0."""
    path = write(report, run)
    if report.rank != 0:
        return path
    try:
        from .render.terminal import print_report  # not at import: a healthy run never needs rich

        print_report(report, path, file=sys.stderr)
    except Exception as error:
        _complain("could not print the report", error)
        _say(f"nobs: {safe_text(report.summary(), 1000)}; dump: {path}")
    return path


def write(report: Report, run: Path) -> Path | None:
    """JSON, then PNG beside it; in the temporary folder where the run's cannot be written to. The path of the JSON."""
    for base in (run, Path(tempfile.gettempdir()) / f"nobs-{os.getpid()}" / run.name):
        try:
            path = _codec.save(report, _unused(base / f"step{_step(report):08d}", report.rank))
        except Exception as error:
            _complain(f"could not write a dump to {base}", error)
            continue
        _draw(report, path.with_suffix(".png"))
        return path
    return None


def _draw(report: Report, path: Path) -> None:
    try:
        from .render.figure import save_png  # not at import: matplotlib takes a second

        save_png(report, path)
    except Exception as error:
        _complain(f"could not draw {path}", error)


def _complain(what: str, error: Exception) -> None:
    """In the log with its trace, and on stderr in a line: at a crash nobody may be reading the log."""
    log.warning("nobs %s: %s", what, safe_text(error), exc_info=error)
    _say(f"nobs {what}: {safe_text(error)}")


def _say(text: str) -> None:
    with contextlib.suppress(Exception):  # stderr may be closed, or None
        print(text, file=sys.stderr)


def _step(report: Report) -> int:
    if report.failure:
        return report.failure.step
    return int(report.history.steps[-1]) if len(report.history) else 0


def _unused(folder: Path, rank: int) -> Path:
    """The dump's path in a folder, with a number behind it where an earlier dump of the same step lies."""
    for n in range(1, 10_000):
        candidate = folder.with_name(folder.name + (f"-{n}" if n > 1 else "")) / f"rank{rank:05d}.json"
        if not candidate.exists():
            return candidate
    raise FileExistsError(f"10000 dumps of one step in {folder.parent}")
