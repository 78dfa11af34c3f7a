"""The eight numbers of a line, and the statistics that are finished from them when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UnknownLayer, explain

Floats = NDArray[np.floating[Any]]

COLUMNS = ("norm", "absmax", "nan", "posinf", "neginf", "zeros", "elements", "first")
"""The eight float32 of a line.

`norm` (L2) and `absmax` are over the finite values, and `norm` is NaN where none was; what is beyond float32's range reads as
infinity; `nan`, `posinf`, `neginf` are counts, exact up to 2**24; `zeros` is a fraction;
`elements` the tensor's size; `first` the reading of the step's clock when the tap first ran, with the code of the dtype
in sixteenths behind the point (see DTYPES), and infinity where the tap did not run. A parameter has no place in that
order: before the point it has TRAINED where it asks for a gradient, and 1 where it is frozen.
"""

TRAINED = 2

NORM, ABSMAX, NAN, POSINF, NEGINF, ZEROS, ELEMENTS, FIRST = range(len(COLUMNS))

DTYPES = ("", "float32", "bfloat16", "float16", "float64", "complex64", "complex128", "complex32")
"""A dtype's place here is its code in the `first` column; place 0 is any other."""

LARGEST = {"float16": 65504.0, "bfloat16": 3.39e38, "float32": 3.4e38, "float64": 1.8e308}
"""The largest number of a dtype."""

OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD = KINDS = ("output", "output.grad", "parameter", "parameter.grad")


def _nonfinite(v: Floats) -> Floats:
    return v[..., NAN] + v[..., POSINF] + v[..., NEGINF]


def _norm(v: Floats) -> Floats:
    """NaN where there was nothing to measure; where no value was finite it is NaN already."""
    return np.where(v[..., ELEMENTS] > 0, v[..., NORM], np.nan)


STATISTICS: Mapping[str, Callable[[Floats], Floats]] = {
    "norm": _norm,
    "rms": lambda v: _norm(v) / np.sqrt(np.maximum(v[..., ELEMENTS], 1)),
    "absmax": lambda v: v[..., ABSMAX],
    "nan": lambda v: v[..., NAN],
    "posinf": lambda v: v[..., POSINF],
    "neginf": lambda v: v[..., NEGINF],
    "nonfinite": _nonfinite,
    "zeros": lambda v: v[..., ZEROS],
    "elements": lambda v: v[..., ELEMENTS],
}
"""Statistics by name, finished from the columns when they are read. To add one: a row here and a test.

`rms` is `norm` over the root of `elements`: exact where all calls of a step were of one size, as the columns fold apart.
"""


def read(values: Floats, statistic: str) -> Floats:
    """One statistic of lines `[..., 8]`, as float64 `[...]`; NaN where the tap did not run."""
    try:
        finish = STATISTICS[statistic]
    except KeyError:
        raise UnknownLayer(
            explain(f"reading {statistic!r}", "no such statistic", f"one of {', '.join(STATISTICS)}", "'norm', say")
        ) from None
    values = values.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # a dump may hold any floats
        return np.where(np.isfinite(values[..., FIRST]), finish(values), np.nan)
