"""The heat map of a live view: a row a layer, a column a step, in powers of ten against the layer's own median.

Height and colour of a cell say the same, so that either is enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from .._columns import Floats
from .._names import cells, printable, shortened
from ._glyphs import Glyphs, figures
from ._scene import Norms, Scene

LEVELS = (
    (-np.inf, "bold blue", "1/20x"),
    (-1.3, "dodger_blue2", "1/5x"),
    (-0.7, "steel_blue3", "1/2x"),
    (-0.3, "grey35", "usual"),
    (0.3, "yellow3", "2x"),
    (0.7, "orange1", "5x"),
    (1.3, "dark_orange3", "20x"),
    (2.0, "red", "100x"),
)
"""For each bar: the least powers of ten above the median, the colour, and what the legend says of it."""

BAD, ABSENT = "bold red", "grey30"
_STYLES = (*(style for _, style, _ in LEVELS), BAD, ABSENT)
VALUE, TIMES = 8, 11
"""The widths of a number, and of what is said of it behind."""
_TYPE, _LEGIBLE, _NAME = 12, 12, 8
_WIDEST_CELL = 3
TITLES: Mapping[str, str] = {
    "execution": "in execution order",
    "rise": "largest rise first",
    "name": "by name",
}


@dataclass(frozen=True)
class Room:
    """How wide the columns are: the `name`, the `type` (0: none), `cell` for each of `steps`; whether `times` has room."""

    name: int
    type: int
    steps: int
    cell: int
    times: bool

    @property
    def left(self) -> int:
        """All that stands before the first step: a mark, the name, the type."""
        return 2 + self.name + (self.type + 1 if self.type else 0)


def room_for(scene: Scene, width: int) -> Room:
    """The whole window where it fits, with wider cells where they do; what is left goes to the names."""
    of_type, times = (_TYPE if width >= 100 else 0), width >= 60
    fixed = 2 + (of_type + 1 if of_type else 0) + VALUE + 1 + (TIMES + 1) * times
    longest = max(_NAME, _longest(scene.layers))
    name = max(_NAME, min(longest, width * 2 // 5, width - fixed - _LEGIBLE))
    free = max(1, width - fixed - name)
    cell = min(_WIDEST_CELL, max(1, free // scene.capacity))
    steps = min(free // cell, scene.capacity)
    return Room(min(longest, name + free - steps * cell), of_type, steps, cell, times)


def heat_map(scene: Scene, layers: Sequence[int], side: str, room: Room, glyphs: Glyphs) -> list[Text]:
    """A head with the first and the last step, then a row for each of some layers.

    Args:
        layers: their places in `scene.layers`.
    """
    norms = scene.sides[side]
    names = dict(
        zip(scene.executed, _names(tuple(scene.layers[i] for i in scene.executed), room.name, glyphs.ellipsis), strict=True)
    )
    rows = [_head(scene, room)]
    for layer in layers:
        style = BAD if scene.layers[layer] == scene.marked else ""
        row = Text.assemble((glyphs.guilty if style else " ", style), (padded(names[layer], room.name) + " ", style))
        if room.type:
            kind = shortened([printable(scene.types[layer])], room.type, glyphs.ellipsis)[0]
            row.append(padded(kind, room.type) + " ", "dim")
        _draw(row, norms.rises[-room.steps :, layer], norms.bad[-room.steps :, layer], room, glyphs)
        _numbers(row, norms, layer, room.times)
        rows.append(row)
    return rows


@lru_cache(maxsize=1)
def _longest(names: tuple[str, ...]) -> int:
    return max((cells(printable(name)) for name in names), default=0)


@lru_cache(maxsize=8)
def _names(names: tuple[str, ...], width: int, ellipsis: str) -> list[str]:
    """Kept: cutting hundreds of long names takes longer than all the rest of a screen."""
    return shortened([printable(name) for name in names], width, ellipsis)


def padded(text: str, width: int) -> str:
    """The text with spaces behind it, `width` columns in all."""
    return text + " " * (width - cells(text))


def _head(scene: Scene, room: Room) -> Text:
    """`layer   type   1135 ......... 1234   last   x usual`."""
    shown, wide = min(len(scene.steps), room.steps), room.steps * room.cell
    first, last = (str(scene.steps[-shown]), str(scene.steps[-1])) if shown else ("", "")
    drawn = shown * room.cell
    span = last if len(first) + len(last) + 2 > drawn else first + last.rjust(drawn - len(first))
    left = " " + "layer".ljust(room.name) + " " + ("type".ljust(room.type) + " ") * bool(room.type)
    right = "last".rjust(VALUE + 1) + "x usual".rjust(TIMES + 1) * room.times
    return Text(left + span[-wide:].rjust(wide) + right, style="dim")


def _draw(row: Text, rises: Floats, bad: NDArray[np.bool_], room: Room, glyphs: Glyphs) -> None:
    """The cells, the newest right; runs of one look are one span, or a screen of them would take its time."""
    codes = np.digitize(rises, [least for least, _, _ in LEVELS[1:]])
    codes = np.where(bad, len(LEVELS), np.where(np.isnan(rises), len(LEVELS) + 1, codes))
    characters = glyphs.bars + glyphs.bad + glyphs.absent
    row.append(" " * (room.steps - len(codes)) * room.cell)
    for code, run in groupby(codes.tolist()):
        row.append(characters[code] * len(list(run)) * room.cell, _STYLES[code])


def level_style(rise: float) -> str:
    """The colour of so many powers of ten above the median."""
    return next((style for least, style, _ in reversed(LEVELS) if rise >= least), ABSENT)


def _numbers(row: Text, norms: Norms, layer: int, times: bool) -> None:
    """The last norm, and how many times its median that is."""
    last, rise = norms.last[layer], float(norms.last_rises[layer])
    if last < 0:
        row.append("-".rjust(VALUE + 1))
    elif norms.last_bad[layer]:
        row.append("NaN/Inf".rjust(VALUE + 1), BAD)
    else:
        row.append(figures(float(norms.values[last, layer]), 3)[:VALUE].rjust(VALUE + 1))
        if times:
            row.append(times_usual(rise).rjust(TIMES + 1), level_style(rise))


def times_usual(rise: float) -> str:
    """`140x`; nothing where that is no number."""
    times = 10 ** min(rise, 300.0)
    return "" if rise > 300 else f"{times:.0f}x" if 10 <= times < 1e5 else f"{times:.2g}x"


def trend(values: Floats, bad: NDArray[np.bool_], room: Room, glyphs: Glyphs) -> Text:
    """A scalar over the same steps as the layers below it, from its least to its largest."""
    values, bad = values[-room.steps :], bad[-room.steps :]
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        shares = np.clip(np.nan_to_num((values - low) / max(high - low, 1e-9 * abs(high), 1e-300)), 0, 1)
    heights = np.minimum(shares * len(glyphs.bars), len(glyphs.bars) - 1).astype(int)
    text = Text(" " * (room.steps - len(values)) * room.cell)
    for value, height, is_bad in zip(values.tolist(), heights.tolist(), bad.tolist(), strict=True):
        character = glyphs.bad if is_bad else glyphs.absent if math.isnan(value) else glyphs.bars[height]
        text.append(character * room.cell, BAD if is_bad else ABSENT if math.isnan(value) else "cyan")
    return text


def legend(glyphs: Glyphs) -> Text:
    """What the bars and the signs mean."""
    text = Text(" ")
    for bar, (_, style, says) in zip(glyphs.bars, LEVELS, strict=True):
        text.append(bar, style).append(f" {says} ", "dim")
    text.append(glyphs.bad, BAD).append(" NaN, Inf ", "dim")
    return text.append(glyphs.absent, ABSENT).append(" not run", "dim")
