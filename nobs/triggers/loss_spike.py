"""The loss left its average: in one step, or in a slow climb."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from .._history import Row
from .._schema import Failure
from .shape import at_least_one, positive


class LossBaseline(NamedTuple):
    """State of LossSpike.

    `mean` and `spread` are the moving average and mean absolute deviation, `low` and `low_spread` the same as they were at the
    lowest average, `peak` is the largest rise above the average lately, `first` the losses of the warm-up while it lasts.
    """

    mean: float = 0.0
    spread: float = 0.0
    low: float = math.inf
    low_spread: float = 0.0
    peak: float = 0.0
    first: tuple[float, ...] | None = ()


@dataclass(frozen=True)
class LossSpike:
    """The loss rose far above its moving average, in one step or in a slow climb.

    A loss is a spike when it is above `factor` times its average, `spreads` mean absolute deviations above it, and `factor`
    times as far above it as any healthy loss lately: losses of small batches have heavy tails. At an average near zero or
    below, where a factor says nothing, the deviations alone decide. A climb too slow for that is caught by the average
    itself, against the lowest that it had over about `memory` steps. Non-finite losses are NonFinite's. After Lightning's
    SpikeDetection and llm-foundry's KillLossSpike, without what disarms them: neither a spike nor a NaN enters the average.

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
        """Judge the row's loss, then learn from it unless it failed. Constant time and memory."""
        loss = float(row.scalars.get("loss", math.nan))
        if not math.isfinite(loss):
            return state, None
        state = LossBaseline() if state is None else LossBaseline(*state)  # a checkpoint may have made a list of it
        if state.first is not None:
            return self._warm_up((*state.first, loss)), None
        failure = self._judge(state, loss, row.step)
        return (state if failure else self._learn(state, loss)), failure

    def _warm_up(self, first: tuple[float, ...]) -> LossBaseline:
        """The median: a spike among the first losses must not be what later ones are compared with."""
        if len(first) < self.warmup:
            return LossBaseline(first=first)
        mean = median(first)
        spread = median(abs(loss - mean) for loss in first)
        return LossBaseline(mean, spread, mean, spread, 0.0, None)

    def _limit(self, base: float, spread: float, spreads: float) -> float:
        """Above this a loss is too far from `base`; infinite while a loss of zero throughout gives no scale."""
        spread = max(spread, 0.003 * abs(base))
        return max(base + spreads * spread, self.factor * base) if spread else math.inf

    def _judge(self, state: LossBaseline, loss: float, step: int) -> Failure | None:
        limit = max(self._limit(state.mean, state.spread, self.spreads), state.mean + self.factor * state.peak)
        if loss > limit:
            message = f"loss {loss:.4g} at step {step}, {_against(loss, state.mean)} (limit {limit:.4g})"
            return Failure("LossSpike", step, message, value=loss, threshold=limit)
        limit = self._limit(state.low, state.low_spread, self.spreads / 2)  # averages scatter less than losses
        if state.mean > limit and loss > state.low:
            message = f"loss climbed to {loss:.4g} by step {step}, {_against(state.mean, state.low, 'its lowest average')}"
            return Failure("LossSpike", step, message, value=state.mean, threshold=limit)
        return None

    def _learn(self, state: LossBaseline, loss: float) -> LossBaseline:
        rise = loss - state.mean
        mean = state.mean + rise / self.window
        spread = state.spread + (abs(rise) - state.spread) / self.window
        peak = max(rise, state.peak * (1 - 1 / (50 * self.window)))
        if mean <= state.low:
            return LossBaseline(mean, spread, mean, spread, peak, None)
        # The lowest average rises slowly, so that a run may settle on a higher loss.
        low = state.low + (mean - state.low) / self.memory
        low_spread = state.low_spread + (spread - state.low_spread) / self.memory
        return LossBaseline(mean, spread, low, low_spread, peak, None)


def _against(value: float, base: float, what: str = "its moving average") -> str:
    if base > 0:
        return f"{value / base:.3g} times {what} of {base:.4g}"
    return f"{value - base:.3g} above {what} of {base:.4g}"
