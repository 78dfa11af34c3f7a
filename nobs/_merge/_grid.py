"""The newest steps of all ranks, and the sites of their parameters: rows and columns of what is added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._columns import PARAMETER, Floats

Key = tuple[str, str]
Bools = NDArray[np.bool_]
Places = NDArray[np.intp]
Steps = NDArray[np.int64]


class Grid:
    """Grows with what ranks bring, to twice as many steps as the longest history has: of ranks further apart the newest count.

    Attributes:
        now: int64 `[T]`, the steps, ascending.
        keys: layer and site -> column.
    """

    def __init__(self) -> None:
        self.now: Steps = np.empty(0, dtype=np.int64)
        self.keys: dict[Key, int] = {}
        self._before = self.now
        self._parameters: list[bool] = []
        self._most = 0
        self._arrays: dict[tuple[str, bytes], NDArray[Any]] = {}

    def steps(self, steps: Steps) -> Steps:
        """Take a rank's steps, ascending."""
        self._most = max(self._most, len(steps))
        if not np.array_equal(steps, self.now):
            self.now = np.union1d(self.now, steps)[-2 * self._most :]
        return self.same(steps)

    def columns(self, keys: Sequence[Key], kinds: Sequence[str]) -> Places:
        """The columns of a rank's sites, new ones behind those that there are."""
        for key, kind in zip(keys, kinds, strict=True):
            if key not in self.keys:
                self.keys[key] = len(self.keys)
                self._parameters.append(kind == PARAMETER)
        return self.same(np.array([self.keys[key] for key in keys], dtype=np.intp))

    def rows(self, steps: Steps) -> tuple[Places, Bools]:
        """The rows of those steps that are among the newest, and which those are."""
        known = np.isin(steps, self.now, assume_unique=True)
        return np.searchsorted(self.now, steps[known]), known

    def fitted(self, field: Floats) -> Floats:
        """A field of the steps before, as it is for those of now."""
        if self._before is self.now and field.shape[1] == len(self.keys):
            return field
        fitted = np.zeros((len(self.now), len(self.keys)))
        i, k = overlap(self.now, self._before)
        fitted[i, : field.shape[1]] = field[k]
        return fitted

    def settle(self) -> None:
        """All fields are fitted."""
        self._before = self.now

    def is_parameter(self, columns: Places) -> Bools:
        """Which columns are values of parameters, and not gradients."""
        return np.array(self._parameters, dtype=np.bool_)[columns]

    def same(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array that was given before with the same numbers: kept for each of 10,000 ranks it takes no room."""
        return self._arrays.setdefault((array.dtype.str, array.tobytes()), array)


def overlap(a: NDArray[Any], b: NDArray[Any]) -> tuple[Places, Places]:
    """Where each of two arrays has what both have."""
    if a is b:
        both = np.arange(len(a))
        return both, both
    _, i, k = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    return i, k
