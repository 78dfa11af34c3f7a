"""Copies of parameters on several ranks, or of parts of them: the same norms, as long as they are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from .._columns import FIRST, STATISTICS, Floats
from ._grid import Bools, Places, Steps, overlap

APART = 1e-4
"""Copies whose norms differ by more, relative, are not the same."""
OF_PARTS = 8
"""Of parameters that are spread over ranks every so many steps are compared: of each part there is one to be kept."""


@dataclass(eq=False)
class _Held:
    """What the first rank holds of a part, and which others hold it; `apart`: column -> since when, and on which ranks."""

    steps: Steps
    columns: Places
    norms: Floats
    ranks: list[int]
    apart: dict[int, tuple[int, set[int]]] = field(default_factory=dict)


class Copies:
    """Compares each rank with the first that holds the same."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, bool], list[_Held]] = {}

    def compare(
        self, rank: int, part: int, steps: Steps, columns: Places, lines: Floats, parameters: Bools, of: Mapping[int, int]
    ) -> None:
        """Compare the values of parameters that a rank holds, `[T, columns, 8]`, with those of a rank before."""
        for split in (False, True):
            mine = np.flatnonzero(parameters & np.array([(of[column] != 1) == split for column in columns.tolist()], np.bool_))
            if mine.size:
                rows = np.flatnonzero(steps % OF_PARTS == 0) if split else np.arange(len(steps))
                norms = np.where(np.isfinite(lines[..., FIRST]), STATISTICS["norm"](lines), -1.0)[np.ix_(rows, mine)]
                self._against_first(rank, (part, split), steps[rows], columns[mine], norms.astype(np.float32))

    def _against_first(self, rank: int, key: tuple[int, bool], steps: Steps, columns: Places, norms: Floats) -> None:
        held = next((h for h in self._held.get(key, ()) if np.array_equal(h.columns, columns)), None)
        if held is None:
            self._held.setdefault(key, []).append(_Held(steps, columns, norms, [rank]))
            return
        held.ranks.append(rank)
        i, k = overlap(steps, held.steps)
        a, b = norms[i], held.norms[k]
        with np.errstate(invalid="ignore"):
            differ = (np.abs(a - b) > APART * np.maximum(a, b)) | (np.isnan(a) != np.isnan(b))
        differ &= (a != -1) & (b != -1)  # both ran
        for at in np.flatnonzero(differ.any(axis=0)).tolist():
            since, ranks = int(steps[i][differ[:, at].argmax()]), held.apart.setdefault(int(columns[at]), (2**62, set()))
            held.apart[int(columns[at])] = min(since, ranks[0]), ranks[1] | {rank}

    def apart(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Column, since which step, and which ranks: those that are fewer, the first among them maybe."""
        for held in (held for parts in self._held.values() for held in parts):
            for column, (since, ranks) in held.apart.items():
                few = ranks if 2 * len(ranks) <= len(held.ranks) else set(held.ranks) - ranks
                yield column, since, tuple(sorted(few))
