"""Rows that can be no failure: found by one look, and learned by the block. Most of what a trigger costs is learning.

Once there is a baseline, a trigger can say between what bounds the readings of the next rows must lie to be no failure, whatever
those rows make of its baseline meanwhile. A `Sieve` is the bounds of all triggers over all columns of a row. A row that lies
within has been judged; it waits, and `BLOCK` of them are learned in one go. Before a row that does not lie within, all that
waits is learned, and then it is judged by each trigger against the baseline that it would have had all along. So no failure
is found earlier, later or otherwise than row by row.

A trigger takes part that has two more methods, both pure; any other is shown each row.

    bounds(state, row, bounds) -> bool    narrow the bounds for rows that ran as this one did; False: not now, show me each
    learned(state, block) -> state        what `update` makes of the rows of a block one by one, but for rounding
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .._columns import ABSMAX, ELEMENTS, NAN, NEGINF, NORM, OUTPUT, PARAMETER
from .._history import Row
from .._readings import Pattern
from .._table import TapTable

BLOCK = 30
WORTH = 4
"""Rows that a sieve must hold to be worth what it costs."""

SETTLED = 100
"""So many rows are learned one by one first."""

SLACK = 1e-5
"""By what share bounds are narrower than they need be, for rounding."""

Floats = NDArray[np.float64]


class Bounds:
    """Between what the norms and peaks of a row must lie to be no failure: float64, `[sites]` as in `Readings`; all is allowed
    at first. A bound of NaN is none. `masked` are the lines `[taps]` that may hold -Inf."""

    def __init__(self, row: Row) -> None:
        self.pattern = row.readings.pattern
        sites = len(row.table.judged)
        self._outputs, self._with_rms = len(row.table.of_kind[OUTPUT]), sites - len(row.table.of_kind[PARAMETER])
        self.least, self.most = np.full(sites, -np.inf), np.full(sites, np.inf)
        self.least_peaks, self.most_peaks = np.full(self._outputs, -np.inf), np.full(self._outputs, np.inf)
        self.masked = np.zeros(len(row.table), dtype=np.bool_)

    @property
    def output_roots(self) -> Floats:
        """The root of the elements of each output: what its root mean square is multiplied with to be a norm."""
        return self.pattern.roots[: self._outputs]

    @property
    def gradient_roots(self) -> Floats:
        """The same of the parameters' gradients."""
        return self.pattern.roots[self._outputs : self._with_rms]

    def outputs(self, least: Any = -np.inf, most: Any = np.inf) -> None:
        """Narrow those of the outputs' norms."""
        self._narrow(slice(0, self._outputs), least, most)

    def gradients(self, least: Any = -np.inf, most: Any = np.inf) -> None:
        """Narrow those of the norms of the parameters' gradients."""
        self._narrow(slice(self._outputs, self._with_rms), least, most)

    def parameters(self, least: Any = -np.inf, most: Any = np.inf) -> None:
        """Narrow those of the parameters' norms."""
        self._narrow(slice(self._with_rms, None), least, most)

    def _narrow(self, part: slice, least: Any, most: Any) -> None:
        np.fmax(self.least[part], least, out=self.least[part])
        np.fmin(self.most[part], most, out=self.most[part])


@dataclass(frozen=True, eq=False)
class Sieve:
    """Bounds over whole rows that run in one way, float32 `[taps, 8]`; and which triggers they are of, `waits`."""

    table: TapTable
    pattern: Pattern
    waits: tuple[bool, ...]
    least: NDArray[np.float32]
    most: NDArray[np.float32]

    @staticmethod
    def of(row: Row, bounds: Bounds, waits: tuple[bool, ...]) -> Sieve:
        """The sieve of rows that run like this one."""
        table, measured = row.table, bounds.pattern.measured
        least, most = (np.full(row.values.shape, bound, dtype=np.float32) for bound in (-np.inf, np.inf))
        with np.errstate(over="ignore"):
            least[table.judged, NORM] = np.where(measured, bounds.least, -np.inf)
            most[table.judged, NORM] = np.where(measured, bounds.most, np.inf)
            least[table.of_kind[OUTPUT], ABSMAX], most[table.of_kind[OUTPUT], ABSMAX] = bounds.least_peaks, bounds.most_peaks
        most[:, NAN : NEGINF + 1] = 0
        most[bounds.masked, NEGINF] = np.inf
        most[:, ELEMENTS:] = least[:, ELEMENTS:] = row.values[:, ELEMENTS:]
        return Sieve(table, bounds.pattern, waits, least, most)

    def resized(self, pattern: Pattern) -> Sieve:
        """The sieve of rows that run like these, but with outputs of other sizes."""
        least, most, outputs = self.least.copy(), self.most.copy(), self.table.of_kind[OUTPUT]
        times = pattern.roots[: len(outputs)] / self.pattern.roots[: len(outputs)]  # of root mean squares they are bounds
        times[np.isnan(times)] = 1
        with np.errstate(over="ignore"):
            for bound in (least, most):
                bound[outputs, NORM] *= times
                bound[:, ELEMENTS] = pattern.elements
        return Sieve(self.table, pattern, self.waits, least, most)

    def holds(self, row: Row) -> bool:
        """Whether a row ran as that one did, and can be no failure of the triggers that wait. Cost: two comparisons of it."""
        if row.table is not self.table or not math.isfinite(row.scalars.get("loss", 0.0)):
            return False
        return not np.count_nonzero(row.values > self.most) and not np.count_nonzero(row.values < self.least)


class Block:
    """The values of rows that wait, and how each ran: what triggers learn of them, `[rows, sites]`; NaN is no reading."""

    def __init__(self, table: TapTable, rows: Sequence[NDArray[np.float32]], patterns: Sequence[Pattern]) -> None:
        self.table, self.patterns = table, patterns
        # A norm and a peak are neighbours in their line, and taken as one number of 64 bits.
        pairs = [np.ascontiguousarray(row, np.float32).view(np.uint64)[:, NORM // 2].take(table.judged) for row in rows]
        self._read = np.array(pairs).view(np.float32).reshape(len(rows), -1, 2)
        self._outputs = len(table.of_kind[OUTPUT])
        self._with_rms = len(table.judged) - len(table.of_kind[PARAMETER])
        self._alike = all(pattern is patterns[0] for pattern in patterns)

    def __len__(self) -> int:
        return len(self.patterns)

    def _of_patterns(self, name: str) -> Any:
        return getattr(self.patterns[0], name) if self._alike else np.array([getattr(pattern, name) for pattern in self.patterns])

    def _where(self, ran: str, values: NDArray[np.float32]) -> Floats:
        """As float64, where they were read."""
        whole = all(pattern.all_measured for pattern in self.patterns)
        wide: Floats = values.astype(np.float64)
        if not whole:
            wide[~np.broadcast_to(self._of_patterns(ran), wide.shape)] = np.nan
        return wide

    @cached_property
    def _norms(self) -> Floats:
        return self._where("measured", self._read[..., 0])

    @cached_property
    def outputs(self) -> Floats:
        """Norms of the outputs."""
        return self._norms[:, : self._outputs]

    @cached_property
    def output_rms(self) -> Floats:
        """Root mean squares of the outputs."""
        rms: Floats = self.outputs / self._of_patterns("roots")[..., : self._outputs]
        return rms

    @cached_property
    def gradients(self) -> Floats:
        """Norms of the parameters' gradients."""
        return self._norms[:, self._outputs : self._with_rms]

    @cached_property
    def parameters(self) -> Floats:
        """Norms of the parameters."""
        return self._norms[:, self._with_rms :]

    @cached_property
    def output_peaks(self) -> Floats:
        """The largest values of the outputs."""
        return self._where("outputs_ran", self._read[:, : self._outputs, 1])


@runtime_checkable
class Waiting(Protocol):
    """A trigger that takes part."""

    def update(self, state: Any, row: Row) -> tuple[Any, Any]: ...
    def bounds(self, state: Any, row: Row, bounds: Bounds) -> bool: ...
    def learned(self, state: Any, block: Block) -> Any: ...
