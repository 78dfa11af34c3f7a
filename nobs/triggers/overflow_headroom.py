"""An output that is about to leave the range of its dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._columns import OUTPUT
from .._history import Row
from .._schema import Failure
from . import blocks
from .shape import positive
from .sieve import SLACK, Block, Bounds


@dataclass(frozen=True)
class OverflowHeadroom:
    """The largest value of an output is above a share of the largest number of its dtype, and several times its lowest lately.

    A layer that always runs hot is left alone: what counts is that it is on its way.

    Args:
        share: of the largest number (65504 in float16, about 3.4e38 in bfloat16 and float32).
        growth: times the lowest that the site had over about 1000 steps.

    Cost: a dozen NumPy calls over the layers.
    """

    share: float = 0.25
    growth: float = 8.0

    def __post_init__(self) -> None:
        positive(self, "share", "growth")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        absmax = row.readings.output_peaks.astype(np.float64)
        if state is None or len(state) != len(absmax):
            state = np.full(len(absmax), np.inf)
        used = absmax / row.readings.pattern.largest
        near = (used > self.share) & (absmax > self.growth * state)
        low = np.fmin(state * _RISES, np.where(absmax > 0, absmax, np.nan))
        return low, self._failure(row, absmax, used, near) if near.any() else None

    def bounds(self, state: Any, row: Row, bounds: Bounds) -> bool:
        """The share itself; where an output is above it already each row is looked at."""
        most = self.share * (1 - SLACK) * row.readings.pattern.largest
        if (row.readings.output_peaks > most).any():
            return False
        np.fmin(bounds.most_peaks, most, out=bounds.most_peaks)
        return True

    def learned(self, state: Any, block: Block) -> Any:
        """Behind a block of rows."""
        peaks = block.output_peaks
        peaks = peaks if peaks.min(initial=np.inf) > 0 else np.where(peaks > 0, peaks, np.nan)
        return np.fmin(state * _RISES ** len(peaks), np.fmin.reduce(peaks * blocks.fading(len(peaks), _RISES), axis=0))

    def _failure(self, row: Row, absmax: Any, used: Any, near: Any) -> Failure:
        worst = int(np.argmax(np.where(near, used, -np.inf)))
        tap = row.table.taps[row.table.of_kind[OUTPUT][worst]]
        message = f"output of {tap.layer} at step {row.step}: {absmax[worst]:.4g} is {used[worst]:.0%} of the largest number"
        message += " of its dtype, and growing"
        return Failure(
            "OverflowHeadroom",
            row.step,
            message,
            tap.layer,
            tap.site,
            float(absmax[worst]),
            self.share * float(row.readings.pattern.largest[worst]),
        )


_RISES = 10 ** (1 / 1000)
"""By so much the lowest comes up each step."""
