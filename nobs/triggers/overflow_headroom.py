"""An output that is about to leave the range of its dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._columns import ABSMAX, DTYPES, FIRST, LARGEST, OUTPUT
from .._history import Row
from .._schema import Failure
from .shape import positive


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
        lines = row.values[row.table.of_kind[OUTPUT]].astype(np.float64)
        if state is None or len(state) != len(lines):
            state = np.full(len(lines), np.inf)
        ran = np.isfinite(lines[:, FIRST])
        absmax = np.where(ran, lines[:, ABSMAX], np.nan)
        codes = np.round(np.where(ran, lines[:, FIRST], 0) % 1 * 16).astype(int)
        used = absmax / _LARGEST[np.clip(codes, 0, len(_LARGEST) - 1)]
        near = (used > self.share) & (absmax > self.growth * state)
        with np.errstate(invalid="ignore"):
            low = np.fmin(state * 10 ** (1 / 1000), np.where(absmax > 0, absmax, np.nan))
        return low, self._failure(row, absmax, used, near) if near.any() else None

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
            self.share * float(absmax[worst] / used[worst]),
        )


_LARGEST = np.array([LARGEST.get(name, np.inf) for name in DTYPES])
