"""The taps that ran in both runs: all their steps and sites, compared at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .._case import Case, Event, median_over_steps
from .._columns import COLUMNS, FIRST, NAN, NEGINF, PARAMETER_GRAD, STATISTICS, Floats
from .._history import History, bad_counts
from .._table import TapTable
from ._schema import LayerDifference, Reading, Spot

APART = 2.0
"""A site comes apart where its norms differ by this factor, and by this factor more than ever before, to the end ..."""
READINGS = 3
"""... and it always was apart where there are not so many readings before."""
USUAL, LEAST = 10.0, 0.05
"""It leaves for that where the logarithm of their ratio is so many times its median before, and at least so large, to the end."""
ROUNDING = 1e-6
"""Below this share of the largest gradient of its layer a gradient is rounding: that of a bias in front of a norm, or of the
keys of attention, which cancels."""

Bools = NDArray[np.bool_]
Rows = NDArray[np.intp]

Turn = tuple[bool, Event]
"""When it is a layer's turn: those that always were apart come last, the others in the order of computation."""


@dataclass(frozen=True)
class _Leaving:
    """Of the sites that are far apart at the end: `left` [T, sites], since when they have left; and of all sites: `apart`
    [T, sites], since when by a factor APART; `always` [sites], whether nearly from the first reading on."""

    left: Bools
    apart: Bools
    always: Bools


@dataclass(frozen=True, eq=False)
class Both:
    """What both runs measured at the sites that ran in both.

    Attributes:
        case: the rows of A and behind them those of B; it knows the order of computation.
        values: float32 `[2, T, sites, 8]`, A's and B's.
        bad: `[2, T, sites]`, NaN or Inf where none may be.
        tolerance: by more than this share of the larger one, two numbers are not the same.
    """

    case: Case
    values: NDArray[np.float32]
    bad: Bools
    tolerance: float

    @staticmethod
    def of(a: History, b: History, rows_a: Rows, rows_b: Rows, sites: Sequence[tuple[str, str]], tolerance: float) -> Both:
        """Both histories, in some rows each, and of some sites."""
        lines = [np.array([h.table.lines[site] for site in sites], dtype=np.intp) for h in (a, b)]
        taps = [(a.table.taps[i], b.table.taps[j]) for i, j in zip(*lines, strict=True)]
        types = [" or ".join(dict.fromkeys(tap.layer_type for tap in pair)) for pair in taps]
        table = TapTable(tuple(replace(tap, layer_type=of_type) for (tap, _), of_type in zip(taps, types, strict=True)))
        values = np.stack([h.values[rows[:, None], at] for h, rows, at in ((a, rows_a, lines[0]), (b, rows_b, lines[1]))])
        steps = np.concatenate([a.steps[rows_a], b.steps[rows_b]])
        history = History(steps, table, values.reshape(len(steps), len(table), len(COLUMNS)))
        counted = (history.values[..., NAN : NEGINF + 1] != 0).any(axis=(1, 2))  # few steps, as a rule
        bad = np.zeros(history.values.shape[:2], dtype=np.bool_)
        bad[counted] = bad_counts(history.values[counted], table) > 0
        return Both(Case(history, None), values, bad.reshape(values.shape[:3]), tolerance)

    @cached_property
    def ran(self) -> Bools:
        """[2, T, sites]: whether a site ran."""
        return np.isfinite(self.values[..., FIRST])

    @cached_property
    def norms(self) -> Floats:
        """float64 `[2, T, sites]`, NaN where the site did not run or no value was finite."""
        return np.where(self.ran, STATISTICS["norm"](self.values), np.nan).astype(np.float64)

    @cached_property
    def one_bad(self) -> Bools:
        """[T, sites]: NaN or Inf in one of two that ran."""
        return np.asarray(self.ran.all(axis=0) & (self.bad[0] != self.bad[1]))

    @cached_property
    def ratios(self) -> Floats:
        """[T, sites]: by what factor the norms differ, as a Spot has it."""
        low, high = np.minimum(*self.norms), np.maximum(*self.norms)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(low == high, 1.0, high / low)
        return np.where(self.one_bad, np.inf, np.where(self.bad.any(axis=0) | self.rounding(ROUNDING), np.nan, ratios))

    def rounding(self, share: float) -> Bools:
        """[T, sites]: gradients of parameters that in each run are below a share of the largest one of their layer."""
        table = self.case.history.table
        largest = np.zeros_like(self.norms)
        for lines in table.of_layer.values():
            of_layer = [line for line in lines if table.taps[line].kind == PARAMETER_GRAD]
            largest[..., of_layer] = np.fmax.reduce(self.norms[..., of_layer], axis=-1, keepdims=True, initial=0.0)
        with np.errstate(invalid="ignore"):
            return np.asarray((self.norms < share * largest).all(axis=0))

    @cached_property
    def changed(self) -> Bools:
        """[T, sites]: whether the norms are not the same, and not by rounding alone."""
        return unequal(self.norms[0], self.norms[1], self.tolerance) & ~self.rounding(min(ROUNDING, self.tolerance))

    def parting(self) -> dict[str, Turn]:
        """layer -> where its first site is not the same, of the layers that have one."""
        counts = unequal(self.values[0, ..., NAN : NEGINF + 1], self.values[1, ..., NAN : NEGINF + 1], 0.0).any(axis=-1)
        differ = np.asarray(np.where(self.ran.all(axis=0), counts | self.changed, self.ran.any(axis=0)))
        return self._earliest(differ, np.zeros(differ.shape[1], dtype=np.bool_))

    def leaving(self) -> dict[str, Turn]:
        """layer -> where its first site leaves, of the layers that are apart at the end."""
        return self._earliest(self._leaving.left, self._leaving.always)

    @cached_property
    def _leaving(self) -> _Leaving:
        """Two seeds are a factor of two off by chance, and some sites all the time: a site is judged by what it was before."""
        logs = np.where(self._not_begun, np.nan, np.log(np.maximum(self.ratios, 1.0)))
        factor = float(np.log(APART))
        apart = _to_the_end(logs, factor)
        before = np.where(apart, np.nan, logs)
        always = np.asarray((~np.isnan(before)).sum(axis=0) < READINGS)
        far = np.where(always, factor, factor + np.fmax.reduce(before, axis=0, initial=0.0))
        out = np.maximum(USUAL * np.nan_to_num(median_over_steps(before)), np.log1p(LEAST))
        left = _to_the_end(logs, np.where(always, far, np.minimum(far, out)))
        return _Leaving(left & _to_the_end(logs, far).any(axis=0), apart, always)

    @property
    def _not_begun(self) -> Bools:
        """[T, sites]: zero in both, as biases begin, of a site that is never zero in one run alone: that is not yet the same."""
        zero = (self.norms == 0) & self.ran.all(axis=0)
        alone = np.asarray((zero[0] != zero[1]).any(axis=0))
        return np.asarray(zero.all(axis=0) & ~alone)

    def _earliest(self, there: Bools, always: Bools) -> dict[str, Turn]:
        """layer -> the turn of its first site, of the layers that have one.

        Args:
            there: `[T, sites]`, the first of which counts.
            always: `[sites]`, whether a site comes behind those that were not so from the first step on.
        """
        found: dict[str, Turn] = {}
        for line in np.flatnonzero(there.any(axis=0)).tolist():
            turn = bool(always[line]), self.case.event(int(there[:, line].argmax()), line)
            layer = self.case.history.table.taps[line].layer
            found[layer] = min(found.get(layer, turn), turn)
        return found

    def layer(self, name: str, parts: Turn | None, leaves: Turn | None) -> LayerDifference:
        """All that there is to say of a layer."""
        lines = self.case.history.table.of_layer[name]
        ratios = np.where(np.isnan(self.ratios[:, lines]), -1.0, self.ratios[:, lines])
        row, line = divmod(int(ratios.argmax()), len(lines))
        return LayerDifference(
            name=name,
            type=self.case.history.table.taps[lines[0]].layer_type,
            parts=parts and self._spot(parts[1].row, parts[1].line),
            leaves=leaves and self._spot(leaves[1].row, leaves[1].line),
            apart=leaves and self._spot(max(leaves[1].row, int(self._leaving.apart[:, leaves[1].line].argmax())), leaves[1].line),
            always=leaves is not None and leaves[0],
            largest=self._spot(row, lines[line]) if ratios[row, line] > 1 else None,
            ratios=np.fmax.reduce(self.ratios[:, lines], axis=1),
            bad=np.asarray(self.one_bad[:, lines].any(axis=1)),
        )

    def _spot(self, row: int, line: int) -> Spot:
        a, b = (self._reading(side, row, line) for side in (0, 1))
        history = self.case.history
        return Spot(history.table.taps[line].site, int(history.steps[row]), a, b, float(self.ratios[row, line]))

    def _reading(self, side: int, row: int, line: int) -> Reading | None:
        with np.errstate(invalid="ignore", over="ignore"):  # a dump may hold any floats
            count = float(STATISTICS["nonfinite"](self.values[side, row, line]))
        known = int(count) if np.isfinite(count) else 0  # a dump may hold any floats
        return Reading(float(self.norms[side, row, line]), known) if self.ran[side, row, line] else None


def _to_the_end(logs: Floats, limit: Floats | float) -> Bools:
    """[T, sites]: the readings from which on none is below a limit; NaN is no reading."""
    below = np.flip(logs < limit, axis=0)
    return np.asarray(~np.flip(np.logical_or.accumulate(below, axis=0), axis=0) & ~np.isnan(logs))


def unequal(a: Floats, b: Floats, tolerance: float) -> Bools:
    """Where two numbers are not the same; two NaN are, and so are two infinities of one sign."""
    other = np.asarray((a != b) & ~(np.isnan(a) & np.isnan(b)))
    if tolerance == 0:
        return other
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.abs(a - b) > tolerance * np.maximum(np.abs(a), np.abs(b))
    return other & (far | ~np.isfinite(a) | ~np.isfinite(b))
