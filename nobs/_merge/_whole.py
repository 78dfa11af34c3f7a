"""Norms of the whole from the parts that ranks hold, added up while the ranks are read one by one.

norm of a tensor  the root of the squares of those parts that do not overlap; a part that several ranks hold counts once
norm of all       the root of the squares of all gradients of all parameters, of whatever rank
not known (NaN)   a part was not recorded at that step, a part is only an addend of a sum, or ranks do not agree on the parts

Memory: a few numbers for each site of a parameter and step, whatever the number of ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .._columns import ELEMENTS, FIRST, NAN, NEGINF, NORM, PARAMETER, PARAMETER_GRAD, Floats
from .._history import History
from .._ranks import Apart, Norms
from .._table import WHOLE, Shard

_APART = 1e-4
"""Copies of a parameter whose norms differ by more, relative, are not the same."""

Key = tuple[str, str]
Places = NDArray[np.intp]


class Whole:
    """Adds up the histories of ranks."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._sites: dict[Key, int] = {}
        self._kinds: list[str] = []
        self._of: list[int] = []
        self._seen: list[set[int]] = []
        self._squares, self._finite, self._parts = (np.zeros((0, 0)) for _ in range(3))
        self._copies: dict[int, Floats] = {}
        self._apart: dict[Key, tuple[int, set[int]]] = {}

    def add(self, rank: int, history: History) -> None:
        """Add what a rank holds."""
        table = history.table
        lines = np.concatenate([table.of_kind[PARAMETER], table.of_kind[PARAMETER_GRAD]])
        if not len(lines) or not len(history):
            return
        taps = [table.taps[line] for line in lines]
        shards = [history.shards.get((tap.layer, tap.site), WHOLE) for tap in taps]
        columns = [self._column((tap.layer, tap.site), tap.kind) for tap in taps]
        rows = [self._rows.setdefault(step, len(self._rows)) for step in history.steps.tolist()]
        self._grow()
        fresh = [self._claim(column, shard) for column, shard in zip(columns, shards, strict=True)]
        at, values = np.array(columns, dtype=np.intp), history.values[:, lines]
        if any(fresh):
            self._put(np.array(rows, dtype=np.intp), at[fresh], values[:, fresh].astype(np.float64))
        copies = [i for i, (tap, shard) in enumerate(zip(taps, shards, strict=True)) if tap.kind == PARAMETER and shard == WHOLE]
        self._compare(rank, rows, at[copies], values[:, copies])

    def _column(self, key: Key, kind: str) -> int:
        if key not in self._sites:
            self._sites[key] = len(self._sites)
            self._kinds.append(kind)
            self._of.append(0)
            self._seen.append(set())
        return self._sites[key]

    def _grow(self) -> None:
        size = len(self._rows), len(self._sites)
        more = [(0, max(0, new - old)) for new, old in zip(size, self._squares.shape, strict=True)]
        if any(behind for _, behind in more):
            self._squares, self._finite, self._parts = (np.pad(a, more) for a in (self._squares, self._finite, self._parts))

    def _claim(self, column: int, shard: Shard) -> bool:
        """Whether nobody has had this part yet. Ranks that do not agree on how many parts there are leave none known."""
        agreed = not shard.addend and self._of[column] in (0, shard.of)
        self._of[column] = shard.of if agreed else -1
        fresh = shard.index not in self._seen[column]
        self._seen[column].add(shard.index)
        return fresh

    def _put(self, rows: Places, columns: Places, lines: Floats) -> None:
        ran = np.isfinite(lines[..., FIRST])
        finite = lines[..., ELEMENTS] - lines[..., NAN : NEGINF + 1].sum(axis=-1)
        at = np.ix_(rows, columns)
        self._squares[at] += np.where(ran & (finite > 0), np.square(lines[..., NORM]), 0)
        self._finite[at] += np.where(ran, finite, 0)
        self._parts[at] += ran

    def _compare(self, rank: int, rows: list[int], columns: Places, lines: Floats) -> None:
        """Copies of whole parameters: their norms are the same to the bit as long as they are."""
        norms = np.full((len(self._rows), len(columns)), np.nan, dtype=np.float32)
        norms[rows] = np.where(np.isfinite(lines[..., FIRST]), lines[..., NORM], np.nan)
        keys, steps = list(self._sites), np.array(list(self._rows))
        for column, mine in zip(columns.tolist(), norms.T, strict=True):
            first = self._copies.setdefault(column, mine)
            size = min(len(first), len(mine))
            with np.errstate(invalid="ignore"):
                differ = np.abs(mine[:size] - first[:size]) > _APART * np.abs(first[:size])
            if differ.any():
                since = int(steps[:size][differ].min())
                known, ranks = self._apart.get(keys[column], (since, set()))
                self._apart[keys[column]] = min(known, since), ranks | {rank}

    def norms(self) -> Norms:
        """What was added up so far."""
        order = np.argsort(list(self._rows)) if self._rows else np.empty(0, dtype=np.intp)
        of, there = np.array(self._of), self._parts > 0
        known = (self._parts == of) & (of > 0)
        norm = np.where(known & (self._finite > 0), np.sqrt(self._squares), np.nan)[order]
        gradients = np.array([kind == PARAMETER_GRAD for kind in self._kinds], dtype=np.bool_)
        total = np.sqrt(np.where(there, self._squares, 0)[:, gradients].sum(axis=1))
        whole = (known | ~there)[:, gradients].all(axis=1) & there[:, gradients].any(axis=1)
        shared = {key: norm[:, column] for key, column in self._sites.items() if self._of[column] != 1}
        return Norms(tuple(sorted(self._rows)), shared, np.where(whole, total, np.nan)[order])

    def apart(self) -> tuple[Apart, ...]:
        """Copies that differ, the earliest first."""
        found = [Apart(*key, step, tuple(sorted(ranks))) for key, (step, ranks) in self._apart.items()]
        return tuple(sorted(found, key=lambda apart: apart.step))
