"""The crash report in a terminal: what failed, where first, why, what to do, and where the files are.

Colours are rich's business: none in a pipe or with NO_COLOR. Every text of the user's is a `Text`, never markup. Where the
terminal's encoding has no block characters, ASCII stands in for them.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .._codec import number
from .._columns import Floats
from .._names import cells, printable, safe_text, shortened
from .._schema import Report
from . import _story

MOST_LAYERS = 16
MOST_SCALARS = 8
NARROWEST = 10
_TYPE, _VALUE = 12, 8  # widths of columns


@dataclass(frozen=True)
class Glyphs:
    """The characters of a picture, from the lowest bar to the highest."""

    bars: str
    bad: str
    absent: str
    guilty: str
    ellipsis: str
    arrow: str
    frame: box.Box


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "✕", "·", "▶", "…", "→", box.HEAVY)
ASCII = Glyphs("_.-=+*#@", "X", ":", ">", "~", "->", box.ASCII)


def print_report(report: Report, path: Path | None = None, *, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print a report, at any width, to a file or stdout.

    Args:
        path: where the dump lies, to be named at the end.
        width: columns; None for the terminal's own.
    """
    console = Console(file=file, width=width, highlight=False, soft_wrap=False)
    if console.width < NARROWEST:  # COLUMNS=0 means that nobody knows
        console.width = 80
    glyphs = UNICODE if _can_show(console.encoding, UNICODE) else ASCII
    parts = _parts(report, path, glyphs, console.width)
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    with console.capture() as capture:  # a pipe or a log file: no spaces behind the text
        console.print(*parts, sep="\n")
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), file=console.file)


def _can_show(encoding: str, glyphs: Glyphs) -> bool:
    try:
        (glyphs.bars + glyphs.bad + glyphs.guilty + glyphs.ellipsis + glyphs.arrow + "┏").encode(encoding)
    except (UnicodeError, LookupError):
        return False
    return True


def _parts(report: Report, path: Path | None, glyphs: Glyphs, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = ["", _head(report, glyphs)]
    if report.findings:
        parts += [_why(report)]
    story = _story.lines(report)
    if story:
        parts += [_layers(report, story, glyphs, width)]
    parts += [_scalars(report, glyphs, width), _files(path), _footer(report)]
    return parts


def _head(report: Report, glyphs: Glyphs) -> RenderableType:
    """What failed, when, and in which layer first."""
    failed = report.failure is not None or report.exception is not None
    style = "bold red" if failed else "bold"
    lines = [Text(_story.headline(report), style=style, overflow="fold")]
    origin, batch = _story.origin(report), _story.batch(report)
    if origin:
        lines.append(Text(f"first wrong: {origin}", overflow="fold"))
    if batch:
        lines.append(Text(f"batch: {batch}", overflow="fold"))
    if report.failure and report.failure.detected_at not in (None, report.failure.step):
        lines.append(Text(f"the host learned of it at step {report.failure.detected_at}", style="dim"))
    title = "nobs: training failed" if report.failure else "nobs: the run ended" if failed else "nobs: recorded steps"
    return Panel(
        Group(*lines), title=Text(title, style=style), title_align="left", border_style="red" if failed else "", box=glyphs.frame
    )


def _why(report: Report) -> RenderableType:
    """The findings, the surest first, each with its numbers and an advice."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for i, finding in enumerate(report.findings[:3]):
        label = "why" if i == 0 else "or"
        grid.add_row(label, Text.assemble((_story.cause(finding), "bold yellow"), f" ({finding.confidence:.0%} sure)"))
        grid.add_row("", Text(printable(finding.evidence)))
        if i == 0:
            grid.add_row("do", Text(printable(finding.advice), style="green"))
    return Padding(grid, (1, 0, 0, 1), expand=False)


def _layers(report: Report, story: list[_story.Line], glyphs: Glyphs, width: int) -> RenderableType:
    """Layers in execution order: a sparkline and the last value forward, and the same backward.

    A narrow terminal shows gradients only, a wide one the layer's type too; the guilty layer's type stands above anyway.
    """
    sides = ("gradient",) if width < 60 else ("output", "gradient")
    of_type = width >= 100
    name_width = max(12, min(max(cells(line.name) for line in story), width * 2 // 5))
    left = width - 2 - (name_width + 1) - (_TYPE + 1 if of_type else 0) - len(sides) * (_VALUE + 2)
    bars = max(3, left // len(sides))
    steps = report.history.steps
    title = Text(f"layers in execution order, steps {steps[0]} to {steps[-1]}: norms on a log scale", style="dim")
    note = f"gradient: the largest of the layer's parameters; {glyphs.bad} NaN or Inf; {glyphs.absent} not recorded"
    left_side = {"title_justify": "left", "caption_justify": "left"}
    caption = Text(note, style="dim")
    table = Table(title=title, caption=caption, box=None, padding=(0, 1, 0, 0), pad_edge=False, **left_side)  # type: ignore[arg-type]
    table.add_column("", width=1, min_width=1, no_wrap=True)
    table.add_column("layer", width=name_width, no_wrap=True)
    if of_type:
        table.add_column("type", width=_TYPE, no_wrap=True, style="dim")
    for side in sides:
        table.add_column(side, width=bars, no_wrap=True)
        table.add_column("last", width=_VALUE, justify="right", no_wrap=True)
    shown = _story.that_matter(story, MOST_LAYERS)
    names = iter(shortened([line.name for line in shown if not isinstance(line, int)], name_width, glyphs.ellipsis))
    for line in shown:
        if isinstance(line, int):
            table.add_row("", Text(f"{glyphs.ellipsis} {line} more", style="dim"))
            continue
        series = {"output": (line.forward, line.forward_bad), "gradient": (line.backward, line.backward_bad)}
        table.add_row(
            Text(glyphs.guilty if line.guilty else "", style="bold red"),
            Text(next(names), style="bold red" if line.guilty else ""),
            *([Text(shortened([line.type], _TYPE, glyphs.ellipsis)[0])] if of_type else []),
            *(cell for side in sides for cell in (_sparkline(*series[side], bars, glyphs), _last(*series[side]))),
        )
    return Padding(table, (1, 0, 0, 0), expand=False)


def _sparkline(values: Floats, bad: NDArray[np.bool_], width: int, glyphs: Glyphs) -> Text:
    """The series in `width` characters, each the largest of its steps, on its own log scale."""
    text = Text()
    logs = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))
    finite = logs[np.isfinite(logs)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    for chunk in np.array_split(np.arange(len(values)), min(width, len(values))):
        part = logs[chunk][np.isfinite(logs[chunk])]
        if bad[chunk].any():
            text.append(glyphs.bad, style="bold red")
        elif np.isposinf(values[chunk]).any():
            text.append(glyphs.bars[-1])
        elif not part.size:
            text.append(glyphs.absent if np.isnan(values[chunk]).all() else glyphs.bars[0], style="dim")
        else:
            share = (float(part.max()) - low) / max(high - low, 1.0)  # less than a power of ten is a flat line
            text.append(glyphs.bars[min(int(share * len(glyphs.bars)), len(glyphs.bars) - 1)])
    return text


def _last(values: Floats, bad: NDArray[np.bool_]) -> Text:
    if len(bad) and bad[-1]:
        return Text("NaN/Inf", style="bold red")
    value = float(values[-1]) if len(values) else float("nan")
    return Text("-" if np.isnan(value) else _figures(value, 3))


def _figures(value: float, count: int) -> str:
    """A number in some figures; not finite as the JSON has it."""
    plain = number(float(value))
    return plain if isinstance(plain, str) else f"{value:.{count}g}"


def _scalars(report: Report, glyphs: Glyphs, width: int) -> RenderableType:
    """The loss and the other scalars, each a sparkline over the window with its first and last value."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="bold", no_wrap=True, max_width=16)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    history = report.history
    # Further learning rates last: of what the user gave there is more to learn.
    there = sorted((name for name in history.scalars if history.given[name].any()), key=lambda name: name.startswith("lr."))
    for name in there[:MOST_SCALARS]:
        given, values = history.given[name], history.scalars[name]
        bad = given & ~np.isfinite(values)
        ends = f"{_figures(values[given][0], 4)} {glyphs.arrow} {_figures(values[given][-1], 4)}"
        grid.add_row(Text(printable(name)), _sparkline(np.abs(values), bad, max(4, width // 3), glyphs), Text(ends))
    if len(there) > MOST_SCALARS:
        grid.add_row("", Text(f"{glyphs.ellipsis} {len(there) - MOST_SCALARS} more in the dump", style="dim"))
    return Padding(grid, (1, 0, 0, 1), expand=False)


def _files(path: Path | None) -> RenderableType:
    if path is None:
        return ""
    picture = path.with_suffix(".png")
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("dump", Text(printable(str(path))))
    if picture.exists():
        grid.add_row("picture", Text(printable(str(picture))))
    grid.add_row("again", Text(f"nobs show {printable(shlex.quote(str(path)))}"))
    return Padding(grid, (1, 0, 0, 1), expand=False)


def _footer(report: Report) -> RenderableType:
    run = {key: printable(safe_text(value)) for key, value in report.run.items()}
    compiled = "compiled" if report.run.get("compiled") else "eager"
    facts = [f"torch {run.get('torch', '?')}", run.get("device", "?"), compiled, f"{len(report.history)} steps kept"]
    if report.world_size > 1:
        facts.append(f"rank {report.rank} of {report.world_size}")
    return Text(" " + " | ".join([f"nobs {printable(report.nobs_version)}", *facts]), style="dim", overflow="fold")
