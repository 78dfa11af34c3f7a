"""A parameter that changed in one step by more than updates change it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._columns import PARAMETER
from .._history import Row
from .._schema import Failure
from . import blocks
from .shape import at_least_one, others_than_one, positive
from .sieve import BLOCK, SLACK, Block, Bounds


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
        norms = row.readings.parameters.astype(np.float64)
        state = state if state is not None and len(state["norm"]) == len(norms) else self._first(norms)
        read = np.isfinite(norms)
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.abs(np.log10(norms / state["norm"]))
        change = np.where(read & (state["norm"] > 0), change, np.nan)  # from zero any change is infinite
        # A weight of few elements comes by zero now and then: a step that is nothing beside its largest norm is no jump.
        with np.errstate(invalid="ignore"):
            far = np.abs(norms - state["norm"]) > _FAR * state["largest"]
        high = far & (change > math.log10(self.factor)) & (change > self.above * state["most"]) & (state["count"] >= self.warmup)
        failure = self._failure(row, norms, state["norm"], change, high) if high.any() else None
        learns = ~high & np.isfinite(change)
        return {
            "count": state["count"] + learns,
            "most": np.fmax(state["most"] * self._fades, np.where(learns, change, np.nan)),
            "norm": np.where(read, norms, state["norm"]),
            "largest": np.fmax(state["largest"] * self._fades, np.where(high, 0, norms)),
        }, failure

    @property
    def _fades(self) -> float:
        return 1 - 1 / (50 * self.window)

    def bounds(self, state: Any, row: Row, bounds: Bounds) -> bool:
        """A band in which no two readings are a jump apart: too few times larger one than the other, or too near beside the
        largest norm."""
        norm, times = state["norm"], math.sqrt(self.factor) * (1 - SLACK)
        near = state["largest"] * (_FAR / 2 * (1 - SLACK) * self._fades**BLOCK)
        wide = near > (times - 1) * norm
        least, most = np.where(wide, norm - near, norm / times), np.where(wide, norm + near, norm * times)
        free, new = state["count"] < self.warmup - BLOCK, np.isnan(norm)  # new: there is nothing to compare with
        least, most = np.where(new, np.inf, least), np.where(new, -np.inf, most)
        bounds.parameters(np.where(free, -np.inf, least), np.where(free, np.inf, most))
        return True

    def learned(self, state: Any, block: Block) -> Any:
        """Behind a block of rows."""
        norms = blocks.behind(state["norm"], block.parameters)
        changes, count = _changes(norms), len(block)
        if not math.isfinite(changes.sum()):
            read = np.isfinite(norms[1:])
            for norm, there, before in zip(norms[1:], read, norms, strict=False):
                norm[:] = np.where(there, norm, before)  # where a parameter was not read it is as it was
            changes = _changes(norms)
            learns = read & np.isfinite(changes)  # from zero, and to zero, a change is infinite, or none
            changes, count = np.where(learns, changes, np.nan), learns.sum(axis=0)
        return {
            "count": state["count"] + count,
            "most": blocks.highest(state["most"], changes, self._fades),
            "norm": norms[-1].copy(),
            "largest": blocks.highest(state["largest"], block.parameters, self._fades),
        }

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


_FAR = 0.25
"""Of the largest norm lately: less is no jump."""


def _changes(norms: Any) -> Any:
    """From row to row, in powers of ten, up or down; NaN or infinite where one is zero or was not read."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(norms)
        return np.abs(logs[1:] - logs[:-1])
