"""The crash report in a terminal: what failed, where first and how it spread, why, what to do, and where the files are.

Colours are rich's business: none in a pipe or with NO_COLOR. Every text of the user's is a `Text`, never markup. Where the
terminal's encoding has no block characters, ASCII stands in for them.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import IO

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .._codec import SUFFIX
from .._names import printable, safe_text
from .._schema import Report
from . import _story
from ._glyphs import Glyphs, figures, sparkline
from ._layers import layers
from ._page import labelled_grid, print_page

_OF_A_BOX = ("killed", "unknown", "running", "ended")
"""Reasons of a report that nothing but a black box tells of."""
_LOST = {
    "failures_before": "failures before these steps",
    "records_damaged": "records damaged",
    "scalars_left_out": "scalars without room",
}
"""What a black box may have lost."""

_YEAR_10000_S = 253402300800.0
"""A time from then on is none that a calendar has."""

_EXIT_CODES = "its exit code says how: 137 SIGKILL (ask dmesg for memory), 139 segfault"

MOST_SCALARS = 8
MOST_FINDINGS = 3


def print_report(report: Report, path: Path | None = None, *, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print a report, at any width, to a file or stdout.

    Args:
        path: where the dump lies, to be named at the end.
        width: columns; None for the terminal's own.
    """
    print_page(lambda glyphs, columns: _parts(report, path, glyphs, columns), file=file, width=width)


def _parts(report: Report, path: Path | None, glyphs: Glyphs, width: int) -> list[RenderableType]:
    """The questions of somebody whose run has failed, in the order in which they are asked."""
    return ["", _head(report, glyphs), *body(report, glyphs, width), _files(path), footer(report)]


def body(report: Report, glyphs: Glyphs, width: int) -> list[RenderableType]:
    """What stands between the first lines and the names of the files: the layers, the scalars, and why."""
    story = _story.lines(report)
    shown = [layers(report.history.steps, story, glyphs, width)] if story else []
    return [*shown, _scalars(report, glyphs, width), *([_why(report)] if report.findings else [])]


def _head(report: Report, glyphs: Glyphs) -> RenderableType:
    """What failed, when, and in which layer first."""
    failed = report.failure is not None or report.exception is not None or report.reason == "killed"
    style = "bold red" if failed else "bold"
    lines = [Text(_story.headline(report), style=style, overflow="fold")]
    origin, batch = _story.origin(report), _story.batch(report)
    if origin:
        lines.append(Text(f"first wrong: {origin}", overflow="fold"))
    if batch:
        lines.append(Text(f"batch: {batch}", overflow="fold"))
    if report.failure and report.failure.detected_at not in (None, report.failure.step):
        lines.append(Text(f"the host learned of it at step {report.failure.detected_at}", style="dim"))
    if report.reason in _OF_A_BOX and (last := _last(report)):
        lines.append(Text(last, style="dim"))
    if report.reason == "killed":
        lines.append(Text(_EXIT_CODES, style="dim", overflow="fold"))
    how = "training failed" if report.failure else "the run died" if report.reason == "killed" else "the run ended"
    title = f"nobs: {how if failed else 'recorded steps'}"
    return Panel(
        Group(*lines), title=Text(title, style=style), title_align="left", border_style="red" if failed else "", box=glyphs.frame
    )


def _last(report: Report) -> str | None:
    """When the last step was, which no dump has to say."""
    history = report.history
    if not len(history) or not 0 <= history.times_s[-1] < _YEAR_10000_S:
        return None
    return f"last step {history.steps[-1]}, at {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(history.times_s[-1]))} UTC"


def _why(report: Report) -> RenderableType:
    """The findings, the first to believe first, each with its numbers; then what to do about that one."""
    grid = labelled_grid()
    for i, finding in enumerate(report.findings[:MOST_FINDINGS]):
        label = "or" if i else "why"
        grid.add_row(label, Text.assemble((_story.cause(finding), "bold yellow"), f" ({finding.confidence:.0%} sure)"))
        grid.add_row("", Text(printable(finding.evidence)))
    grid.add_row("do", Text(printable(report.findings[0].advice), style="green"))
    return Padding(grid, (1, 0, 0, 1), expand=False)


def _scalars(report: Report, glyphs: Glyphs, width: int) -> RenderableType:
    """The loss and the other scalars, each a sparkline over the window with its first and last value."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="bold", no_wrap=True, max_width=16)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    history = report.history
    # Further learning rates last: of what the user gave there is more to learn.
    there = sorted((name for name in history.scalars if history.given[name].any()), key=lambda name: name.startswith("lr."))
    for name in there[:MOST_SCALARS]:
        given, values = history.given[name], history.scalars[name]
        bad = given & ~np.isfinite(values)
        ends = f"{figures(values[given][0], 4)} {glyphs.arrow} {figures(values[given][-1], 4)}"
        grid.add_row(Text(printable(name)), sparkline(np.abs(values), bad, max(4, width // 3), glyphs), Text(ends))
    if len(there) > MOST_SCALARS:
        grid.add_row("", Text(f"{glyphs.ellipsis} {len(there) - MOST_SCALARS} more in the dump", style="dim"))
    return Padding(grid, (1, 0, 0, 1), expand=False)


def _files(path: Path | None) -> RenderableType:
    if path is None:
        return ""
    picture = path.with_suffix(".png")
    kind = "black box" if path.suffix == SUFFIX else "dump"
    grid = labelled_grid()
    grid.add_row(kind, Text(printable(str(path))))
    if picture.exists():
        grid.add_row("picture", Text(printable(str(picture))))
    grid.add_row("again", Text(f"nobs show {printable(shlex.quote(str(path)))}"))
    return Padding(grid, (1, 0, 0, 1), expand=False)


def footer(report: Report) -> RenderableType:
    """Versions, and how it was trained, in a line."""
    run = {key: printable(safe_text(value)) for key, value in report.run.items()}
    compiled = "compiled" if report.run.get("compiled") else "eager"
    facts = [f"torch {run.get('torch', '?')}", run.get("device", "?"), compiled, f"{len(report.history)} steps kept"]
    facts += [f"{what}: {printable(str(report.run[key]))}" for key, what in _LOST.items() if key in report.run]
    if report.world_size > 1:
        facts.append(f"rank {report.rank} of {report.world_size}")
    return Text(" " + " | ".join([f"nobs {printable(report.nobs_version)}", *facts]), style="dim", overflow="fold")
