"""What a trace and TensorBoard have in common: a moment for each step, and for each series a name that no other has."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .._history import History

STEP_S = 1e-3
"""How long a step takes where nobody knows."""
_MOST_S = 1e12
"""A time beyond it, some 30 000 years, is no time."""


def moments_s(history: History) -> NDArray[np.float64]:
    """When each step was recorded, in seconds, float64 `[T]`, never falling: a clock that was set back stands still.

    In Unix time; where that is not known of every step, steps follow each other from 0 on, STEP_S apart.
    """
    known = bool((np.abs(history.times_s) < _MOST_S).all())  # NaN is not
    times_s = history.times_s if known else np.arange(len(history), dtype=np.float64) * STEP_S
    return np.asarray(np.maximum.accumulate(times_s), dtype=np.float64)


def distinct(names: Iterable[str]) -> list[str]:
    """The names as UTF-8 can hold them; of those that are alike then, the second is `name (2)` and so on."""
    taken: dict[str, int] = {}
    found = []
    for name in names:
        plain = wanted = name.encode(errors="backslashreplace").decode()
        while wanted in taken:
            taken[plain] += 1
            wanted = f"{plain} ({taken[plain]})"
        taken[wanted] = 1
        found.append(wanted)
    return found
