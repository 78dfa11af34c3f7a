"""All ranks of a run in one report: which rank, layer and step first, who differs, and norms of the whole.

    _trace.py   a file of a rank -> small arrays over its steps
    _whole.py   parts of parameters and gradients -> norms of the whole
    _copies.py  copies of parameters -> which of them differ
    _grid.py    rows and columns of both: the newest steps, and all sites
    _first.py   all traces -> who was first
    _plain.py   the merged report as JSON

A rank is read from its black box, which holds every number to the bit, and without one that can be read from its newest dump.
One file is open at a time, and of it no more than its trace is kept. The triggers of a rank that died are asked again only for
the rank that was first, whose report is made.

A plan for 10,000 ranks, from what bench/merge.py measured with 1,000 (150 layers, 600 taps, 100 steps; one core, files in the
system's cache): a black box has 2.2 MB and a dump 1.6 MB, so all ranks write 22 GB and, once, 16 GB; merging takes some 20 to 30
ms a rank, so four to five minutes, and the disk's time; 80 KB a rank are kept, most of them the norms of outputs, so 0.8 GB. Of
dumps alone reading takes 80 ms a rank more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .._find import files_of_ranks
from .._history import History
from .._load import load
from .._ranks import First, Ranks, Word
from .._schema import OTHER_RANK, Report
from ..diagnosis import diagnosed
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
    whole, traces, unreadable = Whole(), [], []
    files = files_of_ranks(path)
    for number, of_rank in files.items():
        try:
            trace, history = _readable(number, of_rank)
        except UnreadableDump as error:
            if len(files) == 1:
                raise
            said = [line.strip() for line in str(error).splitlines()]
            unreadable.append(Word(number, str(of_rank[0]), "unreadable", exception="; ".join(said[:2])))
            continue
        traces.append(trace)
        whole.add(number, history)
        del history  # before the next is read
    if not traces:
        load(next(iter(files.values()))[0])  # says what is wrong with it
    return _merged(traces, unreadable, whole)


def _readable(number: int, files: Sequence[Path]) -> tuple[Trace, History]:
    """Of the files of a rank the first that can be read: where its black box is damaged, its dump may not be.

    Raises:
        UnreadableDump: none can; it speaks of the first.
    """
    for file in files:
        with contextlib.suppress(UnreadableDump):
            return traced(file, number)
    return traced(files[0], number)


def _merged(traces: list[Trace], unreadable: list[Word], whole: Whole) -> Ranks:
    first = who_was_first(traces)
    speaks = min(t.rank for t in traces) if first is None else first.ranks[0] if first.rank is None else first.rank
    file = next(trace.file for trace in traces if trace.rank == speaks)
    report = _of_its_own(load(file), traces, first)
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


def _of_its_own(report: Report, traces: Sequence[Trace], first: First | None) -> Report:
    """The report of the rank that was first, which may have been called before its own triggers were asked: with what another
    rank's saw in that step, as the same reached both.
    """
    called = report.failure is not None and report.failure.trigger == OTHER_RANK
    seen = [trace.failure for trace in traces if trace.failure is not None]
    if first is None or not called or not seen:
        return report
    return diagnosed(replace(report, failure=min(seen, key=lambda failure: failure.step), findings=()))


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
