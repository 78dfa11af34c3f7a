"""The order in which layers run, put together from steps none of which need have run them all."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def execution_order(clocks: NDArray[np.floating[Any]]) -> list[int]:
    """The layers that ever ran, in the order of execution.

    The step that ran the most gives the order. What only ran in others, in a branch that is not always taken, goes behind
    what ran before it there; clocks of different steps are not compared, as a branch not taken moves all that follows.

    Args:
        clocks: `[T, layers]`, when each layer first ran in each step; not finite where it did not run.

    Cost: one look at all clocks for each branch.
    """
    ran = np.isfinite(clocks)
    order: list[int] = []
    known = np.zeros(clocks.shape[1], dtype=bool)
    while (fresh := (ran & ~known).any(axis=1)).any():
        step = int(np.argmax(np.where(fresh, ran.sum(axis=1), -1)))
        behind = 0
        for layer in np.argsort(clocks[step], kind="stable")[: ran[step].sum()].tolist():
            if known[layer]:
                behind = order.index(layer) + 1
            else:
                order.insert(behind, layer)
                known[layer] = True
                behind += 1
    return order
