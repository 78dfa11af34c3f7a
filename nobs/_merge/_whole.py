"""Norms of the whole from the parts that ranks hold, added up while the ranks are read one by one.

norm of a tensor  the root of the squares of those parts that do not overlap; a part that several ranks hold counts once
norm of all       the root of the squares of all gradients of all parameters, of whatever rank
not known (NaN)   a part was not recorded at that step, a part is only an addend of a sum, or ranks do not agree on the parts

Memory: a few numbers for each site of a parameter and step, whatever the number of ranks; of each part that is not the whole a
bit for each of them, shared between parts of which the same is known, and a few norms to compare copies by.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .._columns import ELEMENTS, FIRST, NAN, NEGINF, PARAMETER_GRAD, STATISTICS, Floats
from .._history import History
from .._ranks import Apart, Norms
from .._table import WHOLE, Shard
from ._copies import Copies
from ._grid import Bools, Grid, Key, Places, overlap


def _nothing(fields: int) -> tuple[Floats, ...]:
    return tuple(np.zeros((0, 0)) for _ in range(fields))


class Whole:
    """Adds up the histories of ranks."""

    def __init__(self) -> None:
        self._grid = Grid()
        self._of: dict[int, int] = {}
        self._squares, self._finite, self._parts, self._there = _nothing(4)
        self._had: dict[int, list[tuple[NDArray[np.int64], Places, bytes]]] = {}
        self._kept: dict[bytes, bytes] = {}
        self._copies = Copies()

    def add(self, rank: int, history: History) -> None:
        """Add what a rank holds; of a step that comes twice the last."""
        table = history.table
        lines = np.concatenate([table.of_kind["parameter"], table.of_kind[PARAMETER_GRAD]])
        if not len(lines) or not len(history):
            return
        keys = [(table.taps[line].layer, table.taps[line].site) for line in lines.tolist()]
        steps, rows = np.unique(history.steps[::-1], return_index=True)
        values = history.values[(len(history) - 1 - rows)[:, None], lines]
        steps, columns = self._grid.steps(steps), self._grid.columns(keys, [table.taps[line].kind for line in lines.tolist()])
        self._fit()
        at, known = self._grid.rows(steps)
        steps, values = steps[known], values[known]
        self._there[np.ix_(at, columns)] = 1
        shards = [history.shards.get(key, WHOLE) for key in keys]
        self._agree(columns, shards)
        index = np.array([shard.index for shard in shards])
        for part in np.unique(index).tolist():
            mine = np.flatnonzero(index == part)
            of_part = self._grid.same(columns[mine])
            self._put(part, steps, at, of_part, values[:, mine])
            self._copies.compare(rank, part, steps, of_part, values[:, mine], self._grid.is_parameter(of_part), self._of)

    def _fit(self) -> None:
        """Room for the rows and columns that there are by now."""
        fields = (self._squares, self._finite, self._parts, self._there)
        self._squares, self._finite, self._parts, self._there = (self._grid.fitted(field) for field in fields)
        self._grid.settle()

    def _agree(self, columns: Places, shards: list[Shard]) -> None:
        """Ranks that do not agree on how many parts there are, and sums that nobody has made, leave a tensor unknown: -1."""
        for column, shard in zip(columns.tolist(), shards, strict=True):
            if shard.addend or self._of.setdefault(column, shard.of) != shard.of:
                self._of[column] = -1

    def _put(self, part: int, steps: NDArray[np.int64], at: Places, columns: Places, lines: NDArray[np.float32]) -> None:
        """Add a part, where nobody has had it yet: one that ended early leaves later steps to its copies."""
        ran = np.isfinite(lines[..., FIRST])
        fresh = self._fresh(part, steps, columns, ran)
        if not fresh.any():
            return
        lines = lines.astype(np.float64)
        finite = np.where(fresh, lines[..., ELEMENTS] - lines[..., NAN : NEGINF + 1].sum(axis=-1), 0)
        cells = np.ix_(at, columns)
        self._squares[cells] += np.where(finite > 0, np.square(STATISTICS["norm"](lines)), 0)
        self._finite[cells] += finite
        self._parts[cells] += fresh

    def _fresh(self, part: int, steps: NDArray[np.int64], columns: Places, ran: Bools) -> Bools:
        """[T, columns]: where a part ran that nobody has had at that step; from now on it is had."""
        fresh = ran.copy()
        for steps_had, columns_had, bits in self._had.get(part, ()):
            shape = len(steps_had), len(columns_had)
            had = np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0] * shape[1]).reshape(shape).astype(np.bool_)
            (i, k), (j, m) = overlap(steps, steps_had), overlap(columns, columns_had)
            fresh[np.ix_(i, j)] &= ~had[np.ix_(k, m)]
        if fresh.any():
            bits = np.packbits(fresh).tobytes()
            self._had.setdefault(part, []).append((self._grid.same(steps), columns, self._kept.setdefault(bits, bits)))
        return fresh

    def norms(self) -> Norms:
        """What was added up so far."""
        keys = list(self._grid.keys)
        of = np.array([self._of[column] for column in range(len(keys))])
        known = (self._parts == of) & (of > 0)
        norm = np.where(known & (self._finite > 0), np.sqrt(self._squares), np.nan)
        gradients = ~self._grid.is_parameter(np.arange(len(keys)))
        idle = (self._parts == 0) & (self._there > 0)  # of no rank that holds it: a branch that was not taken
        total = np.sqrt(self._squares[:, gradients].sum(axis=1))
        whole = (known | idle)[:, gradients].all(axis=1) & known[:, gradients].any(axis=1)
        shared = {key: norm[:, column] for column, key in enumerate(keys) if of[column] != 1}
        return Norms(tuple(self._grid.now.tolist()), shared, np.where(whole, total, np.nan))

    def apart(self) -> tuple[Apart, ...]:
        """Copies that differ, the earliest first."""
        keys: list[Key] = list(self._grid.keys)
        found = [Apart(*keys[column], step, ranks) for column, step, ranks in self._copies.apart()]
        return tuple(sorted(found, key=lambda apart: (apart.step, apart.ranks)))
