"""From the last steps to findings: what failed first, where, why, how sure, and what to do.

Pure functions. Each rule looks at a case (see `_case`) and returns a finding or None; the surest comes first. The first
event, in the order of computation and not of names, is bracketed by the last clean one before it, which is the bracket rule
of radixark/miles#2198 for forward and backward apart.

The confidences are the rules' own ranking; they are not calibrated against a benchmark yet.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._case import Case, Event
from ._columns import ABSMAX, ELEMENTS, FIRST, NAN, NEGINF, NORM, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD, POSINF
from ._history import History, Tap
from ._schema import Failure, Finding

LARGEST = {"float16": 65504.0, "bfloat16": 3.39e38, "float32": 3.4e38, "float64": 1.8e308}
HEADROOM = 1e-3
"""Below this share of the largest number of the dtype nothing was about to overflow."""

_ADVICE = {
    "nonfinite_input": "look at the batch of this step before it enters the model: normalisation, missing values, a corrupt file",
    "nonfinite_forward": "look at what this layer computes: division, log, sqrt, exp without bounds; add an epsilon or a clamp",
    "nonfinite_backward": "look at derivatives that are infinite at a legal value: sqrt, norm and log at 0, pow below 1",
    "nonfinite_weight": "restore the checkpoint before this step; check what writes to this parameter outside the optimizer",
    "overflow": "bound this layer's values (normalise, clip, lower the learning rate) or compute it in a wider dtype",
    "gradient_explosion": "clip gradients by norm, and look at the scale of this layer's initialisation and normalisation",
    "learning_rate": "lower the learning rate, above all its peak; lengthen the warm-up; clip gradients",
    "weight_corruption": "restore this parameter from a checkpoint; check what wrote to it (a bad load, hardware, in-place code)",
    "bad_batch": "look at the batch of this step, skip it, and check the input pipeline for the way it came in",
    "loss_spike": "look at the batch and the labels of this step; if spikes repeat, lower the learning rate",
    "unknown": "compare with the same steps of a healthy run, or record more steps (capacity) before the failure",
}


def _finding(case: Case, cause: str, event: Event, confidence: float, evidence: str) -> Finding:
    tap = case.tap(event)
    return Finding(cause, tap.layer, tap.site, case.step(event), confidence, evidence, _ADVICE[cause])


def born_nonfinite(case: Case) -> Finding | None:
    """The bracket: which tap was dirty first, and what that place says about the cause."""
    event = case.first_bad
    if event is None or _grew_before(case, event) or (event.phase == 3 and not _loss_was_finite(case, event.row)):
        return None
    tap, values = case.tap(event), case.values[event.row, event.line]
    nan, inf = values[NAN], values[POSINF] + values[NEGINF]
    counts = " and ".join(f"{n:.0f} {word}" for n, word in ((nan, "NaN"), (inf, "Inf")) if n)
    evidence = f"{counts} of {values[ELEMENTS]:.0f} values in {tap.layer} ({tap.site}) at step {case.step(event)}"
    evidence += f"; {case.neighbour(event)}"
    if tap.kind == PARAMETER:
        return _finding(case, "nonfinite_weight", event, 0.9, evidence)
    if tap.kind == OUTPUT:
        cause, more = _forward_cause(case, event, tap)
        return _finding(case, cause, event, 0.75 if cause == "nonfinite_input" else 0.85, evidence + more)
    event = _above(case, event)
    came_in = f"; forward and loss of that step were finite, and the gradient that came into {case.tap(event).layer} was too"
    return _finding(case, "nonfinite_backward", event, 0.85, evidence + came_in)


def _forward_cause(case: Case, event: Event, tap: Tap) -> tuple[str, str]:
    dtype = next((layer.sites[tap.site].dtype for layer in case.history.layers if layer.name == tap.layer), None)
    largest = LARGEST.get(dtype or "", math.inf)
    last = case.before(event)
    near = max(float(case.values[row, event.line, ABSMAX]) for row in (event.row, event.row if last is None else last))
    if near > HEADROOM * largest and (dtype == "float16" or near > 1e30):
        return "overflow", f"; its largest finite value was {near:.3g} where {dtype} ends at {largest:.3g}"
    if not case.clean_before(event, OUTPUT) and not tap.layer_type.startswith("Embedding"):  # which takes integers
        return "nonfinite_input", "; it is the first layer to run and its weights are finite, so its input was not"
    return "nonfinite_forward", "; its own weights are finite"


def _above(case: Case, event: Event) -> Event:
    """For a gradient that is dirty: the layer whose backward made it, the last one whose incoming gradient was clean."""
    layer = case.tap(event).layer
    if case.tap(event).kind == PARAMETER_GRAD and case.entry[layer] == case.place[layer]:
        return event  # a layer without others inside: the gradient that came into it was clean, or it would have come first
    return max(case.clean_before(event, OUTPUT_GRAD), default=event)


def _loss_was_finite(case: Case, row: int) -> bool:
    loss, given = case.history.scalars.get("loss"), case.history.given.get("loss")
    return loss is None or given is None or not given[row] or bool(np.isfinite(loss[row]))


def _grew_before(case: Case, event: Event) -> bool:
    """Whether most of the network had left its band in earlier steps: then the NaN is how it ended, not how it began."""
    return bool(case.leavers) and case.leavers[0].row < event.row and case.share_out(event.row) >= 0.5


def loss_alone(case: Case) -> Finding | None:
    """The loss is not finite while everything before it is: it was born in the loss itself."""
    loss = case.history.scalars.get("loss", np.empty(0))[: case.end + 1]
    given = case.history.given.get("loss", np.empty(0, dtype=np.bool_))[: case.end + 1]
    rows = np.flatnonzero(given & ~np.isfinite(loss))
    if not rows.size or (case.first_bad is not None and case.first_bad < Event(int(rows[0]), 2, 0, 0, 0)):
        return None
    outputs = case.history.table.of_kind[OUTPUT]
    if not np.isfinite(case.values[rows[0], outputs, FIRST]).any() or (case.leavers and case.share_out(case.end) >= 0.5):
        return None
    step = int(case.history.steps[rows[0]])
    evidence = f"the loss of step {step} is {loss[rows[0]]:.4g} while every output is finite"
    advice = "look at the loss function and at the targets of this step: log, division, exp, a target outside its range"
    return Finding("nonfinite_forward", None, "loss", step, 0.8, evidence, advice)


def too_fast(case: Case) -> Finding | None:
    """Most of the network left its band, together or while the learning rate rose: the step size was too large."""
    known = case.rates[np.isfinite(case.rates)]
    rise = float(known[-1] / known.min()) if known.size and known.min() > 0 else 1.0
    confidence = _confidence_in_rate(case, rise)
    if not case.leavers or confidence is None or _one_batch(case) or _jumped(case):
        return None
    first = case.leavers[0]
    tap = case.tap(first)
    layers = len({case.tap(e).layer for e in case.leavers})
    evidence = (
        f"{tap.layer} ({tap.site}) left its usual range at step {case.step(first)}, {layers} of {len(case.place)} layers had by "
        f"step {case.history.steps[case.end]}, when it was at {case.times(first.line, case.end)} its median"
    )
    if known.size:
        evidence += f"; learning rate {known[-1]:.3g}" + (f", up {rise:.3g}x in this window" if rise > 1.05 else ", constant")
    return _finding(case, "learning_rate", first, confidence, evidence)


def _confidence_in_rate(case: Case, rise: float) -> float | None:
    """How sure that the step size did it; None: not at all."""
    if rise > 1.5:
        return 0.85 if case.share_out(case.end) >= 0.5 else 0.5 if rise > 3 else None
    # With a constant rate an update is the cause only where weights moved, and no tap jumped before they did.
    moved = any(case.tap(event).kind == PARAMETER for event in case.leavers)
    return 0.6 if moved and case.at_once() >= 0.5 and not _one_site(case) else None


def _one_site(case: Case) -> bool:
    """The first tap to leave its band jumped, and it was a gradient or an inner output: no update does that."""
    first = case.leavers[0]
    return first.phase > 0 and case.sudden(first)


def _one_batch(case: Case) -> bool:
    """Everything from the input on jumped in one step, with the weights as they were."""
    first = case.leavers[0]
    at_once = [e for e in case.leavers if e.row == first.row]
    outputs = {case.tap(e).layer for e in at_once if case.tap(e).kind == OUTPUT}
    weights = any(case.tap(e).kind == PARAMETER for e in at_once)
    entry = min(case.place, key=lambda name: case.place[name])
    return case.before(first) is not None and not weights and entry in outputs


def bad_batch(case: Case) -> Finding | None:
    """The input changed: everything from the first layer on is out of its band in one step."""
    if not case.leavers or not _one_batch(case):
        return None
    first = case.leavers[0]
    evidence = (
        f"at step {case.step(first)} the output of {case.tap(first).layer}, the first layer, is at once at "
        f"{case.times(first.line, first.row)} its median, and what follows it too, while no weight had moved"
    )
    batch = case.history.batches[first.row] if case.history.batches else None
    return _finding(case, "bad_batch", first, 0.8, evidence + (f"; the batch was {batch}" if batch else ""))


def _jumped(case: Case) -> Event | None:
    """A parameter that changed in one step by more than its update can explain, before anything else left its band."""
    for event in case.leavers:
        tap, row, last = case.tap(event), event.row, case.before(event)
        if tap.kind != PARAMETER or last is None or row > case.leavers[0].row:
            continue
        now, before = case.values[row, event.line], case.values[last, event.line]
        gradient = case.history.table.lines.get((tap.layer, f"{tap.site}.grad"))
        slope = np.nan_to_num(case.values[last:row, gradient, NORM]).max() if gradient is not None else 0.0
        rates = case.rates[last:row][np.isfinite(case.rates[last:row])]
        lr = rates.max() if rates.size else 1.0
        # SGD moves by lr x gradient, Adam by at most about lr x sqrt(elements); with `every=` there were updates between.
        if abs(now[NORM] - before[NORM]) > 10 * lr * max(slope, math.sqrt(now[ELEMENTS])) * (row - last):
            return event
    return None


def weight_jump(case: Case) -> Finding | None:
    """A parameter was written to by something else than its update."""
    event = _jumped(case)
    if event is None:
        return None
    tap, last = case.tap(event), case.before(event)
    before, after = (case.values[row, event.line, NORM] for row in (last, event.row))
    evidence = f"the norm of {tap.layer}.{tap.site} went from {before:.3g} to {after:.3g} at step {case.step(event)}"
    evidence += ", more than an update can do"
    return _finding(case, "weight_corruption", event, 0.9, evidence)  # surer than what NaN came of it


def one_gradient(case: Case) -> Finding | None:
    """Gradients left their band at one layer, and at those that backward reaches from it, before any output or weight."""
    if not case.leavers or case.leavers[0].phase != 3 or not (_one_site(case) or case.at_once() < 0.5):
        return None
    first = case.leavers[0]
    tap = case.tap(first)
    evidence = (
        f"the gradient of {tap.layer} ({tap.site}) left its usual range at step {case.step(first)}, at "
        f"{case.times(first.line, first.row)} its median, before any output or weight did"
    )
    return _finding(case, "gradient_explosion", first, 0.7, evidence)


def one_output(case: Case) -> Finding | None:
    """An inner layer's output jumped while its input and all weights had not: something in it computed otherwise."""
    if not case.leavers or case.leavers[0].phase != 1 or not _one_site(case) or _one_batch(case):
        return None
    first = case.leavers[0]
    tap = case.tap(first)
    evidence = (
        f"the output of {tap.layer} is at {case.times(first.line, first.row)} its median from step {case.step(first)} on, "
        "while the layers before it and all weights were as usual"
    )
    return _finding(case, "unknown", first, 0.65, evidence)


def spike(case: Case) -> Finding | None:
    """The loss alone rose: no layer shows why."""
    if case.failure is None or case.failure.trigger != "LossSpike" or case.leavers or case.first_bad or not case.judges_norms:
        return None
    last = int(case.history.steps[case.readings[-1]])
    until = "" if last == case.failure.step else f" until step {last}, the last that was recorded"
    evidence = f"{case.failure.message}; no layer's norms left their usual range{until}"
    evidence += ", so the labels or the batch are the first suspects"
    return Finding("loss_spike", None, None, case.failure.step, 0.5 if not until else 0.3, evidence, _ADVICE["loss_spike"])


BORN = (born_nonfinite, loss_alone)
RULES = (*BORN, weight_jump, bad_batch, too_fast, one_gradient, one_output, spike)


def diagnose(history: History, failure: Failure | None = None) -> tuple[Finding, ...]:
    """Findings about a history, the surest first. Without a failure only NaN and Inf are findings: growth may be healthy.

    Args:
        history: the last steps; what came after the failing step is not looked at.
        failure: what a trigger saw, if one did.
    """
    if not len(history):
        return ()
    case = Case(history, failure)
    found: list[Any] = [finding for rule in (RULES if failure else BORN) if (finding := rule(case)) is not None]
    if not found and failure is not None:
        found = [_nothing_decided(case, failure)]
    return tuple(sorted(found, key=lambda finding: -finding.confidence))


def _nothing_decided(case: Case, failure: Failure) -> Finding:
    clean = "no NaN or Inf before the end" if case.first_bad is None else "the NaN came late"
    usual = "every norm as usual" if case.judges_norms else f"{len(case.readings)} recorded steps, too few to know a usual range"
    out = f"{len(case.leavers)} sites out of their usual range" if case.leavers else usual
    evidence = f"the numbers do not decide: {clean}, {out}"
    return Finding("unknown", failure.layer, failure.site, failure.step, 0.2, evidence, _ADVICE["unknown"])
