"""An inner layer's output that jumps or grows while what it is fed and all weights are as usual: the layer computes otherwise."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .._break import DEVIATIONS, PAST
from .._case import BAND, Event
from .._columns import ABSMAX, LARGEST, OUTPUT, PARAMETER
from ._finding import Evidence, Told, finding

SOON = 10
"""Steps in which a dtype's end must be near, at the rate of growth."""
ALIKE = 0.7
"""Outputs that grew by so much of the largest growth, in powers of ten, grew alike: what follows a layer grows with it."""


def output_jump(seen: Evidence) -> Told | None:
    """The first output, in the order of computation, of those that jumped in the step that broke."""
    broke, case = seen.broke, seen.case
    if broke is None or broke.parameters or not broke.outputs or broke.entry is not None:
        return None
    event = _first_alike(seen, broke.outputs[0])
    if seen.went_silent and seen.jump(event) < 0:
        return None
    what = f"the output of {case.tap(event).layer} is {seen.breaks.times(event)} from step {case.step(event)} on"
    return grown(seen, event, what)


def _first_alike(seen: Evidence, event: Event) -> Event:
    """The first to run of the outputs that jumped about as far in that step, if less surely: what follows it grew with it."""
    lines = seen.case.history.table.of_kind[OUTPUT]
    jumps, deviations = seen.breaks.jumps[event.row, lines], seen.breaks.deviations(event.row)[lines]
    with np.errstate(invalid="ignore"):
        alike = (jumps / seen.jump(event) > ALIKE) & (deviations > DEVIATIONS / 2)
    return min([event, *(seen.case.event(event.row, int(line)) for line in lines[alike])])


def output_grew(seen: Evidence) -> Told | None:
    """Of the outputs that grew over several steps by about as much, the first to run."""
    case, row = seen.case, seen.case.end
    if seen.failure is None or seen.went_silent or seen.share(tuple(e for e in case.leavers if seen.is_of(e, PARAMETER))) > 0.3:
        return None
    lines = case.history.table.of_kind[OUTPUT]
    rises = np.nan_to_num(seen.breaks.jumps[row, lines])
    if rises.max(initial=0) < math.log10(BAND):
        return None
    line = min(case.event(row, int(line)) for line in lines[rises > ALIKE * rises.max()]).line
    since = max(1, row - PAST)
    later = np.flatnonzero(seen.breaks.jumps[since : row + 1, line] > math.log10(1.5))
    event = case.event(since + int(later[0]) if later.size else row, line)
    times = 10 ** float(seen.breaks.jumps[row, line])
    return grown(seen, event, f"the output of {case.tap(event).layer} grew from step {case.step(event)} on, to {times:.3g} times")


def headroom(seen: Evidence) -> Told | None:
    """What the trigger of that name saw: an output that is about to leave its dtype, whatever its last steps were like."""
    failure, case = seen.failure, seen.case
    if failure is None or failure.trigger != "OverflowHeadroom" or failure.layer is None:
        return None
    event = case.event(case.end, case.history.table.line(failure.layer, OUTPUT))
    return finding(seen, "headroom", "overflow", event, failure.message)


def growing(seen: Evidence, row: int) -> bool:
    """Whether an output was on its way out by a row, without having jumped, and has gone on since: then it began there."""
    end, lines, sizes = seen.case.end, seen.case.history.table.of_kind[OUTPUT], seen.breaks.sizes
    now, deviations = seen.breaks.jumps[row, lines], seen.breaks.deviations(row)[lines]
    later = sizes[end, lines] - seen.breaks.usual[row, lines]
    since = (sizes[end, lines] - sizes[row - 1, lines]) / (end - row + 1)  # a step; in health outputs grow by a few percent
    with np.errstate(invalid="ignore"):
        return bool(((now > math.log10(1.15)) & (deviations > 4) & (later > math.log10(2.5)) & (since > math.log10(1.1))).any())


def grown(seen: Evidence, event: Event, what: str) -> Told:
    """An output that is not what it was: an overflow where float16 ends soon, dead where it is zero."""
    case = seen.case
    evidence = f"{what}, while the layers before it and all weights were as usual"
    if seen.jump(event) < -30:
        return finding(seen, "dead_output", "dead_layer", event, evidence)
    if seen.jump(event) < 0:
        return finding(seen, "output_shrunk", "unknown", event, evidence)
    if leaves_half(seen, event):
        evidence += f"; at {case.values[case.end, event.line, ABSMAX]:.3g} it has left float16, or is about to: that ends at"
        return finding(seen, "overflow", "overflow", event, f"{evidence} {LARGEST['float16']:.0f}")
    return finding(seen, "output_grown", "gradient_explosion", event, evidence)


def leaves_half(seen: Evidence, event: Event) -> bool:
    """Whether an output is beyond float16, or soon will be at its rate of growth, in a model that computes in float16."""
    half = any(site.dtype == "float16" for layer in seen.case.history.layers for site in layer.sites.values())
    return half and _soon_beyond(seen.case.values[event.row : seen.case.end + 1, event.line, ABSMAX], LARGEST["float16"])


def _soon_beyond(absmax: NDArray[np.float64], largest: float) -> bool:
    """Whether a series that grows is beyond a bound within SOON further steps, at its own rate."""
    sizes = absmax[np.isfinite(absmax) & (absmax > 0)]
    if len(sizes) < 2 or sizes[-1] <= sizes[0]:
        return bool(len(sizes) and sizes[-1] > largest / 4)
    return bool(math.log10(sizes[-1]) + SOON * math.log10(sizes[-1] / sizes[0]) / (len(sizes) - 1) > math.log10(largest))
