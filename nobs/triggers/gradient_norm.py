"""A gradient norm above a threshold, and above its own baseline where asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._columns import PARAMETER_GRAD
from .._history import Row
from .._schema import Failure
from . import blocks
from .shape import at_least_one, others_than_one, positive
from .sieve import BLOCK, SLACK, Block, Bounds


@dataclass(frozen=True)
class GradientNorm:
    """A parameter's gradient norm (L2, unscaled, unclipped) is above a threshold; names the layer.

    Args:
        threshold: the norm.
        factor: if given, the norm must also be this many times the site's own baseline, so that a healthy run whose
            gradients are large sums lives. The baseline is a moving average of the logarithm that a failing norm does
            not enter; a climb too slow for that is caught at `climb` times the lowest that it had over about `memory` steps.
            What grows by that much in longer times is healthy: gradients behind a branch that starts at zero do.
        climb: with a factor, how far above its lowest baseline a norm may climb.
        warmup: with a factor, steps that only build the baseline.
        window: the baseline's length in steps.
        memory: how long the lowest baseline is remembered, in steps.
    """

    threshold: float = 100.0
    factor: float | None = None
    climb: float = 1000.0
    warmup: int = 2
    window: int = 20
    memory: int = 200

    def __post_init__(self) -> None:
        positive(self, "threshold", "climb", *(["factor"] if self.factor is not None else []))
        at_least_one(self, "warmup", "window", "memory")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        lines = row.table.of_kind[PARAMETER_GRAD]
        norms = np.abs(row.readings.whole_gradients.astype(np.float64))
        if state is None or len(state["count"]) != len(lines):
            state = {"count": np.zeros(len(lines)), "log": np.zeros(len(lines)), "low": np.full(len(lines), np.inf)}
        high = norms > self.threshold  # NaN compares false: of what is not finite NonFinite speaks
        known = state["count"] >= self.warmup
        ratio = np.where(known, norms / np.exp(state["log"]), 0)
        climbed = np.where(known, norms / np.exp(np.where(known, state["low"], 0)), 0)
        if self.factor is not None:
            high &= (ratio > self.factor) | (climbed > self.climb)
        state = self._learn(state, norms, ~high)
        return state, self._failure(row, lines, norms, ratio, climbed, high) if high.any() else None

    def _learn(self, state: Any, norms: NDArray[np.floating[Any]], healthy: NDArray[np.bool_]) -> Any:
        learns = healthy & np.isfinite(norms) & (norms > 0)
        count = state["count"] + learns
        weight = np.maximum(1 / np.maximum(count, 1), 1 / self.window)
        log = state["log"] + np.where(learns, weight * (np.log(np.where(learns, norms, 1)) - state["log"]), 0)
        low = np.where(count > 1, state["low"], log)
        low = np.minimum(low + (log - low) / self.memory, log)
        return {"count": count, "log": log, "low": np.where(learns, low, state["low"])}

    def bounds(self, state: Any, row: Row, bounds: Bounds) -> bool:
        """What a failure must be above: lower than now, as rows make the baseline sink, though none may be far below it."""
        norms = row.readings.whole_gradients
        if self.factor is None:
            bounds.gradients(most=self.threshold * (1 - SLACK))
            return True
        share = 1 - (1 - 1 / self.window) ** (BLOCK - 1)
        log = state["log"] - np.where(state["count"] < self.window, 1, share) * _FAR_BELOW - SLACK
        above = np.minimum(log + math.log(self.factor), np.minimum(state["low"], log) + math.log(self.climb))
        known, zero = state["count"] >= self.warmup, norms == 0  # zero is no reading, and may stay
        most = np.maximum(np.exp(np.where(known, above, -np.inf)), self.threshold * (1 - SLACK))
        least = np.exp(np.where(known & ~zero, state["log"] - _FAR_BELOW, -np.inf))
        bounds.gradients(np.where(zero, 0, least), np.where(zero, 0, most))
        return True

    def learned(self, state: Any, block: Block) -> Any:
        """Behind a block of rows."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(block.gradients)
            whole = state["count"].min(initial=self.window) >= self.window and math.isfinite(logs.sum())
        if not whole:
            for row in block.gradients:
                state = self._learn(state, row, np.ones(len(row), dtype=np.bool_))
            return state
        rows = blocks.product(blocks.level_and_lows(len(logs), self.window, self.memory), blocks.behind(state["log"], logs))
        rows[-1] += state["low"] * (1 - 1 / self.memory) ** len(logs)
        return {"count": state["count"] + len(logs), "log": rows[0].copy(), "low": np.minimum.reduce(rows[1:], axis=0)}

    def _failure(self, row: Row, lines: Any, norms: Any, ratio: Any, climbed: Any, high: Any) -> Failure:
        """Of the sites above, the one furthest above its own baseline; without baselines, the largest."""
        worst = int(np.argmax(np.where(high, norms if self.factor is None else ratio, -np.inf)))
        tap = row.table.taps[lines[worst]]
        norm = float(norms[worst])
        more = ""
        if self.factor is not None:
            slow = not ratio[worst] > self.factor
            more = f", {climbed[worst]:.3g} times its lowest" if slow else f", {ratio[worst]:.3g} times its baseline"
        others = others_than_one(high, "more above")
        message = f"gradient norm {norm:.4g} of {tap.layer}.{tap.site.removesuffix('.grad')} at step {row.step}{more}{others}"
        return Failure("GradientNorm", row.step, message, tap.layer, tap.site, norm, self.threshold)


_FAR_BELOW = math.log(5)
"""What is so far below its baseline, as a logarithm, makes it sink."""
