"""What a live view shows: how a run stands, and the last steps of every layer. Frozen numbers, free of rich."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._columns import Floats
from .._schema import Failure

SIDES = ("output", "gradient")
"""Forward and backward, as a layer runs."""


@dataclass(frozen=True, eq=False)
class Norms:
    """One side of all layers: `values` float64 `[T, layers]`, NaN without a reading; `bad` where not all was finite."""

    values: Floats
    bad: NDArray[np.bool_]

    @cached_property
    def rises(self) -> Floats:
        """[T, layers]: the powers of ten above the layer's own median; inf where bad, -inf at zero, NaN without a reading."""
        with np.errstate(divide="ignore", invalid="ignore"):  # a file may hold any floats
            logs = np.log10(self.values)
            return np.where(self.bad, np.inf, logs - _medians(logs))

    @cached_property
    def last(self) -> NDArray[np.intp]:
        """[layers]: the row of the last reading, -1 without one."""
        read = ~np.isnan(self.values) | self.bad
        if not len(read):
            return np.full(read.shape[1], -1, dtype=np.intp)
        return np.where(read.any(axis=0), len(read) - 1 - np.argmax(read[::-1], axis=0), -1)

    @cached_property
    def last_rises(self) -> Floats:
        """[layers]: `rises` at the last reading, NaN without one."""
        return np.where(self.last >= 0, self._at_last(self.rises), np.nan)

    @cached_property
    def last_bad(self) -> NDArray[np.bool_]:
        """[layers]: whether the last reading was not finite."""
        return (self.last >= 0) & (self._at_last(self.bad) > 0)

    def _at_last(self, values: NDArray[Any]) -> Floats:
        """[layers]: of `[T, layers]` what stands at the last reading; 0 where there are no rows."""
        count = values.shape[1]
        return values[self.last, np.arange(count)].astype(np.float64) if len(values) else np.zeros(count)


def _medians(logs: Floats) -> Floats:
    """[layers]: the lower median of what is finite in each column; 0 where nothing is. A tenth of nanmedian's time."""
    finite = np.isfinite(logs)
    ascending = np.sort(np.where(finite, logs, np.inf), axis=0)
    counts = finite.sum(axis=0)
    if not len(logs):
        return np.zeros(logs.shape[1])
    return np.where(counts > 0, ascending[np.maximum(counts - 1, 0) // 2, np.arange(logs.shape[1])], 0.0)


@dataclass(frozen=True)
class Worst:
    """The layer to look at: its place in `Scene.layers`, its side, and since which step that is bad (None: it only rose)."""

    layer: int
    side: str
    since: int | None


@dataclass(frozen=True, eq=False)
class Scene:
    """A run as it stands.

    Attributes:
        name: the run's folder.
        facts: what else is known of it, the most useful first.
        state: "running", "silent", "died", or how it ended; see `nobs.render._vitals.LOOKS`.
        quiet_s: whole seconds since its last news.
        capacity: the most rows that there can be.
        steps: int64 `[T]`.
        scalars: float64 `[T]` each, NaN where not given.
        given: bool `[T]` each.
        exception: what ended it.
        failures: what the triggers saw, the oldest first.
        layers: all of them, and `types` what they are.
        executed: the places in `layers` of those that ran, in the order of execution.
        sides: the norms by SIDES.
    """

    name: str
    facts: tuple[str, ...]
    state: str
    quiet_s: int
    capacity: int
    steps: NDArray[np.int64]
    scalars: Mapping[str, Floats]
    given: Mapping[str, NDArray[np.bool_]]
    steps_per_s: float | None
    exception: str | None
    failures: tuple[Failure, ...]
    layers: tuple[str, ...]
    types: tuple[str, ...]
    executed: tuple[int, ...]
    sides: Mapping[str, Norms]

    def sorted(self, sort: str, side: str) -> list[int]:
        """The places in `layers` of those that ran, as SORTS says."""
        return SORTS[sort](self, side)

    @cached_property
    def worst(self) -> Worst | None:
        """The layer that is bad, of several the first that was, as computation runs; else the one that rose most."""
        bad = [(since, turn) for turn in self._turns() if (since := self.bad_since(*turn)) is not None]
        if bad:
            since, (side, layer) = min(bad, key=lambda pair: pair[0])  # of one row the first as computation runs
            return Worst(layer, side, int(self.steps[since]))
        risen = [(float(self.sides[side].last_rises[layer]), side, layer) for side, layer in self._turns()]
        risen = [one for one in risen if one[0] > -np.inf]  # and no NaN
        _, side, layer = max(risen, key=lambda one: one[0], default=(0.0, "", -1))
        return Worst(layer, side, None) if risen else None

    @cached_property
    def marked(self) -> str | None:
        """The layer to point at: that of the last failure, else the first that is bad."""
        named = self.failures[-1].layer if self.failures else None
        return named or (self.layers[self.worst.layer] if self.worst is not None and self.worst.since is not None else None)

    def _turns(self) -> list[tuple[str, int]]:
        """Each side of each layer, as a step computes them: forward, then backward and in reverse."""
        forward, backward = SIDES
        return [*((forward, layer) for layer in self.executed), *((backward, layer) for layer in reversed(self.executed))]

    def bad_since(self, side: str, layer: int) -> int | None:
        """The row from which on a side of a layer is bad without an end; None where it is fine."""
        if not self.sides[side].last_bad[layer]:
            return None
        fine = np.flatnonzero(~self.sides[side].bad[:, layer] & ~np.isnan(self.sides[side].values[:, layer]))
        return int(fine[-1]) + 1 if fine.size else int(np.argmax(self.sides[side].bad[:, layer]))


def _by_rise(scene: Scene, side: str) -> list[int]:
    """Those that are bad first, the longest first; then, and among them, by the last rise that was a number."""

    def key(layer: int) -> tuple[float, float]:
        since = scene.bad_since(side, layer)
        rises = scene.sides[side].rises[:, layer]
        read = rises[~np.isnan(rises) & ~scene.sides[side].bad[:, layer]]
        return (np.inf if since is None else since), -float(read[-1]) if read.size else np.inf

    return sorted(scene.executed, key=key)


def _by_name(scene: Scene, side: str) -> list[int]:
    """Numbers in names count as numbers: block 2 before block 10."""
    return sorted(scene.executed, key=lambda layer: [p.zfill(9) for p in re.split(r"(\d+)", scene.layers[layer])])


SORTS: Mapping[str, Callable[[Scene, str], list[int]]] = {
    "execution": lambda scene, side: list(scene.executed),
    "rise": _by_rise,
    "name": _by_name,
}
"""How layers may be sorted. Of equals the first to run comes first."""
