"""All layers over all steps: a heat map for each direction, for models with more layers than lines can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm

from .._names import shortened
from .._schema import Report
from . import _story
from ._marks import LEFT, RED, left_by, mark_steps, onset, series

_COLOURS = "RdBu_r"


def heat(axes: Any, report: Report, story: Sequence[_story.Line], side: str, label: str) -> Any:
    """Every layer over every step, in powers of ten against its own median; black where not finite. The image."""
    steps = report.history.steps
    rows, bads = zip(*(series(line, side) for line in story), strict=True)
    values, bad = np.array(rows), np.array(bads)
    logs = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))
    known = np.isfinite(logs).any(axis=1, keepdims=True)
    median = np.nanmedian(np.where(known, logs, 0), axis=1, keepdims=True)
    shown = np.ma.masked_invalid(np.clip(logs - median, -3, 3))
    black = np.zeros((*bad.shape, 4))
    black[bad, 3] = 1.0
    look: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    scale: dict[str, Any] = {"cmap": _COLOURS, "norm": TwoSlopeNorm(0, -3, 3)}
    for above, below, of in _strips(story):
        look["extent"] = (steps[0] - 0.5, steps[-1] + 0.5, below, above)
        image = axes.imshow(shown[of], **scale, **look)
        axes.imshow(black[of], **look)
    axes.set_ylim(len(story) - 0.5, -0.5)
    axes.set_xlabel("step")
    mark_steps(axes, report)
    marks = ["black: NaN, Inf", *_mark_spread(axes, report, story, side)]
    marks += ["▶ row drawn wider"] if _half_a_row(story) > 0.5 else []
    axes.set_title(f"{label}, all {len(story)} layers as they run\n({'; '.join(marks)})", fontsize=10, loc="left")
    return image


def _strips(story: Sequence[_story.Line]) -> list[tuple[float, float, slice]]:
    """Where which layers go: all of them, and the guilty one over them."""
    half = _half_a_row(story)
    guilty = [(i - half, i + half, slice(i, i + 1)) for i, line in enumerate(story) if line.guilty]
    return [(-0.5, len(story) - 0.5, slice(None)), *guilty]


def _half_a_row(story: Sequence[_story.Line]) -> float:
    """Half the height of the guilty row: one of hundreds would be a hair."""
    return max(0.5, len(story) / 150) if any(line.guilty for line in story) else 0.5


def _mark_spread(axes: Any, report: Report, story: Sequence[_story.Line], side: str) -> list[str]:
    """A ring where it began, and a dot where each further layer left its usual range by this side; what they mean."""
    steps = report.history.steps
    began = onset(report)
    for i, line in enumerate(story):
        if line.guilty and began and began[1] in (side, ""):
            axes.plot(steps[began[0]], i, "o", mec=RED, mfc="white", mew=2, ms=9, zorder=5)
    left = [(steps[row], i) for i, line in enumerate(story) if (row := left_by(line, side)) is not None]
    if not left:
        return []
    axes.plot(*zip(*left, strict=True), "o", color="black", mec="white", mew=0.5, ms=3.5, zorder=3)
    return [LEFT]


def name_rows(axes: Any, story: Sequence[_story.Line], named: bool) -> None:
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


def _ticks(story: Sequence[_story.Line], most: int = 24) -> list[int]:
    """Which layers are named beside the heat map: evenly spread ones and the guilty one, its close neighbours not."""
    every = max(1, -(-len(story) // most))
    guilty = [i for i, line in enumerate(story) if line.guilty]
    return sorted({*guilty, *(i for i in range(0, len(story), every) if all(abs(i - g) >= every for g in guilty))})
