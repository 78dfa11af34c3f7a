"""A report as strict JSON, and back.

Non-finite floats are the strings "NaN", "Infinity" and "-Infinity" (protobuf's mapping), null means not recorded: in a
crash report what is not finite is the finding, and must survive a trip through any language. Reading executes nothing, and
whatever is wrong with a file ends in `UnreadableDump`.

Format versions: 1, the first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._columns import COLUMNS, FIRST
from ._history import History, Layer, Site
from ._schema import Failure, Report

FORMAT = "nobs.report"
SUFFIX = ".blackbox"
"""What the files of the other format end in; see `_blackbox`."""
VERSION = 1
UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""format_version -> the pure function that makes the next version of it."""

SAVED = ("norm", "absmax", "nan", "posinf", "neginf", "zeros", "elements")


def dumps(report: Report) -> str:
    """The report as JSON text, one line a top-level key."""
    parts = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in _plain(report).items())
    return "{" + ",\n ".join(parts) + "}\n"


def save(report: Report, path: Path) -> Path:
    """Write a report; the file appears whole or not at all."""
    return write_whole(path, dumps(report).encode())


def write_whole(path: Path, content: bytes, *, over: bool = True) -> Path:
    """Write a file under a name of this process, then rename it: nobody ever sees half of it.

    Raises:
        FileExistsError: there is a file, and `over` is False; of two that write at once one gets it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.unlink(missing_ok=True)
        with draft.open("xb") as file:  # never through a link that somebody has laid there
            file.write(content)
        if over:
            draft.replace(path)
        else:
            _name(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _name(draft: Path, path: Path) -> None:
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # a file system without links: somebody may be quicker
        if path.exists():
            raise FileExistsError(f"{path} exists") from None
        draft.replace(path)


def number(value: float | None) -> float | str | None:
    """A float as JSON can hold it."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def facts(report: Report) -> dict[str, Any]:
    """What a report says besides its history, as JSON can hold it."""
    return {
        "nobs_version": report.nobs_version,
        "created": report.created,
        "reason": report.reason,
        "exception": report.exception,
        "rank": report.rank,
        "world_size": report.world_size,
        "run": dict(report.run),
        "failure": report.failure and plain_failure(report.failure),
        "findings": [vars(finding) for finding in report.findings],
    }


def _plain(report: Report) -> dict[str, Any]:
    history = report.history
    return {
        "format": FORMAT,
        "format_version": VERSION,
        **facts(report),
        "layers": [_layer(layer) for layer in history.layers],
        "steps": history.steps.tolist(),
        "times_s": history.times_s.tolist() if np.isfinite(history.times_s).all() else [],
        "batches": list(history.batches) if any(b is not None for b in history.batches) else [],
        "scalars": {
            name: [number(float(v)) if there else None for v, there in zip(values, history.given[name], strict=True)]
            for name, values in history.scalars.items()
        },
        "series": _series(history),
    }


def plain_failure(failure: Failure) -> dict[str, Any]:
    """A failure as JSON can hold it."""
    return {**vars(failure), "value": number(failure.value), "threshold": number(failure.threshold)}


def _layer(layer: Layer) -> dict[str, Any]:
    sites = {name: _site(site) for name, site in layer.sites.items()}
    return {"name": layer.name, "type": layer.type, "order": layer.order, "sites": sites}


def _site(site: Site) -> dict[str, Any]:
    return {"dtype": site.dtype, "elements": site.elements} | ({"shard": vars(site.shard)} if site.shard else {})


def _series(history: History) -> dict[str, dict[str, dict[str, list[float | str | None]]]]:
    """layer -> site -> statistic -> one entry a step. Left out: sites that never ran, statistics that are zero throughout."""
    series: dict[str, dict[str, dict[str, list[float | str | None]]]] = {}
    for line, tap in enumerate(history.table.taps):
        values = history.values[:, line]
        ran = np.isfinite(values[:, FIRST])
        if not ran.any():
            continue
        site = series.setdefault(tap.layer, {}).setdefault(tap.site, {})
        for name in SAVED:
            column = values[:, COLUMNS.index(name)]
            constant = name == "elements" and (column[ran] == column[ran][0]).all()  # it stands in `layers`
            if not constant and not (ran.all() and (column == 0).all()):
                site[name] = [_short(v) if there else None for v, there in zip(column.tolist(), ran, strict=True)]
    return series


def _short(value: float) -> float | str | None:
    """The shortest decimals that give the float32 back."""
    return float(f"{value:.9g}") if math.isfinite(value) else number(value)
