"""Two runs, layer by layer in execution order: when a layer parts, when it leaves, and how far apart it is over the steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .._columns import Floats
from .._difference import APART, Difference, LayerDifference, Reading, Spot
from .._names import cells, printable, shortened
from ._glyphs import Glyphs, figures, sparkline
from ._page import empty_table

MOST_LAYERS = 16
FIRST = 4
"""So many of the layers that part first are always shown, and so many of those that leave first."""
NEAR = 3
"""So many layers before and behind the marked one are shown."""
LEGIBLE = len("difference")  # characters of a sparkline
_LEAST = 1e-7  # a share that float32 can still tell

_WAYS = (
    ("type", "parts", "its site", "leaves", "site", "apart", "difference", "factor", "at step", "A", "B"),
    ("parts", "its site", "leaves", "site", "apart", "difference", "factor", "at step", "A", "B"),
    ("parts", "leaves", "site", "apart", "difference", "factor", "A", "B"),
    ("parts", "leaves", "site", "apart", "difference", "factor"),
    ("parts", "leaves", "apart", "difference", "factor"),
    ("parts", "leaves", "difference", "factor"),
    ("parts", "leaves", "difference"),
    ("parts", "leaves"),
)
"""The columns that there may be room for, in a wide terminal and in ever narrower ones."""
_OF_LEAVING = ("leaves", "site", "apart")


@dataclass(frozen=True)
class _Column:
    """What is said of a layer in so many characters, 0 for all that are left; to the left, or to the right."""

    width: int
    cell: Callable[[LayerDifference, int], Text]
    justify: Literal["left", "right"] = "right"


def courses(difference: Difference, glyphs: Glyphs, width: int) -> Padding:
    """The layers that matter, the first that leaves marked, or else the first that parts."""
    shown = that_matter(difference, MOST_LAYERS)
    layers = [layer for layer in shown if not isinstance(layer, int)]
    longest = max(cells(printable(layer.name)) for layer in layers)
    of_name = max(len("layer"), min(longest, width * 2 // 5))
    columns, bars = _that_fit(_columns(difference, glyphs), width - of_name - 3)
    table = _empty_table(difference, columns, glyphs)
    table.add_column("", width=1, min_width=1, no_wrap=True)
    table.add_column("layer", width=of_name, no_wrap=True)
    for title, column in columns.items():
        table.add_column(title, width=column.width or bars, justify=column.justify, no_wrap=True)
    names = iter(shortened([printable(layer.name) for layer in layers], of_name, glyphs.ellipsis))
    marked = (difference.leaving or difference.parting)[0][1]
    for layer in shown:
        if isinstance(layer, int):
            table.add_row("", Text(f"{glyphs.ellipsis} {layer} more", style="dim"))
            continue
        mark, style = (glyphs.guilty, "bold red") if layer is marked else ("", "")
        said = [column.cell(layer, column.width or bars) for column in columns.values()]
        table.add_row(Text(mark, style=style), Text(next(names), style=style), *said)
    return Padding(table, (1, 0, 0, 0), expand=False)


def that_matter(difference: Difference, most: int) -> list[LayerDifference | int]:
    """At most `most` layers in execution order; gaps as the number left out.

    The first that part and that leave, the first and the last of all, those next to the marked one, and then whatever
    leaves or parts.
    """
    if len(difference.layers) <= most:
        return list(difference.layers)
    layers = difference.layers
    leaving, parting = ([layer for _, layer in found] for found in (difference.leaving, difference.parting))
    marked = layers.index((leaving or parting)[0])
    near = layers[max(0, marked - NEAR) : marked + NEAR + 1]
    wanted = [*leaving[:FIRST], *parting[:FIRST], layers[0], layers[-1], *near, *leaving, *parting]
    keep = {layer.name for layer in list(dict.fromkeys(wanted))[:most]}
    shown: list[LayerDifference | int] = []
    for layer in layers:
        if layer.name in keep:
            shown.append(layer)
        else:
            before = shown.pop() if shown and isinstance(shown[-1], int) else 0
            shown.append(before + 1 if isinstance(before, int) else 1)
    return shown


def _that_fit(columns: dict[str, _Column], width: int) -> tuple[dict[str, _Column], int]:
    """As many columns as leave the bars LEGIBLE, and the width of the bars."""
    ways = [{title: columns[title] for title in way if title in columns} for way in _WAYS]
    left = [width - sum(column.width + 1 for column in way.values()) for way in ways]
    fitting = (pair for pair in zip(ways, left, strict=True) if pair[1] >= LEGIBLE or "difference" not in pair[0])
    return next(fitting)


def _columns(difference: Difference, glyphs: Glyphs) -> dict[str, _Column]:
    """What there is to say of a layer; without those of leaving where no layer does."""
    of_step = max(len("always"), len(str(difference.common.last)))

    def excess(layer: LayerDifference) -> Floats:
        """By what share of the smaller norm the larger one is larger; what is the same is the lowest."""
        return np.maximum(layer.ratios - 1, max(difference.tolerance, _LEAST))

    def text(said: str, width: int) -> Text:
        return Text(shortened([printable(said)], width, glyphs.ellipsis)[0])

    columns = {
        "type": _Column(12, lambda layer, width: text(layer.type, width), "left"),
        "parts": _Column(of_step, lambda layer, width: Text(_step(layer.parts))),
        "its site": _Column(12, lambda layer, width: text(layer.parts.site if layer.parts else "", width), "left"),
        "leaves": _Column(of_step, lambda layer, width: Text("always" if layer.always else _step(layer.leaves))),
        "site": _Column(12, lambda layer, width: text(layer.leaves.site if layer.leaves else "", width), "left"),
        "apart": _Column(of_step, lambda layer, width: Text(_step(layer.apart))),
        "difference": _Column(0, lambda layer, width: sparkline(excess(layer), layer.bad, width, glyphs), "left"),
        "factor": _Column(8, lambda layer, width: Text(figures(layer.largest.ratio, 3) if layer.largest else "-")),
        "at step": _Column(max(of_step, 7), lambda layer, width: Text(_step(layer.largest))),
        "A": _Column(8, lambda layer, width: _reading(layer.largest, "a")),
        "B": _Column(8, lambda layer, width: _reading(layer.largest, "b")),
    }
    return columns if difference.leaving else {title: columns[title] for title in columns if title not in _OF_LEAVING}


def _step(at: Spot | None) -> str:
    return str(at.step) if at else "-"


def _reading(at: Spot | None, side: str) -> Text:
    """A run's norm where the factor is largest; not finite where that is the difference."""
    reading: Reading | None = getattr(at, side, None)
    if at is None or reading is None:
        return Text("-")
    if reading.nonfinite and np.isinf(at.ratio):
        return Text("NaN/Inf", style="bold red")
    return Text(figures(reading.norm, 3))


def _empty_table(difference: Difference, columns: Collection[str], glyphs: Glyphs) -> Table:
    far = f"by more than {difference.tolerance:g} of the larger one" if difference.tolerance else "at all"
    notes = [f"parts: a norm differs {far}, or NaN and Inf do"]
    if difference.leaving:
        notes.append(f"leaves: for good out of the ratio it had before; apart: by a factor of {APART:g} or more to the end")
    if numbers := [title for title in ("factor", "A", "B") if title in columns]:
        notes.append(f"{', '.join(numbers)}: where the layer's norms differ most")
    notes.append(f"{glyphs.bad} NaN or Inf in one run")
    return empty_table("layers in execution order: how far the norms differ, on a log scale", notes)
