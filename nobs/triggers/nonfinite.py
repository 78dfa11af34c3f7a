"""NaN and Inf: in the loss, then at any site, in the order of computation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._columns import FIRST, NEGINF, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD, Floats
from .._history import Row, bad_counts
from .._names import places
from .._schema import Failure
from .._table import Tap
from .shape import at_least_one
from .sieve import Block, Bounds


@dataclass(frozen=True)
class NonFinite:
    """The loss is NaN or infinite, or a NaN or Inf is at any site.

    -Inf in an output is legal, attention masks are made of it; but not in an output that had none for `maskless` steps. Under
    a GradScaler non-finite gradients are how it finds its scale: they count only when they last longer than `patience` steps.

    Args:
        patience: with a loss scale in the row, steps in a row that gradients may be non-finite.
        maskless: readings of an output without -Inf, from the first on, behind which -Inf is no mask.

    Cost: a look at all counts where they are zero; else two dozen NumPy calls over the taps. See `sieve`.
    """

    patience: int = 20
    maskless: int = 20

    def __post_init__(self) -> None:
        at_least_one(self, "patience", "maskless")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        outputs, readings = row.table.of_kind[OUTPUT], row.readings
        ran = readings.pattern.outputs_ran
        state = _usable(state, len(outputs))
        overflows, scaled = state["overflows"], "loss_scale" in row.scalars and readings.pattern.gradients_ran
        if readings.clean:
            return {"overflows": 0 if scaled else overflows, "clean": state["clean"] + ran}, self._loss_failure(row)
        counts = bad_counts(row.values, row.table)
        masks = np.where(ran, row.values[outputs, NEGINF], np.nan)
        counts[outputs] += np.where((masks > 0) & (state["clean"] >= self.maskless), masks, 0)
        if scaled:  # else: a step without taps
            gradients = np.r_[row.table.of_kind[OUTPUT_GRAD], row.table.of_kind[PARAMETER_GRAD]]
            overflows = overflows + 1 if counts[gradients].any() else 0
            if overflows <= self.patience:
                counts[gradients] = 0
        # An output that has ever been masked may always be: it leaves the count for good.
        clean = np.where(masks > 0, -np.inf, state["clean"] + (masks == 0))
        return {"overflows": overflows, "clean": clean}, self._loss_failure(row) or self._site_failure(row, counts)

    def bounds(self, state: Any, row: Row, bounds: Bounds) -> bool:
        """A sieve lets no count through but of masks: in outputs that have had one, and in parameters that have no gradient."""
        outputs, parameters = row.table.of_kind[OUTPUT], row.table.of_kind[PARAMETER]
        bounds.masked[outputs] = np.isinf(state["clean"])
        bounds.masked[parameters] = ~row.table.with_gradient(np.isfinite(row.values[:, FIRST]))
        return bool(state["overflows"] == 0)

    def learned(self, state: Any, block: Block) -> Any:
        """Behind a block of rows."""
        if (np.abs(state["clean"]) >= self.maskless).all():  # of each output that is clean long enough, or masked, all is known
            return state
        return {**state, "clean": state["clean"] + np.add.reduce([pattern.outputs_ran for pattern in block.patterns], axis=0)}

    def _loss_failure(self, row: Row) -> Failure | None:
        loss = row.scalars.get("loss", 0.0)
        if math.isfinite(loss):
            return None
        return Failure("NonFinite", row.step, f"loss is {_word(loss)} at step {row.step}", value=loss)

    def _site_failure(self, row: Row, counts: Floats) -> Failure | None:
        """The first site in the order of a step: parameters, outputs forward, gradients backward."""
        for kind, direction in ((PARAMETER, 1), (OUTPUT, 1), (OUTPUT_GRAD, -1), (PARAMETER_GRAD, -1)):
            lines = row.table.of_kind[kind]
            bad = lines[counts[lines] > 0]
            if bad.size:
                order = _execution_order(row)
                line = min(bad, key=lambda line: direction * order[row.table.taps[line].layer])
                tap, count = row.table.taps[line], float(counts[line])
                return Failure("NonFinite", row.step, self._message(row, tap, count), tap.layer, tap.site, count, 0.0)
        return None

    def _message(self, row: Row, tap: Tap, count: float) -> str:
        nan, elements = row[tap.layer, tap.site, "nan"], row[tap.layer, tap.site, "elements"]
        what = "NaN" if nan == count else "Inf" if nan == 0 else "NaN or Inf"
        return f"{count:.0f} of {elements:.0f} values {what} in {tap.layer} ({tap.site}) at step {row.step}"


def _usable(state: Any, outputs: int) -> dict[str, Any]:
    fits = isinstance(state, dict) and len(state["clean"]) == outputs
    return state if fits else {"overflows": 0, "clean": np.zeros(outputs)}


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"


def _execution_order(row: Row) -> dict[str, float]:
    """layer -> the clock at its first run in this step."""
    taps, lines = row.table.taps, row.table.of_kind[OUTPUT]
    ran = {taps[line].layer: float(row.values[line, FIRST]) for line in lines if np.isfinite(row.values[line, FIRST])}
    return places(ran, (tap.layer for tap in taps))
