"""How a rule says what it found: the advice for each cause, and how sure it is, as measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .._break import Break, Breaks
from .._case import Case, Event
from .._schema import Failure, Finding
from .calibration import confidence

ADVICE = {
    "nonfinite_input": "look at the batch of this step before it enters the model: normalisation, missing values, a corrupt file",
    "nonfinite_forward": "look at what this layer computes: division, log, sqrt, exp, a softmax over nothing; add an epsilon",
    "nonfinite_backward": "look at derivatives that are infinite at a legal value: sqrt, norm and log at 0, pow below 1",
    "nonfinite_weight": "restore the checkpoint before this step; check what writes to this parameter outside the optimizer",
    "overflow": "bound this layer's values (normalise, clip, lower the learning rate) or compute it in a wider dtype",
    "underflow": "scale the loss (torch.amp.GradScaler), or keep these gradients in bfloat16 or float32",
    "gradient_explosion": "clip gradients, and look at the scale of what this layer computes: initialisation, normalisation",
    "vanishing_gradient": "look for detach(), no_grad() or a saturated activation behind this layer; add a residual or a norm",
    "dead_layer": "look at this layer's bias and at what it is fed: units that never fire learn nothing; try a leaky activation",
    "weight_corruption": "restore this parameter from a checkpoint; check what wrote to it (a bad load, hardware, in-place code)",
    "optimizer_state": "warm the learning rate up again where gradients come back, clip updates, or lower beta2",
    "learning_rate": "lower the learning rate, above all its peak; lengthen the warm-up; clip gradients",
    "bad_batch": "look at the batch of this step, skip it, and check the input pipeline for the way it came in",
    "loss_spike": "look at the labels and the batch of this step; if spikes repeat, lower the learning rate",
    "unknown": "compare with the same steps of a healthy run, or record more steps (capacity) before the failure",
}


MOST = 0.5
"""From this share of the layers on it is the network and not a layer."""


@dataclass(frozen=True)
class Evidence:
    """All that rules look at: the case, its breaks, how the run ended, what is known of the optimizer, and of how many ranks this
    is one."""

    case: Case
    exception: str | None = None
    second_moment_decay: float | None = None
    ranks: int = 1

    @property
    def failure(self) -> Failure | None:
        return self.case.failure

    @cached_property
    def breaks(self) -> Breaks:
        return Breaks(self.case)

    @property
    def broke(self) -> Break | None:
        """Where the run broke; None without a failure, as jumps may be healthy."""
        return self.breaks.first if self.failure else None

    @cached_property
    def went_silent(self) -> bool:
        """Whether the failure is that layers fell silent, and had before anything broke."""
        failure, broke = self.failure, self.broke
        if failure is None or failure.trigger != "DeadLayer" or failure.value is None:
            return False
        return broke is None or broke.row >= self.case.end - int(failure.value)

    def jump(self, event: Event) -> float:
        """How far an event's site jumped in its step, in powers of ten."""
        return float(self.breaks.jumps[event.row, event.line])

    def largest(self, events: Iterable[Event]) -> Event:
        """The one that jumped furthest."""
        return max(events, key=lambda event: abs(self.jump(event)))

    def is_of(self, event: Event, kind: str) -> bool:
        return self.case.tap(event).kind == kind

    def share(self, events: tuple[Event, ...]) -> float:
        """The share of the layers that have parameters which some events are of."""
        taps = self.case.history.table.taps
        return len({self.case.tap(e).layer for e in events}) / max(1, len({tap.layer for tap in taps if tap.kind == "parameter"}))


@dataclass(frozen=True)
class Told:
    """What a rule said, and which rule: the name under which it is calibrated."""

    rule: str
    finding: Finding


def finding(seen: Evidence, rule: str, cause: str, event: Event, evidence: str) -> Told:
    """What a rule found at an event."""
    tap = seen.case.tap(event)
    return Told(rule, Finding(cause, tap.layer, tap.site, seen.case.step(event), confidence(rule), evidence, ADVICE[cause]))


def without_layer(rule: str, cause: str, site: str | None, step: int, evidence: str, advice: str | None = None) -> Told:
    """What a rule found that no layer is guilty of."""
    return Told(rule, Finding(cause, None, site, step, confidence(rule), evidence, advice or ADVICE[cause]))
