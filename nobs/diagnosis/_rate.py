"""A learning rate that is too high: it jumped, it rose, or the network left its range together at a constant one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .._break import PAST, Break
from .._case import Event
from .._columns import PARAMETER
from ._finding import MOST, Evidence, Told, finding, without_layer

ROSE = 3.0
"""A learning rate that is so many times what it was has risen fast."""
STILL = 1.3
"""So many times what it was twenty steps ago: a rate that still rises."""
AFTER = 25
"""Steps after a jump of the rate in which what breaks is its doing."""


def rate_jumped(seen: Evidence) -> Told | None:
    """The learning rate jumped, and then something broke."""
    case, broke, rates = seen.case, seen.broke, seen.case.rates
    known = np.flatnonzero(np.isfinite(rates)).tolist()
    jumps = [(a, b) for a, b in pairwise(known) if rates[a] > 0 and rates[b] >= ROSE * rates[a]]
    if seen.failure is None or not jumps:
        return None
    last, row = jumps[-1]
    # With two updates in a step the second forward sees the first one's doing: the same step is not too early.
    if broke is not None and not row <= broke.row <= row + AFTER:
        return None
    first = broke.first if broke is not None else next((e for e in case.leavers if e.row > row), case.first_bad)
    evidence = f"the learning rate went from {rates[last]:.3g} to {rates[row]:.3g} at step {case.history.steps[row]}; "
    if first is not None and row <= first.row <= row + AFTER:
        return finding(seen, "rate_jumped", "learning_rate", first, evidence + _spread(seen, first))
    if broke is not None:
        return without_layer(
            "rate_jumped", "learning_rate", "loss", int(case.history.steps[broke.row]), evidence + "then the loss rose"
        )
    return None


def rate_rose(seen: Evidence) -> Told | None:
    """The network left its band while the learning rate rose, and no layer jumped far by itself before."""
    case, broke = seen.case, seen.broke
    if seen.failure is None or _rise(seen) < 1.5 or not (case.leavers or broke):
        return None
    row = case.end if broke is None else broke.row
    lately = _rise(seen, since=row - PAST)
    climbs = lately > ROSE or (lately > STILL and _rise(seen) > ROSE)
    if not climbs and (case.share_out(case.end) < MOST or case.share_out(row - 2) < MOST):
        return None
    if broke is not None and _alone(seen, broke):
        return None
    rate = f"learning rate {_rate(seen):.3g}, up {_rise(seen):.3g}x in this window"
    first = next(iter(case.leavers), broke.first if broke else None)
    if first is None:
        return without_layer("rate_rose", "learning_rate", "loss", int(case.history.steps[row]), f"the loss rose; {rate}")
    return finding(seen, "rate_rose", "learning_rate", first, f"{_spread(seen, first)}; {rate}")


def rate_constant(seen: Evidence) -> Told | None:
    """Most of the network left its band together, weights too, and nothing jumped before: the step size is too large."""
    case, broke = seen.case, seen.broke
    if seen.failure is None or not case.leavers:
        return None
    if broke is not None and broke.first is not None and seen.share((*broke.outputs, *broke.parameters)) < MOST:
        return None
    if seen.share(tuple(e for e in case.leavers if seen.is_of(e, PARAMETER))) < 0.3 or case.at_once() < MOST:
        return None
    first = case.leavers[0]
    known = f"; learning rate {_rate(seen):.3g}, {'up' if _rise(seen) > 1.05 else 'constant'}" if np.isfinite(_rate(seen)) else ""
    return finding(seen, "rate_constant", "learning_rate", first, _spread(seen, first) + known)


def _alone(seen: Evidence, broke: Break) -> bool:
    """Whether one layer jumped tenfold in a step while the others had not: no rate that rises does that."""
    first = broke.first
    far = first is not None and first.phase < 2 and abs(seen.jump(first)) > 1
    return far and seen.share((*broke.outputs, *broke.parameters)) < MOST


def _rate(seen: Evidence) -> float:
    known = seen.case.rates[np.isfinite(seen.case.rates)]
    return float(known[-1]) if known.size else float("nan")


def _rise(seen: Evidence, since: int = 0) -> float:
    """By how much the learning rate rose in the window, or since a row."""
    rates = seen.case.rates[max(0, since) :]
    known = rates[np.isfinite(rates)]
    return float(known[-1] / known.min()) if known.size and known.min() > 0 else 1.0


def _spread(seen: Evidence, first: Event) -> str:
    """Where it showed first, and how far it went."""
    case, tap = seen.case, seen.case.tap(first)
    out = len({case.tap(e).layer for e in case.leavers} | {tap.layer})
    spread = f"{out} of {len(case.place)} layers had by step {case.history.steps[case.end]}"
    return f"{tap.layer} ({tap.site}) left its usual range at step {case.step(first)}, {spread}"
