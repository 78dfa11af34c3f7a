"""The bytes of a record, and back. Pure functions; what the bytes mean stands in the package's docstring."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .._columns import COLUMNS, ELEMENTS, FIRST
from .._history import Row
from .._names import safe_text
from .._table import TapTable
from ._format import HEAD_BYTES, TAIL_BYTES, Layout

_HEAD = struct.Struct("<IHHQqdI")
_CRC, _DOUBLE = struct.Struct("<I"), struct.Struct("<d")
_LATEST = 2.0**25
"""No clock of a row reads more: beyond 2**24 a float32 does not count."""
_MOST = 2.0**62
"""No tensor has more elements, and no run more steps: a dump takes no larger numbers."""


def encode_record(row: Row, number: int, layout: Layout) -> bytes:
    """All of a record behind its checksum; `checksum` gives that.

    Cost: one copy of the row.
    """
    tail, scalars, left_out = _tail(row.scalars)
    batch = _batch(row.batch, TAIL_BYTES - len(tail))
    named = 0 if row.batch is None else len(batch) + 1
    head = _HEAD.pack(0, scalars, left_out, number, row.step, row.time_s, named)[4:].ljust(HEAD_BYTES - 4, b"\0")
    values = np.ascontiguousarray(row.values, dtype="<f4")
    return b"".join((head, values.data, (tail + batch).ljust(TAIL_BYTES, b"\0")))


def checksum(record: bytes) -> bytes:
    """The four bytes that a record begins with: CRC-32 of all that is behind them."""
    return _CRC.pack(zlib.crc32(record))


def _tail(scalars: Mapping[str, float]) -> tuple[bytes, int, int]:
    """As many scalars as fit, how many those are, and how many did not."""
    parts, used = [], 0
    for name, value in scalars.items():
        prefix = _named(name)
        size = len(prefix) + _DOUBLE.size
        if prefix and used + size <= TAIL_BYTES:
            parts += [prefix, _DOUBLE.pack(value)]
            used += size
    return b"".join(parts), len(parts) // 2, len(scalars) - len(parts) // 2


def _batch(batch: object, room: int) -> bytes:
    """What named the batch, in at most so many bytes. A tensor on an accelerator is described: its text would be waited for."""
    if batch is None:
        return b""
    text = safe_text(batch if isinstance(batch, str) else f"<{type(batch).__name__} {getattr(batch, 'shape', '')}>")
    raw = text.encode("utf-8", "surrogatepass")
    return raw if len(raw) <= room else text[: room // 4].encode("utf-8", "surrogatepass")


@lru_cache(maxsize=256)
def _named(name: str) -> bytes:
    raw = name.encode("utf-8", "surrogatepass")
    return bytes((len(raw),)) + raw if len(raw) < 256 else b""


@dataclass(frozen=True)
class Record:
    """One record: its number from 1 on, its row, and how many scalars of the step did not fit."""

    number: int
    row: Row
    left_out: int


def decode_record(raw: bytes, layout: Layout, table: TapTable) -> Record | None:
    """The record, or None where the bytes are torn or damaged. `is_blank` tells those that were never written."""
    if len(raw) != layout.record_bytes or zlib.crc32(memoryview(raw)[4:]) != _CRC.unpack_from(raw)[0]:
        return None
    _, scalars, left_out, number, step, time_s, named = _HEAD.unpack_from(raw)
    values = np.frombuffer(raw, "<f4", layout.taps * len(COLUMNS), HEAD_BYTES).reshape(layout.taps, len(COLUMNS))
    first, elements = values[:, FIRST], values[:, ELEMENTS]
    if not (-_MOST < step < _MOST and math.isfinite(time_s)):
        return None
    if not (np.isposinf(first) | ((first >= 0) & (first < _LATEST))).all() or not ((elements >= 0) & (elements < _MOST)).all():
        return None
    try:
        read, offset = _scalars(raw, scalars, HEAD_BYTES + values.nbytes)
        batch = raw[offset : offset + named - 1].decode("utf-8", "surrogatepass") if named else None
    except (UnicodeError, IndexError, struct.error):
        return None
    with np.errstate(invalid="ignore"):  # a signalling NaN, which no tap writes, becomes a plain one
        values = values * np.float32(1)
    return Record(number, Row(step, time_s, read, table, values, batch), left_out)


def _scalars(raw: bytes, count: int, offset: int) -> tuple[dict[str, float], int]:
    scalars = {}
    for _ in range(count):
        size = raw[offset]
        name = raw[offset + 1 : offset + 1 + size].decode("utf-8", "surrogatepass")
        (scalars[name],) = _DOUBLE.unpack_from(raw, offset + 1 + size)
        offset += 1 + size + _DOUBLE.size
    return scalars, offset


def number_of(head: bytes) -> int:
    """The number that the beginning of a record claims to have; 0 for a place that was never written, or is cut off."""
    return int(_HEAD.unpack_from(head)[3]) if len(head) == HEAD_BYTES else 0


def is_blank(raw: bytes) -> bool:
    """Whether a place was never written to."""
    return not any(raw[:HEAD_BYTES])
