"""All ranks of a run in one report: which rank, layer and step first, who differs, and norms of the whole.

    _trace.py   a file of a rank -> small arrays over its steps
    _whole.py   parts of parameters and gradients -> norms of the whole
    _first.py   all traces -> who was first
    _plain.py   the merged report as JSON

A rank is read from its black box, which holds every number to the bit, and without one from its newest dump. One file is open at
a time, and of it no more than its trace is kept.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .._find import files_of_ranks
from .._load import load
from .._ranks import First, Ranks, Word
from .._schema import Report
from ..errors import UnreadableDump
from ._first import who_was_first
from ._plain import dumps as dumps
from ._trace import Trace, traced
from ._whole import Whole

_OWN_SITES = ("output", "output.grad", "loss")
_LATE = 2
"""Ranks in step are one step apart at most, as one of them closes it."""


def merge(path: Path) -> Ranks:
    """What all ranks of the newest run in a folder have written; of a file, what that one has.

    Raises:
        UnreadableDump: there is none, or none that can be read.
    """
    whole, traces, unreadable = Whole(), {}, []
    files = files_of_ranks(path)
    for number, file in files.items():
        try:
            trace, history = traced(file)
        except UnreadableDump as error:
            if len(files) == 1:
                raise
            said = [line.strip() for line in str(error).splitlines()]
            unreadable.append(Word(number, str(file), "unreadable", exception="; ".join(said[:2])))
            continue
        traces[trace.rank] = trace
        whole.add(trace.rank, history)
        del history  # before the next is read
    if not traces:
        load(next(iter(files.values())))  # says what is wrong with it
    return _merged([traces[rank] for rank in sorted(traces)], unreadable, whole)


def _merged(traces: list[Trace], unreadable: list[Word], whole: Whole) -> Ranks:
    first = who_was_first(traces)
    speaks = min(t.rank for t in traces) if first is None else first.ranks[0] if first.rank is None else first.rank
    file = next(trace.file for trace in traces if trace.rank == speaks)
    report = load(file)
    if first is not None:
        first = _as_diagnosed(first, report)
    last = min((trace.last_step for trace in traces if trace.last_step is not None), default=None)
    step, layer = (first.step, first.layer) if first else (last, None)
    words = [_word(trace, step, layer) for trace in traces] + unreadable
    sizes = sorted({trace.world_size for trace in traces})
    size = max(*sizes, *(word.rank + 1 for word in words))
    missing = set(range(size)) - {word.rank for word in words}
    words += [Word(rank, None, "missing") for rank in missing]
    furthest = max((trace.last_step for trace in traces if trace.last_step is not None), default=0)
    late = tuple(t.rank for t in traces if t.last_step is None or furthest - t.last_step >= _LATE)
    notes = () if len(sizes) == 1 else (f"the ranks do not agree on how many they are: {', '.join(map(str, sizes))}",)
    return Ranks(
        world_size=size,
        step=step,
        words=tuple(sorted(words, key=lambda word: word.rank)),
        late=late,
        first=first,
        report=report,
        file=str(file),
        norms=whole.norms(),
        apart=whole.apart(),
        notes=notes,
    )


def _as_diagnosed(first: First, report: Report) -> First:
    """The layer and site as the first finding of that rank's report has them, where it speaks of the same step."""
    finding = report.findings[0] if report.findings else None
    if first.rank is None or finding is None or finding.layer is None or finding.step != first.step:
        return first
    if first.site in _OWN_SITES and finding.site not in _OWN_SITES:  # which may have come with the reduction, from here and there
        return first
    return replace(first, layer=finding.layer, site=finding.site)


def _word(trace: Trace, step: int | None, layer: str | None) -> Word:
    """What a rank has to say of the decisive step."""
    row = trace.row_of(step)
    column = trace.layers.index(layer) if layer in trace.layers else None
    return Word(
        rank=trace.rank,
        file=str(trace.file),
        state=trace.state,
        first_step=int(trace.steps[0]) if len(trace.steps) else None,
        last_step=trace.last_step,
        failure=trace.failure,
        exception=trace.exception,
        loss=float(trace.loss[row]) if row is not None and trace.has_loss[row] else None,
        gradient=_known(trace.gradient[row]) if row is not None else None,
        output=_known(trace.outputs[row, column]) if row is not None and column is not None else None,
        wrong=trace.wrong if trace.wrong and trace.wrong.step == step else None,
    )


def _known(value: float) -> float | None:
    return None if value < 0 else float(value)
