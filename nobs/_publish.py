"""A report on its way to its files, JSON and picture: what fails of one costs nothing of the other, and nothing raises."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from . import _codec
from ._log import complain
from ._schema import Report


def write(report: Report, run: Path, name: str | None = None, *, picture: bool = True) -> Path | None:
    """JSON, then PNG beside it if wanted; in the temporary folder where the run's cannot be written to. The path of the JSON.

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
        if picture:
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
