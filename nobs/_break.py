"""Where the recording broke: the first step at which something jumped and did not come back, and all that jumped in it.

A jump is measured against the step's own past: the median of the last readings before it, in powers of ten, and how far the
site usually is from that. So a site that drifts is not out, and one that hardly moves is out by little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ._case import ENOUGH, Case, Event, carried_on, median_over_steps
from ._columns import ABSMAX, FIRST, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD, ZEROS

PAST = 20
"""So many steps before a step tell what is usual for it, if ENOUGH of them have a reading."""
LOOK = 30
"""How far before the failing step a break may lie."""
DEVIATIONS = 8.0
QUIETEST = 0.02
"""Powers of ten: a site that scatters less counts as if it scattered so much."""

LEAST = {PARAMETER: math.log10(1.5), OUTPUT: math.log10(2.0), OUTPUT_GRAD: 1.0, PARAMETER_GRAD: 1.0}
"""kind -> the smallest jump, in powers of ten. Gradients jump by a few times in health."""
BESIDE = 4.0
"""Beside a jump of so many times its powers of ten at the failing step, one of an inner layer is nothing."""
AT_ONCE = 0.5
"""The share of a jump that comes in one step: what drifts there is no jump."""
LEAST_OF_ENTRY = math.log10(1.4)
"""The same for the first layer's output: batches of one data set are alike."""


_PARTS = ((PARAMETER,), (OUTPUT,), (OUTPUT_GRAD, PARAMETER_GRAD))


@dataclass(frozen=True)
class Break:
    """What jumped in one step, each kind in the order of computation; `loss` tells whether the loss did."""

    row: int
    parameters: tuple[Event, ...]
    outputs: tuple[Event, ...]
    loss: bool
    gradients: tuple[Event, ...]
    entry: Event | None
    rows_used: tuple[int, float] | None

    @property
    def first(self) -> Event | None:
        return next((events[0] for events in (self.parameters, self.outputs, self.gradients) if events), None)


@dataclass(frozen=True)
class Breaks:
    """All jumps of a case."""

    case: Case

    @cached_property
    def sizes(self) -> NDArray[np.float64]:
        """[T, taps]: log10 of a site's size: the norm of gradients and parameters, the rms of outputs. Zero is 1e-45."""
        case = self.case
        logs = case.logs.copy()
        outputs = case.history.table.of_kind[OUTPUT]
        elements = np.maximum(case.elements[:, outputs], 1)
        logs[:, outputs] -= 0.5 * np.log10(elements)
        return np.where(case.zero, -45.0, logs)

    @cached_property
    def usual(self) -> NDArray[np.float64]:
        """[T, taps]: the median of the readings before each step; NaN where there were too few."""
        return _medians_before(self.sizes)

    @cached_property
    def jumps(self) -> NDArray[np.float64]:
        """[T, taps]: powers of ten from there."""
        return self.sizes - self.usual

    @cached_property
    def steps(self) -> NDArray[np.float64]:
        """[T, taps]: by how much each reading differs from the one before."""
        return np.abs(self.sizes - self.last)

    def deviations(self, row: int) -> NDArray[np.float64]:
        """[taps]: how far each site is from its usual size, in what it usually moves from step to step."""
        usual = median_over_steps(self.steps[max(0, row - PAST) : row])
        times: NDArray[np.float64] = np.abs(self.jumps[row]) / np.maximum(1.5 * np.nan_to_num(usual, nan=np.inf), QUIETEST)
        return times

    def entry_shift(self, row: int) -> float:
        """How far the first layer's largest value is from its usual size, in powers of ten, where it jumped; else 0.

        A constant image has about the norm of any other, and no bright spot.
        """
        if self.entry_line is None:
            return 0.0
        return self._shift(self.case.values[: self.case.end + 1, self.entry_line, ABSMAX], row, LEAST_OF_ENTRY)

    def rows_used(self, row: int) -> tuple[int, float] | None:
        """An embedding of which suddenly far fewer rows get a gradient: the line of its weight's gradient, and the jump."""
        table = self.case.history.table
        for line in table.of_kind[PARAMETER_GRAD]:
            if table.taps[line].layer_type == "Embedding":
                used = 1 - self.case.values[: self.case.end + 1, line, ZEROS]
                jump = self._shift(np.where(np.isfinite(self.case.values[..., line, FIRST]), used, np.nan), row, math.log10(2))
                if jump < 0:
                    return int(line), jump
        return None

    @staticmethod
    def _shift(values: NDArray[np.float64], row: int, least: float) -> float:
        """How far a series jumped in a row, in powers of ten, if it did and stayed there; else 0."""
        logs = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))
        past = logs[max(0, row - PAST) : row]
        past = past[np.isfinite(past)]
        if len(past) < ENOUGH or not np.isfinite(logs[row]):
            return 0.0
        usual = float(np.median(past))
        jump = float(logs[row] - usual)
        later = logs[row:][np.isfinite(logs[row:])] - usual
        scatter = max(1.5 * float(np.median(np.abs(np.diff(past)))), QUIETEST)
        at_once, stays = abs(logs[row] - past[-1]) > AT_ONCE * abs(jump), bool((later * np.sign(jump) > abs(jump) / 3).all())
        return jump if abs(jump) > max(DEVIATIONS * scatter, least) and at_once and stays else 0.0

    def _jumped(self, row: int) -> NDArray[np.bool_]:
        """[taps]: which sites jumped in a step, and stayed away until the failing step."""
        with np.errstate(invalid="ignore"):
            out = (self.deviations(row) > DEVIATIONS) & (np.abs(self.jumps[row]) > self.least)
            out &= np.abs(self.sizes[row] - self.last[row]) > AT_ONCE * np.abs(self.jumps[row])
            later = self.sizes[row : self.case.end + 1] - self.usual[row]
            away = np.where(np.isnan(later), True, later * np.sign(self.jumps[row]) > np.abs(self.jumps[row]) / 3)
        return np.asarray(out & away.all(axis=0))

    @cached_property
    def last(self) -> NDArray[np.float64]:
        """[T, taps]: the reading before each step's."""
        held = carried_on(self.sizes, np.isfinite(self.sizes))
        return np.concatenate([held[:1], held[:-1]])

    @cached_property
    def least(self) -> NDArray[np.float64]:
        """[taps]: the smallest jump that is one."""
        taps = self.case.history.table.taps
        largest = float(np.nan_to_num(np.minimum(np.abs(self.jumps[self.case.end]), 10)).max(initial=0))
        inner = np.array([tap.kind != PARAMETER for tap in taps])
        least = np.array([LEAST[tap.kind] for tap in taps])
        least = np.where(inner, np.maximum(least, min(1.0, largest / BESIDE)), least)
        line = self.entry_line
        if line is not None:
            least[line] = LEAST_OF_ENTRY
        return least

    @cached_property
    def entry_line(self) -> int | None:
        """The line of the output of the layer that runs first."""
        place, lines = self.case.place, self.case.history.table.of_kind[OUTPUT]
        ran = [int(line) for line in lines if self.case.history.table.taps[line].layer in self.case.ran]
        return min(ran, key=lambda line: place[self.case.history.table.taps[line].layer], default=None)

    @cached_property
    def losses(self) -> NDArray[np.bool_]:
        """[T]: at which steps the loss jumped up and stayed there."""
        case = self.case
        loss = case.history.scalars.get("loss")
        if loss is None:
            return np.zeros(case.end + 1, dtype=np.bool_)
        loss = np.where(np.isfinite(loss[: case.end + 1]), loss[: case.end + 1], np.nan)
        usual = _medians_before(loss[:, None])[:, 0]
        jumped = np.zeros(len(loss), dtype=np.bool_)
        for row in range(max(1, case.end - LOOK), len(loss)):
            past = loss[max(0, row - PAST) : row]
            past = past[np.isfinite(past)]
            if len(past) < ENOUGH or not np.isfinite(loss[row]):
                continue
            scatter = max(1.5 * float(np.median(np.abs(np.diff(past)))), 0.01 * abs(float(usual[row])))
            later = loss[row:][np.isfinite(loss[row:])] - usual[row]
            jumped[row] = loss[row] - usual[row] > 4 * scatter and np.median(later) > 3 * scatter and later.min() > scatter
        return jumped

    def at(self, row: int) -> Break:
        case, taps = self.case, self.case.history.table.taps
        events = sorted(case.event(row, int(line)) for line in np.flatnonzero(self._jumped(row)))
        entry = next((e for e in events if e.line == self.entry_line), None)
        if entry is None and self.entry_line is not None and self.entry_shift(row):
            entry = case.event(row, self.entry_line)
            events = sorted([*events, entry])
        parameters, outputs, gradients = (tuple(e for e in events if taps[e.line].kind in kinds) for kinds in _PARTS)
        return Break(row, parameters, outputs, bool(self.losses[row]), gradients, entry, self.rows_used(row))

    @cached_property
    def first(self) -> Break | None:
        """The first break, at most LOOK steps before the failing one."""
        for row in range(max(1, self.case.end - LOOK), self.case.end + 1):
            found = self.at(row)
            if found.first is not None or found.loss or found.rows_used:
                return found
        return None

    def times(self, event: Event) -> str:
        """How large a jump was, in words."""
        jump = float(self.jumps[event.row, event.line])
        if jump < -30:
            return "zero"
        return f"{10**jump:.3g} times its usual size" if jump < 300 else "beyond all bounds"


def _medians_before(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """[T, n]: of each row the median of up to PAST rows before it, NaN with fewer than ENOUGH readings."""
    padded = np.concatenate([np.full((PAST, x.shape[1]), np.nan), x[:-1]]) if len(x) else x
    windows = np.lib.stride_tricks.sliding_window_view(padded, PAST, axis=0)[: len(x)]
    enough = np.isfinite(windows).sum(axis=-1) >= ENOUGH
    filled = np.where(enough[..., None], windows, 0.0)
    return np.where(enough, np.nanmedian(filled, axis=-1), np.nan)
