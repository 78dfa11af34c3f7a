"""A report on its way to the terminal: on rank 0 alone, to stderr. Nothing here raises."""

from __future__ import annotations

import sys
from pathlib import Path

from ._log import complain, say
from ._lookout import Lookout
from ._names import safe_text
from ._schema import Report

MOST_RANKS = 64
"""Of so many ranks the files are read at the end of a run, before the launcher loses its patience; of more by `nobs merge`."""


def show(report: Report, path: Path | None) -> None:
    """Print the report of a run, if this is rank 0."""
    if report.rank != 0:
        return
    try:
        from .render.terminal import print_report  # not at import: a healthy run never needs rich

        print_report(report, path, file=sys.stderr)
    except Exception as error:
        complain("could not print the report", error)
        say(f"nobs: {safe_text(report.summary(), 1000)}; dump: {path}")


def show_together(lookout: Lookout, report: Report | None, path: Path | None, run: Path, *, linger: bool) -> None:
    """Rank 0 waits for what all write, and prints it; the others may linger until then: a launcher stops all behind the first."""
    lookout.gather()
    if report is not None:
        show_ranks(report, path, run)
    if lookout.rank == 0:
        lookout.let_go()
    elif linger:
        lookout.linger()


def show_ranks(report: Report, path: Path | None, run: Path) -> None:
    """Print what all ranks of a run have written, if this is rank 0; its own report alone where that cannot be read."""
    if report.rank != 0:
        return
    try:
        if report.world_size > MOST_RANKS:
            say(f"nobs: this is rank 0 of {report.world_size}; of all of them: nobs merge {run}")
            show(report, path)
            return
        from ._merge import merge
        from .render.ranks import print_ranks

        print_ranks(merge(run), run, file=sys.stderr)
    except Exception as error:
        complain("could not merge the ranks", error)
        show(report, path)
