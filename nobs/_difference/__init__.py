"""Where two runs part: two histories, aligned by step, and per layer the first step at which they are not the same.

Two questions, as only runs of one seed are ever the same. Where do they *part*, by more than a tolerance? And of the layers
that are far *apart* at the end: where do they *leave* the ratio that they had before?
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from .._columns import FIRST, Floats
from .._history import History
from ..errors import BadSetting, explain
from ._both import APART as APART
from ._both import Bools, Both, Rows, Turn, unequal
from ._schema import Difference as Difference
from ._schema import LayerDifference as LayerDifference
from ._schema import Pair as Pair
from ._schema import Reading as Reading
from ._schema import ScalarDifference as ScalarDifference
from ._schema import Span as Span
from ._schema import Spot as Spot

TOLERANCE = 1e-3
"""By more than this share of the larger one, two numbers are not the same."""


def compare(a: History, b: History, tolerance: float = TOLERANCE, layers: Collection[str] | None = None) -> Difference:
    """Two histories, compared step by step and site by site; of a step that a run repeated, the last time counts.

    Args:
        tolerance: by more than this share of the larger one, two numbers are not the same.
        layers: only these; None means all.

    Raises:
        BadSetting: they have no step in common, or the tolerance is negative or no number.
    """
    if not 0 <= tolerance < math.inf:
        raise BadSetting(explain("comparing two runs", f"a tolerance of {tolerance}", "a number from 0 on", "--tolerance 0.001"))
    rows_a, rows_b = _aligned(a, b)
    common = a.steps[rows_a]
    sites_a, sites_b = _sites(a, layers), _sites(b, layers)
    measured = _ran(a)[rows_a].any(axis=1) & _ran(b)[rows_b].any(axis=1)
    shared = [site for site in sites_a if site in sites_b and measured.any()]
    both = Both.of(a, b, rows_a[measured], rows_b[measured], shared, tolerance)
    parting, leaving = both.parting(), both.leaving()
    order = [layer.name for layer in both.case.history.layers]
    found = {name: both.layer(name, parting.get(name), leaving.get(name)) for name in order}

    def in_turn(turns: dict[str, Turn]) -> list[LayerDifference]:
        return [found[name] for name in sorted(turns, key=lambda name: turns[name])]

    return Difference(
        tolerance=tolerance,
        common=_span(common),
        measured=_span(common[measured]) if measured.any() else None,
        only_a=_spans(a.steps, common),
        only_b=_spans(b.steps, common),
        layers=tuple(found.values()),
        parting=tuple((layer.parts, layer) for layer in in_turn(parting) if layer.parts),
        leaving=tuple((layer.leaves, layer) for layer in in_turn(leaving) if layer.leaves),
        scalars=tuple(_scalar(name, a, b, rows_a, rows_b, tolerance) for name in dict.fromkeys([*a.scalars, *b.scalars])),
        only_in_a=tuple(site for site in sites_a if site not in sites_b),
        only_in_b=tuple(site for site in sites_b if site not in sites_a),
    )


def _aligned(a: History, b: History) -> tuple[Rows, Rows]:
    """The rows of the steps that both have, ascending by step; of a step that comes twice the last."""
    (steps_a, back_a), (steps_b, back_b) = (np.unique(history.steps[::-1], return_index=True) for history in (a, b))
    common, at_a, at_b = np.intersect1d(steps_a, steps_b, assume_unique=True, return_indices=True)
    if not len(common):
        ranges = (f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no steps" for steps in (steps_a, steps_b))
        got = "{} in A, {} in B".format(*ranges)
        expected = "steps that both have recorded"
        raise BadSetting(explain("comparing two runs step by step", got, expected, "nobs diff A B, of runs that overlap"))
    return len(a) - 1 - back_a[at_a], len(b) - 1 - back_b[at_b]


def _span(steps: NDArray[np.int64]) -> Span:
    return Span(int(steps[0]), int(steps[-1]), len(steps))


def _spans(steps: NDArray[np.int64], common: NDArray[np.int64]) -> tuple[Span, ...]:
    """The steps that a run has alone, those together between which there is no common one."""
    alone = np.setdiff1d(steps, common)
    gaps = np.flatnonzero(np.diff(np.searchsorted(common, alone))) + 1
    return tuple(_span(part) for part in np.split(alone, gaps) if len(part))


def _ran(history: History) -> Bools:
    """[T, taps]: whether a tap ran in a step."""
    return np.isfinite(history.values[..., FIRST])


def _sites(history: History, layers: Collection[str] | None) -> dict[tuple[str, str], int]:
    """(layer, site) -> line, of the sites that ever ran: a black box has the others too, a dump has not."""
    ever = np.asarray(_ran(history).any(axis=0))
    lines = history.table.lines.items()
    return {site: line for site, line in lines if ever[line] and (layers is None or site[0] in layers)}


def _scalar(name: str, a: History, b: History, rows_a: Rows, rows_b: Rows, tolerance: float) -> ScalarDifference:
    """One scalar over the common steps."""
    (values_a, given_a), (values_b, given_b) = (_given(name, *side) for side in ((a, rows_a), (b, rows_b)))
    there = given_a | given_b
    parted = np.flatnonzero(there & ((given_a != given_b) | unequal(values_a, values_b, tolerance)))
    known = np.flatnonzero(there)

    def pair(row: int) -> Pair:
        sides = (float(v[row]) if given[row] else None for v, given in ((values_a, given_a), (values_b, given_b)))
        return Pair(int(a.steps[rows_a[row]]), *sides)

    return ScalarDifference(name, pair(int(parted[0])) if parted.size else None, pair(int(known[-1])) if known.size else None)


def _given(name: str, history: History, rows: Rows) -> tuple[Floats, Bools]:
    """A scalar's values, and whether it was given."""
    if name not in history.scalars:
        return np.full(len(rows), np.nan), np.zeros(len(rows), dtype=np.bool_)
    return history.scalars[name][rows], history.given[name][rows]
