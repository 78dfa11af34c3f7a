"""The characters that a terminal draws with, and what they draw: a series in a few columns, a number in a few figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.text import Text

from .._codec import number
from .._columns import Floats


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


_UNICODE = Glyphs("▁▂▃▄▅▆▇█", "✕", "·", "▶", "…", "→", box.HEAVY)
_ASCII = Glyphs("_.-=+*#@", "X", ":", ">", "~", "->", box.ASCII)


def that_fit(encoding: str) -> Glyphs:
    """Block characters where the encoding has them, else ASCII."""
    try:
        (_UNICODE.bars + _UNICODE.bad + _UNICODE.guilty + _UNICODE.ellipsis + _UNICODE.arrow + "┏").encode(encoding)
    except (UnicodeError, LookupError):
        return _ASCII
    return _UNICODE


def sparkline(values: Floats, bad: NDArray[np.bool_], width: int, glyphs: Glyphs) -> Text:
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


def figures(value: float, count: int) -> str:
    """A number in some figures; not finite as the JSON has it."""
    plain = number(float(value))
    return plain if isinstance(plain, str) else f"{value:.{count}g}"
