"""The shape of a trigger, and the check of its settings."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .._history import Row
from .._schema import Failure
from ..errors import BadSetting, explain


class Trigger(Protocol):
    """What the engine asks of a trigger."""

    def update(self, state: Any, row: Row) -> tuple[Any, Failure | None]: ...


def positive(trigger: object, *names: str) -> None:
    """Refuse settings that are NaN, infinite or not positive."""
    for name in names:
        value = getattr(trigger, name)
        if not _is_positive(value):
            default = next(f.default for f in fields(trigger) if f.name == name)  # type: ignore[arg-type]
            shown = 10.0 if default is None else default
            raise BadSetting(
                explain(
                    f"{type(trigger).__name__}({name}=...)", f"{name}={value!r}", "a positive finite number", f"{name}={shown}"
                )
            )


def _is_positive(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) < math.inf
    except OverflowError:  # an integer of thousands of digits
        return False


def at_least_one(trigger: object, *names: str) -> None:
    """Refuse numbers of steps that are no whole numbers of at least 1."""
    positive(trigger, *names)
    for name in names:
        value = getattr(trigger, name)
        if value != int(value) or value < 1:
            raise BadSetting(
                explain(
                    f"{type(trigger).__name__}({name}=...)",
                    f"{name}={value!r}",
                    "a whole number of steps, at least 1",
                    f"{name}=10",
                )
            )


def others_than_one(which: NDArray[np.bool_], what: str = "more so") -> str:
    """How many sites there are beside the one that a message names, in words; nothing where it is alone."""
    count = int(which.sum())
    return f" ({count - 1} {what})" if count > 1 else ""


def finite_loss(row: Row) -> float | None:
    """The row's loss, None where it is not finite or not given; bounded, as differences of float64's largest are infinite."""
    loss = float(row.scalars.get("loss", math.nan))
    return min(max(loss, -_LARGEST), _LARGEST) if math.isfinite(loss) else None


_LARGEST = 1e150
