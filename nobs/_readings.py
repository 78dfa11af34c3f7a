"""What the triggers of the house ask of a row, computed once a row, on arrays without gaps between their numbers.

Which taps ran, in which order and on how many elements hardly changes from step to step. What follows from that alone is a
`Pattern`; a table keeps its last few, as a model that trains on every second batch, or two in turn, has as many.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._columns import (
    ABSMAX,
    DTYPES,
    ELEMENTS,
    FIRST,
    LARGEST,
    NAN,
    NEGINF,
    NORM,
    OUTPUT,
    OUTPUT_GRAD,
    PARAMETER,
    PARAMETER_GRAD,
    TRAINED,
)
from ._table import TapTable

_KEPT = 4
"""So many of the last patterns a table keeps."""

_COUNTS, _KEY = 1, 3
"""Columns two at a time, as one number of 64 bits: `nan` with `posinf`, `elements` with `first`."""

_LARGEST = np.array([LARGEST.get(name, np.inf) for name in DTYPES])


class Pattern:
    """What follows from the columns `elements` and `first` of a row alone, float32 `[taps]` both.

    Attributes:
        elements: as given.
        ran, measured: bool `[sites]`, in the order of `table.judged`; measured is what ran, on at least one element.
        all_measured: whether all are.
        roots: of the numbers of elements, float64 `[sites]`; NaN where not measured.
    """

    def __init__(self, table: TapTable, elements: NDArray[np.float32], first: NDArray[np.float32]) -> None:
        self._table, self._first, self.elements = table, first, elements
        elements, ran = elements[table.judged], np.isfinite(first[table.judged])
        self.ran, self.measured = ran, ran & (elements > 0)
        self.all_measured = bool(self.measured.all())
        self.roots = np.where(self.measured, np.sqrt(np.maximum(elements.astype(np.float64), 1)), np.nan)

    def is_like(self, other: Pattern) -> bool:
        """Whether they differ in nothing but the sizes of outputs, as batches of different sizes do."""
        behind, same = len(self._table.of_kind[OUTPUT]), np.array_equal(self._first, other._first)
        same = same and np.array_equal(self.measured, other.measured)
        return same and np.array_equal(self.roots[behind:], other.roots[behind:], equal_nan=True)

    @cached_property
    def outputs_ran(self) -> NDArray[np.bool_]:
        """Which outputs ran."""
        return self.ran[: len(self._table.of_kind[OUTPUT])]

    @cached_property
    def gradients_that_ran(self) -> NDArray[np.bool_]:
        """Which gradients of parameters ran."""
        outputs, others = len(self._table.of_kind[OUTPUT]), len(self._table.of_kind[PARAMETER])
        return self.ran[outputs : len(self.ran) - others]

    @cached_property
    def gradients_ran(self) -> bool:
        """Whether there is any gradient in the row."""
        lines = (self._table.of_kind[OUTPUT_GRAD], self._table.of_kind[PARAMETER_GRAD])
        return any(bool(np.isfinite(self._first[of_kind]).any()) for of_kind in lines)

    @cached_property
    def first_output(self) -> int | None:
        """Which of the outputs came first; None where none ran."""
        return int(np.argmin(self._first[self._table.of_kind[OUTPUT]])) if self.outputs_ran.any() else None

    @cached_property
    def largest(self) -> NDArray[np.float64]:
        """For each output the largest number of its dtype; infinite where it did not run."""
        first = np.where(self.outputs_ran, self._first[self._table.of_kind[OUTPUT]].astype(np.float64), 0)
        codes = np.round(first % 1 * 16).astype(int)
        largest: NDArray[np.float64] = _LARGEST[np.clip(codes, 0, len(_LARGEST) - 1)]
        return largest

    @cached_property
    def asking(self) -> NDArray[np.bool_]:
        """Which layers with parameters ask for a gradient, and were used: the output of the layer ran, where it has one."""
        parameters, outputs, _ = self._table.trained_layers
        trained = np.floor(self._first[parameters]) == TRAINED
        used = np.where(outputs >= 0, np.isfinite(self._first[outputs]), True)
        asking: NDArray[np.bool_] = self._table.largest_of_layers(trained & used) > 0
        return asking


class Readings:
    """The readings of one row, `values` float32 `[taps, 8]`. NaN where there is nothing to measure.

    Attributes:
        pattern: how the step ran.
        clean: whether no value at all was NaN or infinite, nor one of a mask.
        outputs, gradients, parameters: norms, of the parameters' gradients, float32, in the order of `table.of_kind`.
        output_peaks: the largest values of the outputs, float32.
        output_rms, gradient_rms: root mean squares, float64.
        whole_gradients: the norms of those gradients that are finite throughout.

    Cost: four passes over the row, and half a dozen NumPy calls over its norms.
    """

    def __init__(self, table: TapTable, values: NDArray[np.float32]) -> None:
        values = np.ascontiguousarray(values, dtype=np.float32)
        pairs = values.view(np.uint64)  # [taps, 4]
        self._table, self._values = table, values
        self.pattern = pattern = pattern_of(table, values)
        self.clean = not (np.count_nonzero(pairs[:, _COUNTS]) or np.count_nonzero(values[:, NEGINF]))
        norms, peaks = values[:, NORM].take(table.judged), values[:, ABSMAX].take(table.of_kind[OUTPUT])
        if not pattern.all_measured:
            norms, peaks = np.where(pattern.measured, norms, _NAN), np.where(pattern.outputs_ran, peaks, _NAN)
        outputs, with_rms = len(peaks), len(norms) - len(table.of_kind[PARAMETER])
        self.outputs, self.gradients, self.parameters = norms[:outputs], norms[outputs:with_rms], norms[with_rms:]
        self.output_peaks = peaks
        rms = norms[:with_rms] / pattern.roots[:with_rms]
        self.output_rms, self.gradient_rms = rms[:outputs], rms[outputs:]
        self.whole_gradients = self.gradients if self.clean else self._whole_gradients()

    def _whole_gradients(self) -> NDArray[np.float32]:
        """The norms of those gradients that are finite throughout, else NaN: the norm of the finite rest is no gradient's."""
        counts: Any = self._values[self._table.of_kind[PARAMETER_GRAD], NAN : NEGINF + 1].T.astype(np.float64)
        with np.errstate(invalid="ignore"):
            return np.where(counts[0] + counts[1] + counts[2] > 0, _NAN, self.gradients)


_NAN = np.float32(np.nan)


def pattern_of(table: TapTable, values: NDArray[np.float32]) -> Pattern:
    """How a row ran: one of the last patterns, if it ran like that."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    key = values.view(np.uint64)[:, _KEY].tobytes()
    for known, pattern in table.patterns:
        if known == key:
            return pattern  # type: ignore[no-any-return]
    pattern = Pattern(table, values[:, ELEMENTS].copy(), values[:, FIRST].copy())
    table.patterns[:] = [(key, pattern), *table.patterns[: _KEPT - 1]]
    return pattern
