"""Values of a file, each checked for what it should be: a file may be truncated, foreign or hostile.

All raise ValueError, TypeError or KeyError; the reader of the file says which file it was.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How JSON holds a float that is not finite."""


def text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text should be")
    return value


def text_or_none(value: Any) -> str | None:
    """A text or None."""
    return None if value is None else text(value)


def whole(value: Any) -> int:
    """A whole number that an int64 holds."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**62) < value < 2**62:
        raise ValueError(f"{value!r} is no whole number")
    return value


def whole_or_none(value: Any) -> int | None:
    """A whole number or None."""
    return None if value is None else whole(value)


def number(value: Any) -> float:
    """A float; one that is not finite comes as a word."""
    if isinstance(value, str):
        return WORDS[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def number_or_none(value: Any) -> float | None:
    """A float or None."""
    return None if value is None else number(value)


def share(value: Any) -> float:
    """A number from 0 to 1."""
    if not 0 <= number(value) <= 1:
        raise ValueError(f"{value!r} is not from 0 to 1")
    return number(value)


def fact(value: Any) -> object:
    """What is known of a run: a plain value."""
    if not (value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(f"{value!r} is no fact of a run")
    return value


def as_long(column: list[Any], steps: int) -> list[Any]:
    """A column with one entry a step."""
    if len(column) != steps:
        raise ValueError(f"{len(column)} entries for {steps} steps")
    return column


def numbers(column: list[Any], steps: int) -> NDArray[np.float64]:
    """A column of floats, NaN where nothing was recorded."""
    return np.array([math.nan if v is None else number(v) for v in as_long(column, steps)], dtype=np.float64)
