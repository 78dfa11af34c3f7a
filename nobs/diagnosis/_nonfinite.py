"""NaN and Inf: the bracket of the last clean and the first dirty tap in the order of computation.

After radixark/miles#2198, forward and backward apart.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .._case import Event
from .._columns import ABSMAX, ELEMENTS, FIRST, LARGEST, NAN, NEGINF, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD, POSINF
from ._finding import Evidence, Told, finding, without_layer

HEADROOM = 1e-3
"""Below this share of the largest number of the dtype nothing was about to overflow."""


def nonfinite_loss(seen: Evidence) -> Told | None:
    """The loss is not finite while everything before it is: it was born in the loss itself."""
    case = seen.case
    loss = case.history.scalars.get("loss", np.empty(0))[: case.end + 1]
    given = case.history.given.get("loss", np.empty(0, dtype=np.bool_))[: case.end + 1]
    rows = np.flatnonzero(given & ~np.isfinite(loss))
    if not rows.size or (case.first_bad is not None and case.first_bad < Event(int(rows[0]), 2, 0, 0, 0)):
        return None
    outputs = case.history.table.of_kind[OUTPUT]
    if not np.isfinite(case.values[rows[0], outputs, FIRST]).any():
        return None
    if case.new_masks(int(rows[0])):  # a log of zero in a layer: -Inf is legal elsewhere
        return None
    step = int(case.history.steps[rows[0]])
    evidence = f"the loss of step {step} is {loss[rows[0]]:.4g} while every output is finite"
    advice = "look at the loss function and at the targets of this step: log, division, exp, a target outside its range"
    return without_layer("nonfinite_loss", "nonfinite_forward", "loss", step, evidence, advice)


def nonfinite_born(seen: Evidence) -> Told | None:
    """Which tap was dirty first, and what that place says about the cause."""
    case, event = seen.case, seen.case.first_bad
    if event is None or (event.phase == 3 and not _loss_was_finite(seen, event.row)):
        return None
    if (
        event.phase == 3
        and "loss_scale" in case.history.scalars
        and seen.failure is not None
        and seen.failure.trigger != "NonFinite"
    ):
        return None  # the scaler finds its scale so
    broke = seen.broke
    if broke is not None and broke.first is not None and broke.first < event and broke.first.phase < 2:
        return None  # what jumped before it is where it began
    tap, values = case.tap(event), case.values[event.row, event.line]
    counts = ((values[NAN], "NaN"), (values[POSINF] + values[NEGINF], "Inf"))
    what = " and ".join(f"{n:.0f} {word}" for n, word in counts if n)
    evidence = f"{what} of {values[ELEMENTS]:.0f} values in {tap.layer} ({tap.site}) at step {case.step(event)}"
    evidence += f"; {case.neighbour(event)}"
    if tap.kind == PARAMETER:
        return finding(seen, "nonfinite_weight", "nonfinite_weight", event, evidence)
    if tap.kind == OUTPUT:
        cause, more = _forward_cause(seen, event)
        if "came in" in more:
            event = max(case.clean_before(event, OUTPUT))
        return finding(seen, cause, cause, event, evidence + more)
    if seen.ranks > 1 and tap.kind == PARAMETER_GRAD and not _own_gradient_is_bad(seen, event):
        told = finding(seen, "nonfinite_backward", "nonfinite_backward", event, f"{evidence}; {_REDUCED.format(seen.ranks)}")
        sure = told.finding.confidence / seen.ranks
        return replace(told, finding=replace(told.finding, confidence=sure, advice=_ASK_ALL))
    event = _above(seen, event)
    came_in = f"; forward and loss of that step were finite, and the gradient that came into {case.tap(event).layer} was too"
    return finding(seen, "nonfinite_backward", "nonfinite_backward", event, evidence + came_in)


_REDUCED = "outputs and their gradients are finite on this rank: it may have come with the reduction, from any of {} ranks"
_ASK_ALL = "see on which rank it was born: nobs merge, of the folder of this run"


def _own_gradient_is_bad(seen: Evidence, event: Event) -> bool:
    """Whether a gradient that no reduction has touched, of an output, is dirty in that step too."""
    case = seen.case
    return bool(case.bad[event.row, case.history.table.of_kind[OUTPUT_GRAD]].any())


def _forward_cause(seen: Evidence, event: Event) -> tuple[str, str]:
    case, tap, dtype = seen.case, seen.case.tap(event), seen.case.dtype(event)
    largest = LARGEST.get(dtype or "", math.inf)
    last = case.before(event)
    fed = max(case.clean_before(event, OUTPUT), default=None)
    if fed is not None and dtype == "float16" and case.values[event.row, fed.line, ABSMAX] > largest:
        return "overflow", f"; {case.values[event.row, fed.line, ABSMAX]:.3g} came in where {dtype} ends at {largest:.3g}"
    near = max(float(case.values[row, event.line, ABSMAX]) for row in (event.row, event.row if last is None else last))
    if near > HEADROOM * largest and (dtype == "float16" or near > 1e30):
        return "overflow", f"; its largest finite value was {near:.3g} where {dtype} ends at {largest:.3g}"
    if not case.clean_before(event, OUTPUT) and not tap.layer_type.startswith("Embedding"):  # which takes integers
        values = case.values[event.row, event.line]
        if values[NAN] + values[POSINF] > 0 and values[[NAN, POSINF, NEGINF]].sum() < _width(seen, tap.layer):
            return "nonfinite_forward", "; a bad input would have made all features of it bad"
        if values[NAN] + values[POSINF] == 0 or (values[NAN] == 0 and values[POSINF] + values[NEGINF] == values[ELEMENTS]):
            return "nonfinite_forward", "; no NaN among them, and an input of some Inf would have made some"
        return "nonfinite_input", "; it is the first layer to run and its weights are finite, so its input was not"
    return "nonfinite_forward", "; its own weights are finite"


def _width(seen: Evidence, layer: str) -> float:
    """The features of a layer's output, as its bias has them; 2 without one."""
    line = seen.case.history.table.lines.get((layer, "bias"))
    return 2.0 if line is None else float(seen.case.values[seen.case.end, line, ELEMENTS])


def _above(seen: Evidence, event: Event) -> Event:
    """For a gradient that is dirty: the layer whose backward made it, the last one whose incoming gradient was clean."""
    case, layer = seen.case, seen.case.tap(event).layer
    if case.tap(event).layer_type.endswith("Cell"):  # its output's gradient came through its own backward, step by step
        return event
    if case.tap(event).kind == PARAMETER_GRAD and case.entry[layer] == case.place[layer]:
        return event  # a layer without others inside: the gradient that came into it was clean, or it would have come first
    return max(case.clean_before(event, OUTPUT_GRAD), default=event)


def _loss_was_finite(seen: Evidence, row: int) -> bool:
    loss, given = seen.case.history.scalars.get("loss"), seen.case.history.given.get("loss")
    return loss is None or given is None or not given[row] or bool(np.isfinite(loss[row]))
