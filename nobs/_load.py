"""Read a dump from disk, whatever it turns out to be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ._codec import FORMAT, SAVED, UPGRADES, VERSION, WORDS
from ._columns import COLUMNS, DTYPES, ELEMENTS, FIRST, KINDS, OUTPUT, PARAMETER, Floats
from ._history import History, Tap, TapTable
from ._schema import CAUSES, Failure, Finding, Report
from .errors import UnreadableDump, explain, reason

MOST_BYTES = 1 << 30


def load(path: str | Path) -> Report:
    """The report in a dump. Executes nothing of what is in the file, and needs no torch.

    Args:
        path: a JSON that nobs wrote, or a folder, of which the newest dump is taken.

    Raises:
        UnreadableDump: there is none, or it is truncated, foreign, from a newer release, or hostile.
    """
    file = find(Path(path))
    try:
        size = file.stat().st_size
        content = b"" if size > MOST_BYTES else file.read_bytes()
    except (OSError, ValueError) as error:
        raise _no_file(file, reason(error)) from None
    if size > MOST_BYTES:
        raise _no_file(file, "more than 1 GiB")
    return loads(content, str(file))


def find(path: Path) -> Path:
    """The dump that a path means: the file itself, or of a folder the newest below it, of which the lowest rank."""
    try:
        if not path.is_dir():
            return path
        files = [*path.rglob("rank*.json")] or path.glob("*.json")
        dumps = sorted((file for file in files if file.is_file()), key=lambda p: (p.stat().st_mtime, str(p)))
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be read, a NUL
        raise _no_file(path, reason(error)) from None
    if not dumps:
        raise _no_file(path, "a folder without dumps")
    newest = dumps[-1]
    return min(dumps, key=lambda p: (p.parent != newest.parent, p.name))


def _no_file(path: Path, got: str) -> UnreadableDump:
    return UnreadableDump(
        explain(
            f"reading {path}", got, "a dump, <directory>/<run>/step<N>/rank<N>.json, or a folder of them", "nobs show crashes"
        )
    )


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
        reason=_text(data["reason"]),
        created=_text(data["created"]),
        nobs_version=_text(data["nobs_version"]),
        failure=None if failure is None else _failure(failure),
        findings=tuple(_finding(finding) for finding in data["findings"]),
        exception=_text_or_none(data.get("exception")),
        rank=_whole(data.get("rank", 0)),
        world_size=_whole(data.get("world_size", 1)),
        run={_text(name): _fact(value) for name, value in data.get("run", {}).items()},
    )


def _failure(data: dict[str, Any]) -> Failure:
    return Failure(
        trigger=_text(data["trigger"]),
        step=_whole(data["step"]),
        message=_text(data["message"]),
        layer=_text_or_none(data.get("layer")),
        site=_text_or_none(data.get("site")),
        value=_float_or_none(data.get("value")),
        threshold=_float_or_none(data.get("threshold")),
        detected_at=None if data.get("detected_at") is None else _whole(data["detected_at"]),
    )


def _finding(data: dict[str, Any]) -> Finding:
    cause = _text(data["cause"])
    return Finding(
        cause=cause if cause in CAUSES else "unknown",
        layer=_text_or_none(data.get("layer")),
        site=_text_or_none(data.get("site")),
        step=None if data.get("step") is None else _whole(data["step"]),
        confidence=_share(data["confidence"]),
        evidence=_text(data["evidence"]),
        advice=_text(data["advice"]),
    )


def _history(data: dict[str, Any]) -> History:
    """Put the columns together again. The order of layers goes back into the `first` column of their outputs."""
    steps = np.array([_whole(step) for step in data["steps"]], dtype=np.int64)
    taps: list[Tap] = []
    lines: list[Floats] = []
    for layer in data["layers"]:
        series = data["series"].get(layer["name"], {})
        for site, facts in layer["sites"].items():
            taps.append(Tap(_text(layer["name"]), _text(layer["type"]), _text(site), _kind(site)))
            lines.append(_line(series.get(site, {}), facts, layer["order"], len(steps)))
        if not layer["sites"]:  # it never ran, and stands in the list all the same
            taps.append(Tap(_text(layer["name"]), _text(layer["type"]), OUTPUT, OUTPUT))
            lines.append(_line({"norm": [None] * len(steps)}, {"elements": 0, "dtype": None}, None, len(steps)))
    values = np.array(lines, dtype=np.float32).reshape(len(taps), len(steps), len(COLUMNS)).transpose(1, 0, 2)
    scalars = {_text(name): _floats(column, len(steps)) for name, column in data["scalars"].items()}
    given = {name: np.array([v is not None for v in column], dtype=np.bool_) for name, column in data["scalars"].items()}
    batches = tuple(_text_or_none(batch) for batch in _as_long(data.get("batches", []) or [None] * len(steps), len(steps)))
    return History(steps, TapTable(tuple(taps)), values, scalars, given, batches)


def _kind(site: str) -> str:
    if site in KINDS[:2]:
        return site
    return f"{PARAMETER}.grad" if site.endswith(".grad") else PARAMETER


def _line(series: dict[str, Any], facts: dict[str, Any], order: int | None, steps: int) -> Floats:
    line = np.zeros((steps, len(COLUMNS)))
    line[:, ELEMENTS] = _whole(facts["elements"])
    ran = np.ones(steps, dtype=np.bool_)
    for name in SAVED:
        if name in series:
            line[:, COLUMNS.index(name)] = _floats(series[name], steps)
            ran = np.array([v is not None for v in series[name]], dtype=np.bool_)
    code = DTYPES.index(facts["dtype"]) if facts["dtype"] in DTYPES else 0
    line[:, FIRST] = np.where(ran, (0 if order is None else _whole(order)) + 1 + code / 16, np.inf)
    line[~ran, :FIRST] = 0
    with np.errstate(over="ignore"):
        if (np.isinf(line.astype(np.float32)) & np.isfinite(line)).any():
            raise ValueError("a number beyond float32")
    return line


def _share(value: Any) -> float:
    if not 0 <= _float(value) <= 1:
        raise ValueError(f"{value!r} is not from 0 to 1")
    return _float(value)


def _fact(value: Any) -> object:
    if not (value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(f"{value!r} is no fact of a run")
    return value


def _floats(column: list[Any], steps: int) -> NDArray[np.float64]:
    return np.array([math.nan if v is None else _float(v) for v in _as_long(column, steps)], dtype=np.float64)


def _as_long(column: list[Any], steps: int) -> list[Any]:
    if len(column) != steps:
        raise ValueError(f"{len(column)} entries for {steps} steps")
    return column


def _float(value: Any) -> float:
    if isinstance(value, str):
        return WORDS[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _float_or_none(value: Any) -> float | None:
    return None if value is None else _float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**62) < value < 2**62:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text should be")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)
