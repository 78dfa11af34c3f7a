"""What was found out: failures, findings, and the report that holds them with the history. Frozen, and free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ._history import History, Layer


@dataclass(frozen=True)
class Failure:
    """What a trigger saw: at which step, in which layer and site (None: the loss), which value against which threshold.

    `detected_at` is the step at which the host learned of it; rows arrive late on an accelerator.
    """

    trigger: str
    step: int
    message: str
    layer: str | None = None
    site: str | None = None
    value: float | None = None
    threshold: float | None = None
    detected_at: int | None = None


OTHER_RANK = "OtherRank"
"""The trigger of a failure that this rank did not see itself: another rank failed, and told it."""


CAUSES = (
    "nonfinite_input", "nonfinite_forward", "nonfinite_backward", "nonfinite_weight", "overflow", "underflow",
    "gradient_explosion", "vanishing_gradient", "dead_layer", "weight_corruption", "optimizer_state", "learning_rate",
    "bad_batch", "loss_spike", "unknown",
)  # fmt: skip
"""The closed list of causes."""


@dataclass(frozen=True)
class Finding:
    """One explanation: a cause from CAUSES, where and when it began, how sure (0 to 1), the numbers, and what to do."""

    cause: str
    layer: str | None
    site: str | None
    step: int | None
    confidence: float
    evidence: str
    advice: str


REASONS = {
    "sigterm": "stopped by SIGTERM",
    "manual": "dump on request",
    "ended": "the run ended",
    "running": "the run goes on",
    "killed": "the process died without a word",
    "unknown": "the run goes on, or its process died: nobody can tell from here, on another machine or in another container",
}
"""Why there is a report, where no trigger and no exception was the reason."""


_DEATHS = ("killed", "sigterm")


@dataclass(frozen=True, eq=False)
class Report:
    """Everything a dump or a black box holds; renderers read nothing else."""

    history: History
    reason: str
    created: str
    nobs_version: str
    failure: Failure | None = None
    findings: tuple[Finding, ...] = ()
    exception: str | None = None
    rank: int = 0
    world_size: int = 1
    run: Mapping[str, object] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.history.layers

    def __repr__(self) -> str:
        return f"<nobs.Report of {len(self.history)} steps: {self.summary()}>"

    @property
    def failed(self) -> bool:
        """Whether anything went wrong: what a trigger saw, an exception, a death, an order to stop, NaN that nobody judged."""
        return self.failure is not None or self.exception is not None or self.reason in _DEATHS or bool(self.findings)

    @property
    def what(self) -> str:
        """What happened, in one line."""
        return self.failure.message if self.failure else self.exception or REASONS.get(self.reason, self.reason)

    def summary(self) -> str:
        """The failure in one line, and the first finding behind it."""
        if not self.findings:
            return self.what
        first = self.findings[0]
        where = f" in {first.layer}" if first.layer else ""
        return f"{self.what} (cause: {first.cause}{where})"
