"""Layers that fell silent: outputs of zeros, gradients that are zero, do not come, or are nothing beside the others."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .._case import Event
from .._columns import ABSMAX, FIRST, NORM, OUTPUT, OUTPUT_GRAD, PARAMETER_GRAD
from ._finding import Evidence, Told, finding

CLIFF = 3.0
"""Powers of ten that a gradient falls from one layer to the next where it does not vanish through depth but there."""
FEW = 3
"""Steps of silence that mean something where another trigger fired."""
SMALLEST = 2.0**-24
"""The smallest number of float16 above zero."""


def dead_output(seen: Evidence) -> Told | None:
    """Outputs of nothing but zeros, which were alive: the first of them in the order of computation."""
    case, row = seen.case, seen.case.end
    if seen.failure is None:
        return None
    lines = case.history.table.of_kind[OUTPUT]
    dead = [int(line) for line in lines[case.zero[row, lines]] if (case.values[:row, line, NORM] > 0).any()]
    if not dead:
        return None
    line = min(case.event(row, line) for line in dead).line
    event = case.event(_since(case.zero[:, line]), line)
    layer, before = case.tap(event).layer, case.clean_before(case.event(row, line), OUTPUT)
    evidence = f"every value of the output of {layer} is zero from step {case.step(event)} on"
    if before:
        evidence += f"; {case.tap(max(before)).layer} before it is alive"
    elif (layer, "bias") not in case.history.table.lines:
        evidence += "; it is the first layer, has no bias, and its weights are as usual: its input is zero"
        return finding(seen, "zero_input", "bad_batch", event, evidence)
    return finding(seen, "dead_output", "dead_layer", event, evidence)


def fed_with_zeros(seen: Evidence) -> Told | None:
    """From the step that broke on, a layer's weight has a gradient of zero and its bias one that is not: its input is zero."""
    broke, case, table = seen.broke, seen.case, seen.case.history.table
    if broke is None or broke.parameters:
        return None
    hungry = []
    for line in table.of_kind[PARAMETER_GRAD]:
        tap, norms = table.taps[line], case.values[..., int(line), NORM]
        if tap.site == "weight.grad" and all(_is_fed_zeros(seen, tap.layer, row) for row in range(broke.row, case.end + 1)):
            hungry += [case.event(broke.row, table.line(tap.layer, OUTPUT))] if (norms[: broke.row] > 0).any() else []
    if not hungry:
        return None
    layer = max(hungry)  # of several the nearest to the loss: backward stops there
    before = case.clean_before(layer, OUTPUT)
    event = max(before) if before else layer
    evidence = f"from step {case.step(event)} on what comes into {case.tap(layer).layer} is zero: its bias has a gradient and its"
    return finding(seen, "fed_with_zeros", "dead_layer", event, f"{evidence} weight none; {case.tap(event).layer} runs before it")


def silent_gradient(seen: Evidence) -> Told | None:
    """Layers whose gradients are zero or missing: the last of them in the order of computation."""
    if seen.failure is None:
        return None
    case, table, row = seen.case, seen.case.history.table, seen.case.end
    gone = ~np.isfinite(case.values[..., FIRST]) | (case.values[..., NORM] == 0)
    lines, (_, outputs, _) = table.of_kind[PARAMETER_GRAD], table.trained_layers
    used = np.where(outputs >= 0, np.isfinite(case.values[row, outputs, FIRST]), True)
    speaking = {table.taps[line].layer for line in lines[~gone[row, lines]]}
    silent = [int(line) for line in lines[gone[row, lines] & used] if table.taps[line].layer not in speaking]
    silent = [line for line in silent if not gone[:row, line].all()]
    if not silent:
        return _faint(seen) if seen.failure.trigger == "DeadLayer" else None
    line = min(case.event(row, line) for line in silent).line
    event = case.event(_since(gone[:, line]), line)
    if seen.failure.trigger != "DeadLayer" and row - event.row < FEW:
        return None
    return _why_silent(seen, event, all_silent=not speaking)


def _why_silent(seen: Evidence, event: Event, all_silent: bool) -> Told:
    """Why a layer and all that backward meets after it have no gradient."""
    case, tap, loss = seen.case, seen.case.tap(event), seen.case.history.scalars.get("loss")
    came = case.history.table.lines.get((tap.layer, OUTPUT_GRAD))
    evidence = f"no gradient in {tap.layer} from step {case.step(event)} on"
    half = any(layer.sites[OUTPUT_GRAD].dtype == "float16" for layer in case.history.layers if OUTPUT_GRAD in layer.sites)
    if half and (all_silent or _was_small(seen, came, event.row)) and (loss is None or loss[case.end] != 0):
        evidence += "" if loss is None else f", with a loss of {loss[case.end]:.3g}"
        return finding(seen, "underflow", "underflow", event, f"{evidence}; in float16 all below {SMALLEST:.1g} is zero")
    behind = _behind(seen, event)
    arrives = None if came is None else case.values[case.end, came]
    if arrives is not None and np.isfinite(arrives[FIRST]) and arrives[NORM] == 0:
        evidence += f": that of its output is zero, while {behind} has one; its units do not fire, or what follows ignores them"
        return finding(seen, "dead_units", "dead_layer", event, evidence)
    after = case.event(case.end, event.line)
    beyond = [e for e in (case.event(case.end, int(g)) for g in case.history.table.of_kind[PARAMETER_GRAD]) if e > after]
    ends = not any(case.values[case.end, e.line, NORM] > 0 for e in beyond if np.isfinite(case.values[case.end, e.line, FIRST]))
    how = "it ends there" if ends else "layers before it have one too: it goes past this one"
    return finding(seen, "cut_gradient", "vanishing_gradient", event, f"{evidence}: {behind} has one, and {how}")


def _was_small(seen: Evidence, line: int | None, row: int) -> bool:
    """Whether a gradient was at the lower end of float16 just before it was gone."""
    if line is None or row == 0:
        return False
    before = seen.case.values[max(0, row - 5) : row, line, ABSMAX]
    return bool(np.nanmin(np.where(before > 0, before, np.nan), initial=1.0) < 50 * SMALLEST)


def _is_fed_zeros(seen: Evidence, layer: str, row: int) -> bool:
    """Whether the weight of a layer has a gradient of zero, and its bias one that is not."""
    weight, bias = (seen.case.history.table.lines.get((layer, f"{name}.grad")) for name in ("weight", "bias"))
    values = seen.case.values[row]
    if weight is None or bias is None or not np.isfinite(values[weight, FIRST]):
        return False
    return bool(values[weight, NORM] == 0 and values[bias, NORM] > 0)


def _faint(seen: Evidence) -> Told | None:
    """Gradients that are nothing beside the network's largest: behind a cliff the layer below it, else the faintest."""
    case, row, table = seen.case, seen.case.end, seen.case.history.table
    lines, of_layer = table.of_kind[PARAMETER_GRAD], table.trained_layers[2]
    rms = case.values[row, lines, NORM] / np.sqrt(np.maximum(case.elements[row, lines], 1))
    best = table.largest_of_layers(np.where(np.isfinite(case.values[row, lines, FIRST]), rms, 0.0))
    if not best.max(initial=0) > 0:
        return None
    order = sorted((case.event(row, int(lines[np.argmax(of_layer == i)])), int(i)) for i in np.flatnonzero(best > 0))
    drops = [math.log10(best[a] / best[b]) for (_, a), (_, b) in pairwise(order)]
    cliff = int(np.argmax(drops)) if drops else 0
    at_cliff = bool(drops) and drops[cliff] > CLIFF
    event, least = order[cliff + 1] if at_cliff else min(order, key=lambda pair: best[pair[1]])
    evidence = f"the gradient of {case.tap(event).layer} is {best[least] / best.max():.1g} of the network's largest"
    evidence += f", and {10 ** -drops[cliff]:.1g} of that of the layer behind it" if at_cliff else ""
    weak = int((best < 1e-3 * best.max()).sum())
    evidence += f"; {weak} of {len(best)} layers are below a thousandth"
    return finding(seen, "vanishing", "vanishing_gradient", event, evidence)


def _since(silent: NDArray[np.bool_]) -> int:
    """The row from which on a tap has been silent without a break."""
    back = np.flatnonzero(~silent)
    return int(back[-1]) + 1 if back.size else 0


def _behind(seen: Evidence, event: Event) -> str:
    """The layer that backward meets just before an event's: it still has a gradient."""
    case, row = seen.case, seen.case.end
    alive = [e for e in case.clean_before(case.event(row, event.line), OUTPUT_GRAD) if case.values[row, e.line, NORM] > 0]
    alive = [e for e in alive if case.tap(e).layer != case.tap(event).layer]
    return case.tap(max(alive)).layer if alive else "the loss"
