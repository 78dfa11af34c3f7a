"""The crash as a picture: the loss on top, the layers that matter below, and with many layers a heat map of all.

`matplotlib.figure.Figure` with Agg, never pyplot: no global state, no backend switched under the user, safe at crash time.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .._codec import write_whole
from .._columns import Floats
from .._names import printable, shortened
from .._schema import Report
from . import _story
from ._heat import heat, name_rows
from ._marks import BLUE, GREY, LEFT, RED, SIDES, left_by, mark_bad, mark_steps, onset, series

MOST_LINES = 12
"""With more layers than this a heat map shows them all."""

MOST_NAMED = 6
"""With at most this many, each line is named at its end."""

_NAME_HEIGHT = 0.055
"""Of a panel, what a name at the end of a line takes."""

_HIGHEST = 1e300
"""The width of an axis must be a float64 too."""


def save_png(report: Report, path: Path) -> Path:
    """Draw a report into a PNG file, which appears whole or not at all."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of a glyph that the font lacks, at a crash, nobody wants to hear
        warnings.simplefilter("ignore")
        figure = draw(report)
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})  # the same report, the same bytes
    return write_whole(path, buffer.getvalue())


def draw(report: Report) -> Figure:
    """The figure of a report."""
    story = _story.lines(report)
    many = len(story) > MOST_LINES
    heights = [1.1, 1.8, *([2.4] if many else [])] if story else [1.0]
    figure = Figure(figsize=(12, 3.2 + 2.1 * sum(heights) * 0.9), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    figure.suptitle(
        _title(report),
        x=0.01,
        ha="left",
        fontsize=13,
        color=RED if report.failure or report.exception else "black",
        parse_math=False,
    )
    _loss(figure.add_subplot(grid[0, :]), report)
    for column, (label, side) in enumerate(SIDES if story else ()):
        _lines(figure.add_subplot(grid[1, column]), report, story, side, label)
        if many:
            axes = figure.add_subplot(grid[2, column])
            image = heat(axes, report, story, side, label)
            name_rows(axes, story, named=column == 0)
    if many:  # one scale for both
        figure.colorbar(image, ax=axes, label="powers of ten above its median", fraction=0.05, pad=0.06)
    return figure


def _title(report: Report) -> str:
    """The first questions and their answers, as in the terminal: what failed and when, what was wrong first, why."""
    lines = textwrap.wrap(_story.headline(report), 110, max_lines=2)
    if report.findings:
        first, origin = report.findings[0], _story.origin(report, 60)
        lines += textwrap.wrap(f"first wrong: {origin}", 110, max_lines=2) if origin else []
        why = f"why: {first.cause} ({first.confidence:.0%} sure): {printable(first.evidence)}"
        lines += textwrap.wrap(why, 110, max_lines=2)
    return "\n".join(lines)


def _loss(axes: Any, report: Report) -> None:
    history = report.history
    steps = history.steps
    loss = history.scalars.get("loss", np.full(len(steps), np.nan))
    finite = np.isfinite(loss) & (np.abs(loss) < _HIGHEST)
    axes.plot(steps[finite], loss[finite], color=BLUE, lw=1.6, marker="." if finite.sum() < 40 else "")
    if finite.any() and (loss[finite] > 0).all():
        axes.set_yscale("log")
    mark_bad(axes, steps, history.given.get("loss", np.zeros(len(steps), dtype=np.bool_)) & ~finite)
    axes.set_ylabel("loss", color=BLUE)
    mark_steps(axes, report, named=True)
    lr = history.scalars.get("lr")
    lr = None if lr is None else np.where(np.abs(lr) < _HIGHEST, lr, np.nan)
    if lr is not None and np.isfinite(lr).any() and np.nanmax(lr) > np.nanmin(lr):
        right = axes.twinx()
        right.plot(steps, lr, color=GREY, lw=1.2, ls="--")
        right.set_ylabel("learning rate", color="grey")
        if np.nanmin(lr) > 0:
            right.set_yscale("log")


def _lines(axes: Any, report: Report, story: list[_story.Line], side: str, label: str) -> None:
    """The layers that matter on a log axis: the guilty one thick and red, named in the corner, the others grey."""
    steps = report.history.steps
    shown = [line for line in _story.that_matter(story, MOST_LINES) if not isinstance(line, int)]
    axes.set_yscale("log")  # before anything is drawn: a panel may hold no number at all
    ends, marks = {}, ""
    names = dict(zip([line.name for line in shown], shortened([line.name for line in shown], 30), strict=True))
    for line in sorted(shown, key=lambda line: line.guilty):
        values, bad = series(line, side)
        drawn = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        style = {"color": RED, "lw": 2.4, "zorder": 3} if line.guilty else {"color": GREY, "lw": 1.0}
        axes.plot(steps, drawn, marker="." if len(steps) < 40 else "", **style)
        if line.guilty:
            mark_bad(axes, steps, bad)
            _mark_onset(axes, report, drawn, side)
            _name_in_the_corner(axes, names[line.name])
        elif np.isfinite(drawn).any():
            ends[line.name] = float(drawn[np.isfinite(drawn)][-1])
        if (row := left_by(line, side)) is not None and np.isfinite(drawn[row]):
            axes.plot(steps[row], drawn[row], "o", color="black", mec="white", mew=0.5, ms=4.5, zorder=4)
            marks = f" ({LEFT})"
    if len(shown) <= MOST_NAMED:
        _name_the_ends(axes, ends)
    axes.set_title(f"{label}{marks}", fontsize=11, loc="left")
    axes.set_xlabel("step")
    mark_steps(axes, report)


def _mark_onset(axes: Any, report: Report, drawn: Floats, side: str) -> None:
    """A ring on the guilty curve where the first finding began, if that is the site it names; else which site it was."""
    began = onset(report)
    if began is None:
        return
    step, site = report.history.steps[began[0]], report.findings[0].site or ""
    if began[1] == side:
        axes.plot(step, drawn[began[0]], "o", mec=RED, mfc="white", mew=2, ms=8, zorder=5)
    else:
        place = {"xy": (step, 0.02), "xycoords": ("data", "axes fraction"), "ha": "right", "va": "bottom", "rotation": 90}
        place |= {"xytext": (-3, 0), "textcoords": "offset points"}
        axes.annotate(f"onset ({printable(site)})", color=RED, fontsize=8, parse_math=False, **place)


def _name_in_the_corner(axes: Any, name: str) -> None:
    """The guilty layer's name; no legend, which leaves out names that begin with an underscore."""
    behind = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
    place = {"xy": (0.02, 0.96), "xycoords": "axes fraction", "va": "top", "bbox": behind, "zorder": 4}
    axes.annotate(f"━━ {name}", color=RED, fontsize=11, parse_math=False, **place)  # may be $\\frac$


def _name_the_ends(axes: Any, ends: dict[str, float]) -> None:
    """Names right of the frame, at the height of each line's last value, moved apart where they would overlap."""
    low, high = np.log10(axes.get_ylim())
    at = {name: (np.log10(value) - low) / max(high - low, 1e-9) for name, value in sorted(ends.items(), key=lambda e: e[1])}
    floor, heights = 0.0, []
    for height in at.values():
        heights.append(max(height, floor))
        floor = heights[-1] + _NAME_HEIGHT
    excess = max(0.0, floor - _NAME_HEIGHT - 1.0)  # pushed out above: all of them down, what fits below
    for name, height in zip(shortened(list(at), 24), heights, strict=True):
        place = {"xy": (1.01, max(0.0, height - excess)), "xycoords": "axes fraction", "va": "center", "annotation_clip": False}
        axes.annotate(name, color="grey", fontsize=8, parse_math=False, **place)
