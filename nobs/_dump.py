"""What is known of a ring, for its reports, which there are whatever goes wrong, and for the header of its black box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import _group, _launch
from ._blackbox import Header, this_process
from ._board import Alarm
from ._history import History
from ._log import complain
from ._names import safe_text
from ._ring import RingBuffer
from ._schema import OTHER_RANK, Failure, Report
from .diagnosis import diagnosed
from .triggers import Trigger, settings_of


def report_of(ring: RingBuffer, reason: str, failure: Failure | None = None, exception: str | None = None) -> Report:
    """The history of a ring with what failed in it and what was found out about it. Never raises."""
    try:
        try:
            history = ring.history()
        except Exception:  # the device is gone: what has arrived lies in host memory
            history = ring.history(wait=False)
        return diagnosed(replace(ring.report(reason, history), failure=failure, exception=exception))
    except Exception as error:
        complain("could not make a report", error)
        empty = History.of((), ring.row.table)
        return Report(empty, reason, "", _launch.installed_version(), failure, exception=exception)


def report_of_called(ring: RingBuffer, alarm: Alarm) -> Report:
    """The report of a rank that saw no failure itself, as far as the rank that called goes. Host memory only; never raises.

    It is not diagnosed: what is wrong here came, most likely, with a reduction.
    """
    failure = Failure(OTHER_RANK, alarm.step, f"rank {alarm.rank} failed: {alarm.message}", detected_at=alarm.step)
    try:
        history = ring.history(wait=False)
        return replace(ring.report("trigger", history.where(history.steps <= alarm.last)), failure=failure)
    except Exception as error:
        complain("could not make a report", error)
        empty = History.of((), ring.row.table)
        return Report(empty, "trigger", "", _launch.installed_version(), failure)


def alarm_of(ring: RingBuffer, what: str, step: int | None = None, *, stop: bool = True) -> Alarm:
    """What the other ranks are to know of a failure; without a step it is an exception, which has left the loop."""
    last = ring.last_step
    return Alarm(_group.rank(), last if step is None else step, last, safe_text(what, 500), stop, gone=step is None)


def header_of(ring: RingBuffer, triggers: Sequence[Trigger]) -> Header:
    """What the black box of a ring says of its run."""
    known = ring.report("running", History.of((), ring.row.table))
    return Header(
        nobs_version=known.nobs_version,
        created=known.created,
        rank=known.rank,
        world_size=known.world_size,
        run=known.run,
        capacity=ring.capacity,
        table=ring.row.table,
        triggers=tuple(settings_of(trigger) for trigger in triggers),
        process=this_process(),
        shards=dict(ring.row.shards),
    )
