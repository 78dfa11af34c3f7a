"""A report on its way out: JSON, picture, terminal. Each by itself: what fails costs nothing of the rest, and nothing raises."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from . import _codec
from ._log import complain, say
from ._names import safe_text
from ._schema import Report


def publish(report: Report, run: Path) -> Path | None:
    """Write the files, then print the report to stderr, on rank 0."""
    path = write(report, run)
    if report.rank != 0:
        return path
    try:
        from .render.terminal import print_report  # not at import: a healthy run never needs rich

        print_report(report, path, file=sys.stderr)
    except Exception as error:
        complain("could not print the report", error)
        say(f"nobs: {safe_text(report.summary(), 1000)}; dump: {path}")
    return path


def write(report: Report, run: Path, name: str | None = None) -> Path | None:
    """JSON, then PNG beside it; in the temporary folder where the run's cannot be written to. The path of the JSON.

    Args:
        name: of the file, without its suffix; else that of the rank.
    """
    name = name or f"rank{report.rank:05d}"
    for base in folders_of(run):
        try:
            path = _saved(report, base / f"step{_step(report):08d}", name)
        except Exception as error:
            complain(f"could not write a dump to {base}", error)
            continue
        _draw(report, path.with_suffix(".png"))
        return path
    return None


def folders_of(run: Path) -> list[Path]:
    """Where the files of a run go: into its own folder, or, if that takes none and there is one, into the temporary folder."""
    with contextlib.suppress(OSError):
        return [run, Path(tempfile.gettempdir()) / f"nobs-{os.getpid()}" / run.name]
    return [run]


def _draw(report: Report, path: Path) -> None:
    try:
        from .render.figure import save_png  # not at import: matplotlib takes a second

        save_png(report, path)
    except Exception as error:
        complain(f"could not draw {path}", error)


def _step(report: Report) -> int:
    if report.failure:
        return report.failure.step
    return int(report.history.steps[-1]) if len(report.history) else 0


def _saved(report: Report, folder: Path, name: str) -> Path:
    """The dump's path: in the folder, with a number behind it where an earlier dump of the same step lies, or another's."""
    content = _codec.dumps(report).encode()
    for n in range(1, 10_000):
        there = folder.with_name(folder.name + (f"-{n}" if n > 1 else ""))
        try:
            return _codec.write_whole(there / f"{name}.json", content, over=False)
        except FileExistsError:
            if not there.is_dir():  # a file in the way of the folder
                raise
    raise FileExistsError(f"10000 dumps of one step in {folder.parent}")
