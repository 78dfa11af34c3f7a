"""An open black box: its header once, its status and its records whenever they are asked for, also while it is written to.

It reads and does not map: a file that somebody cuts while it is mapped would kill the reader.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn

from .._history import History
from .._names import printable
from ..errors import UnreadableDump, explain, reason
from ._format import (
    HEAD_BYTES,
    MAGIC,
    PREAMBLE_BYTES,
    VERSION,
    Header,
    Layout,
    Status,
    decode_header,
    decode_preamble,
    decode_status,
)
from ._process import is_alive
from ._record import Record, decode_record, is_blank, number_of

_MOST_HEADER_BYTES = 1 << 28
_MOST_PLACES = 1 << 22


@dataclass(frozen=True, eq=False)
class Recording:
    """All that a black box holds.

    Attributes:
        history: the last steps, as many as the capacity and intact.
        status: how the run stood; None where that is damaged.
        alive: whether the process that writes it still runs; None where nobody can tell from here.
        damaged: places whose record is torn, changed, or cut off.
        left_out: scalars that did not fit into their record.
    """

    header: Header
    history: History
    status: Status | None
    alive: bool | None
    damaged: int
    left_out: int


class OpenBox:
    """A black box that is read while it may be written to.

    Args:
        path: the file.

    Raises:
        UnreadableDump: it is no black box, is cut before its first record, or comes from a newer release.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._plain_file()
        try:
            self.header, self.layout = self._open()
        except BaseException:
            self._file.close()
            raise

    def _plain_file(self) -> BinaryIO:
        try:
            if self.path.is_file():
                return self.path.open("rb", buffering=0)  # closed by __exit__
            got = "no plain file" if self.path.exists() else "no such file"  # of a pipe nobody knows when it ends
        except (OSError, ValueError) as error:
            got = reason(error)
        return self._refuse(got)

    def __enter__(self) -> OpenBox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _refuse(self, got: str, expected: str = "an intact black box", type_this: str = "") -> NoReturn:
        type_this = type_this or "nobs show PATH, with another file"
        raise UnreadableDump(explain(f"reading {printable(str(self.path))}", got, expected, type_this)) from None

    def _open(self) -> tuple[Header, Layout]:
        preamble = decode_preamble(self._read(0, PREAMBLE_BYTES))
        if preamble is None:
            begin = self._read(0, len(MAGIC))
            blank = "a black box that nobody has finished to make" if not begin.strip(b"\0") else "a file of another kind"
            self._refuse("a black box whose first bytes are damaged or cut off" if begin == MAGIC else blank)
        if preamble.version > VERSION:
            self._refuse(f"version {preamble.version}", f"at most {VERSION}", "pip install --upgrade neural-observer")
        raw = self._read(PREAMBLE_BYTES, min(preamble.layout.header_bytes, _MOST_HEADER_BYTES))
        if len(raw) != preamble.layout.header_bytes or zlib.crc32(raw) != preamble.header_crc:
            self._refuse("a black box whose header is damaged or cut off")
        try:
            header = decode_header(raw)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            self._refuse(f"a header whose fields do not fit ({type(error).__name__}: {error})")
        layout = Layout.of(len(raw), len(header.table), preamble.layout.places)
        fits = {**vars(preamble.layout), "taps": layout.taps} == vars(layout) and layout.places == header.capacity + 1
        if not fits or not 1 < layout.places < _MOST_PLACES:
            self._refuse("sizes that do not fit together")
        return header, layout

    def _read(self, offset: int, size: int) -> bytes:
        """As many bytes as there are."""
        parts = []
        try:
            self._file.seek(offset)
            while size > 0 and (part := self._file.read(size)):
                parts.append(part)
                size -= len(part)
        except (OSError, OverflowError) as error:
            self._refuse(reason(error))
        return b"".join(parts)

    def status(self) -> Status | None:
        """How the run stands by now, None where both places are damaged."""
        places = (self._read(self.layout.status(number), self.layout.status_bytes) for number in range(2))
        found = [status for raw in places if (status := decode_status(raw)) is not None]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def at(self, place: int) -> bytes:
        """The bytes of a place, fewer where the file is cut."""
        return self._read(self.layout.record(place), self.layout.record_bytes)

    def records(self) -> tuple[list[Record], int]:
        """All intact records, the oldest first, and how many are torn, changed or cut off."""
        there = self._places()
        intact, damaged = [], 0
        for place in range(there):
            raw = self.at(place)
            if (record := self._intact(raw, place)) is not None:
                intact.append(record)
            elif len(raw) == self.layout.record_bytes and not is_blank(raw):
                damaged += 1
            elif len(raw) < self.layout.record_bytes:
                there -= 1
        intact.sort(key=lambda record: record.number)
        # Of places behind the end of the file those count that were written to: all, once the ring has gone round.
        written = min(self.layout.places, intact[-1].number) if intact else self.layout.places
        return intact, damaged + max(0, written - there)

    def _places(self) -> int:
        """The places that the file is long enough for, the last maybe in part: what it says of itself may be any number."""
        behind = os.fstat(self._file.fileno()).st_size - self.layout.records_offset
        return min(self.layout.places, max(0, -(-behind // self.layout.record_bytes)))

    def last_time_s(self) -> float | None:
        """When the last intact record was made, in Unix time; reads little but the records' beginnings."""
        found = (self._intact_of(number) for number in reversed(self._claimed()))
        return next((record.row.time_s for record in found if record is not None), None)

    def since(self, number: int) -> list[Record]:
        """The records behind that of a number, the oldest first; reads little else than their beginnings."""
        # Whatever stands there by now: a fast writer may have gone round since.
        found = (self._intact_of(claimed) for claimed in self._claimed() if claimed > number)
        fresh = {record.number: record for record in found if record is not None and record.number > number}
        return [fresh[n] for n in sorted(fresh)]

    def _claimed(self) -> list[int]:
        """The numbers that the records claim to have, ascending; of a damaged one it may be any."""
        heads = (self._read(self.layout.record(place), HEAD_BYTES) for place in range(self._places()))
        return sorted({number_of(head) for head in heads} - {0})

    def _place_of(self, number: int) -> int:
        return (number - 1) % self.layout.places

    def _intact(self, raw: bytes, place: int) -> Record | None:
        """The record in the bytes of a place, if it is one, and belongs there."""
        record = decode_record(raw, self.layout, self.header.table)
        return record if record is not None and record.number > 0 and self._place_of(record.number) == place else None

    def _intact_of(self, number: int) -> Record | None:
        """Whatever stands where that number stood."""
        return self._intact(self.at(self._place_of(number)), self._place_of(number))

    def alive(self) -> bool | None:
        """Whether the process that writes it still runs; None where nobody can tell from here."""
        return is_alive(self.header.process)

    def recording(self) -> Recording:
        """All that it holds now."""
        alive = self.alive()  # before the records: a process that dies in between has written them
        status = self.status()  # likewise: of a run that fails in between the row may be there and the failure not, but not
        records, damaged = self.records()  # the failure without its row
        kept = [record for record in records if record.number > records[-1].number - self.header.capacity]
        history = History.of([record.row for record in kept], self.header.table, self.header.shards)
        return Recording(self.header, history, status, alive, damaged, sum(record.left_out for record in kept))


def read(path: Path) -> Recording:
    """All that a black box holds.

    Raises:
        UnreadableDump: see OpenBox.
    """
    with OpenBox(path) as box:
        return box.recording()
