"""How it spread: a sentence, and below it the layers in execution order, each with a sparkline forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .._columns import Floats
from .._names import cells, shortened
from . import _story
from ._glyphs import Glyphs, figures, sparkline
from ._page import empty_table

MOST_LAYERS = 16
LEGIBLE = 8  # characters of a sparkline
_TYPE, _VALUE = 12, 8  # widths of columns


def layers(steps: NDArray[np.int64], story: Sequence[_story.Line], glyphs: Glyphs, width: int) -> RenderableType:
    """The layers that matter, the guilty one marked, with the sentence above them where a layer left its usual range."""
    shown = _story.that_matter(story, MOST_LAYERS)
    room = _room(steps, story, width)
    told_first = [line for _, line in _story.spread(story)[: _story.FIRST_OUT]]
    lines = list(dict.fromkeys([*(line for line in shown if not isinstance(line, int)), *told_first]))
    names = dict(zip(lines, shortened([line.name for line in lines], room.name, glyphs.ellipsis), strict=True))
    table = _empty_table(steps, room, glyphs)
    for line in shown:
        if isinstance(line, int):
            table.add_row("", Text(f"{glyphs.ellipsis} {line} more", style="dim"))
        else:
            table.add_row(*_cells(line, names[line], steps, room, glyphs))
    told = _spread(steps, story, names, glyphs)
    return Group(*([Padding(told, (1, 0, 0, 1))] if told else []), Padding(table, (1, 0, 0, 0), expand=False))


def _spread(
    steps: NDArray[np.int64], story: Sequence[_story.Line], names: dict[_story.Line, str], glyphs: Glyphs
) -> RenderableType | None:
    """`spread  text.up (step 61) -> text.down (61) -> 5 more by step 64`; None where no layer left its usual range."""
    out = _story.spread(story)
    if not out:
        return None
    told = Text()
    for i, (left, line) in enumerate(out[: _story.FIRST_OUT]):
        told.append(f" {glyphs.arrow} " if i else "")
        told.append(names[line], style="bold red" if line.guilty else "bold")
        told.append(f" ({'' if i else 'step '}{steps[left.row]})")
    if len(out) > _story.FIRST_OUT:
        told.append(f" {glyphs.arrow} {len(out) - _story.FIRST_OUT} more by step {steps[out[-1][0].row]}")
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("spread", told)
    return grid


@dataclass(frozen=True)
class _Room:
    """The columns that a terminal has room for: the directions, the width of `since` (0: none), of the type, of the others."""

    sides: tuple[str, ...]
    since: int
    type: int
    name: int
    bars: int


def _room(steps: NDArray[np.int64], story: Sequence[_story.Line], width: int) -> _Room:
    """As much as leaves a sparkline LEGIBLE: both directions, then when a layer left its range, and in a wide terminal its type.

    What is left out is said in the sentence and in the head, at any width.
    """
    since = max(5, len(str(steps[-1]))) if _story.spread(story) else 0
    of_type = _TYPE if width >= 100 else 0
    name = max(12, min(max(cells(line.name) for line in story), width * 2 // 5))
    both, one = ("output", "gradient"), ("gradient",)
    ways = [(both, since, of_type), (both, 0, of_type), (one, since, 0), (one, 0, 0)]
    rooms = []
    for sides, steps_in, types_in in ways if width >= 60 else ways[2:]:
        columns = [1, name, *filter(None, (steps_in, types_in)), *[_VALUE for _ in sides]]
        bars = (width - sum(columns) - len(columns) - len(sides) + 1) // len(sides)
        rooms.append(_Room(sides, steps_in, types_in, name, max(3, bars)))
    return next((room for room in rooms if room.bars >= LEGIBLE), rooms[-1])


def _empty_table(steps: NDArray[np.int64], room: _Room, glyphs: Glyphs) -> Table:
    title = f"layers in execution order, steps {steps[0]} to {steps[-1]}: norms on a log scale"
    notes = ["since: output or gradient out of its usual range"] if room.since else []
    notes += ["gradient: the largest of the layer's parameters", f"{glyphs.bad} NaN or Inf", f"{glyphs.absent} not recorded"]
    table = empty_table(title, notes)
    table.add_column("", width=1, min_width=1, no_wrap=True)
    table.add_column("layer", width=room.name, no_wrap=True)
    if room.type:
        table.add_column("type", width=room.type, no_wrap=True, style="dim")
    if room.since:
        table.add_column("since", width=room.since, justify="right", no_wrap=True)
    for side in room.sides:
        table.add_column(side, width=room.bars, no_wrap=True)
        table.add_column("last", width=_VALUE, justify="right", no_wrap=True)
    return table


def _cells(line: _story.Line, name: str, steps: NDArray[np.int64], room: _Room, glyphs: Glyphs) -> list[Text]:
    """The row of a layer."""
    style = "bold red" if line.guilty else ""
    row = [Text(glyphs.guilty if line.guilty else "", style="bold red"), Text(name, style=style)]
    if room.type:
        row.append(Text(shortened([line.type], room.type, glyphs.ellipsis)[0]))
    if room.since:
        row.append(Text(str(steps[line.left.row]) if line.left else "", style=style))
    series = {"output": (line.forward, line.forward_bad), "gradient": (line.backward, line.backward_bad)}
    for side in room.sides:
        row += [sparkline(*series[side], room.bars, glyphs), _last(*series[side])]
    return row


def _last(values: Floats, bad: NDArray[np.bool_]) -> Text:
    if len(bad) and bad[-1]:
        return Text("NaN/Inf", style="bold red")
    value = float(values[-1]) if len(values) else float("nan")
    return Text("-" if np.isnan(value) else figures(value, 3))
