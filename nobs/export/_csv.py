"""CSV (RFC 4180), one tidy table: a row for each step and site that ran, and one for each scalar that was given.

    step,time_s,layer,type,order,site,value,norm,rms,absmax,nan,posinf,neginf,nonfinite,zeros,elements,dtype

A scalar has no layer: its name stands in `site`, its number in `value`. A site has its statistics and no `value`. Within a
step come the scalars, then the layers in execution order, numbered from 0 in `order`.

Empty means: not known, or not of that row. What is not finite is `NaN`, `inf` or `-inf`, which pandas, R and Python's `float`
read as what they are; Excel has no such numbers, and leaves the text out of its sums. Statistics have the shortest digits that
give the float32 back, counts all of theirs, scalars and times the shortest for the float64.

Names are as they are, line breaks quoted, but for what a table cannot hold: NUL and lone surrogates are escaped (`\\x00`), and
a name that a spreadsheet would run as a formula (one that begins with `=`, `+`, `-`, `@`) gets an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from .._columns import DTYPES, FIRST, Floats, read
from .._history import History
from .._schema import Report

_MEASURED = ("norm", "rms", "absmax", "nan", "posinf", "neginf", "nonfinite", "zeros", "elements")
_COUNTS = ("nan", "posinf", "neginf", "nonfinite", "elements")
HEAD = ("step", "time_s", "layer", "type", "order", "site", "value", *_MEASURED, "dtype")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def content(report: Report) -> bytes:
    """The history of a report as CSV, in UTF-8."""
    history = report.history
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(HEAD)
    scalars, (sites, counts) = _scalars(history), _sites(history)
    times_s = ["" if time_s == "NaN" else time_s for time_s in _digits(history.times_s)]
    for step, time_s, given, count in zip(history.steps.tolist(), times_s, scalars, counts, strict=True):
        writer.writerows((step, time_s, *cells) for cells in given)
        writer.writerows((step, time_s, *cells) for cells in islice(sites, count))
    return text.getvalue().encode()


def _scalars(history: History) -> list[list[tuple[str, ...]]]:
    """For each step the scalars that were given: their cells from `layer` on."""
    columns = [(name, _name(name), _digits(values)) for name, values in history.scalars.items()]
    rest = ("",) * (len(_MEASURED) + 1)
    return [
        [("", "", "", cell, digits[row], *rest) for name, cell, digits in columns if history.given[name][row]]
        for row in range(len(history))
    ]


def _sites(history: History) -> tuple[Iterator[tuple[Any, ...]], list[int]]:
    """Of all steps, one behind the other, the sites that ran: their cells from `layer` on; and how many each step has."""
    taps = history.table.taps
    order = {layer.name: i for i, layer in enumerate(history.layers)}
    ran_at_all = {layer.name: layer.order for layer in history.layers}
    lines = sorted(range(len(taps)), key=lambda line: order[taps[line].layer])
    names = [
        (_name(tap.layer), _name(tap.layer_type), ran_at_all[tap.layer], _name(tap.site), "")
        for tap in (taps[line] for line in lines)
    ]
    values = history.values[:, lines]
    ran = np.isfinite(values[..., FIRST])
    values, of = values[ran], np.nonzero(ran)[1].tolist()
    numbers = [
        _counts(read(values, name)) if name in _COUNTS else _digits(read(values, name).astype(np.float32)) for name in _MEASURED
    ]
    dtypes = _dtypes(values[..., FIRST])
    cells = ((*names[tap], *measured) for tap, measured in zip(of, zip(*numbers, dtypes, strict=True), strict=True))
    return cells, ran.sum(axis=1).tolist()


def _digits(values: Floats) -> list[str]:
    """The shortest digits that give each number back, in its own precision."""
    bits, places = np.unique(values.view(f"i{values.itemsize}"), return_inverse=True)  # most numbers stand there many times
    texts = bits.view(values.dtype).astype(np.str_)
    return np.where(texts == "nan", "NaN", texts)[places].tolist()  # type: ignore[no-any-return]


def _counts(values: Floats) -> list[str]:
    """Counts, without a point where they are whole."""
    return [digits.removesuffix(".0") for digits in _digits(values)]


def _dtypes(first: Floats) -> list[str]:
    """The dtype behind each reading of the clock; empty where it is not known."""
    codes = np.rint(first % 1 * 16).astype(np.intp)
    return np.array([*DTYPES, ""])[np.minimum(codes, len(DTYPES))].tolist()  # type: ignore[no-any-return]


def _name(text: str) -> str:
    """A user's text as a cell."""
    text = text.replace("\0", "\\x00").encode(errors="backslashreplace").decode()
    return f"'{text}" if text.startswith(_FORMULA) else text
