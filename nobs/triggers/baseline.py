"""What is usual for many sites at once, learned as it goes: the common ground of the adaptive triggers.

All in powers of ten, as norms of healthy layers span many of them. A baseline is a few NumPy arrays, one number a site:

    count, level, spread   readings so far, their moving average and mean absolute deviation
    past, last, recent     the highest reading before the last whole window, in it, and since
    age                    steps since

What is not finite is no reading, and what a trigger takes for a failure is not learned, so that neither a NaN nor a spike
hides the next one. Several rows at once: `learn_block`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blocks
from .sieve import BLOCK, SLACK

State = dict[str, Any]
Floats = NDArray[np.float64]

FADES = 1000
"""Steps in which a record comes down by a power of ten, so that one wild step of long ago does not excuse all that follow."""

FADED = BLOCK / FADES + SLACK
"""Powers of ten by which a record may have come down, at the most, behind the rows of a block."""


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


def learn_block(state: State, readings: Floats, window: int) -> State:
    """The state behind several rows `[rows, sites]`, all of them healthy, their readings not in powers: what `learn` makes of
    them one by one, but for rounding.

    Cost: two dozen NumPy calls where every site has a reading in every row and a full window behind it; else as many a row.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(readings)
        whole = state["count"].min(initial=window) >= window and math.isfinite(logs.sum())
    if not whole:
        for row in np.where(np.isfinite(logs), logs, np.nan):
            state = learn(state, row, np.ones(len(row), dtype=np.bool_), window)
        return state
    rows = blocks.product(blocks.level_and_rises(len(logs), window), blocks.behind(state["level"], logs))
    level = rows[0].copy()
    np.abs(rows, out=rows)
    rows[0] = state["spread"]
    return {
        "count": state["count"] + len(logs),
        "level": level,
        "spread": blocks.product(blocks.averages(len(logs), window)[-1:], rows)[0],
        **_records(state, logs, window),
    }


def _records(state: State, logs: Floats, window: int) -> State:
    """The highest readings behind several rows, each of a reading of every site."""
    past, last, recent, age = (state[name] for name in ("past", "last", "recent", "age"))
    while len(logs):
        rows = logs[: max(1, window - age)]
        past, recent = past - len(rows) / FADES, np.maximum(recent, rows.max(axis=0))
        age, logs = age + len(rows), logs[len(rows) :]
        if age >= window:
            past, last, recent, age = np.maximum(past, last), recent, np.full_like(recent, -np.inf), 0
    return {"past": past, "last": last, "recent": recent, "age": age}


def bound(state: State, logs: Floats, warmup: int) -> Floats:
    """A bound in powers of ten as a size, for the rows of a block: lower by what a record fades, none where little is known."""
    with np.errstate(over="ignore"):
        return np.where(state["count"] < warmup - BLOCK, np.inf, np.exp((logs - FADED) * math.log(10)))


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
