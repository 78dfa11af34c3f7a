"""Moving averages and records over several rows at once, `[rows, sites]`, each with a finite reading of every site.

What a moving average is behind some rows is a weighted sum of what it was and of their readings: a product with a small matrix,
which is one call in place of three a row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MOST = 9000
"""Elements in a product. Of a larger one the library behind NumPy wakes threads, which then wait for more where one trains."""


def product(matrix: Floats, rows: Floats) -> Floats:
    """Matrix `[m, rows]` times rows `[rows, sites]`."""
    sites, width = rows.shape[1], max(1, _MOST // max(1, len(rows)))
    if sites <= width:
        return matrix @ rows
    done = np.empty((len(matrix), sites))
    for begin in range(0, sites, width):
        np.matmul(matrix, rows[:, begin : begin + width], out=done[:, begin : begin + width])
    return done


def behind(first: Any, readings: Any) -> Floats:
    """What was there before, and the readings behind it, in one array `[1 + rows, sites]`."""
    rows = np.empty((len(readings) + 1, len(first)))
    rows[0] = first
    rows[1:] = readings
    return rows


@cache
def averages(rows: int, window: int) -> Floats:
    """`[rows, 1 + rows]`: the average behind each row, of what it was before and the readings."""
    since = np.arange(rows)[:, None] - np.arange(-1, rows)
    shares = np.tril((1 - 1 / window) ** np.maximum(since, 0), 1)
    shares[:, 1:] /= window
    return _frozen(shares)


@cache
def level_and_rises(rows: int, window: int) -> Floats:
    """`[1 + rows, 1 + rows]`: the average behind all rows, and how far each reading is above the average before it."""
    average = averages(rows, window)
    before = np.vstack((np.eye(1, rows + 1), average[:-1]))
    return _frozen(np.vstack((average[-1:], np.eye(rows, rows + 1, 1) - before)))


@cache
def level_and_lows(rows: int, window: int, memory: int) -> Floats:
    """`[2 + rows, 1 + rows]`: the average behind all rows, and what its lowest is the least of.

    The lowest goes towards the average by a share a row, and is never above it. So it is the least of what it would be had it
    been equal to the average behind the first row, the second and so on, or had it never been; the latter stands last, without
    what comes of the lowest before.
    """
    average = averages(rows, window)
    stays = 1 - 1 / memory
    lows = [stays ** (rows - 1 - row) * average[row] + _approach(average[row + 1 :], memory) for row in range(rows)]
    return _frozen(np.vstack((average[-1], *lows, _approach(average, memory))))


def _approach(averages_: Floats, memory: int) -> Any:
    """What comes in from the averages of some rows."""
    shares = (1 - 1 / memory) ** np.arange(len(averages_) - 1, -1, -1) / memory
    return shares @ averages_


@cache
def fading(rows: int, factor: float) -> Floats:
    """`[rows, 1]`: what is left of a record of each row behind the last, where it fades by a factor a row."""
    return _frozen(factor ** np.arange(rows - 1, -1, -1)[:, None])


def highest(record: Floats, readings: Floats, factor: float) -> Floats:
    """A record behind several rows, where it fades by a factor a row; NaN is no reading."""
    return np.fmax(record * factor ** len(readings), np.fmax.reduce(readings * fading(len(readings), factor), axis=0))


def _frozen(matrix: Any) -> Floats:
    frozen: Floats = matrix
    frozen.setflags(write=False)
    return frozen
