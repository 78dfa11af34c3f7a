"""Weights that moved by more than their updates can move them: something else wrote to them.

One layer's weight alone: a bad load, a bit that flipped, code that writes to it. Most of the network's at once, at a rate
that did not change: a bad load of all, or an optimizer whose state is not its own.
"""

from __future__ import annotations

import math

import numpy as np

from .._case import Event
from .._columns import ELEMENTS, NORM, PARAMETER
from ._finding import MOST, Evidence, Told, finding

OFTEN = 3
"""Steps of the last ten in which a weight that creeps did so."""


def weight_corruption(seen: Evidence) -> Told | None:
    """A parameter of one layer, or of a few, was written to by something else than its update."""
    broke, case = seen.broke, seen.case
    if broke is None or not broke.parameters or seen.share(broke.parameters) > MOST:
        return None
    beyond = [event for event in broke.parameters if beyond_update(seen, event)]
    if not beyond:
        return None
    event = seen.largest(beyond)
    tap, last = case.tap(event), case.before(event)
    before = case.values[event.row if last is None else last, event.line, NORM]
    others = len({case.tap(e).layer for e in broke.parameters}) - 1
    evidence = f"the norm of {tap.layer}.{tap.site} went from {before:.3g} to {case.values[event.row, event.line, NORM]:.3g} at"
    evidence += f" step {case.step(event)}, more than an update can do, while "
    evidence += f"those of {others} other layers moved too" if others else "the weights of all other layers were as usual"
    return finding(seen, "weight_corruption", "weight_corruption", event, evidence)


def all_weights(seen: Evidence) -> Told | None:
    """Most weights jumped at once, by more than updates can do at this rate: a bad load, or Adam with a wrong second moment.

    Adam moves an element by at most lr / sqrt(1 - beta2) in a step, and by about lr if its moments are its own (Kingma and Ba
    2015, arXiv:1412.6980, section 2.1).
    """
    broke, case = seen.broke, seen.case
    if broke is None or not np.isfinite(case.rates).any():
        return None
    beyond = tuple(event for event in broke.parameters if beyond_update(seen, event, times=4))
    if seen.share(beyond) <= MOST:
        return None
    event = seen.largest(beyond)
    layers = len({case.tap(e).layer for e in beyond})
    evidence = f"{len(beyond)} weights of {layers} layers jumped at step {case.step(event)}, that of {case.tap(event).layer} to"
    evidence += f" {seen.breaks.times(event)}, more than updates can do at a learning rate of {case.rates[event.row]:.3g}"
    if seen.second_moment_decay is None:
        return finding(seen, "all_weights", "weight_corruption", event, evidence)
    evidence += " if Adam's second moment fits its gradients"
    return finding(seen, "all_weights_adam", "optimizer_state", event, evidence)


def weight_crept(seen: Evidence) -> Told | None:
    """A weight of one layer moves, step by step, by more than its updates can do."""
    case = seen.case
    if seen.failure is None or not np.isfinite(case.rates).any():
        return None
    rows = range(max(1, case.end - 9), case.end + 1)
    crept: dict[int, list[Event]] = {}
    for line in case.history.table.of_kind[PARAMETER]:
        events = [event for row in rows if beyond_update(seen, event := case.event(row, int(line)))]
        if len(events) >= OFTEN:
            crept[int(line)] = events
    if not crept or seen.share(tuple(events[0] for events in crept.values())) > MOST:
        return None
    line = max(crept, key=lambda line: float(seen.breaks.jumps[case.end, line]))
    event, tap = crept[line][0], case.history.table.taps[line]
    evidence = f"{tap.layer}.{tap.site} has moved by more than its updates can do in {len(crept[line])} of the last {len(rows)}"
    evidence += f" steps, to {10 ** float(seen.breaks.jumps[case.end, line]):.3g} times what it was"
    return finding(seen, "weight_crept", "weight_corruption", event, evidence)


def beyond_update(seen: Evidence, event: Event, times: float = 10) -> bool:
    """Whether a parameter changed by so many times more than its update can do.

    SGD moves by lr x gradient, Adam by about lr x sqrt(elements) at most; with `every=` there were updates between.
    """
    case, tap, last = seen.case, seen.case.tap(event), seen.case.before(event)
    if last is None:
        return False
    rates = case.rates[last : event.row]
    rates = rates[np.isfinite(rates)]
    if not rates.size:  # no optimizer was given: that the weight jumped must do
        return True
    now, before = case.values[event.row, event.line], case.values[last, event.line]
    gradient = case.history.table.lines.get((tap.layer, f"{tap.site}.grad"))
    slope = np.nan_to_num(case.values[last : event.row, gradient, NORM]).max() if gradient is not None else 0.0
    steps = max(1, int(case.history.steps[event.row] - case.history.steps[last]))
    return bool(abs(now[NORM] - before[NORM]) > times * rates.max() * max(slope, math.sqrt(now[ELEMENTS])) * steps)
