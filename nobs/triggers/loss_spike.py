"""The loss left its average: in one step, or in a slow climb."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from .._history import Row
from .._schema import Failure
from .shape import at_least_one, finite_loss, positive


class LossBaseline(NamedTuple):
    """State of LossSpike, all in the loss's own unit but `ratio`.

    `mean` and `spread` are the moving average and mean absolute deviation, `low` is the lowest average, `start` the median of
    the first losses and `top` the highest. `peak` is the largest healthy rise above the average lately, and `ratio` the same
    in averages. `past` is the peak before the last one to two windows, whose own are `recent`, and before the average began
    to climb; `age` counts steps into the window, `seen` all since the warm-up. `first` holds the losses of the warm-up while
    it lasts.
    """

    mean: float = 0.0
    spread: float = 0.0
    low: float = math.inf
    start: float = 0.0
    peak: float = 0.0
    ratio: float = 0.0
    past: float = 0.0
    recent: tuple[float, float] = (0.0, 0.0)
    age: int = 0
    seen: int = 0
    top: float = 0.0
    first: tuple[float, ...] | None = ()


@dataclass(frozen=True)
class LossSpike:
    """The loss rose far above its moving average, in one step or in a slow climb.

    A loss is a spike when it is above `factor` times its average, `spreads` mean absolute deviations above it, and half as many
    times again as far above it as any healthy loss lately: losses of small batches have heavy tails. At an average near zero or
    below, where a factor says nothing, the deviations alone decide.

    A climb too slow for that is caught by the average itself: it is above `factor` times the lowest that it had over about
    `memory` steps, has lost half of what training had won since its start (three quarters of it in powers of ten, where that
    is less), and is further up than single losses scattered before; or it has lost nearly all and stays there. Losses that
    are nearly zero, restarts of the learning rate and adversarial losses wander without that. Where the lowest average is
    zero or below, all that was won must be lost.

    Non-finite losses are NonFinite's. After Lightning's SpikeDetection and llm-foundry's KillLossSpike, without what disarms
    them: neither a spike nor a NaN enters the average.

    Args:
        factor: how many times the average.
        spreads: how many mean absolute deviations above it.
        warmup: steps that only build the average, from their median.
        window: the average's length in steps; the largest healthy rise is remembered for 50 times as long.
        memory: how long the lowest average is remembered, in steps.
    """

    factor: float = 3.0
    spreads: float = 10.0
    warmup: int = 10
    window: int = 20
    memory: int = 10_000

    def __post_init__(self) -> None:
        positive(self, "factor", "spreads")
        at_least_one(self, "warmup", "window", "memory")

    def update(self, state: LossBaseline | None, row: Row) -> tuple[LossBaseline | None, Failure | None]:
        """Judge the row's loss, then learn from it unless it is a spike. Constant time and memory."""
        loss = finite_loss(row)
        if loss is None:
            return state, None
        if type(state) is not LossBaseline:  # a checkpoint may have made a list of it
            state = LossBaseline(*(state or ()))
        if state.first is not None:
            return self._warm_up((*state.first, loss)), None
        # Neither limit is below what it is compared with first, which is quick: a usual loss need not know them.
        if loss > state.mean + self.spreads * state.spread and loss > (limit := self._spike_limit(state)):
            message = f"loss {loss:.4g} at step {row.step}, {_against(loss, state.mean)} (limit {limit:.4g})"
            return state, Failure("LossSpike", row.step, message, value=loss, threshold=limit)
        failure = None
        usual = 1e-3 * state.peak < state.low and state.mean <= self.factor * state.low
        if not usual and min(state.mean, loss) > (limit := self._climb_limit(state)):
            message = f"loss climbed to {loss:.4g} by step {row.step}, {_against(state.mean, state.low, 'its lowest average')}"
            failure = Failure("LossSpike", row.step, message, value=state.mean, threshold=limit)
        return self._learn(state, loss), failure  # a climb is learned: the average must be able to come down again

    def _warm_up(self, first: tuple[float, ...]) -> LossBaseline:
        """The median: a spike among the first losses must not be what later ones are compared with."""
        if len(first) < self.warmup:
            return LossBaseline(first=first)
        mean = median(first)
        spread = median(abs(loss - mean) for loss in first) or 0.03 * abs(mean)  # equal losses say nothing of their scatter
        rises = sorted(max(0.0, after - before) for before, after in pairwise(first))
        peak = rises[-2] if len(rises) > 1 else 0.0  # the largest may be a spike; a descent has none
        return LossBaseline(mean, spread, mean, mean, peak, self._ratio(peak, mean), peak, top=max(first), first=None)

    def _spike_limit(self, state: LossBaseline) -> float:
        """Above this a loss is a spike; infinite while losses of zero throughout give no scale."""
        spread = max(state.spread, 0.003 * abs(state.mean))
        usual = max(state.mean + self.spreads * spread, self.factor * state.mean) if spread else math.inf
        # A loss that has fallen since scatters less than it did, if not in proportion; one that is mostly zero does not.
        dense = spread < abs(state.mean) / 2
        peak = min(state.peak, math.sqrt(state.peak * state.ratio * abs(state.mean))) if dense else state.peak
        limit = max(usual, state.mean + 1.5 * self.factor * peak)
        if state.seen < self.window and math.isfinite(limit):  # soon after the warm-up little is known of the tail
            limit = state.mean + (limit - state.mean) * (1 + self.warmup / (1 + state.seen))
        return limit

    def _climb_limit(self, state: LossBaseline) -> float:
        """Above this an average has climbed. Its scatter is of before: a climb must not set the scale that it is judged by."""
        low, won = state.low, max(0.0, state.start - state.low)
        if low <= 1e-3 * state.peak:  # below zero, or nothing beside what single losses reach: it is no scale
            scatter = self.factor * max(state.past, -0.01 * low)
            beyond = state.top + 0.1 * max(0.0, state.top - low)  # adversarial losses come back to where they began
            return max(low + won + 2 * scatter, beyond) if scatter and (low > 0 or state.seen >= 2 * self.window) else math.inf
        half_lost = low + won / 2 if won < 15 * low else low * (state.start / low) ** 0.75
        limit = max(half_lost, low + self.factor * state.past / 2)
        if won > low:  # nearly all lost, and steady there: a network that has died
            limit = min(limit, max(low + 0.8 * won, low + self.factor * state.spread))
        return max(self.factor * low, limit)

    @staticmethod
    def _ratio(rise: float, mean: float) -> float:
        """A rise in averages; at most 1e9, also over an average of zero."""
        return rise / max(abs(mean), 1e-9 * rise, 1e-300) if rise > 0 else 0.0

    def _learn(self, state: LossBaseline, loss: float) -> LossBaseline:
        rise = loss - state.mean
        mean = state.mean + rise / self.window
        spread = state.spread + (abs(rise) - state.spread) / self.window
        # The lowest average rises slowly, so that a run may settle on a higher loss.
        low = mean if mean <= state.low else state.low + (mean - state.low) / self.memory
        forget = 1 - 1 / (50 * self.window)
        peak = max(rise, state.peak * forget)
        ratio = max(self._ratio(rise, state.mean), state.ratio * forget)
        past, (before, now), age = state.past * forget, state.recent, state.age + 1
        now = max(now, rise)
        if age >= self.window:
            climbing = mean - low > (self._climb_limit(state) - low) / 3
            past, before, now, age = past if climbing else max(past, before), now, 0.0, 0
        return LossBaseline(
            mean, spread, low, state.start, peak, ratio, past, (before, now), age, state.seen + 1, state.top, None
        )


def _against(value: float, base: float, what: str = "its moving average") -> str:
    if base > 0:
        return f"{value / base:.3g} times {what} of {base:.4g}"
    return f"{value - base:.3g} above {what} of {base:.4g}"
