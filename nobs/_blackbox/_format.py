"""The bytes in front of the records, and back. Pure functions; what the bytes mean stands in the package's docstring."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from .. import _checked as checked
from .._codec import number, plain_failure
from .._columns import COLUMNS, KINDS
from .._names import safe_text
from .._parse import failure_from, shard_from
from .._schema import Failure
from .._table import Shard, Tap, TapTable
from ._process import Process

MAGIC = b"\x89nobsbox"
"""No text begins like this, and a transfer that takes the file for text destroys it."""
FORMAT, VERSION = "nobs.blackbox", 1

_PREAMBLE = struct.Struct("<8sIIIIIIQQ")
PREAMBLE_BYTES = _PREAMBLE.size + 4
STATUS_BYTES = 16384
_PAGE = 4096

HEAD_BYTES = 64
LINE_BYTES = 4 * len(COLUMNS)
TAIL_BYTES = 2048
"""Of each record, what the scalars take, and the text that names the batch behind them."""

_CRC = struct.Struct("<I")
_STATUS = struct.Struct("<IIQ")


@dataclass(frozen=True)
class Header:
    """What is known of a run when its black box is made, and does not change."""

    nobs_version: str
    created: str
    rank: int
    world_size: int
    run: Mapping[str, object]
    capacity: int
    table: TapTable
    triggers: tuple[tuple[str, Mapping[str, object]], ...]
    process: Process
    shards: Mapping[tuple[str, str], Shard] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """How a run stands: one of STATES, what its triggers saw (the last few), what ended it, where its dump lies."""

    state: str = "running"
    failures: tuple[Failure, ...] = ()
    exception: str | None = None
    dump: str | None = None


STATES = ("running", "ended", "failed", "exception", "sigterm")


@dataclass(frozen=True)
class Layout:
    """Where things stand in the file, in bytes."""

    header_bytes: int
    taps: int
    places: int
    record_bytes: int
    status_bytes: int
    status_offset: int
    records_offset: int

    @staticmethod
    def of(header_bytes: int, taps: int, places: int) -> Layout:
        """The layout that this version writes."""
        status = _round_up(PREAMBLE_BYTES + header_bytes)
        record = HEAD_BYTES + taps * LINE_BYTES + TAIL_BYTES
        return Layout(header_bytes, taps, places, record, STATUS_BYTES, status, status + 2 * STATUS_BYTES)

    @property
    def total_bytes(self) -> int:
        """The size of the whole file."""
        return self.record(self.places)

    def record(self, place: int) -> int:
        """Where the record of a place begins."""
        return self.records_offset + place * self.record_bytes

    def status(self, number: int) -> int:
        """Where a status of this number stands: two places take turns, so that one is always whole."""
        return self.status_offset + number % 2 * self.status_bytes


def _round_up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def encode_header(header: Header) -> bytes:
    """The header as JSON in UTF-8."""
    taps = [[tap.layer, tap.layer_type, tap.site, tap.kind] for tap in header.table.taps]
    triggers = [[name, {key: _settable(value) for key, value in settings.items()}] for name, settings in header.triggers]
    data = {
        "format": FORMAT,
        "nobs_version": header.nobs_version,
        "created": header.created,
        "rank": header.rank,
        "world_size": header.world_size,
        "run": dict(header.run),
        "capacity": header.capacity,
        "statistics": COLUMNS,
        "taps": taps,
        "triggers": triggers,
        "process": vars(header.process),
        "shards": [[layer, site, vars(shard)] for (layer, site), shard in header.shards.items()],
    }
    return json.dumps(data, allow_nan=False).encode()


def _settable(value: object) -> object:
    return number(value) if isinstance(value, float) else value


def encode_preamble(layout: Layout, header: bytes) -> bytes:
    """The first bytes of the file: everything that is needed to find the rest."""
    sizes = (len(header), zlib.crc32(header), layout.record_bytes, layout.places, layout.status_bytes)
    packed = _PREAMBLE.pack(MAGIC, VERSION, *sizes, layout.status_offset, layout.records_offset)
    return packed + _CRC.pack(zlib.crc32(packed))


@dataclass(frozen=True)
class Preamble:
    """What the first bytes say; `layout` has no taps yet, which the header knows."""

    version: int
    header_crc: int
    layout: Layout


def decode_preamble(raw: bytes) -> Preamble | None:
    """The preamble, or None where the bytes are none or damaged."""
    if len(raw) < PREAMBLE_BYTES or zlib.crc32(raw[: _PREAMBLE.size]) != _CRC.unpack_from(raw, _PREAMBLE.size)[0]:
        return None
    magic, version, header, crc, record, places, status, status_offset, records_offset = _PREAMBLE.unpack_from(raw)
    layout = Layout(header, 0, places, record, status, status_offset, records_offset)
    return Preamble(version, crc, layout) if magic == MAGIC else None


def decode_header(raw: bytes) -> Header:
    """The header.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: it is not what this version writes.
    """
    data = json.loads(raw)
    process = data["process"]
    if data["format"] != FORMAT or tuple(data["statistics"]) != COLUMNS:
        raise ValueError(f"statistics {data['statistics']!r}")
    return Header(
        nobs_version=checked.text(data["nobs_version"]),
        created=checked.text(data["created"]),
        rank=checked.whole(data["rank"]),
        world_size=checked.whole(data["world_size"]),
        run={checked.text(name): checked.fact(value) for name, value in data["run"].items()},
        capacity=checked.whole(data["capacity"]),
        table=_table(tuple(map(tuple, data["taps"]))),
        triggers=tuple((checked.text(name), _settings(settings)) for name, settings in data["triggers"]),
        process=Process(checked.whole(process["pid"]), *(checked.text(process[k]) for k in ("host", "boot", "space", "started"))),
        shards={(checked.text(layer), checked.text(site)): shard_from(shard) for layer, site, shard in data.get("shards", ())},
    )


def _settings(data: Mapping[str, Any]) -> dict[str, object]:
    return {name: checked.number(value) if isinstance(value, str) else checked.fact(value) for name, value in data.items()}


@lru_cache(maxsize=4)
def _table(taps: tuple[tuple[Any, ...], ...]) -> TapTable:
    """The table of some taps; of many ranks, which have the same, one."""
    if len({(layer, site) for layer, _, site, _ in taps}) < len(taps):
        raise ValueError("two taps of one site")
    return TapTable(tuple(_tap(*tap) for tap in taps))


def _tap(layer: Any, layer_type: Any, site: Any, kind: Any) -> Tap:
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of a site")
    return Tap(checked.text(layer), checked.text(layer_type), checked.text(site), kind)


def encode_status(status: Status, number: int) -> bytes:
    """The status, its texts cut where it would not fit into its place."""
    for longest in (2000, 400, 80, 16):
        text = json.dumps(_plain(status, longest), allow_nan=False, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if len(text) <= STATUS_BYTES - _STATUS.size:
            break
    packed = _STATUS.pack(0, len(text), number)[4:] + text
    return _CRC.pack(zlib.crc32(packed)) + packed


def _plain(status: Status, longest: int) -> dict[str, Any]:
    def cut(value: object) -> object:
        return safe_text(value, longest) if isinstance(value, str) else value

    failures = [{name: cut(value) for name, value in plain_failure(failure).items()} for failure in status.failures]
    return {"state": status.state, "failures": failures, "exception": cut(status.exception), "dump": cut(status.dump)}


def decode_status(raw: bytes) -> tuple[int, Status] | None:
    """The number of a status and what it says; None where it is torn, or was never written."""
    if len(raw) < _STATUS.size:
        return None
    crc, size, number = _STATUS.unpack_from(raw)
    text = raw[_STATUS.size : _STATUS.size + size]
    if number == 0 or len(text) != size or zlib.crc32(raw[4 : _STATUS.size + size]) != crc:
        return None
    try:
        data = json.loads(text.decode("utf-8", "surrogatepass"))
        state = data["state"] if data["state"] in STATES else "running"
        failures = tuple(failure_from(failure) for failure in data["failures"])
        exception, dump = checked.text_or_none(data["exception"]), checked.text_or_none(data["dump"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return number, Status(state, failures, exception, dump)
