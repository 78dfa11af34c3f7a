"""From a black box to the report that its process could not write, or has not needed to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ._blackbox import Recording, Status
from ._history import History, Row
from ._schema import Failure, Report
from .diagnosis import diagnosed
from .triggers import DEFAULT, TriggerEngine, with_settings

_REASONS = {"failed": "trigger", "exception": "exception", "sigterm": "sigterm", "ended": "ended"}
"""The state of a run -> the reason of its report."""


def report_of(recording: Recording) -> Report:
    """The report of what a black box holds, diagnosed like any other.

    What the triggers saw while the run lived counts: they knew more of it. Only where it died unheard, or its status is
    damaged, are they shown the records again; they then begin to learn with the first of them.
    """
    header, history = recording.header, recording.history
    status = recording.status or Status()
    reason = _REASONS.get(status.state) or ("running" if recording.alive else "killed" if recording.alive is False else "unknown")
    noted = next((failure for failure in reversed(status.failures) if history.row_of(failure.step) is not None), None)
    died_unheard = reason in ("killed", "unknown") or recording.status is None
    failure = noted or (judged(history, header.triggers) if died_unheard else None)
    counted = {"records_damaged": recording.damaged, "scalars_left_out": recording.left_out}
    report = Report(
        history=history,
        reason=reason,
        created=header.created,
        nobs_version=header.nobs_version,
        failure=failure,
        exception=status.exception,
        rank=header.rank,
        world_size=header.world_size,
        run={**header.run, **{name: count for name, count in counted.items() if count}},
    )
    return report if reason == "running" and failure is None else diagnosed(report)


def judged(history: History, triggers: Sequence[tuple[str, object]]) -> Failure | None:
    """What the triggers of the run, those of the house among them, see in its last steps: the first failure."""
    engine = TriggerEngine.only(with_settings(triggers) if triggers else DEFAULT)  # type: ignore[arg-type]
    for row in rows_of(history):
        if (failure := engine.check(row)) is not None:
            return replace(failure, detected_at=row.step)
    return None


def rows_of(history: History) -> list[Row]:
    """The rows of a history, as the triggers were shown them."""
    rows = []
    for i, step in enumerate(history.steps.tolist()):
        scalars = {name: float(history.scalars[name][i]) for name, given in history.given.items() if given[i]}
        time_s = float(history.times_s[i]) if math.isfinite(history.times_s[i]) else 0.0
        rows.append(Row(step, time_s, scalars, history.table, history.values[i], history.batches[i]))
    return rows
