"""Who was first. Pure functions over the traces of all ranks, asked in this order:

NaN or Inf    the earliest step with one on any rank. In that step a rank that had it in a parameter, or in its own outputs or
              their gradients, is before one that has it in gradients of parameters only, through a reduction; then parameters
              are before forward, that before the loss, and that before backward; then born here before come in; then the place
              in the order of execution
a trigger     the earliest failing step. Reduced gradients make triggers fire on all ranks alike: then the rank whose own
              outputs or loss stand out there, from its own past and from the other ranks, and else nobody
an exception  but for one that only says that another rank is gone
a death       without a word: of those, who came least far. Of a process on another machine nobody can tell whether it lives:
              where others lost a rank, or are at their end and came further, it counts as dead
the rest      what was left above, and SIGTERM
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from .._ranks import First, Wrong, named
from ._trace import Trace

STANDS_OUT = math.log10(3)
"""By so many powers of ten a rank has jumped further than the middle of the others."""
PAST, ENOUGH = 20, 3
"""So many readings before are a rank's own past; fewer than ENOUGH tell nothing."""
LEAD = 5
"""A trigger may see a bad batch some steps late: so many steps before are looked at too."""

_OF_ANOTHER = (
    "by peer", "by remote", "remote process", "connection reset", "broken pipe", "nccl", "gloo", "processgroup", "process group",
    "socket timeout", "wait timeout", "watchdog", "distnetworkerror", "tcpstore",
)  # fmt: skip
"""What an exception says where another rank is gone; not any timeout, which the reading of data has too."""


def who_was_first(traces: Sequence[Trace]) -> First | None:
    """Where it began; None where nothing failed."""
    return next((first for rule in _RULES if (first := rule(traces)) is not None), None)


def _not_finite(traces: Sequence[Trace]) -> First | None:
    dirty = [(trace, trace.wrong) for trace in traces if trace.wrong is not None]
    step = min((wrong.step for _, wrong in dirty), default=None)
    failed = min((t.failure.step for t in traces if t.failure and t.state == "failed"), default=None)  # others were warned
    if step is None or (failed is not None and failed < step):  # what a trigger saw before is where it began
        return None
    dirty = sorted(((t, w) for t, w in dirty if w.step == step), key=lambda pair: _key(*pair))
    first, wrong = dirty[0]
    ranks = tuple(sorted(trace.rank for trace, _ in dirty))
    had = set(ranks)
    clean = [trace for trace in traces if trace.rank not in had and trace.row_of(step) is not None]
    what = f"NaN or Inf in {_place(wrong)}"
    known: int | None = first.rank
    if len(traces) == 1:
        why = f"the only rank here had {what} at step {step}"
    elif wrong.own or (wrong.phase == 0 and not (wrong.whole and clean)):
        alike = [trace.rank for trace, other in dirty if _key(trace, other)[:4] == _key(first, wrong)[:4]]
        known = first.rank if len(alike) == 1 else None
        why = _own(dirty, alike, what, step, clean)
    elif wrong.whole and clean:
        why = f"rank {first.rank} had {what} at step {step}, where {named(t.rank for t in clean)} had none: no reduction made it"
    else:
        held = "every rank" if not clean else f"{named(ranks)}, which hold that part of it,"
        known = None
        why = f"{held} had {what} at step {step}, and nobody in its own outputs or their gradients: it was born "
        why += "in the backward of that layer on one of the ranks, or in the reduction itself"
    return First(known, ranks, wrong.layer, wrong.site, step, why)


def _key(trace: Trace, wrong: Wrong) -> tuple[bool, int, bool, float, int]:
    return not (wrong.own or wrong.phase == 0), wrong.phase, wrong.came_in, wrong.place, trace.rank


def _own(dirty: Sequence[tuple[Trace, Wrong]], alike: Sequence[int], what: str, step: int, clean: Sequence[Trace]) -> str:
    """The sentence for ranks whose own numbers had it first, and what the others had."""
    there = set(alike)
    further = [trace.rank for trace, wrong in dirty if (wrong.own or wrong.phase == 0) and trace.rank not in there]
    through = [(trace.rank, wrong) for trace, wrong in dirty if not wrong.own and wrong.phase]
    why = f"{named(alike)} had {what} at step {step}"
    if len(alike) > 1:
        why += ", at the same place"
    if further:
        why += f"; {named(further)} had it further on"
    if through:
        why += f"; {named(rank for rank, _ in through)} got it with the reduced gradients, in {_place(through[0][1])}"
    if clean:
        why += f"; {named(trace.rank for trace in clean)} had none in that step"
    return why


def _place(wrong: Wrong) -> str:
    return "the loss" if wrong.layer is None else f"{wrong.layer} ({wrong.site})"


def _trigger(traces: Sequence[Trace]) -> First | None:
    failed = [(trace, trace.failure) for trace in traces if trace.failure is not None]
    if not failed:
        return None
    step = min(failure.step for _, failure in failed)
    now = [(trace, failure) for trace, failure in failed if failure.step == step]
    ranks = tuple(sorted(trace.rank for trace, _ in now))
    for at in range(step - LEAD, step + 1):
        odd = standing_out(traces, at)
        if odd is not None:
            trace, layer, times = odd
            of = "the loss" if layer is None else f"the output of {layer}"
            why = f"on rank {trace.rank} alone {of} jumped at step {at}, {times:.3g} times its usual size"
            return First(trace.rank, ranks, layer, "loss" if layer is None else "output", at, why)
    trace, failure = min(now, key=lambda pair: pair[0].rank)
    if len(traces) > 1 and len(now) > 1:
        why = f"{named(ranks)} failed alike at step {step}: no rank's own outputs or loss stand out"
        return First(None, ranks, failure.layer, failure.site, step, why)
    return First(trace.rank, ranks, failure.layer, failure.site, step, f"rank {trace.rank} alone saw it, at step {step}")


def standing_out(traces: Sequence[Trace], step: int) -> tuple[Trace, str | None, float] | None:
    """The rank whose own outputs, or loss (None), have jumped at a step as no other's have, and by how much."""
    jumps = [(jump, trace) for trace in traces if (jump := _jump(trace, step)) is not None]
    if len(jumps) < 2:
        return None
    (size, layer), trace = max(jumps, key=lambda pair: pair[0][0])
    others = median(other[0] for other, of in jumps if of is not trace)
    return (trace, layer, 10**size) if size - others > STANDS_OUT else None


def _jump(trace: Trace, step: int) -> tuple[float, str | None] | None:
    """By how many powers of ten a rank's own numbers are above their past at a step, and of which layer (None: the loss)."""
    row = trace.row_of(step)
    if row is None or row < ENOUGH:
        return None
    own = np.column_stack([trace.outputs.astype(np.float64), np.abs(trace.loss)])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(own[max(0, row - PAST) : row + 1])
    past = np.where(np.isfinite(logs[:-1]), logs[:-1], np.nan)
    enough = np.isfinite(past).sum(axis=0) >= ENOUGH
    usual = np.nanmedian(np.where(enough, past, 0.0), axis=0)
    off = np.where(enough & np.isfinite(logs[-1]), logs[-1] - usual, 0.0)
    at = int(np.argmax(off))  # the first of equals, and so the first layer
    return float(off[at]), trace.layers[at] if at < len(trace.layers) else None


def _exception(traces: Sequence[Trace]) -> First | None:
    return _earliest(traces, lambda t: t.exception is not None and not _of_another(t), "ended by an exception of its own")


def _death(traces: Sequence[Trace]) -> First | None:
    furthest = max((t.last_step for t in traces if t.last_step is not None), default=-1)
    lost = any(t.exception is not None and _of_another(t) for t in traces)
    over = any(t.state not in ("running", "unknown") for t in traces)

    def fell_silent(t: Trace) -> bool:
        behind = t.last_step is None or t.last_step < furthest - 1
        return t.state == "killed" or (t.state == "unknown" and (lost or (over and behind)))

    return _earliest(traces, fell_silent, "died without a word")


def _rest(traces: Sequence[Trace]) -> First | None:
    lost = _earliest(traces, lambda t: t.exception is not None, "lost another rank")
    stopped = _earliest(traces, lambda t: t.state == "sigterm", "was stopped by SIGTERM")
    if lost is None and stopped is not None and len(stopped.ranks) > 1:  # from outside, and all alike
        return replace(stopped, rank=None, why=f"{named(stopped.ranks)} were stopped by SIGTERM")
    return lost or stopped


def _of_another(trace: Trace) -> bool:
    said = (trace.exception or "").lower()
    return any(word in said for word in _OF_ANOTHER)


def _earliest(traces: Iterable[Trace], applies: Callable[[Trace], bool], how: str) -> First | None:
    there = sorted((t for t in traces if applies(t)), key=lambda t: (-1 if t.last_step is None else t.last_step, t.rank))
    if not there:
        return None
    first, ranks = there[0], tuple(sorted(trace.rank for trace in there))
    why = f"rank {first.rank} {how}" + ("" if first.last_step is None else f", its last step was {first.last_step}")
    return First(first.rank, ranks, None, None, first.last_step, why)


_RULES: tuple[Callable[[Sequence[Trace]], First | None], ...] = (_not_finite, _trigger, _exception, _death, _rest)
