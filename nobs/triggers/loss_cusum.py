"""The loss went up and stays up: many small steps, or one that is no spike, add up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from .._history import Row
from .._schema import Failure
from .shape import at_least_one, finite_loss, positive


class LossSum(NamedTuple):
    """State of LossCusum: the average and spread that a climb does not move, the sum, and what training began with.

    `spread` is the mean absolute change from one usual loss to the next, which a descent does not widen; `recent` is a short
    average of the loss itself, `last` the last usual loss, `previous` the last; `sharp` is the largest rise in one step since
    the sum was zero, and `high` the highest short average before; `first` holds the losses of the warm-up while it lasts.
    """

    mean: float = 0.0
    spread: float = 0.0
    start: float = 0.0
    total: float = 0.0
    recent: float = 0.0
    last: float = 0.0
    previous: float = 0.0
    sharp: float = 0.0
    high: float = 0.0
    first: tuple[float, ...] | None = ()


@dataclass(frozen=True)
class LossCusum:
    """The cumulated sum of the loss's deviations is high, and training has lost what it had won.

    A one-sided CUSUM chart (Page, Biometrika 1954): each loss adds its deviations above the average less `slack`, at most
    `most`, and the sum never falls below zero. A curriculum that gets harder or a restart raises the loss too, but not to
    where an untrained model stood.

    Args:
        threshold: of the sum, in mean absolute changes of the loss.
        much: of the sum, from where on `lost_much` is enough.
        slack: deviations that a loss may be above its average for nothing.
        lost: the share of what was won since the start that must be lost again; `lost_much` where the sum is above `much`.
        most: what one loss may add.
        warmup: steps that only build the average.
        window: the average's length in steps.
    """

    threshold: float = 15.0
    much: float = 35.0
    slack: float = 2.5
    lost: float = 0.9
    lost_much: float = 0.5
    most: float = 8.0
    warmup: int = 10
    window: int = 20

    def __post_init__(self) -> None:
        positive(self, "threshold", "slack", "lost", "lost_much", "much", "most")
        at_least_one(self, "warmup", "window")

    def update(self, state: LossSum | None, row: Row) -> tuple[LossSum | None, Failure | None]:
        """Judge the row's loss, then learn from it as far as it is usual. Constant time and memory."""
        loss = finite_loss(row)
        if loss is None:
            return state, None
        if type(state) is not LossSum:  # a checkpoint may have made a list of it
            state = LossSum(*(state or ()))
        if state.first is not None:
            return self._warm_up((*state.first, loss)), None
        spread = max(state.spread, 0.01 * abs(state.mean), 1e-12)
        z = (loss - state.mean) / spread
        total = max(0.0, state.total + min(z, self.most) - self.slack)
        recent = state.recent + (loss - state.recent) / 4
        sharp = max(state.sharp, loss - state.previous) if total > 0 else 0.0
        won = state.start - state.mean
        limit = state.mean + (self.lost if total < self.much else self.lost_much) * won
        if sharp < 0.9 * (recent - state.mean):  # a slow climb: adversarial losses come back to where they began, and settle
            limit = max(state.start + 0.25 * won, state.high)
        failed = total > self.threshold and won > max(3 * spread, 0.12 * abs(state.start)) and min(loss, recent) > limit
        usual = z < 4
        # A loss that falls is followed at once; one that rises slowly, half as fast once the sum has grown, and what is far
        # above it hardly at all.
        fast = 4.0 if z < 0 else 0.1 if not usual else 1.0 if total < self.threshold / 3 else 0.5
        learned = fast / self.window
        state = LossSum(
            state.mean + learned * (loss - state.mean),
            state.spread + (abs(loss - state.last) - state.spread) / self.window if usual else state.spread,
            state.start, 0.0 if failed else total, recent, loss if usual else state.last,
            loss, sharp, max(state.high, recent) if total == 0 else state.high, None,
        )  # fmt: skip
        if not failed:
            return state, None
        message = f"loss {recent:.4g} by step {row.step} has lost what training had won: {state.start:.4g} at the start, "
        message += f"{state.mean:.4g} before"
        return state, Failure("LossCusum", row.step, message, value=recent, threshold=limit)

    def _warm_up(self, first: tuple[float, ...]) -> LossSum:
        if len(first) < self.warmup:
            return LossSum(first=first)
        mean = median(first)
        spread = sum(abs(after - before) for before, after in pairwise(first)) / max(1, len(first) - 1)
        return LossSum(mean, spread, mean, 0.0, mean, first[-1], first[-1], 0.0, max(first), None)
