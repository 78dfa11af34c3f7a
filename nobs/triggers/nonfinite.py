"""NaN and Inf: in the loss, then at any site, in the order of computation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._columns import FIRST, KINDS, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD
from .._schema import Failure, Row, Tap
from .shape import positive


@dataclass(frozen=True)
class NonFinite:
    """The loss is NaN or infinite, or a NaN or Inf is at any site.

    -Inf in an output is legal, attention masks are made of it. Under a GradScaler non-finite gradients are how it finds its
    scale: they count only when they last longer than `patience` steps.

    Args:
        patience: with a loss scale in the row, steps in a row that gradients may be non-finite.
    """

    patience: int = 20

    def __post_init__(self) -> None:
        positive(self, "patience")

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]:
        counts = self._bad_counts(row)
        skipped = 0
        if "loss_scale" in row.scalars and (counts[PARAMETER_GRAD].any() or counts[OUTPUT_GRAD].any()):
            skipped = int(state or 0) + 1
            if skipped <= self.patience:
                counts = {kind: c if kind in (OUTPUT, PARAMETER) else np.zeros_like(c) for kind, c in counts.items()}
        return skipped, self._loss_failure(row) or self._site_failure(row, counts)

    def _bad_counts(self, row: Row) -> dict[str, NDArray[np.floating[Any]]]:
        counts = {kind: np.nan_to_num(row.kind(kind, "nonfinite")) for kind in KINDS}
        counts[OUTPUT] -= np.nan_to_num(row.kind(OUTPUT, "neginf"))
        return counts

    def _loss_failure(self, row: Row) -> Failure | None:
        loss = row.scalars.get("loss", 0.0)
        if math.isfinite(loss):
            return None
        return Failure("NonFinite", row.step, f"loss is {_word(loss)} at step {row.step}", value=loss)

    def _site_failure(self, row: Row, counts: dict[str, NDArray[np.floating[Any]]]) -> Failure | None:
        """The first site in the order of a step: parameters, outputs forward, gradients backward."""
        for kind, key in ((PARAMETER, 1), (OUTPUT, 1), (OUTPUT_GRAD, -1), (PARAMETER_GRAD, -1)):
            bad = np.flatnonzero(counts[kind])
            if not bad.size:
                continue
            lines = row.table.of_kind[kind][bad]
            order = _execution_order(row)
            place = min(range(len(bad)), key=lambda i: key * order[row.table.taps[lines[i]].layer])
            tap, count = row.table.taps[lines[place]], float(counts[kind][bad[place]])
            return Failure("NonFinite", row.step, self._message(row, tap, count), tap.layer, tap.site, count, 0.0)
        return None

    def _message(self, row: Row, tap: Tap, count: float) -> str:
        nan, elements = row[tap.layer, tap.site, "nan"], row[tap.layer, tap.site, "elements"]
        what = "NaN" if nan == count else "Inf" if nan == 0 else "NaN or Inf"
        return f"{count:.0f} of {elements:.0f} values {what} in {tap.layer} ({tap.site}) at step {row.step}"


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"


def _execution_order(row: Row) -> dict[str, float]:
    """layer -> the clock at its first run in this step, infinite where it did not run."""
    lines = row.table.of_kind[OUTPUT]
    order = {tap.layer: math.inf for tap in row.table.taps}
    order.update({row.table.taps[line].layer: float(row.values[line, FIRST]) for line in lines})
    return order
