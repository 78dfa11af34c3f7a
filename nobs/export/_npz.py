"""NumPy's npz: the history bit for bit, for a program that calculates with it. `np.load` opens it without pickle.

    steps         int64   [T]
    times_s       float64 [T]           Unix time, NaN where not known
    values        float32 [T, taps, 8]  the eight `columns`; `first` is infinite where a tap did not run
    columns       str     [8]
    layers, types, sites, kinds         str [taps]
    scalars       float64 [T, n]        of the `scalar_names`, NaN where not `given`
    scalar_names  str     [n]
    given         bool    [T, n]
    batches       str     [T]           the text that named the batch, empty where nothing did
    meta          str     []            JSON: failure, findings, reason, exception, rank, facts of the run, version

Arrays of text have no NUL at their end: NumPy cannot hold it, and it stands there as `\\x00`.

    with np.load("rank00000.npz") as data:
        norm = data["values"][:, data["layers"] == "fc", list(data["columns"]).index("norm")]
        failure = json.loads(str(data["meta"]))["failure"]
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .._codec import facts
from .._columns import COLUMNS
from .._schema import Report


def content(report: Report) -> bytes:
    """The report as npz."""
    history = report.history
    taps, steps, names = history.table.taps, len(history), list(history.scalars)
    file = io.BytesIO()
    np.savez(
        file,
        steps=history.steps,
        times_s=history.times_s,
        values=history.values,
        columns=_texts(COLUMNS),
        layers=_texts(tap.layer for tap in taps),
        types=_texts(tap.layer_type for tap in taps),
        sites=_texts(tap.site for tap in taps),
        kinds=_texts(tap.kind for tap in taps),
        scalar_names=_texts(names),
        scalars=np.array([history.scalars[name] for name in names], dtype=np.float64).reshape(len(names), steps).T,
        given=np.array([history.given[name] for name in names], dtype=np.bool_).reshape(len(names), steps).T,
        batches=_texts(batch or "" for batch in history.batches or [None] * steps),
        meta=np.array(json.dumps(facts(report), allow_nan=False)),
    )
    return file.getvalue()


_LONGEST = 1000
"""Of a name; an array of text is as wide as its longest, and a stranger's may be a book."""


def _texts(texts: Iterable[str]) -> NDArray[np.str_]:
    """An array of text, each NUL at an end escaped."""
    kept = ((text, text.rstrip("\0")) for text in (text[:_LONGEST] for text in texts))
    return np.array([stem + "\\x00" * (len(text) - len(stem)) for text, stem in kept], dtype=np.str_)
