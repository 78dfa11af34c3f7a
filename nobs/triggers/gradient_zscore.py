"""A layer's gradient far out of what is usual for that layer, however small it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._columns import PARAMETER_GRAD
from .._history import Row
from .._schema import Failure
from . import baseline
from .shape import at_least_one, others_than_one, positive
from .sieve import Block, Bounds


@dataclass(frozen=True)
class GradientZScore:
    """A parameter's gradient norm is far above its own baseline, in deviations and as a factor, and above all it ever was.

    Where GradientNorm asks for a large norm, this one finds the jump from 1e-6 to 1. The baseline is of the logarithm, as
    gradient norms are close to log-normal (Chmiel et al. 2020, arXiv:2006.08173).

    Args:
        z: mean absolute deviations above the moving average.
        factor: times above that average.
        above: times above the highest healthy norm so far, which fades by a power of ten in 1000 steps.
        warmup: readings of a parameter that only build its baseline.
        window: the baseline's length in steps.

    Cost: a dozen NumPy calls over the parameters.
    """

    z: float = 8.0
    factor: float = 30.0
    above: float = 10.0
    warmup: int = 20
    window: int = 20

    def __post_init__(self) -> None:
        positive(self, "z", "factor", "above")
        at_least_one(self, "warmup", "window")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        norms = row.readings.whole_gradients.astype(np.float64)
        logs = baseline.powers(norms)
        state = baseline.usable(state, len(logs))
        z = baseline.scores(state, logs)
        with np.errstate(invalid="ignore"):
            high = (z > self.z) & (logs - state["level"] > math.log10(self.factor)) & (state["count"] >= self.warmup)
            high &= logs > baseline.record(state) + math.log10(self.above)
        failure = self._failure(row, norms, logs - state["level"], z, high) if high.any() else None
        return baseline.learn(state, logs, ~high, self.window), failure

    def bounds(self, state: Any, row: Row, bounds: Bounds) -> bool:
        """`above` times the record: the least that a failure is above."""
        bounds.gradients(most=baseline.bound(state, baseline.record(state) + math.log10(self.above), self.warmup))
        return True

    def learned(self, state: Any, block: Block) -> Any:
        """Behind a block of rows."""
        return baseline.learn_block(state, block.gradients, self.window)

    def _failure(self, row: Row, norms: Any, rise: Any, z: Any, high: Any) -> Failure:
        worst = int(np.argmax(np.where(high, rise, -np.inf)))
        tap = row.table.taps[row.table.of_kind[PARAMETER_GRAD][worst]]
        name, others = tap.site.removesuffix(".grad"), others_than_one(high)
        message = f"gradient norm {norms[worst]:.4g} of {tap.layer}.{name} at step {row.step}, {10 ** rise[worst]:.3g} times"
        message += f" its usual size ({z[worst]:.0f} deviations){others}"
        return Failure("GradientZScore", row.step, message, tap.layer, tap.site, float(z[worst]), self.z)
