"""The report in a JSON text. Executes nothing of what is in it, and needs no torch."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import numpy as np

from . import _checked as checked
from ._codec import FORMAT, SAVED, UPGRADES, VERSION
from ._columns import COLUMNS, DTYPES, ELEMENTS, FIRST, KINDS, OUTPUT, PARAMETER, Floats
from ._history import History
from ._schema import CAUSES, Failure, Finding, Report
from ._table import Shard, Tap, TapTable
from .errors import UnreadableDump, explain


def loads(text: str | bytes, path: str = "the dump") -> Report:
    """The report in a JSON text.

    Raises:
        UnreadableDump: truncated, not a dump of nobs, from a newer release, or hostile.
    """

    def refuse(
        got: str, expected: str = "a dump that nobs wrote", type_this: str = "nobs show PATH, with another file"
    ) -> NoReturn:
        raise UnreadableDump(explain(f"reading {path}", got, expected, type_this)) from None

    try:
        data = json.loads(text, parse_constant=lambda word: refuse(f"the bare token {word}", "strict JSON"))
    except UnreadableDump:
        raise
    except RecursionError:
        refuse("JSON nested too deep")
    except ValueError as error:  # JSONDecodeError, bad UTF-8, integers of thousands of digits
        refuse(f"text that is no JSON, or not all of it ({error})")
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        refuse("JSON of another kind", f'an object with "format": "{FORMAT}"')
    version = data.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        refuse(f"format_version {version!r}", f"a number from 1 to {VERSION}")
    if version > VERSION:
        made_by = data.get("nobs_version")
        wanted = f"=={made_by}" if isinstance(made_by, str) and made_by.replace(".", "").isalnum() else ""
        refuse(f"format_version {version}", f"at most {VERSION}", f"pip install --upgrade 'neural-observer{wanted}'")
    for old in range(version, VERSION):
        data = UPGRADES[old](data)
    try:
        return _report(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        return refuse(f"a dump whose fields do not fit ({type(error).__name__}: {error})")


def _report(data: dict[str, Any]) -> Report:
    failure = data["failure"]
    history = _history(data)
    return Report(
        history=history,
        reason=checked.text(data["reason"]),
        created=checked.text(data["created"]),
        nobs_version=checked.text(data["nobs_version"]),
        failure=None if failure is None else failure_from(failure),
        findings=tuple(_finding(finding) for finding in data["findings"]),
        exception=checked.text_or_none(data.get("exception")),
        rank=checked.whole(data.get("rank", 0)),
        world_size=checked.whole(data.get("world_size", 1)),
        run={checked.text(name): checked.fact(value) for name, value in data.get("run", {}).items()},
    )


def failure_from(data: dict[str, Any]) -> Failure:
    """A failure, as JSON holds it."""
    return Failure(
        trigger=checked.text(data["trigger"]),
        step=checked.whole(data["step"]),
        message=checked.text(data["message"]),
        layer=checked.text_or_none(data.get("layer")),
        site=checked.text_or_none(data.get("site")),
        value=checked.number_or_none(data.get("value")),
        threshold=checked.number_or_none(data.get("threshold")),
        detected_at=checked.whole_or_none(data.get("detected_at")),
    )


def _finding(data: dict[str, Any]) -> Finding:
    cause = checked.text(data["cause"])
    return Finding(
        cause=cause if cause in CAUSES else "unknown",
        layer=checked.text_or_none(data.get("layer")),
        site=checked.text_or_none(data.get("site")),
        step=checked.whole_or_none(data.get("step")),
        confidence=checked.share(data["confidence"]),
        evidence=checked.text(data["evidence"]),
        advice=checked.text(data["advice"]),
    )


def _history(data: dict[str, Any]) -> History:
    """Put the columns together again. The order of layers goes back into the `first` column of their outputs."""
    steps = np.array([checked.whole(step) for step in data["steps"]], dtype=np.int64)
    taps: list[Tap] = []
    lines: list[Floats] = []
    shards: dict[tuple[str, str], Shard] = {}
    for layer in data["layers"]:
        series = data["series"].get(layer["name"], {})
        for site, facts in layer["sites"].items():
            taps.append(Tap(checked.text(layer["name"]), checked.text(layer["type"]), checked.text(site), _kind(site)))
            lines.append(_line(series.get(site, {}), facts, layer["order"], len(steps)))
            if "shard" in facts:
                shards[layer["name"], site] = shard_from(facts["shard"])
        if not layer["sites"]:  # it never ran, and stands in the list all the same
            taps.append(Tap(checked.text(layer["name"]), checked.text(layer["type"]), OUTPUT, OUTPUT))
            lines.append(_line({"norm": [None] * len(steps)}, {"elements": 0, "dtype": None}, None, len(steps)))
    values = np.array(lines, dtype=np.float32).reshape(len(taps), len(steps), len(COLUMNS)).transpose(1, 0, 2)
    scalars = {checked.text(name): checked.numbers(column, len(steps)) for name, column in data["scalars"].items()}
    given = {name: np.array([v is not None for v in column], dtype=np.bool_) for name, column in data["scalars"].items()}
    named = checked.as_long(data.get("batches") or [None] * len(steps), len(steps))
    times_s = checked.numbers(data.get("times_s") or [None] * len(steps), len(steps))
    batches = tuple(map(checked.text_or_none, named))
    return History(steps, TapTable(tuple(taps)), values, scalars, given, batches, times_s, shards)


def shard_from(data: dict[str, Any]) -> Shard:
    """Which part a rank holds, as JSON holds it."""
    shard = Shard(checked.whole(data["index"]), checked.whole(data["of"]), bool(data["addend"]))
    if not 0 <= shard.index < shard.of:
        raise ValueError(f"part {shard.index} of {shard.of}")
    return shard


def _kind(site: str) -> str:
    if site in KINDS[:2]:
        return site
    return f"{PARAMETER}.grad" if site.endswith(".grad") else PARAMETER


def _line(series: dict[str, Any], facts: dict[str, Any], order: int | None, steps: int) -> Floats:
    line = np.zeros((steps, len(COLUMNS)))
    line[:, ELEMENTS] = checked.whole(facts["elements"])
    ran = np.ones(steps, dtype=np.bool_)
    for name in SAVED:
        if name in series:
            line[:, COLUMNS.index(name)] = checked.numbers(series[name], steps)
            ran = np.array([v is not None for v in series[name]], dtype=np.bool_)
    if not (np.isfinite(line[ran, ELEMENTS]) & (line[ran, ELEMENTS] >= 0)).all():
        raise ValueError("elements that are no count")
    code = DTYPES.index(facts["dtype"]) if facts["dtype"] in DTYPES else 0
    line[:, FIRST] = np.where(ran, (0 if order is None else checked.whole(order)) + 1 + code / 16, np.inf)
    line[~ran, :FIRST] = 0
    with np.errstate(over="ignore"):
        if (np.isinf(line.astype(np.float32)) & np.isfinite(line)).any():
            raise ValueError("a number beyond float32")
    return line
