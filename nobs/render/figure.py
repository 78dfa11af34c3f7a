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
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .._codec import write_whole
from .._columns import Floats
from .._names import printable, shortened
from .._schema import Report
from . import _story

MOST_LINES = 12
"""With more layers than this a heat map shows them all."""

MOST_NAMED = 6
"""With at most this many, each line is named at its end."""

_NAME_HEIGHT = 0.055
"""Of a panel, what a name at the end of a line takes."""

_HIGHEST = 1e300
"""The width of an axis must be a float64 too."""

RED, GREY, BLUE = "#c8102e", "#b4b4b4", "#1f4e79"
_HEAT = "RdBu_r"
_SIDES = (("output norm", "forward"), ("gradient norm", "backward"))


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
    heat = len(story) > MOST_LINES
    heights = [1.1, 1.8, *([2.4] if heat else [])] if story else [1.0]
    figure = Figure(figsize=(12, 3.2 + 2.1 * sum(heights) * 0.9), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    failed_at = report.failure.step if report.failure else None
    figure.suptitle(
        _title(report),
        x=0.01,
        ha="left",
        fontsize=13,
        color=RED if report.failure or report.exception else "black",
        parse_math=False,
    )
    _loss(figure.add_subplot(grid[0, :]), report, failed_at)
    for column, (label, side) in enumerate(_SIDES if story else ()):
        _lines(figure.add_subplot(grid[1, column]), report, story, side, label, failed_at)
        if heat:
            axes = figure.add_subplot(grid[2, column])
            image = _heat(axes, report, story, side, label, failed_at)
            _name_rows(axes, story, named=column == 0)
    if heat:  # one scale for both
        figure.colorbar(image, ax=axes, label="powers of ten above its median", fraction=0.05, pad=0.06)
    return figure


def _title(report: Report) -> str:
    lines = textwrap.wrap(_story.headline(report), 100, max_lines=2)
    if report.findings:
        first, origin = report.findings[0], _story.origin(report, 60)
        since = f": {origin}" if origin else ""
        lines += textwrap.wrap(f"{first.cause}{since} ({first.confidence:.0%} sure)", 100, max_lines=2)
    return "\n".join(lines)


def _loss(axes: Any, report: Report, failed_at: int | None) -> None:
    history = report.history
    steps = history.steps
    loss = history.scalars.get("loss", np.full(len(steps), np.nan))
    finite = np.isfinite(loss) & (np.abs(loss) < _HIGHEST)
    axes.plot(steps[finite], loss[finite], color=BLUE, lw=1.6, marker="." if finite.sum() < 40 else "")
    if finite.any() and (loss[finite] > 0).all():
        axes.set_yscale("log")
    _mark_bad(axes, steps, history.given.get("loss", np.zeros(len(steps), dtype=np.bool_)) & ~finite)
    axes.set_ylabel("loss", color=BLUE)
    _mark_steps(axes, steps)
    _mark_failure(axes, steps, failed_at, named=True)
    lr = history.scalars.get("lr")
    lr = None if lr is None else np.where(np.abs(lr) < _HIGHEST, lr, np.nan)
    if lr is not None and np.isfinite(lr).any() and np.nanmax(lr) > np.nanmin(lr):
        right = axes.twinx()
        right.plot(steps, lr, color=GREY, lw=1.2, ls="--")
        right.set_ylabel("learning rate", color="grey")
        if np.nanmin(lr) > 0:
            right.set_yscale("log")


def _lines(axes: Any, report: Report, story: list[_story.Line], side: str, label: str, failed_at: int | None) -> None:
    """The layers that matter on a log axis: the guilty one thick and red, named in the corner, the others grey."""
    steps = report.history.steps
    shown = [line for line in _story.that_matter(story, MOST_LINES) if not isinstance(line, int)]
    axes.set_yscale("log")  # before anything is drawn: a panel may hold no number at all
    ends = {}
    names = dict(zip([line.name for line in shown], shortened([line.name for line in shown], 30), strict=True))
    for line in sorted(shown, key=lambda line: line.guilty):
        values, bad = _series(line, side)
        drawn = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        style = {"color": RED, "lw": 2.4, "zorder": 3} if line.guilty else {"color": GREY, "lw": 1.0}
        axes.plot(steps, drawn, marker="." if len(steps) < 40 else "", **style)
        if line.guilty:
            _mark_bad(axes, steps, bad)
            _mark_onset(axes, report, drawn, side)
            _name_in_the_corner(axes, names[line.name])
        elif np.isfinite(drawn).any():
            ends[line.name] = float(drawn[np.isfinite(drawn)][-1])
    if len(shown) <= MOST_NAMED:
        _name_the_ends(axes, ends)
    axes.set_title(label, fontsize=11, loc="left")
    axes.set_xlabel("step")
    _mark_steps(axes, steps)
    _mark_failure(axes, steps, failed_at)


def _mark_onset(axes: Any, report: Report, drawn: Floats, side: str) -> None:
    """A dashed line where the first finding began, and a ring on the guilty curve where that is the site it names."""
    first = report.findings[0] if report.findings else None
    row = report.history.row_of(first.step) if first else None
    if first is None or row is None:
        return
    step = report.history.steps[row]
    axes.axvline(step, color=RED, lw=0.8, ls="--")
    site = first.site or ""
    if site.endswith(".grad") if side == "backward" else site == "output":
        axes.plot(step, drawn[row], "o", mec=RED, mfc="white", mew=2, ms=8, zorder=5)
    else:
        place = {"xy": (step, 0.02), "xycoords": ("data", "axes fraction"), "ha": "right", "va": "bottom", "rotation": 90}
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


def _heat(axes: Any, report: Report, story: list[_story.Line], side: str, label: str, failed_at: int | None) -> Any:
    """Every layer over every step, in powers of ten against its own median; black where not finite. The image."""
    steps = report.history.steps
    rows, bads = zip(*(_series(line, side) for line in story), strict=True)
    values, bad = np.array(rows), np.array(bads)
    logs = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))
    known = np.isfinite(logs).any(axis=1, keepdims=True)
    median = np.nanmedian(np.where(known, logs, 0), axis=1, keepdims=True)
    shown = np.ma.masked_invalid(np.clip(logs - median, -3, 3))
    extent = (steps[0] - 0.5, steps[-1] + 0.5, len(story) - 0.5, -0.5)
    image = axes.imshow(shown, aspect="auto", cmap=_HEAT, norm=TwoSlopeNorm(0, -3, 3), extent=extent, interpolation="nearest")
    black = np.zeros((*bad.shape, 4))
    black[bad, 3] = 1.0
    axes.imshow(black, aspect="auto", extent=extent, interpolation="nearest")
    axes.set_title(f"{label}, all {len(story)} layers as they run (black: NaN, Inf)", fontsize=10, loc="left")
    axes.set_xlabel("step")
    _mark_steps(axes, steps)
    _mark_failure(axes, steps, failed_at)
    return image


def _name_rows(axes: Any, story: list[_story.Line], named: bool) -> None:
    """Names left of a heat map, where asked for, and arrows from both sides at the guilty row: it may be a pixel high."""
    ticks = _ticks(story)
    names = shortened([story[i].name for i in ticks], 30) if named else [""] * len(ticks)
    axes.tick_params(axis="y", pad=12)
    axes.set_yticks(ticks, names, fontsize=7, parse_math=False)
    for tick, i in zip(axes.get_yticklabels(), ticks, strict=True):
        tick.set_color(RED if story[i].guilty else "black")
    for i, line in enumerate(story):
        if line.guilty:
            for side_of_axes, arrow, align in ((0, "▶", "right"), (1, "◀", "left")):
                place = {"xy": (side_of_axes, i), "xycoords": ("axes fraction", "data"), "ha": align, "va": "center"}
                axes.annotate(arrow, color=RED, fontsize=13, **place)


def _ticks(story: list[_story.Line], most: int = 24) -> list[int]:
    """Which layers are named beside the heat map: evenly spread ones and the guilty one, its close neighbours not."""
    every = max(1, -(-len(story) // most))
    guilty = [i for i, line in enumerate(story) if line.guilty]
    return sorted({*guilty, *(i for i in range(0, len(story), every) if all(abs(i - g) >= every for g in guilty))})


def _series(line: _story.Line, side: str) -> tuple[Floats, NDArray[np.bool_]]:
    return getattr(line, side), getattr(line, f"{side}_bad")


def _mark_steps(axes: Any, steps: NDArray[np.int64]) -> None:
    """Whole steps on the axis, and a width for a single one."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _mark_failure(axes: Any, steps: NDArray[np.int64], failed_at: int | None, named: bool = False) -> None:
    """A dotted line at the failing step, with its number above it where asked for; nothing for a step out of the window."""
    if failed_at is None or not len(steps) or not steps[0] <= failed_at <= steps[-1]:
        return
    axes.axvline(failed_at, color=RED, lw=1.2, ls=":")
    if named:
        place = {"xy": (failed_at, 1.0), "xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        axes.annotate(f"step {failed_at}", color=RED, **place)


def _mark_bad(axes: Any, steps: NDArray[np.int64], bad: NDArray[np.bool_]) -> None:
    """A cross at the upper edge for each step that is not finite: it has no place on the axis."""
    axes.plot(
        steps[bad], np.full(int(bad.sum()), 0.96), "x", color=RED, ms=9, mew=2.5, transform=axes.get_xaxis_transform(), zorder=4
    )
