"""A layer's output far above what is usual for that layer: in one step, or growing beyond all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._columns import OUTPUT
from .._history import Row
from .._schema import Failure
from . import baseline
from .shape import at_least_one, others_than_one, positive
from .sieve import Block, Bounds


@dataclass(frozen=True)
class ActivationGrowth:
    """The root mean square of a layer's output jumped, or has grown beyond the largest that any layer had.

    Args:
        jump: times the site's own average in one step, and half as many times the highest it ever had.
        z: mean absolute deviations of the logarithm that a jump must also be.
        growth: times the site's own highest of more than a window ago: more than logits that begin small and learn.
        beyond: times the highest of all sites then. Branches that begin at zero grow by powers of ten in health, though never
            beyond the rest.
        warmup: readings of a site that only build its baseline.
        window: the baseline's length in steps.

    Cost: a dozen NumPy calls over the layers.
    """

    jump: float = 10.0
    z: float = 8.0
    growth: float = 30.0
    beyond: float = 10.0
    warmup: int = 20
    window: int = 20

    def __post_init__(self) -> None:
        positive(self, "jump", "z", "growth", "beyond")
        at_least_one(self, "warmup", "window")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        rms = row.readings.output_rms
        logs = baseline.powers(rms)
        state = baseline.usable(state, len(logs))
        known = state["count"] >= self.warmup
        with np.errstate(invalid="ignore"):
            rise, over = logs - state["level"], logs - baseline.record(state)
            jumped = known & (rise > math.log10(self.jump)) & (over > math.log10(self.jump / 2))
            jumped &= baseline.scores(state, logs) > self.z
            before = state["past"]
            grown = known & np.isfinite(before) & (logs > before + math.log10(self.growth))
            grown &= logs > before.max(initial=-np.inf) + math.log10(self.beyond)
        high = jumped | grown
        failure = self._failure(row, rms, rise, logs - before, jumped, high) if high.any() else None
        return baseline.learn(state, logs, ~high, self.window), failure

    def bounds(self, state: Any, row: Row, bounds: Bounds) -> bool:
        """The least that a jump, and that growth, must be above."""
        past = state["past"]
        jump = baseline.record(state) + math.log10(self.jump / 2)
        growth = np.maximum(past + math.log10(self.growth), past.max(initial=-np.inf) + math.log10(self.beyond))
        bounds.outputs(most=baseline.bound(state, np.minimum(jump, growth), self.warmup) * bounds.output_roots)
        return True

    def learned(self, state: Any, block: Block) -> Any:
        """Behind a block of rows."""
        return baseline.learn_block(state, block.output_rms, self.window)

    def _failure(self, row: Row, rms: Any, rise: Any, grown: Any, jumped: Any, high: Any) -> Failure:
        worst = int(np.argmax(np.where(high, np.where(jumped.any(), rise, grown), -np.inf)))
        tap = row.table.taps[row.table.of_kind[OUTPUT][worst]]
        what = f"{10 ** rise[worst]:.3g} times its usual size" if jumped.any() else f"{10 ** grown[worst]:.3g} times what it was"
        others = others_than_one(high)
        message = f"output of {tap.layer} at step {row.step}: rms {rms[worst]:.4g}, {what}{others}"
        return Failure(
            "ActivationGrowth",
            row.step,
            message,
            tap.layer,
            tap.site,
            float(rms[worst]),
            float(rms[worst]) / 10 ** max(0.0, rise[worst]) * self.jump,
        )
