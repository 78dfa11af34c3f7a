"""What is usual for many sites at once, learned as it goes: the common ground of the adaptive triggers.

All in powers of ten, as norms of healthy layers span many of them. A baseline is a few NumPy arrays, one number a site:

    count, level, spread   readings so far, their moving average and mean absolute deviation
    past, last, recent     the highest reading before the last whole window, in it, and since
    age                    steps since

What is not finite is no reading, and what a trigger takes for a failure is not learned, so that neither a NaN nor a spike
hides the next one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

State = dict[str, Any]
Floats = NDArray[np.float64]

FADES = 1000
"""Steps in which a record comes down by a power of ten, so that one wild step of long ago does not excuse all that follow."""


def powers(values: NDArray[np.floating[Any]]) -> Floats:
    """log10; NaN where there is no positive finite value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((values > 0) & np.isfinite(values), np.log10(values), np.nan)


def empty(sites: int) -> State:
    """Nothing learned yet."""
    low = np.full(sites, -np.inf)
    none = np.zeros(sites)
    return {"count": none, "level": none, "spread": none, "past": low, "last": low, "recent": low, "age": 0}


def usable(state: Any, sites: int) -> State:
    """The state, or an empty one where there is none for so many sites: the first step, another model."""
    return state if state is not None and len(state["count"]) == sites else empty(sites)


def learn(state: State, logs: Floats, healthy: NDArray[np.bool_], window: int) -> State:
    """The state after a row; `logs` [sites] in powers of ten."""
    learns = healthy & np.isfinite(logs)
    seen = np.where(learns, logs, state["level"])
    count = state["count"] + learns
    weight = np.maximum(1 / np.maximum(count, 1), 1 / window)
    rise = seen - state["level"]
    known = state["count"] > 0
    spread = state["spread"] + np.where(known, weight * (np.abs(rise) - state["spread"]), 0)
    past, last, recent = state["past"] - 1 / FADES, state["last"], np.maximum(state["recent"], np.where(learns, logs, -np.inf))
    age = state["age"] + 1
    if age >= window:
        past, last, recent, age = np.maximum(past, last), recent, np.full_like(recent, -np.inf), 0
    return {
        "count": count,
        "level": np.where(learns, state["level"] + weight * rise, state["level"]),
        "spread": np.where(learns, spread, state["spread"]),
        "past": past,
        "last": last,
        "recent": recent,
        "age": age,
    }


def record(state: State) -> Floats:
    """The highest healthy reading of each site, -Inf where there is none."""
    highest: Floats = np.maximum(np.maximum(state["past"], state["last"]), state["recent"])
    return highest


def scores(state: State, logs: Floats) -> Floats:
    """How many mean absolute deviations a reading is above its level; one that hardly scatters counts as if it did."""
    deviations: Floats = (logs - state["level"]) / np.maximum(state["spread"], LEAST_SPREAD)
    return deviations


LEAST_SPREAD = 0.05
"""Powers of ten; 12 %."""
