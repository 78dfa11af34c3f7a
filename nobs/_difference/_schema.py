"""What is found where two runs are compared. Frozen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._columns import Floats


@dataclass(frozen=True)
class Span:
    """`count` steps from `first` to `last`."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Reading:
    """What a site held: the norm of its finite values (NaN: it had none), and how many were NaN or Inf."""

    norm: float
    nonfinite: int


@dataclass(frozen=True)
class Spot:
    """A site at a step, in both runs (None: it did not run), and by what `ratio` the norms differ.

    The ratio is infinite where one is zero, or alone has NaN or Inf, and NaN where nobody can say.
    """

    site: str
    step: int
    a: Reading | None
    b: Reading | None
    ratio: float


@dataclass(frozen=True, eq=False)
class LayerDifference:
    """A layer in both runs; None is said of what happens nowhere.

    Attributes:
        parts: where its first site is not the same.
        leaves: where the first of the sites that are far apart at the end leaves the ratio that it had before; else the
            first of those that `always` were.
        apart: since when, having left, that site is apart by a factor APART at least.
        largest: where the ratio is largest.
        ratios: `[steps measured]`, the largest of its sites; NaN where there is none.
        bad: `[steps measured]`, whether one run alone has NaN or Inf.
    """

    name: str
    type: str
    parts: Spot | None
    leaves: Spot | None
    apart: Spot | None
    always: bool
    largest: Spot | None
    ratios: Floats
    bad: NDArray[np.bool_]


@dataclass(frozen=True)
class Pair:
    """A scalar at a step in both runs, None where it was not given."""

    step: int
    a: float | None
    b: float | None


@dataclass(frozen=True)
class ScalarDifference:
    """A scalar: where it parts (None: nowhere), and the last of the common steps for which either run has it."""

    name: str
    parts: Pair | None
    last: Pair | None


@dataclass(frozen=True, eq=False)
class Difference:
    """Two runs, compared.

    Attributes:
        common: the steps that both have; `measured`: those in which taps ran in both (`every=`), None where in none.
        only_a, only_b: the steps that one has alone.
        layers: those that ran in both, in execution order.
        parting: where they part, those that do, in the order of computation; `leaving`: where they leave, those that are far
            apart at the end, likewise, and behind them those that always were.
        only_in_a, only_in_b: (layer, site) that ran in one run alone.
    """

    tolerance: float
    common: Span
    measured: Span | None
    only_a: tuple[Span, ...]
    only_b: tuple[Span, ...]
    layers: tuple[LayerDifference, ...]
    parting: tuple[tuple[Spot, LayerDifference], ...]
    leaving: tuple[tuple[Spot, LayerDifference], ...]
    scalars: tuple[ScalarDifference, ...]
    only_in_a: tuple[tuple[str, str], ...]
    only_in_b: tuple[tuple[str, str], ...]
