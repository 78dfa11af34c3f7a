"""TensorBoard: a folder with one event file, for `tensorboard --logdir FOLDER`. Needs the package tensorboard, and no more.

Tags are `nobs/<scalar>`, `nobs/<layer>/<site>/<statistic>` for norm, absmax and nonfinite, and `nobs/report`, a text that says
what failed. A point stands at its step and at the time that it was recorded; NaN and Inf stay what they are. TensorBoard has
float32: a scalar beyond that reads as infinity there.

The name of the file is always the same, so that a second export replaces the first. Names of layers are tags only.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from .._columns import FIRST, read
from .._names import printable, safe_text
from .._schema import Report
from ..errors import BadSetting, explain, reason
from ._tracks import distinct, moments_s

FILE = "events.out.tfevents.0.nobs"
_REPORT = "report"
_STATISTICS = ("norm", "absmax", "nonfinite")


def content(report: Report) -> bytes:
    """The report as an event file.

    Raises:
        BadSetting: the package tensorboard is not there, or does not work.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
    except Exception as error:  # it is not there; or it is, and protobuf is of another age, which has errors of its own
        type_this = "pip install 'neural-observer[tensorboard]', or pip install tensorboard"
        expected = "the package tensorboard, which writes its files"
        raise BadSetting(explain("exporting to TensorBoard", safe_text(reason(error)), expected, type_this)) from None
    file = io.BytesIO()
    writer = RecordWriter(file)
    moments = moments_s(report.history).tolist()
    writer.write(Event(wall_time=(moments or [0.0])[0], file_version="brain.Event:2").SerializeToString())
    steps = report.history.steps.tolist()
    for step, moment, values in zip(steps, moments, _points(report), strict=True):
        writer.write(Event(wall_time=moment, step=step, summary={"value": values}).SerializeToString())
    last = {"wall_time": (moments or [0.0])[-1], "step": (steps or [0])[-1]}
    writer.write(Event(**last, summary={"value": [_text(report)]}).SerializeToString())
    return file.getvalue()


def _points(report: Report) -> Iterator[list[dict[str, Any]]]:
    """For each step a point of each scalar that was given, and of each statistic of each site that ran."""
    history = report.history
    scalars = list(history.scalars)
    sites = (f"{tap.layer}/{tap.site}/{name}" for tap in history.table.taps for name in _STATISTICS)
    tags = distinct(f"nobs/{name}" for name in (_REPORT, *scalars, *sites))[1:]
    ran = np.isfinite(history.values[..., FIRST])
    statistics = np.stack([read(history.values, name) for name in _STATISTICS], axis=-1)
    for row in range(len(history)):
        values = [float(history.scalars[name][row]) for name in scalars] + statistics[row].ravel().tolist()
        there = [bool(history.given[name][row]) for name in scalars] + np.repeat(ran[row], len(_STATISTICS)).tolist()
        points = zip(tags, values, there, strict=True)
        yield [{"tag": tag, "simple_value": value} for tag, value, is_there in points if is_there]


def _text(report: Report) -> dict[str, Any]:
    """What failed, as text; in a block of code, as TensorBoard reads Markdown and names may be anything."""
    found = [f"{finding.cause}: {finding.evidence}; {finding.advice}" for finding in report.findings]
    text = "\n".join(f"    {printable(line)}" for line in (report.summary(), *found))
    tensor = {"dtype": "DT_STRING", "tensor_shape": {"dim": [{"size": 1}]}, "string_val": [text.encode()]}
    return {"tag": f"nobs/{_REPORT}", "metadata": {"plugin_data": {"plugin_name": "text"}}, "tensor": tensor}
