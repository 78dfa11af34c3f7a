"""What both pictures show: which layer is guilty, how it spread, which layers matter, and one series a layer and direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from .._case import Case
from .._columns import OUTPUT, OUTPUT_GRAD, PARAMETER, PARAMETER_GRAD, Floats, read
from .._history import bad_counts
from .._names import printable, safe_text, shortened
from .._schema import REASONS, Finding, Report

ABOVE, BELOW = 3.0, 0.1
"""So many times its median a norm has left its usual range ..."""
USUAL, ENOUGH = 20, 3
"""... that of so many readings before the failure began, and of at least so many."""
LOOK_BACK = 30
"""So many rows before the failing one a failure began of which no finding says when."""
FIRST_OUT = 4
"""So many of the layers that left their usual range are told by name."""


@dataclass(frozen=True, order=True)
class Left:
    """When a layer left its usual range, ordered as computation is: by row, then forward, then backward and in reverse.

    The layer that the first finding names comes first in its row.
    """

    row: int
    phase: int
    place: float


NAMED, FORWARD, BACKWARD = range(3)


@dataclass(frozen=True, eq=False)
class Line:
    """A layer over the steps: `forward` its output's norm, `backward` its largest gradient norm; `*_bad` where not finite."""

    name: str
    type: str
    guilty: bool
    forward: Floats
    backward: Floats
    forward_bad: NDArray[np.bool_]
    backward_bad: NDArray[np.bool_]
    left: Left | None


def guilty_layer(report: Report) -> str | None:
    """The layer that the first finding names (none, if it is the loss itself); without findings the trigger's."""
    if report.findings:
        return report.findings[0].layer
    return report.failure.layer if report.failure else None


def headline(report: Report) -> str:
    """What failed and when, in one sentence."""
    if report.failure:
        return printable(report.failure.message)
    if report.exception:
        said = [line.strip() for line in report.exception.splitlines()]  # of nobs' own errors all four parts
        return printable(safe_text("; ".join(filter(None, said[:4])), 400))
    return REASONS.get(report.reason, f"dump on request ({printable(report.reason)})")


def origin(report: Report, width: int = 1000) -> str | None:
    """What went wrong first and when, in a few words, the name in `width` columns; None where no finding says so."""
    if not report.findings:
        return None
    first = report.findings[0]
    at = "" if first.step is None else f", at step {first.step}"
    if first.layer is None:
        return f"the loss itself{at}" if first.site == "loss" else None
    kind = next((layer.type for layer in report.layers if layer.name == first.layer), "")
    name = shortened([printable(first.layer)], width)[0]
    return f"{name} ({printable(kind)}), {printable(first.site or '')}{at}"


def cause(finding: Finding) -> str:
    """The cause and its place. A learning rate is in no layer; it shows in one first."""
    if finding.layer is None:
        return finding.cause
    where = "first seen in" if finding.cause in ("learning_rate", "bad_batch") else "in"
    return f"{finding.cause}, {where} {printable(finding.layer)}"


def batch(report: Report) -> str | None:
    """What the batch was called with which it began: of the first finding's step, else of the failing one."""
    steps = [finding.step for finding in report.findings[:1]] + [report.failure.step if report.failure else None]
    row = next((row for step in steps if (row := report.history.row_of(step)) is not None), None)
    named = None if row is None or not report.history.batches else report.history.batches[row]
    return None if named is None else safe_text(printable(named))  # the dump has all of it


def lines(report: Report) -> list[Line]:
    """All layers that ran, in execution order."""
    if not len(report.history):
        return []
    guilty = guilty_layer(report)
    history = report.history
    bad = bad_counts(history.values, history.table) > 0
    of_layer: dict[str, dict[str, list[int]]] = {}
    for i, tap in enumerate(history.table.taps):
        of_layer.setdefault(tap.layer, {}).setdefault(tap.kind, []).append(i)
    case, begin = Case(history, report.failure), _begin(report)
    story = []
    for layer in history.layers:
        kinds = of_layer[layer.name]
        if layer.order is None and layer.name != guilty:
            continue
        # A layer without an output of its own (a ParameterList) is shown by its parameters.
        forward = _largest(history.values, kinds.get(OUTPUT) or kinds.get(PARAMETER, []))
        backward = _largest(history.values, kinds.get(PARAMETER_GRAD) or kinds.get(OUTPUT_GRAD, []))
        forward_bad, backward_bad = (
            np.asarray(bad[:, [i for kind in pair for i in kinds.get(kind, [])]].any(axis=1)) for pair in _DIRECTIONS
        )
        name, of_type = printable(layer.name), printable(layer.type)
        left = _left(report, case, begin, layer.name, ((forward, forward_bad), (backward, backward_bad)))
        story.append(Line(name, of_type, layer.name == guilty, forward, backward, forward_bad, backward_bad, left))
    return story


def spread(story: Sequence[Line]) -> list[tuple[Left, Line]]:
    """The layers that left their usual range, in the order in which they did."""
    return sorted(((line.left, line) for line in story if line.left is not None), key=lambda pair: pair[0])


def left_at(values: Floats, bad: NDArray[np.bool_], begin: int, end: int) -> int | None:
    """The first row from `begin` on from which on a series is out of its own usual range until the failing row, `end`.

    Out of it is what is not finite, and what is above ABOVE times, or below BELOW times, the median of the last USUAL finite
    readings before `begin`. Fewer than ENOUGH tell nothing, and neither does a median of zero. A zero is far below; a row
    without a reading says nothing. None for a series that never left, or came back.
    """
    ran = np.flatnonzero(bad[: end + 1] | ~np.isnan(values[: end + 1]))
    before = values[ran[(ran < begin) & ~bad[ran]]][-USUAL:].tolist()
    usual = median(before) if len(before) >= ENOUGH else 0.0
    since = ran[ran >= begin]
    outside = bad[since]
    if usual > 0:
        outside = outside | (values[since] > usual * ABOVE) | (values[since] < usual * BELOW)
    inside = np.flatnonzero(~outside)
    since = since[inside[-1] + 1 :] if inside.size else since
    return int(since[0]) if since.size else None


def _begin(report: Report) -> int:
    """The row at which the failure began; behind all rows where there is none."""
    history = report.history
    if not report.failure and not report.findings:
        return len(history)
    step = report.findings[0].step if report.findings else None
    row = history.row_of(step)
    if row is None and step is not None and step > history.steps[-1]:  # of the step that an exception ended there is nothing
        return len(history)
    return max(0, Case(history, report.failure).end - LOOK_BACK) if row is None else row


def _left(report: Report, case: Case, begin: int, layer: str, series: Sequence[tuple[Floats, NDArray[np.bool_]]]) -> Left | None:
    """When a layer left its usual range: as the first finding says it of this one, else the earlier of both directions."""
    first = report.findings[0] if report.findings else None
    if first and first.layer == layer and (row := report.history.row_of(first.step)) is not None:
        return Left(row, NAMED, 0.0)
    rows = [left_at(values, bad, begin, case.end) for values, bad in series]
    turns = ((FORWARD, case.place[layer]), (BACKWARD, -case.entry[layer]))
    return min((Left(row, *turn) for turn, row in zip(turns, rows, strict=True) if row is not None), default=None)


_DIRECTIONS = ((PARAMETER, OUTPUT), (OUTPUT_GRAD, PARAMETER_GRAD))


def _largest(values: NDArray[np.float32], taps: Sequence[int]) -> Floats:
    """[T]: the largest norm of some taps, NaN where none has one."""
    if not taps:
        return np.full(len(values), np.nan)
    norms = read(values[:, list(taps)], "norm")
    return np.where(np.isnan(norms).all(axis=1), np.nan, np.nanmax(np.nan_to_num(norms, nan=-1.0, posinf=np.inf), axis=1))


def that_matter(story: Sequence[Line], most: int) -> list[Line | int]:
    """At most `most` lines in execution order; gaps as the number left out.

    The guilty one with its neighbours, the first and the last, those that left their usual range first, and those whose
    gradients rose most, if tenfold.
    """
    if len(story) <= most:
        return list(story)
    guilty = next((i for i, line in enumerate(story) if line.guilty), len(story) - 1)
    ends = (0, len(story) - 1)
    near = [i for i in range(len(story)) if abs(i - guilty) <= 3 or i in ends]
    out = [story.index(line) for _, line in spread(story)[:FIRST_OUT]]
    risen = sorted((i for i in range(len(story)) if _rise(story[i]) > 1), key=lambda i: -_rise(story[i]))
    keep = sorted(list(dict.fromkeys([*near, *out, *risen]))[:most])
    shown: list[Line | int] = []
    last = -1
    for i in keep:
        if i > last + 1:
            shown.append(i - last - 1)
        shown.append(story[i])
        last = i
    return [*shown, len(story) - last - 1] if last < len(story) - 1 else shown


def _rise(line: Line) -> float:
    """By how many powers of ten the gradient rose in the window."""
    finite = line.backward[np.isfinite(line.backward) & (line.backward > 0)]
    return float(np.log10(finite[-1] / np.median(finite))) if finite.size else 0.0
