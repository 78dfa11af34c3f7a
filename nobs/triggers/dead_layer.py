"""Layers that fell silent: an output of zeros, a gradient that is zero or does not come, or next to none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._columns import FIRST, NORM, OUTPUT, PARAMETER_GRAD
from .._history import Row
from .._schema import Failure
from .shape import at_least_one, others_than_one, positive
from .sieve import SLACK, Block, Bounds


@dataclass(frozen=True)
class DeadLayer:
    """A layer that was alive gives only zeros, or its parameters get no gradient any more, for some steps on end.

    Frozen parameters, layers that do not run, and losses of exactly zero are left alone; so are pauses that a layer has
    made before (a branch that is dropped at random, a head whose task is not on). A parameter whose gradient is, from
    the start, nothing beside the largest of the network counts too: gradients vanish through depth.

    Args:
        patience: steps on end, twice as many for gradients; and three times the longest pause that the site has made in health.
        vanishing: a parameter's root mean square gradient as a share of the network's largest, over four times `patience`.
        warmup: steps that a site must have been alive before its silence means something.

    Cost: two dozen NumPy calls over the taps; see `sieve`.
    """

    patience: int = 5
    vanishing: float = 1e-6
    warmup: int = 10

    def __post_init__(self) -> None:
        positive(self, "vanishing")
        at_least_one(self, "patience", "warmup")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        largest = _largest(row)
        pairs = zip(_outputs(row), self._gradients(row, largest), strict=True)
        silent, alive, weak = (np.concatenate(pair) for pair in pairs)
        state = _empty(len(silent)) if state is None or len(state["alive"]) != len(silent) else state
        pause = np.where(silent, state["pause"] + 1, np.where(alive, 0, state["pause"]))
        longest = np.where(alive, np.maximum(state["longest"], state["pause"]), state["longest"])
        faint = np.where(weak, state["faint"] + 1, np.where(alive, 0, state["faint"]))
        least = np.full(len(silent), 2 * self.patience)
        least[: len(row.table.of_kind[OUTPUT])] = self.patience
        dead = silent & (pause >= least) & (pause > 3 * longest) & (state["alive"] >= self.warmup)
        vanished = faint >= 4 * self.patience
        failure = None
        if dead.any() or vanished.any():
            failure = self._failure(row, dead if dead.any() else vanished, pause if dead.any() else faint)
        alive_for = state["alive"] + alive
        return {
            "alive": alive_for,
            "pause": np.where(dead, 0, pause),
            "longest": longest,
            "faint": np.where(vanished, 0, faint),
        }, failure

    def bounds(self, state: Any, row: Row, bounds: Bounds) -> bool:
        """No output is zero, and of each layer that has a gradient the strongest is far from next to none."""
        norms, rms, largest = row.readings.outputs, row.readings.gradient_rms, _largest(row)
        silent = (norms == 0).any() or ((largest == 0) & row.readings.pattern.asking).any()
        if silent or state["pause"].any() or state["faint"].any():
            return False
        of_gradients = largest[row.table.trained_layers[2]]
        most = _GROWS * largest.max(initial=0.0)
        least = self.vanishing * most * (1 + SLACK)
        strongest, none = (rms > 0) & (rms == of_gradients), ~(of_gradients > 0)
        if (strongest & (rms < least)).any():
            return False
        bounds.outputs(np.where(norms > 0, _TINY, np.nan), np.where(norms > 0, np.nan, 0))
        roots = bounds.gradient_roots
        bounds.gradients(np.where(strongest, least, np.nan) * roots, np.where(none, 0, most * roots))
        return True

    def learned(self, state: Any, block: Block) -> Any:
        """Behind a block of rows, in each of which what was alive was so."""
        if (state["alive"] >= self.warmup).all():  # nobody need count on
            return state
        largest = np.array([block.table.largest_of_layers(norms) for norms in block.gradients])
        alive = np.concatenate(((block.outputs > 0).sum(axis=0), (largest > 0).sum(axis=0)))
        return {**state, "alive": state["alive"] + alive}

    def _gradients(self, row: Row, largest: Any) -> tuple[Any, Any, Any]:
        """Which layers that ask for a gradient have none, which have one, and which next to none.

        They must have been used. Where no gradient at all is left, the loss must not be zero.
        """
        table = row.table
        lines = row.values[table.of_kind[PARAMETER_GRAD]]
        # A NaN: of that NonFinite speaks.
        unclear = table.largest_of_layers(np.isfinite(lines[:, FIRST]) & ~(lines[:, NORM] >= 0)) > 0
        most, loss = largest.max(initial=0.0), row.scalars.get("loss", 0.0)
        asked = most > 0 or (math.isfinite(loss) and loss != 0)
        weak = (largest > 0) & (largest < self.vanishing * most) & math.isfinite(most)
        return asked & row.readings.pattern.asking & (largest == 0) & ~unclear, (largest > 0) & ~weak, weak & ~unclear

    def _failure(self, row: Row, which: Any, steps: Any) -> Failure:
        first = int(np.argmax(which))
        outputs = row.table.of_kind[OUTPUT]
        if first < len(outputs):
            tap, what = row.table.taps[outputs[first]], "only zeros in the output of"
        else:
            of_layer = row.table.trained_layers[2]
            tap = row.table.taps[row.table.of_kind[PARAMETER_GRAD][np.argmax(of_layer == first - len(outputs))]]
            what = "no gradient in"
            if steps[first] >= 4 * self.patience:
                what = f"a gradient below {self.vanishing:.0e} of the network's largest in"
        others = others_than_one(which)
        message = f"{what} {tap.layer} for {steps[first]:.0f} steps until step {row.step}{others}"
        return Failure("DeadLayer", row.step, message, tap.layer, tap.site, float(steps[first]), float(self.patience))


_TINY = float(np.finfo(np.float32).tiny)
_GROWS = 10.0
"""A gradient may be so many times the network's largest, for the others not to be next to none beside it."""


def _empty(sites: int) -> dict[str, Any]:
    return {name: np.zeros(sites) for name in ("alive", "pause", "longest", "faint")}


def _outputs(row: Row) -> tuple[Any, Any, Any]:
    """Which outputs are all zero, and which are not."""
    norms = row.readings.outputs
    return norms == 0, norms > 0, np.zeros(len(norms), dtype=bool)


def _largest(row: Row) -> Any:
    """Of each layer the largest root mean square of a gradient; 0 where there is none."""
    pattern, rms = row.readings.pattern, row.readings.gradient_rms
    return row.table.largest_of_layers(rms if pattern.all_measured else np.where(pattern.gradients_that_ran, rms, 0))
