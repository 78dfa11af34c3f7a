"""The memory: rows of the last steps in a device ring, copied to pinned host memory without waiting.

`add` is a few kernel launches: the running row into the ring, the ring's row to its pinned row (non-blocking), an event
behind it. `drain` looks at events that are done. The host waits in `wait` only, and in `add` when the device is a whole
ring behind, which is counted. On CPU the ring is the host memory itself, and every row has arrived at once.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from . import _codec, _group, _launch, _stats
from ._columns import ABSMAX, COLUMNS, NORM
from ._given import batch_name, checked_scalar
from ._history import History, Row
from ._link import Link, link_for
from ._row import FIRST_TAP_LINE, LOSS_SCALE, LiveRow, rows_of
from ._schema import Report
from ._table import TapTable
from .errors import BadSetting, NobsWarning, NotInstrumented, explain, whole_number


class _Record(NamedTuple):
    """What the host knows of a step without asking the device; `number` counts the rows added, from 0 on."""

    number: int
    step: int
    time_s: float
    scalars: Mapping[str, float]
    on_device: Mapping[str, tuple[int, int]]
    batch: object


class RingBuffer:
    """The memory on its own, for a hand-written loop. `nobs.Recorder` is this with triggers and a clock.

    Args:
        model: an instrumented model, wrapped or not (torch.compile, DDP).
        capacity: how many steps to remember.

    Raises:
        NotInstrumented: the model has no taps.
        BadSetting: a capacity below 1.

    Attributes:
        waits: how often `add` had to wait because the device was a whole ring behind.
        facts: what else is known of the run, for its reports; plain numbers and strings.

    Memory: `capacity x (3 + taps) x 32` bytes on the host, and as much on an accelerator.
    """

    def __init__(self, model: nn.Module, *, capacity: int = 100) -> None:
        self.capacity = whole_number("capacity=...", "capacity", capacity, 100)
        self._off = _launch.disabled()
        self.row = LiveRow(TapTable(()), torch.device("cpu"), 1) if self._off else _row_of(model)
        self.waits = 0
        self.facts: dict[str, object] = {}
        self._said = False
        self._device = self.row.values.device
        self._link = self._new_link()
        # Lines are decoded by a product with these: of two arrays of one shape it takes a sixth of the time.
        self._signs = _stats.decode(np.ones((len(self.row.table), len(COLUMNS)), dtype=np.float32))
        self.row.owned_by(self)  # last: a ring that could not be made takes nothing from another
        self._records: deque[_Record] = deque(maxlen=capacity)
        self._overtaken: deque[tuple[int, Row]] = deque(maxlen=capacity)
        self._begun = 0
        self._drained = 0
        self._graphs_before = counters["stats"]["unique_graphs"]

    def _new_link(self) -> Link:
        try:
            return link_for(self.row.values, self.capacity)
        except (RuntimeError, TypeError, MemoryError) as error:
            got = f"capacity={self.capacity}, which is {self.capacity * self.row.values.numel() * 4:.3g} bytes"
            raise BadSetting(explain("making the ring", got, "a ring that fits into memory", "capacity=100")) from error

    def add(self, step: int, loss: Tensor | float | None, *, batch: object = None, **scalars: Tensor | float) -> None:
        """Close the running step: its row goes into the ring and on its way to the host, and the next step begins.

        Args:
            step: the number of the step.
            loss: a tensor with one element, on any device, or a number.
            batch: whatever names the batch; its text is in the report.
            scalars: further numbers of the step, tensors with one element or plain numbers.

        Cost: three small kernels, and one a scalar that lives on the device. Waits for nothing (see `waits`).
        """
        if self._off:
            return
        if self.row.broken is not None and not self._said:
            self._said = True
            warnings.warn(f"nobs stopped recording, the training goes on: {self.row.broken!r}", NobsWarning, stacklevel=2)
        given = {"loss": loss, **scalars} if loss is not None else scalars
        self.close_step(step, {name: checked_scalar(name, value) for name, value in given.items()}, batch)

    def close_step(self, step: int, scalars: Mapping[str, Tensor | float | None], batch: object = None) -> None:
        """`add` with checked scalars in one mapping, so that they may have any name; those that are None are left out."""
        if self.row.owner is None or self.row.owner() is not self:
            raise BadSetting(
                explain(
                    "adding a step",
                    "a ring that a newer one of the same model has replaced",
                    "one ring a model",
                    "use the newer one",
                )
            )
        if self.row.values.device != self._device and not self._follow():
            return
        record = self._write_scalars(step, scalars, batch)
        self.row.settle()
        place = self._make_room()
        self._link.send(self.row.values, place)
        self._records.append(record)
        self.row.next_step()

    @property
    def _added(self) -> int:
        """How many rows there were. Counted by the records, so that Ctrl-C between two lines leaves no half a count."""
        return self._records[-1].number + 1 if self._records else self._begun

    @property
    def last_step(self) -> int:
        """The number of the newest row's step; 0 before the first."""
        return self._records[-1].step if self._records else 0

    def _write_scalars(self, step: int, given: Mapping[str, Tensor | float | None], batch: object) -> _Record:
        """Numbers stay on the host; tensors on an accelerator go into the row, so that nobody asks for their value."""
        on_host: dict[str, float] = {}
        for name, value in given.items():
            if isinstance(value, float):
                on_host[name] = value
            elif isinstance(value, Tensor) and value.device.type != "cpu":
                self.row.write_scalar(name, value)
            elif value is not None:
                on_host[name] = float(value.item() if isinstance(value, Tensor) else value)
        return _Record(self._added, step, time.time(), on_host, dict(self.row.written_scalars), batch_name(batch))

    def _follow(self) -> bool:
        """The model has moved: memory begins anew on its new device. Not where a part moved alone; the next call says so."""
        if not self.row.on_one_device():
            return False
        self._device = self.row.values.device
        self._link = self._new_link()
        self._begun = self._drained = self._added
        self._records.clear()
        return True

    def _make_room(self) -> int:
        """The place of the next row. A row there that nobody has drained is kept for `drain`, up to `capacity` of them."""
        if self._added - self._drained >= self.capacity:
            place = self._drained % self.capacity
            if not self._link.arrived(place):
                self.waits += 1
                self._link.wait(place)
            self._overtaken.append((self._drained, self._read(self._drained)))
            self._drained += 1
        self._begun = self._added
        if len(self._records) == self.capacity:  # before its place is written over, so that no record names another's values
            self._records.popleft()
        return self._begun % self.capacity

    def drain(self) -> Iterator[Row]:
        """The rows that have arrived since the last call, in order, none left out; never waits."""
        return (row for _, row in self.arrivals())

    def arrivals(self) -> Iterator[tuple[int, Row]]:
        """The same, each with its number."""
        while self._overtaken:
            yield self._overtaken.popleft()
        while self._drained < self._added and self._link.arrived(self._drained % self.capacity):
            number = self._drained
            row = self._read(number)
            self._drained += 1
            yield number, row

    def rows(self, since: int = 0) -> list[tuple[int, Row]]:
        """The rows in memory that have arrived, from a number on, each with its number; drained or not."""
        numbers = range(max(since, self._added - len(self._records)), self._added)
        read = [(n, self._read(n)) for n in numbers if n < self._drained or self._has_arrived(n)]
        # Another thread may ask (see `_lookout`) while rows are added: what has been written over since is left out.
        oldest = self._records[0].number if self._records else 0
        return [(n, row) for n, row in read if n >= oldest]

    def _has_arrived(self, number: int) -> bool:
        try:
            return self._link.arrived(number % self.capacity)
        except RuntimeError:  # after an error of the device nobody can ask it; what was drained is here
            return False

    def wait(self) -> None:
        """Wait until every row added so far has arrived."""
        for number in range(self._drained, self._added):
            self._link.wait(number % self.capacity)

    def history(self, *, wait: bool = True) -> History:
        """The last `capacity` steps; with `wait=False` those of them that have arrived."""
        if wait:
            self.wait()
        return History.of([row for _, row in self.rows()], self.row.table, self.row.shards)

    def report(self, reason: str, history: History) -> Report:
        """A report of the history with the facts of this run, without failure or findings."""
        return Report(
            history=history,
            reason=reason,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            nobs_version=_launch.installed_version(),
            rank=_group.rank(),
            world_size=_group.world_size(),
            run={
                "torch": str(torch.__version__),
                "device": str(self.row.values.device),
                "compiled": counters["stats"]["unique_graphs"] > self._graphs_before,
                "capacity": self.capacity,
                "every": self.row.every,
                **self.facts,
            },
        )

    def save_json(self, path: str | Path, trigger_reason: str = "manual") -> Path:
        """Write the last steps as a dump that `nobs show` opens; waits for rows that are on their way. Judges nothing."""
        if self._off:
            return Path(path)
        return _codec.save(self.report(trigger_reason, self.history()), Path(path))

    def _read(self, number: int) -> Row:
        """Decode one arrived row: signs, scalars, and gradients divided by the loss scale that was on them."""
        lines = self._link.rows[number % self.capacity]
        record = self._records[number - self._records[0].number]
        scalars = dict(record.scalars)
        for name, (line, column) in record.on_device.items():
            scalars[name] = float(lines[line, column])
        values = lines[FIRST_TAP_LINE:] * self._signs
        scale = scalars[LOSS_SCALE] if LOSS_SCALE in record.on_device else 1.0
        if scale > 0 and scale != 1:
            scales = np.where(self.row.table.are_gradients, np.float32(scale), np.float32(1))
            values[:, NORM] /= scales
            values[:, ABSMAX] /= scales
        return Row(record.step, record.time_s, scalars, self.row.table, values, record.batch)


def _row_of(model: nn.Module) -> LiveRow:
    """The row of an instrumented model, found through whatever wraps it."""
    rows = rows_of(model)
    if len(rows) != 1:
        got = f"a {type(model).__name__} without taps" if not rows else f"a model with {len(rows)} parts instrumented apart"
        raise NotInstrumented(
            explain("recording a model", got, "a model instrumented once, before torch.compile", "model = nobs.instrument(model)")
        )
    rows[0].follow(model)
    return rows[0]
