"""Gradients that jump while every output and weight is as usual: at one layer, or in all of the network from the loss on."""

from __future__ import annotations

import math

import numpy as np

from .._break import PAST, Break
from .._case import Event
from .._columns import OUTPUT, OUTPUT_GRAD
from ._finding import Evidence, Told, finding

ALL = 0.9
"""The share of layers that is all of the network."""
FAR = 30.0
"""So many times what it was a loss has another scale."""
AS_MUCH = 0.7
"""Powers of ten by which loss and gradients may differ in how far they jumped, where the loss was multiplied."""


NATURAL = 0.7
"""Powers of ten: how much larger |grad| x |output| is than the loss, as a rule."""


def another_scale(seen: Evidence, broke: Break) -> float | None:
    """How many times larger loss and gradients are, where both jumped by about as much, and no output did: the loss was scaled.

    Wrong targets of a squared loss raise it by the square of what they raise gradients by.
    """
    loss = seen.case.history.scalars.get("loss")
    if loss is None or not broke.gradients or seen.share(broke.gradients) < ALL:
        return None
    usual = abs(float(np.nanmedian(loss[max(0, broke.row - PAST) : broke.row])))
    if not (usual > 0 and loss[broke.row] > FAR * usual):
        return None
    rise, jump = math.log10(loss[broke.row] / usual), float(np.median([seen.jump(event) for event in broke.gradients]))
    return 10**rise if abs(rise - jump) < AS_MUCH else None


def optimizer_state(seen: Evidence) -> Told | None:
    """All gradients came back from being small, which Adam's second moment has learned: its next updates are too large.

    The moment is what the recorded gradients before the jump say: their mean square, which is its steady state (Kingma and
    Ba 2015, arXiv:1412.6980, section 2). One step adds 1 - beta2 of the new square, so the first update is up to
    1 / sqrt(1 - beta2) times as large as usual. See also Molybog et al. 2023, arXiv:2304.09871.
    """
    broke, case, decay = seen.broke, seen.case, seen.second_moment_decay
    if broke is None or decay is None or not broke.gradients or broke.parameters or broke.outputs or seen.went_silent:
        return None
    scaled = another_scale(seen, broke)
    if seen.share(broke.gradients) < ALL or not (scaled or (not broke.loss and _came_back(seen, broke.row))):
        return None
    event = seen.largest(broke.gradients)
    ratio = 10 ** seen.jump(event)
    update = ratio / math.sqrt(decay + (1 - decay) * ratio**2)
    evidence = f"the gradients of all layers jumped at step {case.step(event)}, that of {case.tap(event).layer} to"
    evidence += f" {seen.breaks.times(event)}, while every output was as usual; with beta2 = {decay:g} Adam's second moment is"
    evidence += f" {ratio**2:.2g} times too small there, and its update {update:.3g} times too large"
    return finding(seen, "optimizer_state", "optimizer_state", broke.gradients[0], evidence)


def gradient_jump(seen: Evidence) -> Told | None:
    """Gradients jumped, and nothing before them in that step had: the first that backward meets."""
    broke, case = seen.broke, seen.case
    if broke is None or broke.parameters or broke.outputs or broke.loss or not broke.gradients or seen.went_silent:
        return None
    event = broke.gradients[0]
    if seen.jump(event) < 0:
        return None
    tap = case.tap(event)
    evidence = f"the gradient of {tap.layer} ({tap.site}) is {seen.breaks.times(event)} at step {case.step(event)}, the first in"
    return finding(
        seen, "gradient_jump", "gradient_explosion", event, f"{evidence} backward, while every output and weight was as usual"
    )


def gradient_grew(seen: Evidence) -> Told | None:
    """Gradients left their band at one layer, and at those that backward reaches from it, before any output or weight."""
    case = seen.case
    if seen.failure is None or seen.went_silent or not case.leavers or case.leavers[0].phase != 3:
        return None
    first = case.leavers[0]
    tap = case.tap(first)
    evidence = f"the gradient of {tap.layer} ({tap.site}) left its usual range at step {case.step(first)}, at"
    evidence += f" {case.times(first.line, first.row)} its median, before any output or weight did"
    return finding(seen, "gradient_grew", "gradient_explosion", first, evidence)


def _came_back(seen: Evidence, row: int) -> bool:
    """Whether gradients that jumped came back to their natural size, and did not leave it.

    A loss changes by some times its own size when the output changes by its own: |grad| x |output| / |loss| of the last layer
    is between one and some tens. Where it was nearer to that before the jump, the jump is an explosion.
    """
    case, table = seen.case, seen.case.history.table
    loss = case.history.scalars.get("loss")
    ran: list[Event] = [case.event(row, int(line)) for line in table.of_kind[OUTPUT] if np.isfinite(case.logs[row, line])]
    if loss is None or not ran or not loss[row]:
        return True
    last = max(ran)
    grad = table.lines.get((case.tap(last).layer, OUTPUT_GRAD))
    if grad is None or not np.isfinite(case.logs[row, grad]):
        return True
    jump = float(seen.breaks.jumps[row, grad])
    if not jump > 1:  # the loss asks for no more than before: what jumped is made behind it
        return False
    after = float(case.logs[row, grad] + case.logs[row, last.line]) - math.log10(abs(loss[row]))
    return abs(after - NATURAL) < abs(after - jump - NATURAL)
