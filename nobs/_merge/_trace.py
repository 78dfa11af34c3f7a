"""What is kept of a rank while all are read: small arrays over its steps, and never its history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._blackbox import read
from .._case import Case, Event
from .._columns import ELEMENTS, FIRST, NORM, OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD, Floats
from .._history import History, bad_counts
from .._load import is_black_box, load
from .._ranks import Wrong
from .._recover import reason_of
from .._schema import OTHER_RANK, Failure

_OWN = (OUTPUT, OUTPUT_GRAD)
_NOT_REDUCED = (*_OWN, PARAMETER)
"""A parameter counts here: where one is not finite in the first dirty step, no reduction of that step has made it."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A rank: its arrays are over its `steps`, `[T]`.

    Attributes:
        loss: float64; `has_loss` tells a NaN from none.
        gradient: float64, the norm of all gradients of parameters that lie here; NaN where they hold NaN or Inf, and below 0
            where there is none.
        outputs: float32 `[T, layers]`, the norms of outputs, in the order of `layers`; likewise.
        state: one of `_ranks.STATES`.
    """

    rank: int
    world_size: int
    file: Path
    state: str
    failure: Failure | None
    exception: str | None
    wrong: Wrong | None
    steps: NDArray[np.int64]
    loss: Floats
    has_loss: NDArray[np.bool_]
    gradient: Floats
    outputs: NDArray[np.float32]
    layers: tuple[str, ...]

    @property
    def last_step(self) -> int | None:
        """Of the newest row."""
        return int(self.steps[-1]) if len(self.steps) else None

    def row_of(self, step: int | None) -> int | None:
        """The last row of a step."""
        rows = np.flatnonzero(self.steps == step)
        return int(rows[-1]) if rows.size else None


def traced(file: Path, number: int) -> tuple[Trace, History]:
    """What is kept of a rank's file, and its history, which the caller lets go.

    Args:
        number: of the rank, as the file's name has it: what stands in a file may be copied.

    Raises:
        UnreadableDump: it cannot be read.
    """
    if is_black_box(file):
        box = read(file)
        status = box.status
        state = reason_of(box)
        failures = status.failures if status else ()
        world_size, history, exception = box.header.world_size, box.history, status.exception if status else None
    else:
        report = load(file)
        state, failures = report.reason, (report.failure,) if report.failure else ()
        world_size, history, exception = report.world_size, report.history, report.exception
    own = _own_failure(failures, state, history)
    state = {"trigger": "failed" if own else "called", "manual": "unknown"}.get(state, state)
    bad = bad_counts(history.values, history.table) > 0
    outputs = history.table.of_kind[OUTPUT]
    trace = Trace(
        number,
        world_size,
        file,
        state,
        own,
        exception,
        first_wrong(history, bad),
        history.steps,
        history.scalars.get("loss", np.full(len(history), np.nan)),
        history.given.get("loss", np.zeros(len(history), dtype=np.bool_)),
        *_norms(history, bad),
        tuple(history.table.taps[line].layer for line in outputs),
    )
    return trace, history


def _own_failure(failures: Sequence[Failure], state: str, history: History) -> Failure | None:
    """What its own triggers saw last: of a rank that was stopped, what stopped it, and of one that went on, what is still there.

    A warning of long ago is not why a rank was called.
    """
    if state == "trigger":
        return failures[-1] if failures and failures[-1].trigger != OTHER_RANK else None
    own = (f for f in reversed(failures) if f.trigger != OTHER_RANK and history.row_of(f.step) is not None)
    return next(own, None)


def _norms(history: History, bad: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.float32]]:
    """Of all gradients of parameters together, and of each output: see Trace."""
    ran = np.isfinite(history.values[..., FIRST])
    lines, outputs = history.table.of_kind[PARAMETER_GRAD], history.table.of_kind[OUTPUT]
    there = ran[:, lines] & (history.values[:, lines, ELEMENTS] > 0)
    squares = np.where(there & ~bad[:, lines], np.square(history.values[:, lines, NORM].astype(np.float64)), 0)
    gradient = np.where(bad[:, lines].any(axis=1), np.nan, np.sqrt(squares.sum(axis=1)))
    norms = np.where(bad[:, outputs], np.nan, history.values[:, outputs, NORM])
    return np.where(there.any(axis=1), gradient, -1.0), np.where(ran[:, outputs], norms, -1.0).astype(np.float32)


def first_wrong(history: History, bad: NDArray[np.bool_]) -> Wrong | None:
    """What was not finite first, what is this rank's own before what a reduction may have brought in the same step.

    With a loss scale, gradients are no news: the scale is found by their overflows.

    Args:
        bad: `[T, taps]`, where a tap holds NaN or Inf and may not.
    """
    if not len(history):
        return None
    if "loss_scale" in history.scalars:
        bad = bad & ~history.table.are_gradients
    loss, given = history.scalars.get("loss"), history.given.get("loss")
    lost = given & ~np.isfinite(loss) if loss is not None and given is not None else np.zeros(len(history), dtype=np.bool_)
    rows = np.flatnonzero(bad.any(axis=1) | lost)
    if not rows.size:
        return None
    row = int(rows[0])
    case = Case(history.where(np.arange(len(history)) == row), None)  # the order of that step, and a tenth of the time
    events = [case.event(0, int(line)) for line in np.flatnonzero(bad[row])]
    own = min((event for event in events if case.tap(event).kind in _NOT_REDUCED), default=None)
    step = int(history.steps[row])
    if lost[row] and (own is None or own.phase > 2):
        return Wrong(step, None, "loss", True, 2, False, 0.0, True)
    event = own or min(events)
    tap = case.tap(event)
    clean = np.isfinite(history.values[row, :, FIRST]) & ~bad[row]
    came_in = _came_in(case, event, clean, given is not None and bool(given[row]))
    whole = (tap.layer, tap.site) not in history.shards
    return Wrong(step, tap.layer, tap.site, tap.kind in _OWN, event.phase, came_in, event.place, whole)


def _came_in(case: Case, event: Event, clean: NDArray[np.bool_], has_loss: bool) -> bool:
    """Whether nothing before it was clean here: for a gradient the loss counts, which it then was born behind.

    Args:
        clean: `[taps]`, whether a tap ran and was finite.
    """
    kind = {1: OUTPUT, 3: OUTPUT_GRAD}.get(event.phase)
    if kind is None or (event.phase == 3 and has_loss):
        return False
    return not any(clean[line] and case.event(0, line) < event for line in case.history.table.of_kind[kind].tolist())
