"""All that is known of some layers in a terminal: each site with the norm over the window, and its last numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .._history import Layer
from .._names import printable
from .._schema import Report
from ._glyphs import Glyphs, figures, sparkline
from ._page import print_page

_NUMBERS = ("norm", "rms", "absmax", "nonfinite", "zeros")
_LEGIBLE, _WIDEST = 8, 48


def print_sites(report: Report, layers: Sequence[str], *, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print every site of some layers, at any width, to a file or stdout."""
    print_page(lambda glyphs, columns: _parts(report, set(layers), glyphs, columns), file=file, width=width)


def _parts(report: Report, wanted: set[str], glyphs: Glyphs, width: int) -> list[RenderableType]:
    steps = report.history.steps
    span = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no steps"
    parts: list[RenderableType] = [Text(f"{span}: norms on a log scale, and the last of each number", style="dim")]
    for layer in report.layers:
        if layer.name in wanted:
            title = Text.assemble((printable(layer.name), "bold"), f"  {printable(layer.type)}")
            parts += ["", title, _sites(report, layer, glyphs, width)]
    return parts


def _sites(report: Report, layer: Layer, glyphs: Glyphs, width: int) -> RenderableType:
    if not layer.sites:
        return Text(" it never ran", style="dim")
    numbers = _NUMBERS if width >= 100 else ("norm", "absmax", "nonfinite") if width >= 60 else ("norm",)
    names = {site: printable(site) for site in layer.sites}
    of_names = max(len(name) for name in names.values())
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for title, justify in (("site", "left"), ("dtype", "left"), ("elements", "right")):
        table.add_column(title, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    bars = min(_WIDEST, max(_LEGIBLE, width - of_names - 22 - 10 * len(numbers)))
    table.add_column("its course", width=bars, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name, site in layer.sites.items():
        norms, bad = report.history[layer.name, name, "norm"], report.history[layer.name, name, "nonfinite"] > 0
        ran = np.flatnonzero(~np.isnan(report.history[layer.name, name, "elements"]))
        last = [figures(float(report.history[layer.name, name, number][ran[-1]]), 4) for number in numbers]
        cells = [names[name], site.dtype or "?", f"{site.elements:,}"]
        table.add_row(*map(Text, cells), sparkline(norms, bad, bars, glyphs), *map(Text, last))
    return table
