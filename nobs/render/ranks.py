"""All ranks of a run in a terminal: which rank, layer and step first, the ranks side by side where they differ, then the report
of that rank as `terminal` has it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import IO

from rich.console import Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from .._names import cells, printable, shortened
from .._ranks import STATES, Ranks, Word, folded, named
from . import _story
from ._glyphs import Glyphs, figures
from ._page import empty_table, labelled_grid, print_page
from .terminal import body, footer

MOST_ROWS = 12
MOST_APART = 3
_LONGEST_SPAN = 10
_NUMBERS = ("loss", "gradient", "output")
_TITLES = ("", "rank", "last", "state", *_NUMBERS)
_AS_TOLD = ("called", "ended", "running")
"""States of ranks on which nothing was wrong."""


def print_ranks(ranks: Ranks, path: Path, *, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print the merged report, at any width, to a file or stdout.

    Args:
        path: the folder that was read, to be named at the end.
        width: columns; None for the terminal's own.
    """
    print_page(lambda glyphs, columns: _parts(ranks, path, glyphs, columns), file=file, width=width)


def _parts(ranks: Ranks, path: Path, glyphs: Glyphs, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = ["", _head(ranks, glyphs), _table(ranks, glyphs, width), _told(ranks)]
    return [*parts, *body(ranks.report, glyphs, width), _files(ranks, path), footer(ranks.report)]


def _head(ranks: Ranks, glyphs: Glyphs) -> RenderableType:
    """What failed, and on which rank, in which layer and at which step first."""
    first = ranks.first
    style = "bold red" if first else "bold"
    lines = [Text(_story.headline(ranks.report), style=style, overflow="fold")]
    if first is not None:
        lines.append(Text(f"first wrong: {_origin(ranks)}", style="bold", overflow="fold"))
        batch = _story.batch(ranks.report) if first.rank is not None else None
        lines += [Text(f"batch: {batch}", overflow="fold")] if batch else []
    if ranks.missing:
        lines.append(Text(f"{named(ranks.missing)} wrote nothing", style="bold", overflow="fold"))
    title = Text(f"nobs: {_title(ranks)}", style=style)
    return Panel(Group(*lines), title=title, title_align="left", border_style="red" if first else "", box=glyphs.frame)


def _title(ranks: Ranks) -> str:
    of = f"of {ranks.world_size}"
    if ranks.first is None:
        return f"{ranks.world_size} rank{'s' if ranks.world_size != 1 else ''}, none failed"
    if ranks.first.rank is not None:
        return f"training failed on rank {ranks.first.rank} {of}"
    failed = len(ranks.first.ranks)
    return f"training failed on all {failed} ranks" if failed == ranks.world_size else f"training failed on {failed} {of} ranks"


def _origin(ranks: Ranks) -> str:
    """ "rank 1, fc2 (Linear), output, at step 12"."""
    first = ranks.first
    assert first is not None
    where = [f"rank {first.rank}" if first.rank is not None else named(first.ranks)]
    if first.layer is not None:
        kind = next((layer.type for layer in ranks.report.layers if layer.name == first.layer), "")
        where.append(f"{printable(first.layer)}{f' ({printable(kind)})' if kind else ''}")
    if first.site is not None:
        where.append("the loss itself" if first.site == "loss" else printable(first.site))
    at = "after" if first.site is None else "at"  # a death, an exception
    return ", ".join([*where, *([] if first.step is None else [f"{at} step {first.step}"])])


def _table(ranks: Ranks, glyphs: Glyphs, width: int) -> RenderableType:
    """The ranks, those that are alike in one row, the first one marked."""
    rows = _rows(ranks)
    shown = rows if len(rows) <= MOST_ROWS else rows[: MOST_ROWS - 1]
    lines = [_cells(ranks, group, glyphs) for group in shown]
    taken = sum(max(cells(line[i]) for line in [_TITLES, *lines]) + 1 for i in range(len(_TITLES)))
    wrongs = shortened([printable(_wrong(group[0])) for group in shown], max(8, width - taken), glyphs.ellipsis)
    layer = ranks.first.layer if ranks.first else None
    notes = ["norms: gradient of all parameters on the rank", *([] if layer is None else [f"output of {printable(layer)}"])]
    table = empty_table("ranks" if ranks.step is None else f"ranks at step {ranks.step}", notes)
    for title in (*_TITLES, "first wrong"):
        justify: JustifyMethod = "right" if title in ("last", *_NUMBERS) else "left"
        table.add_column(Text(title, style="dim"), justify=justify, no_wrap=True)
    for group, line, wrong in zip(shown, lines, wrongs, strict=True):
        style = "bold red" if line[0] else "" if group[0].state in _AS_TOLD else "bold"
        table.add_row(*(Text(cell, style=style) for cell in (*line, wrong)))
    rest = sum(map(len, rows[len(shown) :]))
    if rest:
        table.add_row("", Text(f"{glyphs.ellipsis} {rest} more", style="dim"))
    return Padding(table, (1, 0, 0, 0), expand=False)


def _cells(ranks: Ranks, group: Sequence[Word], glyphs: Glyphs) -> tuple[str, ...]:
    """A row of the table but for what was wrong: under _TITLES."""
    word = group[0]
    first = ranks.first is not None and word.rank == ranks.first.rank
    state = STATES.get(word.state, printable(word.state)) + (", late" if word.rank in ranks.late else "")
    numbers = (_span([getattr(word, name) for word in group]) for name in _NUMBERS)
    return glyphs.guilty if first else "", _who(group), _steps(group), state, *numbers


def _rows(ranks: Ranks) -> list[list[Word]]:
    """Ranks in groups of those that are alike: the first rank, then the smallest groups, which differ most."""
    groups: dict[tuple[object, ...], list[Word]] = {}
    first = ranks.first.rank if ranks.first else None
    for word in ranks.words:
        late = word.last_step if word.rank in ranks.late else None
        key = word.rank == first, late, word.state, _wrong(word), word.failure is None, word.loss is None
        groups.setdefault(key, []).append(word)
    return sorted(groups.values(), key=lambda group: (group[0].rank != first, len(group), group[0].rank))


def _who(group: Sequence[Word]) -> str:
    """Their numbers, or, of more than fit, how many there are."""
    numbers = folded(word.rank for word in group)
    return numbers if len(numbers) <= 10 else f"{len(group)} ranks"


def _steps(group: Sequence[Word]) -> str:
    steps = sorted({word.last_step for word in group if word.last_step is not None})
    return "" if not steps else str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"


def _span(values: Sequence[float | None]) -> str:
    """A number, or the smallest and the largest where they do not read the same, or their middle where those are too long."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    ends = "..".join(dict.fromkeys(figures(value, 3) for value in (min(there), max(there))))
    return ends if len(ends) <= _LONGEST_SPAN else f"~{figures(median(there), 3)}"


def _wrong(word: Word) -> str:
    """What was not finite first on a rank, else what its trigger saw, or what ended it."""
    if word.wrong is not None:
        where = word.wrong.site if word.wrong.layer is None else f"{word.wrong.layer} {word.wrong.site}"
        return where if word.wrong.own else f"{where}, reduced"
    if word.failure is not None:
        return " ".join(filter(None, (word.failure.trigger, word.failure.layer)))
    return (word.exception or "").split("\n")[0][:80] if word.state in ("exception", "unreadable") else ""


def _told(ranks: Ranks) -> RenderableType:
    """Why that rank, and what else is to be known of all of them."""
    grid = labelled_grid()
    lines: list[tuple[str, str]] = [("ranks", ranks.first.why)] if ranks.first else []
    lines += [("late", f"{named(ranks.late)}: behind the others by two steps or more")] if ranks.late else []
    for apart in ranks.apart[:MOST_APART]:
        what = f"{apart.layer}.{apart.site} is not the same on all ranks since step {apart.step}: other on {named(apart.ranks)}"
        lines.append(("copies", what))
    if len(ranks.apart) > MOST_APART:
        lines.append(("", f"and {len(ranks.apart) - MOST_APART} more parameters"))
    if (norm := _whole_gradient(ranks)) is not None:
        lines.append(("whole", f"the norm of all gradients of all ranks at step {ranks.step} was {figures(norm, 4)}"))
    lines += [("note", note) for note in ranks.notes]
    for name, text in lines:
        grid.add_row(name, Text(printable(text)))
    return Padding(grid, (1, 0, 0, 1), expand=False) if lines else ""


def _whole_gradient(ranks: Ranks) -> float | None:
    """Of parameters that ranks share, at the decisive step; of others each rank's own is that of the whole."""
    if ranks.step not in ranks.norms.steps or not ranks.norms.sites:
        return None
    norm = float(ranks.norms.gradient[ranks.norms.steps.index(ranks.step)])
    return norm if norm == norm else None


def _files(ranks: Ranks, path: Path) -> RenderableType:
    grid = labelled_grid()
    grid.add_row("all", Text(printable(str(path))))
    grid.add_row("this", Text(printable(ranks.file)))
    grid.add_row("again", Text(f"nobs merge {printable(shlex.quote(str(path)))}"))
    return Padding(grid, (1, 0, 0, 1), expand=False)
