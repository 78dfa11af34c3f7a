"""The first layer's output changed its size for good: the data did, not the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._columns import OUTPUT
from .._history import Row
from .._schema import Failure
from . import baseline
from .shape import at_least_one, positive
from .sieve import BLOCK, SLACK, Block, Bounds


@dataclass(frozen=True)
class InputShift:
    """The output of the layer that runs first, or its largest value, is several times what is usual or a fraction of it, for
    some steps on end.

    Batches of one data set are alike, and the first layer sees nothing else: a forgotten or doubled normalisation, a loader
    that repeats one sample.

    Args:
        factor: times larger or smaller than its average.
        z: mean absolute deviations of the logarithm that it must also be.
        patience: steps on end.
        warmup: readings that only build the baseline.
        window: the baseline's length in steps.
    """

    factor: float = 2.0
    z: float = 8.0
    patience: int = 3
    warmup: int = 20
    window: int = 20

    def __post_init__(self) -> None:
        positive(self, "factor", "z")
        at_least_one(self, "patience", "warmup", "window")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        at = row.readings.pattern.first_output
        if at is None:
            return state, None
        sizes = np.array([row.readings.output_rms[at], row.readings.output_peaks[at]])
        logs = baseline.powers(sizes)
        known: dict[str, Any] = (
            state if state is not None and state["at"] == at else {"at": at, "out": 0, "base": baseline.empty(2)}
        )
        base = known["base"]
        rise = logs - base["level"]
        with np.errstate(invalid="ignore"):
            out = (np.abs(rise) > math.log10(self.factor)) & (np.abs(baseline.scores(base, logs)) > self.z)
        shifted = bool((out & (base["count"] >= self.warmup)).any())
        steps = known["out"] + 1 if shifted else 0
        failed = steps >= self.patience
        failure = self._failure(row, row.table.of_kind[OUTPUT][at], sizes, rise) if failed else None
        learned = baseline.learn(base, logs, np.array([not shifted] * 2), self.window)
        return {"at": at, "out": 0 if failed else steps, "base": learned}, failure

    def bounds(self, state: Any, row: Row, bounds: Bounds) -> bool:
        """Half as far from the level as a shift is: rows so near cannot have moved the level further than that."""
        at = row.readings.pattern.first_output
        if at is None:
            return True
        if state is None or state["at"] != at or state["out"]:
            return False
        sites = zip(state["base"]["level"].tolist(), state["base"]["count"].tolist(), strict=True)
        (least, most), (least_peak, most_peak) = (self._band(level, count) for level, count in sites)
        root = float(bounds.output_roots[at])
        bounds.least[at], bounds.most[at] = np.fmax(bounds.least[at], least * root), np.fmin(bounds.most[at], most * root)
        bounds.least_peaks[at] = max(bounds.least_peaks[at], least_peak)
        bounds.most_peaks[at] = min(bounds.most_peaks[at], most_peak)
        return True

    def _band(self, level: float, count: float) -> tuple[float, float]:
        """Of a size; free where little is known, and empty where nothing is, though soon enough will be."""
        if count < self.warmup - BLOCK:
            return -math.inf, math.inf
        half = math.log10(self.factor) / 2 * (1 - SLACK)
        return (10.0 ** (level - half), 10.0 ** (level + half)) if count else (math.inf, -math.inf)

    def learned(self, state: Any, block: Block) -> Any:
        """Behind a block of rows."""
        rows = np.array([pattern.first_output is not None for pattern in block.patterns])
        if not rows.any():
            return state
        sizes = np.stack((block.output_rms[rows, state["at"]], block.output_peaks[rows, state["at"]]), axis=1)
        return {**state, "base": baseline.learn_block(state["base"], sizes, self.window)}

    def _failure(self, row: Row, line: int, sizes: Any, rise: Any) -> Failure:
        tap, which = row.table.taps[line], int(np.argmax(np.abs(np.nan_to_num(rise))))
        size, times = float(sizes[which]), 10 ** float(rise[which])
        what = ("rms", "largest value")[which]
        message = f"{what} of the output of {tap.layer}, the first layer, is {size:.4g}, {times:.3g} times what is usual, for"
        message += f" {self.patience} steps until {row.step}"
        return Failure("InputShift", row.step, message, tap.layer, tap.site, size, size / times * self.factor)
