"""A page of text on a terminal, in a pipe or in a log file: any width, any encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ._glyphs import Glyphs, that_fit

NARROWEST = 10


def empty_table(title: str, notes: Sequence[str]) -> Table:
    """A table without columns yet or lines around it, with a title above and notes below."""
    return Table(
        title=Text(title, style="dim"),
        title_justify="left",
        caption=Text("; ".join(notes), style="dim"),
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def labelled_grid() -> Table:
    """Rows of a bold label and a text that folds, without lines around them."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def print_page(
    parts: Callable[[Glyphs, int], Sequence[RenderableType]], *, file: IO[str] | None = None, width: int | None = None
) -> None:
    """Print what `parts` makes of the glyphs and the width that there are, to a file or stdout.

    Args:
        width: columns; None for the terminal's own.
    """
    console = Console(file=file, width=width, highlight=False, soft_wrap=False)
    if console.width < NARROWEST:  # COLUMNS=0 means that nobody knows
        console.width = 80
    made = parts(that_fit(console.encoding), console.width)
    if console.is_terminal:
        console.print(*made, sep="\n")
        return
    with console.capture() as capture:  # a pipe or a log file: no spaces behind the text
        console.print(*made, sep="\n")
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), file=console.file)
