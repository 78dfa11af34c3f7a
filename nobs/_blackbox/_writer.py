"""The writing end: one file, and the policy around it. Nothing here ends a run, and nothing is said more than once."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._codec import SUFFIX
from .._history import Row
from .._log import complain
from .._names import safe_text
from .._schema import Failure
from ._format import PREAMBLE_BYTES, Header, Layout, Status, encode_header, encode_preamble, encode_status
from ._record import checksum, encode_record
from ._storage import storage_for

MOST_FAILURES = 4
"""So many of the last failures stand in the status."""


class BoxFile:
    """One file. Its disk space is taken when it is made, so that a disk that fills up later costs no record.

    Args:
        folder: where to; made if need be.
        rank: the file is `rank<NNNNN>.blackbox`, with a number behind it where another recorder's file lies.
        durable: wait for the disk after each record.

    Raises:
        OSError: no room, no permission.
    """

    def __init__(self, folder: Path, header: Header, durable: bool) -> None:
        raw = encode_header(header)
        self.header = header
        self.layout = Layout.of(len(raw), len(header.table), header.capacity + 1)
        self._written = (0, 0)
        self.status = Status()
        self._status_number = 0
        self._durable = durable
        self._pid = os.getpid()
        self._error_before = getattr(sys, "last_value", None)
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._descriptor = _create(folder, header.rank)
        self._identity = _identity(os.fstat(self._descriptor))
        try:
            self._storage = storage_for(self._descriptor, self.path, self.layout.total_bytes)
            self._put(PREAMBLE_BYTES, raw)
            self.tell(self.status)
            self._put(0, encode_preamble(self.layout, raw))  # last: a reader takes the file for whole by it
        except BaseException:  # on a full disk half a file is worth nothing, and in the way
            os.close(self._descriptor)
            self.path.unlink(missing_ok=True)
            raise

    @property
    def rows(self) -> int:
        """The number of the row that comes next, as the ring counts them."""
        return self._written[1]

    def write(self, row: Row, number: int | None = None) -> None:
        """Put a row into the next place. Cost: two copies and a CRC-32.

        Args:
            number: of the row, from 0 on, as the ring counts; the next if it is not told.
        """
        records, rows = self._written
        record = encode_record(row, records + 1, self.layout)
        offset = self.layout.record(records % self.layout.places)
        # Torn anywhere in between, the checksum does not hold, and the place is one more than the capacity asks for.
        self._storage.put(offset + 4, record)
        self._storage.put(offset, checksum(record))
        # Last, and at once: a row that found no room, or was interrupted, is not there, and the next one has its place.
        self._written = (records + 1, (rows if number is None else number) + 1)
        self._sync(offset, self.layout.record_bytes)

    def tell(self, status: Status) -> None:
        """Write how the run stands, in the place of the status before last."""
        number = self._status_number + 1
        raw = encode_status(status, number)
        self.status = status  # also where there is no room for it now: it comes with the next
        self._put(self.layout.status(number), raw)
        self._status_number = number  # last: the other place, which is whole, is not written to before this one is

    def _put(self, offset: int, content: bytes) -> None:
        self._storage.put(offset, content)
        self._sync(offset, len(content))

    def _sync(self, offset: int, size: int) -> None:
        if self._durable:
            self._storage.sync(offset, size)

    def lost(self) -> str | None:
        """How the file was lost, if it was: "deleted", "cut" or "closed". A store into a cut one would kill the process."""
        facts = os.fstat(self._descriptor)
        if _identity(facts) != self._identity:  # somebody has closed all descriptors, and this one is of another file by now
            return "closed"
        return "cut" if facts.st_size < self.layout.total_bytes else None if facts.st_nlink else "deleted"

    def copy_of(self, other: BoxFile) -> None:
        """Take over all that another file with the same header holds."""
        begin = self.layout.status_offset
        self._put(begin, other._storage.get(begin, self.layout.total_bytes - begin))
        self._written, self._status_number, self.status = other._written, other._status_number, other.status

    def close(self) -> None:
        """Let go of the file; the bytes stay where they are."""
        self._storage.close()
        os.close(self._descriptor)

    def end_with_the_process(self) -> None:
        """The recorder is gone, or the program is at its end, and nobody said how the run ended."""
        with contextlib.suppress(Exception):  # nobody is left to be told
            if os.getpid() == self._pid and self.lost() is None and self.status.state == "running":
                error = getattr(sys, "last_value", None)  # what the interpreter has just printed; in a notebook it goes on
                error = None if error is self._error_before or hasattr(sys, "ps1") else error
                ended = {"state": "ended"} if error is None else {"state": "exception", "exception": described(error)}
                self.tell(replace(self.status, **ended))  # type: ignore[arg-type]
        with contextlib.suppress(Exception):
            self.close()


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _create(folder: Path, rank: int) -> tuple[Path, int]:
    """A file of a name that no other recorder has, open."""
    for n in range(1, 10_000):
        path = folder / f"rank{rank:05d}{f'-{n}' if n > 1 else ''}{SUFFIX}"
        try:
            return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileExistsError:
            continue
    raise FileExistsError(f"10000 black boxes of rank {rank} in {folder}")


def described(error: BaseException) -> str:
    """The exception in a line or some."""
    return ": ".join(filter(None, (type(error).__name__, safe_text(error, 2000))))


class BlackBox:
    """What a recorder writes to: a file made with the first row, or none where none can be made. Never raises.

    A file that somebody deletes is made anew with all it held, and one that is cut without. Where a folder cannot be written
    to the next is taken.
    A worker that is forked while there is a file never writes.

    Args:
        folders: where to, the best first; empty to write nothing.
        header: called when the file is made.
        durable: see BoxFile.
    """

    def __init__(self, folders: Sequence[Path], header: Callable[[], Header], durable: bool = False) -> None:
        self._folders = tuple(folders)
        self._header = header
        self._durable = durable
        self._pid = -1
        self._file: BoxFile | None = None
        self._finalizer: weakref.finalize[..., BlackBox] | None = None
        self._off = not folders
        self._said: set[str] = set()
        # The thread that listens for other ranks tells of their failures. A signal may come in the middle of a write.
        self._writing = threading.RLock()

    @property
    def path(self) -> Path | None:
        """The file, None where there is none (yet)."""
        return self._file.path if self._file else None

    @property
    def rows(self) -> int:
        """The number of the row that comes next, as the ring counts them."""
        return self._file.rows if self._file else 0

    def write(self, row: Row, number: int | None = None) -> None:
        """Keep a row; its number is the ring's, the next if it is not told."""
        self._try(lambda file: file.write(row, number))
        if self._file is not None and self._file.status.state != "running":  # somebody caught what ended it, and goes on
            self.tell(state="running", exception=None)

    def failed(self, failure: Failure, state: str) -> None:
        """Note what a trigger saw, before anybody tries to make a report of it, and whether the run goes on."""
        if self._file is not None:
            self.tell(failures=(*self._file.status.failures, failure)[-MOST_FAILURES:], state=state)

    def tell(self, **news: Any) -> None:
        """Note how the run stands: fields of Status. Nothing where no row was ever kept."""
        if self._file is not None:
            self._try(lambda file: file.tell(replace(file.status, **news)))

    def _try(self, write: Callable[[BoxFile], None]) -> None:
        if self._off or (self._file is not None and os.getpid() != self._pid):
            return
        with self._writing:
            self._try_alone(write)

    def _try_alone(self, write: Callable[[BoxFile], None]) -> None:
        try:
            lost = None if self._file is None else self._file.lost()
            file = self._made(self._file, lost) if self._file is None or lost else self._file
            if file is not None:
                write(file)
        except OSError as error:  # of a disk that is full just now; the next row may find room
            self._say("could not write to its black box", error)
        except Exception as error:
            self._off = True
            self._say(f"stopped writing its black box, and goes on without: {type(error).__name__}", error)

    def _made(self, old: BoxFile | None, lost: str | None) -> BoxFile | None:
        """A file, in place of one that was lost; None, for good, where no folder takes it."""
        header = self._header() if old is None else old.header
        self._file = next((file for folder in self._folders if (file := self._file_in(folder, header)) is not None), None)
        if old is not None:
            if self._file is not None and lost == "deleted":  # it is open here, and holds all that nobody else can find
                self._file.copy_of(old)
            self._let_go(old)
            self._say(f"found its black box {lost}: {old.path}")
        if self._file is None:
            self._off = True
            self._say("goes on without a black box")
        else:
            self._pid = os.getpid()
            self._finalizer = weakref.finalize(self, BoxFile.end_with_the_process, self._file)
            if old is not None or self._file.path.parent != self._folders[0]:
                self._say(f"writes its black box to {self._file.path}")
        return self._file

    def _file_in(self, folder: Path, header: Header) -> BoxFile | None:
        try:
            return BoxFile(folder, header, self._durable)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            self._say(f"could not make a black box in {folder}", error)
            return None

    def _let_go(self, file: BoxFile) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        if file.lost() != "closed":
            file.close()

    def _say(self, what: str, error: Exception | None = None) -> None:
        """Each text once: a folder may vanish at every step."""
        if what not in self._said:
            self._said.add(what)
            complain(what, error)
