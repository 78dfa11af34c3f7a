"""From a black box to the report that its process could not write, or has not needed to."""

from __future__ import annotations

from dataclasses import replace

from ._blackbox import Recording, Status
from ._history import History
from ._schema import Failure, Report
from .diagnosis import diagnosed
from .triggers import DEFAULT, TriggerEngine, with_settings

_REASONS = {"failed": "trigger", "exception": "exception", "sigterm": "sigterm", "ended": "ended"}
"""The state of a run -> the reason of its report."""


def reason_of(recording: Recording) -> str:
    """Why there would be a report of it: what its process said at the end, else whether that lives."""
    said = recording.status and _REASONS.get(recording.status.state)
    return said or ("running" if recording.alive else "killed" if recording.alive is False else "unknown")


def report_of(recording: Recording) -> Report:
    """The report of what a black box holds, diagnosed like any other."""
    header, history = recording.header, recording.history
    status = recording.status or Status()
    reason = reason_of(recording)
    noted = _noted(status, history)
    failure = noted or (unheard(recording) if reason in ("killed", "unknown") or recording.status is None else None)
    before = len(status.failures) if failure is None else 0
    counted = {"failures_before": before, "records_damaged": recording.damaged, "scalars_left_out": recording.left_out}
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


def _noted(status: Status, history: History) -> Failure | None:
    """What ended the run, as its triggers said it; of a run that went on behind it, while its row is there."""
    if status.state == "failed" and status.failures:
        return status.failures[-1]
    return next((failure for failure in reversed(status.failures) if history.row_of(failure.step) is not None), None)


def unheard(recording: Recording) -> Failure | None:
    """What the run's triggers see in the records of a run that died, and had no time to say.

    Where they judged while the run lived that counts, but for the last row: they had learned from all of it, and begin here with
    the first record. Where there were none of the house, or the status is damaged, all records are shown to them.
    """
    history = recording.history
    triggers = with_settings(recording.header.triggers)
    engine = TriggerEngine.only(triggers or DEFAULT)
    judged_alive = triggers and recording.status is not None
    for number, row in enumerate(history.rows(), 1):
        if (failure := engine.check(row)) is not None and (number == len(history) or not judged_alive):
            return replace(failure, detected_at=row.step)
    return None
