"""The loss left its average: in one step, or in a slow climb."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .._schema import Failure, Row
from .shape import positive


class LossBaseline(NamedTuple):
    """State of LossSpike: losses seen, their moving average and spread, both as they were at the lowest average, and the
    largest average."""

    seen: int
    mean: float
    spread: float
    low: float
    low_spread: float
    high: float


@dataclass(frozen=True)
class LossSpike:
    """The loss rose far above its moving average, in one step or in a slow climb.

    A loss is a spike when it is above `factor` times its average and more than `spreads` mean absolute deviations above it.
    At an average near zero or below, where a factor says nothing, the spread alone decides. A climb too slow for that
    is caught by the average itself, against the lowest that it had over about `memory` steps. Non-finite losses are
    NonFinite's. After Lightning's SpikeDetection and llm-foundry's KillLossSpike, without what disarms them: here neither a
    spike nor a NaN enters the average.

    Args:
        factor: how many times the average.
        spreads: how many mean absolute deviations above it.
        warmup: steps that only build the average.
        window: the average's length in steps.
        memory: how long the lowest average is remembered, in steps.
    """

    factor: float = 3.0
    spreads: float = 10.0
    warmup: int = 10
    window: int = 20
    memory: int = 10_000

    def __post_init__(self) -> None:
        positive(self, "factor", "spreads", "warmup", "window", "memory")

    def update(self, state: LossBaseline | None, row: Row) -> tuple[LossBaseline | None, Failure | None]:
        loss = row.scalars.get("loss", math.nan)
        if not math.isfinite(loss):
            return state, None
        if state is None:
            return LossBaseline(1, loss, 0.0, math.inf, 0.0, abs(loss)), None
        state = LossBaseline(*state)  # a checkpoint may have made a plain list of it
        failure = self._judge(state, loss, row.step) if state.seen >= self.warmup else None
        return (state if failure else self._learn(state, loss)), failure

    def _limit(self, state: LossBaseline, base: float, spread: float) -> float:
        """Above this a loss is too far from `base`; infinite while a loss of zero throughout gives no scale."""
        spread = max(spread, 0.003 * state.high)
        return max(base + self.spreads * spread, self.factor * base) if spread else math.inf

    def _judge(self, state: LossBaseline, loss: float, step: int) -> Failure | None:
        limit = self._limit(state, state.mean, state.spread)
        if loss > limit:
            message = f"loss {loss:.4g} at step {step}, {_against(loss, state.mean)}"
            return Failure("LossSpike", step, message, value=loss, threshold=limit)
        limit = self._limit(state, state.low, state.low_spread)
        if state.mean > limit and loss > state.low:
            message = f"loss climbed to {loss:.4g} by step {step}, {_against(state.mean, state.low, 'its lowest average')}"
            return Failure("LossSpike", step, message, value=state.mean, threshold=limit)
        return None

    def _learn(self, state: LossBaseline, loss: float) -> LossBaseline:
        seen = state.seen + 1
        weight = max(1 / seen, 1 / self.window)  # a plain mean at first, so that the first loss is not remembered
        mean = state.mean + weight * (loss - state.mean)
        spread = state.spread + weight * (abs(loss - state.mean) - state.spread)
        high = max(abs(mean), state.high * (1 - 1 / self.memory))
        if seen < self.warmup:
            return LossBaseline(seen, mean, spread, math.inf, spread, high)
        if mean <= state.low:
            return LossBaseline(seen, mean, spread, mean, spread, high)
        forget = 1 / self.memory  # the lowest average rises slowly, so that a run may settle on a higher loss
        low = state.low + forget * (mean - state.low)
        low_spread = state.low_spread + forget * (spread - state.low_spread)
        return LossBaseline(seen, mean, spread, low, low_spread, high)


def _against(value: float, base: float, what: str = "its moving average") -> str:
    if base > 0:
        return f"{value / base:.3g} times {what} of {base:.4g}"
    return f"{value - base:.3g} above {what} of {base:.4g}"
