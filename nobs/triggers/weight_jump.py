"""A parameter that changed in one step by more than updates change it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._columns import PARAMETER
from .._history import Row
from .._schema import Failure
from .shape import at_least_one, others_than_one, positive


@dataclass(frozen=True)
class WeightJump:
    """A parameter's norm is, from one reading to the next, several times larger or smaller.

    A bit that flips, a bad load, code that writes to a weight; also an update at a thousand times the learning rate.

    Args:
        factor: times larger or smaller.
        above: times the largest change, in powers of ten, that the parameter had in health.
        warmup: readings of a parameter that only build its baseline.
        window: the baseline's length in steps.

    Cost: a dozen NumPy calls over the parameters.
    """

    factor: float = 2.0
    above: float = 5.0
    warmup: int = 20
    window: int = 20

    def __post_init__(self) -> None:
        positive(self, "factor", "above")
        at_least_one(self, "warmup", "window")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        norms = row.kind(PARAMETER, "norm")
        state = state if state is not None and len(state["norm"]) == len(norms) else self._first(norms)
        read = np.isfinite(norms)
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.abs(np.log10(norms / state["norm"]))
        change = np.where(read & (state["norm"] > 0), change, np.nan)  # from zero any change is infinite
        # A weight of few elements comes by zero now and then: a step that is nothing beside its largest norm is no jump.
        far = np.abs(norms - state["norm"]) > 0.25 * state["largest"]
        high = far & (change > math.log10(self.factor)) & (change > self.above * state["most"]) & (state["count"] >= self.warmup)
        failure = self._failure(row, norms, state["norm"], change, high) if high.any() else None
        learns = ~high & np.isfinite(change)
        most = state["most"] * (1 - 1 / (50 * self.window))
        return {
            "count": state["count"] + learns,
            "most": np.where(learns, np.maximum(most, np.where(learns, change, 0)), most),
            "norm": np.where(read, norms, state["norm"]),
            "largest": np.fmax(state["largest"] * (1 - 1 / (50 * self.window)), np.where(high, 0, norms)),
        }, failure

    def _first(self, norms: Any) -> Any:
        return {
            "count": np.zeros(len(norms)),
            "most": np.zeros(len(norms)),
            "norm": np.full(len(norms), np.nan),
            "largest": np.zeros(len(norms)),
        }

    def _failure(self, row: Row, norms: Any, before: Any, change: Any, high: Any) -> Failure:
        worst = int(np.argmax(np.where(high, change, -np.inf)))
        tap = row.table.taps[row.table.of_kind[PARAMETER][worst]]
        others = others_than_one(high)
        message = (
            f"the norm of {tap.layer}.{tap.site} went from {before[worst]:.4g} to {norms[worst]:.4g} at step {row.step}{others}"
        )
        return Failure(
            "WeightJump", row.step, message, tap.layer, tap.site, float(norms[worst]), float(before[worst]) * self.factor
        )
