"""Two runs compared, in a terminal: which is which, what parts first and what leaves, and the layers in execution order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from .._difference import APART, Difference, LayerDifference, Pair, Reading, ScalarDifference, Span, Spot
from .._names import printable, shortened
from .._schema import Report
from . import _story
from ._courses import courses
from ._glyphs import Glyphs, figures
from ._page import labelled_grid, print_page

MOST_SCALARS, MOST_NAMED = 8, 4
_NAME = 16  # the width of a scalar's name


def print_difference(
    difference: Difference,
    a: tuple[Path, Report],
    b: tuple[Path, Report],
    *,
    file: IO[str] | None = None,
    width: int | None = None,
) -> None:
    """Print how two runs differ, at any width, to a file or stdout.

    Args:
        a, b: where each run lies, and its report.
        width: columns; None for the terminal's own.
    """
    print_page(lambda glyphs, columns: _parts(difference, (a, b), glyphs, columns), file=file, width=width)


def _parts(difference: Difference, runs: Sequence[tuple[Path, Report]], glyphs: Glyphs, width: int) -> list[RenderableType]:
    parts = ["", _head(difference, runs, glyphs)]
    if difference.parting or difference.leaving:
        parts += [courses(difference, glyphs, width)]
    return [*parts, _rest(difference, glyphs)]


def _head(difference: Difference, runs: Sequence[tuple[Path, Report]], glyphs: Glyphs) -> RenderableType:
    """Which run is which and how it ended, the steps that are compared, and below them what was found."""
    grid = labelled_grid()
    for side, (path, report) in zip("AB", runs, strict=True):
        origin = _story.origin(report)
        grid.add_row(side, Text(printable(str(path))))
        grid.add_row("", Text(f"{_story.headline(report)}{'; first wrong: ' + origin if origin else ''}", style="dim"))
    grid.add_row("steps", Text(_steps(difference)))
    lines = [Text(line, style="bold" if i == 0 else "", overflow="fold") for i, line in enumerate(sentences(difference))]
    panel = Panel(Group(*lines), title=Text("nobs: A against B", style="bold"), title_align="left", box=glyphs.frame)
    return Group(Padding(grid, (0, 0, 1, 1), expand=False), panel)


def _steps(difference: Difference) -> str:
    """`51 to 149 in both (99); in A alone 38 to 50 (13)`."""

    def said(span: Span) -> str:
        return f"{span.first} to {span.last} ({span.count})" if span.count > 1 else str(span.first)

    parts = [f"{said(difference.common)} in both"]
    if difference.measured and difference.measured.count < difference.common.count:
        parts.append(f"layers measured by both in {difference.measured.count} of them")
    for side, spans in (("A", difference.only_a), ("B", difference.only_b)):
        more = f" and {len(spans) - MOST_NAMED} more ranges" if len(spans) > MOST_NAMED else ""
        parts += [f"in {side} alone {', '.join(map(said, spans[:MOST_NAMED]))}{more}"] if spans else []
    return "; ".join(parts)


def sentences(difference: Difference) -> list[str]:
    """What was found, the most important first."""
    steps = f"{difference.common.count} common step{'s' * (difference.common.count > 1)}"
    if not difference.layers:
        return [f"nothing to compare: no layer was measured by both in {steps}"]
    came = [(at, layer) for at, layer in difference.leaving if not layer.always]
    always = [layer.name for _, layer in difference.leaving if layer.always]
    said = [f"first to part: {_place(*difference.parting[0])}{_with_it(difference)}"] if difference.parting else []
    if came:
        more = f"; {len(came) - 1} more until the end" if len(came) > 1 else ""
        said.append(f"{_first_apart(*came[0])}{more}")
    if always:
        said.append(f"a factor of {APART:g} apart throughout: {_some(always)}")
    scalars = [scalar.name for scalar in difference.scalars if scalar.parts]
    but = f", but in {_some(scalars)}" if scalars else ""
    return said or [f"no difference beyond {difference.tolerance:g} in {steps}{but}"]


def _first_apart(at: Spot, layer: LayerDifference) -> str:
    """Where the first layer leaves, and if it goes slowly, when it is a factor of two apart."""
    if layer.apart is None or layer.apart.step == at.step:
        return f"first a factor of {APART:g} apart: {_place(at, layer)}"
    return f"first to come apart: {_place(at, layer)}, and from step {layer.apart.step} on by a factor of {APART:g}"


def _with_it(difference: Difference) -> str:
    """How many layers part in the same step as the first, and what it means if that is the very first step."""
    step = difference.parting[0][0].step
    together = sum(at.step == step for at, _ in difference.parting) - 1
    more = f"; {together} more in this step" if together else ""
    before = ", the first in common: other seeds or data, or it began before"
    return more + before * (difference.measured is not None and step == difference.measured.first)


def _place(at: Spot, layer: LayerDifference) -> str:
    """`conv2 (Conv2d), output, at step 153: 12.3 against 4.1`."""
    where = f"{printable(layer.name)} ({printable(layer.type)}), {printable(at.site)}"
    return f"{where}, at step {at.step}: {_against(at)}"


def _against(at: Spot) -> str:
    """Both readings, in as many figures as it takes to tell them apart; NaN and Inf where they are not the same."""
    norms = both(at.a.norm if at.a else None, at.b.norm if at.b else None)
    counted = at.a is not None and at.b is not None and at.a.nonfinite != at.b.nonfinite

    def said(reading: Reading | None, norm: str) -> str:
        if reading is None:
            return "did not run"
        bad = f"{reading.nonfinite:,} NaN or Inf" if counted and reading.nonfinite else ""
        return bad if bad and np.isnan(reading.norm) else " and ".join(filter(None, (norm, bad)))

    return " against ".join(said(*side) for side in zip((at.a, at.b), norms, strict=True))


def both(a: float | None, b: float | None) -> tuple[str, str]:
    """Two numbers in as many figures as it takes to tell them apart, three at least."""
    ways = ([("not given" if value is None else figures(value, count)) for value in (a, b)] for count in range(3, 18))
    first = next(ways)
    text_a, text_b = first if a == b or first[0] != first[1] else next((way for way in ways if way[0] != way[1]), first)
    return text_a, text_b


def _some(names: Sequence[str]) -> str:
    """The first few of some names, and how many more."""
    more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return ", ".join([*map(printable, names[:MOST_NAMED]), *more])


def _rest(difference: Difference, glyphs: Glyphs) -> RenderableType:
    """The scalars, those first that part first, and what only one of the runs has."""
    grid = labelled_grid()
    parted = sorted((s for s in difference.scalars if s.parts), key=lambda scalar: scalar.parts.step if scalar.parts else 0)
    for scalar in parted[:MOST_SCALARS]:
        grid.add_row(Text(shortened([printable(scalar.name)], _NAME, glyphs.ellipsis)[0]), Text(_scalar(scalar)))
    if len(parted) > MOST_SCALARS:
        grid.add_row("", Text(f"{glyphs.ellipsis} {len(parted) - MOST_SCALARS} more", style="dim"))
    rows = {
        "the same": [scalar.name for scalar in difference.scalars if scalar.last and not scalar.parts],
        "only in A": _alone(difference, difference.only_in_a),
        "only in B": _alone(difference, difference.only_in_b),
    }
    for label, names in rows.items():
        if names:
            grid.add_row(label, Text(_some(names)))
    return Padding(grid, (1, 0, 0, 1), expand=False)


def _scalar(scalar: ScalarDifference) -> str:
    """`parts at step 121: 2.26 against 2.27; at step 149: 2.3 against NaN`."""

    def said(at: Pair) -> str:
        return f"at step {at.step}: {' against '.join(both(at.a, at.b))}"

    parts, last = scalar.parts, scalar.last
    said_of = [f"parts {said(parts)}"] if parts else []
    return "; ".join([*said_of, *([said(last)] if parts and last and last.step > parts.step else [])])


def _alone(difference: Difference, sites: Sequence[tuple[str, str]]) -> list[str]:
    """The layers that one run has alone, and the sites of those that both have."""
    shared = {layer.name for layer in difference.layers}
    return list(dict.fromkeys(f"{layer} {site}" if layer in shared else layer for layer, site in sites))
