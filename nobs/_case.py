"""A failing history, and the two questions that every diagnosis asks of it, answered for all taps at once.

Which values are *bad* (NaN, Inf), and which have left their own *band* (norms far above the median of the quiet part of the
window)? The order of events inside a step is the order of computation: parameters, outputs forward, the loss, gradients
backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ._columns import ABSMAX, ELEMENTS, FIRST, NEGINF, NORM, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD
from ._history import History, bad_counts
from ._names import parents, places
from ._schema import Failure
from ._table import Tap

BAND = 3.0
"""A norm this many times its own median has left its band ..."""
SPREADS = 5.0
"""... unless it scatters so much by itself: this many median absolute deviations of its logarithm."""
ENOUGH = 3
"""Readings in a window that tell a usual range."""
DRIFT = 1.0
"""So many powers of ten above its median a tap is no drift, however far out others are."""

_PHASES = {PARAMETER: (0, 0, 1), OUTPUT: (1, 0, 1), OUTPUT_GRAD: (3, 0, -1), PARAMETER_GRAD: (3, 1, -1)}
"""kind -> (phase of the step, place within the phase, direction); phase 2 is the loss."""


@dataclass(frozen=True, order=True)
class Event:
    """A tap that went wrong, ordered as computation is: by step, then phase, then place in the phase."""

    row: int
    phase: int
    place: float
    kind: int
    line: int


@dataclass(frozen=True)
class Case:
    """A history up to the failing step, and what all rules ask of it."""

    history: History
    failure: Failure | None

    @cached_property
    def end(self) -> int:
        """The row of the failing step; the last one where no trigger failed, or it is not in the window."""
        row = self.history.row_of(self.failure.step) if self.failure else None
        return len(self.history) - 1 if row is None else row

    @cached_property
    def values(self) -> NDArray[np.float64]:
        return self.history.values[: self.end + 1].astype(np.float64)

    @cached_property
    def place(self) -> dict[str, float]:
        """layer -> its place in execution; one that never ran itself stands where its parent does."""
        known = {name: float(place) for name, place in self.history.order.items() if place is not None}
        return {name: min(at, len(known)) for name, at in places(known, self.history.order).items()}

    @cached_property
    def ran(self) -> frozenset[str]:
        """The layers that ran, as layers."""
        return frozenset(name for name, place in self.history.order.items() if place is not None)

    @property
    def elements(self) -> NDArray[np.float64]:
        return self.values[..., ELEMENTS]

    def dtype(self, event: Event) -> str | None:
        """The dtype that a site had at its last run."""
        tap = self.tap(event)
        return next(
            (layer.sites[tap.site].dtype for layer in self.history.layers if layer.name == tap.layer and tap.site in layer.sites),
            None,
        )

    def tap(self, event: Event) -> Tap:
        return self.history.table.taps[event.line]

    def step(self, event: Event) -> int:
        return int(self.history.steps[event.row])

    @cached_property
    def entry(self) -> dict[str, float]:
        """layer -> the place from which backward leaves it for good: just before the first of the layers inside it.

        A layer's own parameters may be used before the layers inside it, and so have their gradient after all of them.
        """
        ran = self.ran
        place = {name: at for name, at in self.place.items() if name in ran}
        for name in ran:
            for parent in parents(name):
                if parent in ran:
                    place[parent] = min(place[parent], self.place[name] - 0.5 / (1 + len(parents(parent))))  # outermost last
        for name in self.place:  # one that never runs itself goes with its parent, and else comes last
            place.setdefault(name, next((place[parent] for parent in parents(name) if parent in ran), -1.0))
        return place

    def event(self, row: int, line: int) -> Event:
        tap = self.history.table.taps[line]
        phase, kind, sign = _PHASES[tap.kind]
        place = self.entry if tap.kind == PARAMETER_GRAD else self.place
        return Event(row, phase, sign * place[tap.layer], kind, line)

    def before(self, event: Event) -> int | None:
        """The row of the tap's last reading before an event; None if there is none. With `every=` it is not the step before."""
        ran = np.flatnonzero(np.isfinite(self.values[: event.row, event.line, FIRST]))
        return int(ran[-1]) if ran.size else None

    @cached_property
    def bad(self) -> NDArray[np.bool_]:
        """[T, taps]: NaN or Inf where none may be."""
        return bad_counts(self.values, self.history.table) > 0

    @cached_property
    def zero(self) -> NDArray[np.bool_]:
        """[T, taps]: all values were zero."""
        zero: NDArray[np.bool_] = np.isfinite(self.values[..., FIRST]) & (self.values[..., NORM] == 0) & ~self.bad
        return zero

    @cached_property
    def first_bad(self) -> Event | None:
        """The very first tap with a NaN or an Inf."""
        rows = np.flatnonzero(self.bad.any(axis=1))
        loss, given = self.history.scalars.get("loss"), self.history.given.get("loss")
        lost = (
            np.flatnonzero(given & ~np.isfinite(loss)) if loss is not None and given is not None else np.empty(0, dtype=np.intp)
        )
        judged = [self.end] if self.failure is not None and self.failure.trigger == "NonFinite" else []
        row = min([*rows[:1], *lost[lost <= self.end][:1], *judged], default=None)
        if row is None:
            return None
        lines = {*np.flatnonzero(self.bad[row]).tolist(), *self.new_masks(int(row))}
        if not lines:  # the loss alone, so far
            row, lines = (rows[0], set(np.flatnonzero(self.bad[rows[0]]).tolist())) if rows.size else (row, lines)
        return min((self.event(int(row), int(line)) for line in lines), default=None)

    def new_masks(self, row: int) -> list[int]:
        """Outputs with -Inf in a bad step that had none in any step before: that is no mask, but a log of zero."""
        outputs = self.history.table.of_kind[OUTPUT]
        masked = np.nan_to_num(self.values[: row + 1, outputs, NEGINF]) > 0
        return [int(line) for line in outputs[masked[row] & ~masked[:row].any(axis=0)]] if row else []

    @cached_property
    def logs(self) -> NDArray[np.float64]:
        """[T, taps]: log10 of the norm; NaN where the tap did not run or was zero."""
        norm = np.where(np.isfinite(self.values[..., NORM]), self.values[..., NORM], self.values[..., ABSMAX])
        return np.log10(np.where(np.isfinite(self.values[..., FIRST]) & (norm > 0), norm, np.nan))

    @cached_property
    def readings(self) -> NDArray[np.intp]:
        """The rows in which any tap ran; with `every=` not all of them."""
        return np.flatnonzero(np.isfinite(self.values[..., FIRST]).any(axis=1))

    @property
    def judges_norms(self) -> bool:
        """Whether there are enough readings to tell a usual range from a departure."""
        return len(self.readings) >= ENOUGH

    @property
    def first_half(self) -> NDArray[np.float64]:
        """[T/2, taps]: `logs` of the window's first half, which tells what is usual."""
        return self.logs[: max(1, self.end // 2)]

    @cached_property
    def quiet(self) -> NDArray[np.float64]:
        """[taps]: the median of `logs` over the window's first half; NaN without one."""
        return median_over_steps(self.first_half)

    @cached_property
    def held(self) -> NDArray[np.float64]:
        """[T, taps]: `logs`, where a step without a reading (`every=`, a branch not taken) keeps the one before."""
        ran = np.isfinite(self.values[..., FIRST])  # a measured zero is a reading: the tap is back inside its band
        return carried_on(self.logs, ran)

    @cached_property
    def onset(self) -> NDArray[np.int64]:
        """[taps]: the row at which a tap left its band for good; -1 for those that are inside it at the end.

        Where the failure threw one tap far out, another that had drifted before by a fraction of that had not begun it.
        """
        scatter = median_over_steps(np.abs(self.first_half - self.quiet))
        excess = np.nan_to_num(self.held - self.quiet, nan=-np.inf)
        band = np.nan_to_num(np.maximum(math.log10(BAND), SPREADS * scatter), nan=np.inf)
        outside = excess > np.maximum(band, min(DRIFT, excess.max(initial=0) / 6))
        back = np.flip(~outside, axis=0).argmax(axis=0)  # how many rows since it was last inside
        back = np.where(outside.all(axis=0), len(outside), back)
        return np.where(back > 0, len(outside) - back, -1)

    @cached_property
    def leavers(self) -> list[Event]:
        """The taps that left their band, in the order in which they did."""
        return sorted(self.event(int(self.onset[line]), int(line)) for line in np.flatnonzero(self.onset >= 0))

    def share_out(self, until: int) -> float:
        """The share of layers with gradients whose gradients or weights have left their band by a row."""
        taps = self.history.table.taps
        out = {taps[e.line].layer for e in self.leavers if e.row <= until and taps[e.line].kind != OUTPUT}
        bearing = {tap.layer for i, tap in enumerate(taps) if tap.kind == PARAMETER_GRAD and np.isfinite(self.logs[:, i]).any()}
        return len(out & bearing) / max(1, len(bearing))

    def at_once(self) -> float:
        """`share_out` soon after the first tap left its band: together, or one after the other?"""
        return self.share_out(self.leavers[0].row + max(3, self.end // 10)) if self.leavers else 0.0

    def times(self, line: int, row: int) -> str:
        """How far a tap is above its median, in words."""
        return f"{10 ** float(self.held[row, line] - self.quiet[line]):.3g} times"

    def clean_before(self, event: Event, kind: str) -> list[Event]:
        """The clean taps of a kind that ran before an event in its step."""
        ran = [int(line) for line in self.history.table.of_kind[kind] if np.isfinite(self.values[event.row, line, FIRST])]
        return [e for e in (self.event(event.row, line) for line in ran) if e < event and not self.bad[e.row, e.line]]

    def neighbour(self, event: Event) -> str:
        """The last clean tap of the same direction before an event, in words."""
        if event.phase == 0:
            row = self.before(event)
            return "it was so from the first step on" if row is None else f"it was finite at step {self.history.steps[row]}"
        before = self.clean_before(event, OUTPUT if event.phase == 1 else OUTPUT_GRAD)
        if not before:
            return "nothing before it was recorded clean"
        line = max(before).line
        return f"{self.history.table.taps[line].layer} before it is clean (absmax {self.values[event.row, line, ABSMAX]:.3g})"

    @cached_property
    def rates(self) -> NDArray[np.float64]:
        """[T]: the largest learning rate of any parameter group up to the failing step, NaN where none was recorded."""
        groups = [v[: self.end + 1] for name, v in self.history.scalars.items() if name == "lr" or name.startswith("lr.")]
        return np.max(groups, axis=0) if groups else np.full(self.end + 1, np.nan)


def carried_on(x: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[T, n]: where a step has no value, the last that had one."""
    rows = np.where(known, np.arange(len(x))[:, None], 0)
    return np.take_along_axis(x, np.maximum.accumulate(rows, axis=0), axis=0)


def median_over_steps(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] of [T, n]; NaN where there is no value in any step, of which np.nanmedian warns."""
    if not len(x):
        return np.full(x.shape[1], np.nan)
    known = np.isfinite(x).any(axis=0)
    return np.where(known, np.nanmedian(np.where(known, np.where(np.isfinite(x), x, np.nan), 0.0), axis=0), np.nan)
