"""What every panel of the picture shares: colours, whole steps, and where it began and failed."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .._columns import Floats
from .._schema import Report
from . import _story

RED, GREY, BLUE = "#c8102e", "#b4b4b4", "#1f4e79"
SIDES = (("output norm", "forward"), ("gradient norm", "backward"))
LEFT = "dots: left its usual range"
_PHASES = {"forward": _story.FORWARD, "backward": _story.BACKWARD}


def series(line: _story.Line, side: str) -> tuple[Floats, NDArray[np.bool_]]:
    """A layer's numbers in one direction, and where they are not finite."""
    return getattr(line, side), getattr(line, f"{side}_bad")


def onset(report: Report) -> tuple[int, str] | None:
    """The row at which the first finding began, and the side of its site ("" for a weight); None out of the window."""
    first = report.findings[0] if report.findings else None
    row = report.history.row_of(first.step) if first else None
    if first is None or row is None:
        return None
    site = first.site or ""
    return row, "backward" if site.endswith(".grad") else "forward" if site == "output" else ""


def left_by(line: _story.Line, side: str) -> int | None:
    """The row at which a layer left its usual range in one direction first; the guilty one has a mark of its own."""
    return line.left.row if line.left and line.left.phase == _PHASES[side] else None


def mark_steps(axes: Any, report: Report, named: bool = False) -> None:
    """Whole steps on the axis; a dashed line where it began and a dotted one where it failed, said above where asked for."""
    steps = report.history.steps
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    began, failed = onset(report), report.history.row_of(report.failure.step) if report.failure else None
    if began:
        axes.axvline(steps[began[0]], color=RED, lw=1.2, ls="--")
    if failed is not None:
        axes.axvline(steps[failed], color=RED, lw=1.2, ls=":")
    if began and failed is not None and began[0] < failed and not axes.images:  # not over colours that have a meaning
        axes.axvspan(steps[began[0]], steps[failed], color=RED, alpha=0.06, lw=0)
    if named:
        _name_steps(axes, steps, began[0] if began else None, failed)


def _name_steps(axes: Any, steps: NDArray[np.int64], began: int | None, failed: int | None) -> None:
    """Above the panel, the first to the left of its line and the second to the right, so that they never meet."""
    place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 6), "textcoords": "offset points", "va": "bottom", "color": RED}
    if began is not None and began != failed:
        early = began < len(steps) // 3
        axes.annotate(f"first wrong: step {steps[began]}", (steps[began], 1.0), ha="left" if early else "right", **place)
    if failed is not None:
        said = "first wrong and failed" if began == failed else "failed"
        axes.annotate(f"{said}: step {steps[failed]}", (steps[failed], 1.0), ha="right" if began == failed else "left", **place)


def mark_bad(axes: Any, steps: NDArray[np.int64], bad: NDArray[np.bool_]) -> None:
    """A cross at the upper edge for each step that is not finite: it has no place on the axis."""
    axes.plot(
        steps[bad], np.full(int(bad.sum()), 0.96), "x", color=RED, ms=9, mew=2.5, transform=axes.get_xaxis_transform(), zorder=4
    )
