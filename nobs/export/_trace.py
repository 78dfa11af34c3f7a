"""A trace (Chrome's trace event format, strict JSON) for ui.perfetto.dev and chrome://tracing. The process is the rank.

- The thread `steps` has a span for each step, from the moment that it was recorded until the next was.
- A counter for each scalar, and one for the norm of each site that ran, named `layer/site`.
- Instants for the failure and each finding at their steps, for why there is a report at the end, and wherever something was not
  finite: a site with NaN or Inf in it (a -Inf that is legal, as in a mask, is none), or a number that no counter can show.
- All that the report says besides its history stands under `otherData`, with the keys of a dump.

Times are in microseconds since the first step. Where the report does not know them, a step takes a millisecond.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np

from .._codec import facts, number, plain_failure
from .._columns import read
from .._history import History, bad_counts
from .._schema import Report
from ._tracks import STEP_S, distinct, moments_s

_THREAD = 1
_COUNTS = ("nan", "posinf", "neginf")
Event = dict[str, Any]


def content(report: Report) -> bytes:
    """The report as a trace, one event a line."""
    encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
    events = ",\n".join(map(encode, _events(report)))
    head = f'{{"displayTimeUnit":"ms","otherData":{encode(facts(report))},"traceEvents":[\n'
    return f"{head}{events}\n]}}\n".encode()


def _events(report: Report) -> Iterator[Event]:
    """All events: the names of process and thread, then the others in the order of time."""
    of = {"pid": report.rank, "tid": _THREAD}
    yield {"ph": "M", "name": "process_name", **of, "ts": 0, "args": {"name": f"nobs rank {report.rank}"}}
    yield {"ph": "M", "name": "thread_name", **of, "ts": 0, "args": {"name": "steps"}}
    moments = moments_s(report.history)
    starts_us = [round(moment * 1e6, 3) for moment in (moments - moments[:1]).tolist()]
    lasted_us = [round(end - start, 3) for start, end in pairwise(starts_us)]
    lasted_us += lasted_us[-1:] or [STEP_S * 1e6]  # nobody knows how long the last one took
    rows = zip(report.history.steps.tolist(), starts_us, lasted_us, _samples(report.history), strict=False)
    marks = _marks(report)
    for row, (step, start_us, took_us, samples) in enumerate(rows):
        yield {"ph": "X", "name": f"step {step}", **of, "ts": start_us, "dur": took_us}
        yield from ({**event, **of, "ts": start_us} for event in chain(samples, marks.get(row, ())))
    yield from ({**event, **of, "ts": max(starts_us, default=0)} for event in marks[None])


def _samples(history: History) -> Iterator[list[Event]]:
    """For each step its counters, and instants for what no counter can show."""
    names = distinct([*history.scalars, *(f"{tap.layer}/{tap.site}" for tap in history.table.taps)])
    scalars, sites = names[: len(history.scalars)], names[len(history.scalars) :]
    norms, counts = read(history.values, "norm"), [read(history.values, name) for name in _COUNTS]
    measured = read(history.values, "elements") > 0
    wrong = (bad_counts(history.values, history.table) > 0) | (measured & ~np.isfinite(norms))
    for row, step in enumerate(history.steps.tolist()):
        events = _scalars(history, row, scalars)
        there, bad = (np.flatnonzero(which).tolist() for which in (np.isfinite(norms[row]), wrong[row]))
        events += [_counter(sites[line], "norm", float(norms[row, line])) for line in there]
        for line in bad:
            about = {name: number(float(of[row, line])) for name, of in zip(("norm", *_COUNTS), (norms, *counts), strict=True)}
            events.append(_instant(f"not finite: {sites[line]}", {"step": step, **about}))
        yield events


def _scalars(history: History, row: int, names: list[str]) -> list[Event]:
    """The scalars that were given with a step, under these names."""
    events = []
    for name, (scalar, values) in zip(names, history.scalars.items(), strict=True):
        value = float(values[row])
        if math.isfinite(value):
            events.append(_counter(name, "value", value))
        elif history.given[scalar][row]:
            events.append(_instant(f"not finite: {name}", {"step": int(history.steps[row]), "value": number(value)}))
    return events


def _marks(report: Report) -> dict[int | None, list[Event]]:
    """Row -> what happened in it: the failure, findings. Under None, for the end: how it ended, and what is not in the window."""
    marks: dict[int | None, list[Event]] = {}
    if report.failure:
        event = _instant(f"failure: {report.failure.trigger}", plain_failure(report.failure))
        marks.setdefault(report.history.row_of(report.failure.step), []).append(event)
    for finding in report.findings:
        event = _instant(f"finding: {finding.cause}", dict(vars(finding)))
        marks.setdefault(report.history.row_of(finding.step), []).append(event)
    why = {"exception": report.exception, "summary": report.summary()}
    marks.setdefault(None, []).append(_instant(f"end: {report.reason}", why))
    return marks


def _counter(name: str, of: str, value: float) -> Event:
    return {"ph": "C", "name": name, "args": {of: value}}


def _instant(name: str, about: Event) -> Event:
    """A mark over the whole process."""
    return {"ph": "i", "s": "p", "name": name, "args": about}
