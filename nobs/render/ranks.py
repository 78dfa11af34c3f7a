"""All ranks of a run in a terminal: which rank, layer and step first, the ranks side by side where they differ, then the report of
that rank as `terminal` has it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .._names import printable, shortened
from .._ranks import STATES, Ranks, Word, folded, named
from . import _story
from ._glyphs import Glyphs, figures
from ._page import empty_table, print_page
from .terminal import body, footer

MOST_ROWS = 12
MOST_APART = 3
_NUMBERS = ("loss", "gradient", "output")
_FIXED = 47  # columns that all of the table but the names of layers takes


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
    failed = ranks.first.ranks
    return (
        f"training failed on all {len(failed)} ranks"
        if len(failed) == ranks.world_size
        else f"training failed, {len(failed)} {of} ranks"
    )


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
    return ", ".join([*where, *([] if first.step is None else [f"at step {first.step}"])])


def _table(ranks: Ranks, glyphs: Glyphs, width: int) -> RenderableType:
    """The ranks, those that are alike in one row, the first one marked."""
    rows = _rows(ranks)
    shown = rows if len(rows) <= MOST_ROWS else rows[: MOST_ROWS - 1]
    room = max(8, width - _FIXED)
    wrongs = shortened([_wrong(group[0]) for group in shown], room, glyphs.ellipsis)
    at = "" if ranks.step is None else f" at step {ranks.step}"
    notes = ["gradient: norm of all gradients on the rank"]
    layer = ranks.first.layer if ranks.first else None
    notes += [f"output: norm of that of {printable(layer)}"] if layer is not None else []
    table = empty_table(f"ranks{at}", notes)
    for name, justify in (
        ("", "left"),
        ("rank", "left"),
        ("last", "right"),
        ("state", "left"),
        *((n, "right") for n in _NUMBERS),
    ):
        table.add_column(Text(name, style="dim"), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column(Text("first wrong", style="dim"), no_wrap=True)
    for group, wrong in zip(shown, wrongs, strict=True):
        first = ranks.first is not None and group[0].rank == ranks.first.rank
        style = "bold red" if first else "" if group[0].state in ("called", "ended", "running") else "bold"
        numbers = [_span([getattr(word, name) for word in group]) for name in _NUMBERS]
        state = STATES.get(group[0].state, group[0].state) + (", late" if group[0].rank in ranks.late else "")
        last = _steps(group)
        cells = [_who(group), last, state, *numbers, printable(wrong)]
        table.add_row(glyphs.guilty if first else "", *(Text(cell, style=style) for cell in cells))
    if len(shown) < len(rows):
        rest = [word for group in rows[len(shown) :] for word in group]
        table.add_row("", Text(f"{glyphs.ellipsis} {len(rest)} more", style="dim"))
    return Padding(table, (1, 0, 0, 0), expand=False)


def _rows(ranks: Ranks) -> list[list[Word]]:
    """Ranks in groups of those that are alike: the first rank, then those that differ from most, then the others."""
    groups: dict[tuple[object, ...], list[Word]] = {}
    for word in ranks.words:
        alone = ranks.first is not None and word.rank == ranks.first.rank
        late = word.rank in ranks.late
        key = (alone, late, word.last_step if late else None, word.state, _wrong(word), word.failure is None, word.loss is None)
        groups.setdefault(key, []).append(word)
    most = max(map(len, groups.values()))
    first = ranks.first.rank if ranks.first else None
    return sorted(
        groups.values(), key=lambda group: (group[0].rank != first, len(group) == most and len(group) > 1, group[0].rank)
    )


def _who(group: Sequence[Word]) -> str:
    """Their numbers, or, of more than fit, how many there are."""
    numbers = folded(word.rank for word in group)
    return numbers if len(numbers) <= 10 else f"{len(group)} ranks"


def _steps(group: Sequence[Word]) -> str:
    steps = sorted({word.last_step for word in group if word.last_step is not None})
    return "" if not steps else str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"


def _span(values: Sequence[float | None]) -> str:
    """A number, or the smallest and the largest where they do not read the same."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    ends = dict.fromkeys(figures(value, 3) for value in (min(there), max(there)))
    return "..".join(ends)


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
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    lines: list[tuple[str, str]] = [("ranks", ranks.first.why)] if ranks.first else []
    lines += [("late", f"{named(ranks.late)}: behind the others by two steps or more")] if ranks.late else []
    for apart in ranks.apart[:MOST_APART]:
        what = (
            f"{apart.layer}.{apart.site} is not the same as on the lowest rank, on {named(apart.ranks)}, since step {apart.step}"
        )
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
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("all", Text(printable(str(path))))
    grid.add_row("this", Text(printable(ranks.file)))
    grid.add_row("again", Text(f"nobs merge {printable(shlex.quote(str(path)))}"))
    return Padding(grid, (1, 0, 0, 1), expand=False)
