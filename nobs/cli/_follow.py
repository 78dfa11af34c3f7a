"""A black box, followed while a run writes to it: each record is read once. Nothing is locked, signalled or written."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .._blackbox import OpenBox, Status
from .._find import beside, dump_of
from .._history import Row
from .._names import safe_text
from .._order import execution_order
from ..errors import UnreadableDump, explain
from ..render._scene import SIDES, Norms, Scene
from ._layer_norms import LayerLines, LayerNorms

SETTLED_S = 2.0
"""So long a run has to be over: what ended it may yet be caught."""
DUMP_S = 10.0
"""So long is waited for the dump of a run that failed, while its process lives."""
LOST_S = 5.0
"""So long is waited for another black box, where the run's was deleted or cut: a recorder makes one at its next step."""
QUIET_S, QUIET_STEPS = 5.0, 10.0
"""Silent is a run of which nothing was heard for so many seconds, and so many times what a step took."""
_RATED = 20


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is kept of a row."""

    step: int
    time_s: float
    scalars: dict[str, float]
    layers: LayerNorms


class Follower:
    """The last steps of a run, as of the last `look`.

    Args:
        box: the black box.

    Raises:
        UnreadableDump: it is no black box.
    """

    def __init__(self, box: Path) -> None:
        self._lost_at_s: float | None = None
        self._status = Status()
        self._alive: bool | None = None
        self._news_at_s = time.monotonic()
        self._adopt(OpenBox(box))
        if self.last_time_s is not None:
            self._news_at_s -= max(0.0, time.time() - self.last_time_s)

    def _adopt(self, box: OpenBox) -> None:
        self._box = box
        self._identity = _identity(box.path)
        self._lines = LayerLines(box.header.table)
        self._rows: deque[_Seen] = deque(maxlen=box.header.capacity)
        self._last: Row | None = None
        self._number = 0
        self._damaged = 0 if box.alive() else box.records()[1]  # of one that is written to, one may be torn just now
        self.look()

    def close(self) -> None:
        """Let go of the file."""
        self._box.__exit__(None, None, None)

    @property
    def path(self) -> Path:
        """The black box."""
        return self._box.path

    def look(self) -> bool:
        """Read what is new; whether anything is.

        Raises:
            UnreadableDump: the file is gone, and no other has taken its place.
        """
        before = self.state
        self._alive = self._box.alive()  # before the records: a process that dies in between has written them
        if (lost := self._lost()) is not None:
            return self._look_elsewhere(lost)
        self._lost_at_s = None
        fresh = self._box.since(self._number)
        for record in fresh:
            row = record.row
            self._rows.append(_Seen(row.step, row.time_s, dict(row.scalars), self._lines.norms_of(row)))
            self._number, self._last = record.number, row
        status = self._box.status() or self._status
        news = bool(fresh) or repr(status) != repr(self._status)  # by its text: a NaN in it is never equal to itself
        self._status = status
        if news:
            self._news_at_s = time.monotonic()
        return news or self.state != before

    def _lost(self) -> str | None:
        """How the file was lost since it was opened: "deleted", "replaced" or "cut"."""
        before, now = self._identity, _identity(self.path)
        if before is None or now is None:
            return "deleted"
        return "replaced" if now[:2] != before[:2] else "cut" if now[2] < before[2] else None

    def _look_elsewhere(self, lost: str) -> bool:
        """Go on with what the same recorder writes to since, if there is such a file."""
        now_s = time.monotonic()
        self._lost_at_s = self._lost_at_s or now_s
        if (box := self._another()) is not None:
            self.close()
            self._adopt(box)
            return True
        if self._alive is False or now_s - self._lost_at_s >= LOST_S:
            got = f"a black box that was {lost} while it was watched"
            raise UnreadableDump(explain(f"watching {self.path}", got, "one that stays", f"nobs watch {self.path.parent}"))
        return False

    def _another(self) -> OpenBox | None:
        """The box beside it, of the same rank and recorder, that is not the one lost, and not older."""
        lost = self._box.header
        for path in sorted(beside(self.path), reverse=True):
            with suppress(UnreadableDump):  # not made yet, or only half
                box = OpenBox(path)
                same = (box.header.process, box.header.created, box.header.table) == (lost.process, lost.created, lost.table)
                new = path != self.path or ((now := _identity(path)) is not None and now[:2] != (self._identity or now)[:2])
                if same and new and (box.last_time_s() or 0.0) >= (self.last_time_s or 0.0):
                    return box
                box.__exit__(None, None, None)
        return None

    # -- how it stands ---------------------------------------------------------------------------------------------

    @property
    def quiet_s(self) -> float:
        """How long nothing was heard of the run."""
        return time.monotonic() - self._news_at_s

    @property
    def state(self) -> str:
        """One of `nobs.render._vitals.LOOKS`."""
        if self._status.state != "running":
            return self._status.state
        if self._alive is False:
            return "died"
        rate = self.steps_per_s
        return "silent" if self.quiet_s > max(QUIET_S, QUIET_STEPS / rate if rate else 0.0) else "running"

    @property
    def standing(self) -> tuple[str, int]:
        """The state, and for how many whole seconds nothing was heard, where that is too long."""
        state = self.state
        return state, int(self.quiet_s) if state == "silent" else 0

    @property
    def over(self) -> bool:
        """Whether the run has ended for good: its process is dead, or has said so and left it at that."""
        if self._alive is False:
            return True
        if self._status.state == "running" or self.quiet_s < SETTLED_S:
            return False
        return self._status.state == "ended" or self.quiet_s > DUMP_S or self.dump() is not None

    def dump(self) -> Path | None:
        """The dump that the run made since its last record."""
        return dump_of(self.path)

    @property
    def last_time_s(self) -> float | None:
        """When the last step was, in Unix time."""
        return self._rows[-1].time_s if self._rows else None

    @property
    def steps_per_s(self) -> float | None:
        """The median of the last steps; None where their times tell nothing."""
        rows = list(self._rows)[-1 - _RATED :]
        took_s = np.diff([row.time_s for row in rows]) / np.maximum(1, np.diff([row.step for row in rows]))
        took_s = took_s[np.isfinite(took_s) & (took_s > 0)]
        return float(1 / np.median(took_s)) if took_s.size else None

    def scene(self) -> Scene:
        """All that is known by now."""
        rows, count = list(self._rows), len(self._lines.names)
        names = list(dict.fromkeys(name for row in rows for name in row.scalars))
        clocks = np.array([row.layers.clocks for row in rows]).reshape(len(rows), count)
        sides = {
            side: Norms(
                np.array([row.layers.norms[side] for row in rows]).reshape(len(rows), count),
                np.array([row.layers.bad[side] for row in rows], np.bool_).reshape(len(rows), count),
            )
            for side in SIDES
        }
        order = execution_order(clocks) if rows else []
        read = np.any([(side.last >= 0) for side in sides.values()], axis=0)
        without_output = [int(layer) for layer in np.flatnonzero(read) if layer not in set(order)]
        return Scene(
            name=self.path.absolute().parent.name,
            facts=self._facts(),
            state=self.standing[0],
            quiet_s=self.standing[1],
            capacity=self._box.header.capacity,
            steps=np.array([row.step for row in rows], np.int64),
            scalars={name: np.array([row.scalars.get(name, np.nan) for row in rows]) for name in names},
            given={name: np.array([name in row.scalars for row in rows], np.bool_) for name in names},
            steps_per_s=self.steps_per_s,
            exception=self._status.exception,
            failures=self._status.failures,
            layers=self._lines.names,
            types=self._lines.types,
            executed=(*order, *without_output),
            sides=sides,
        )

    def _facts(self) -> tuple[str, ...]:
        header = self._box.header
        rank = f"rank {header.rank} of {header.world_size}" if header.world_size > 1 else f"rank {header.rank}"
        compiled = "compiled" if header.run.get("compiled") else "eager"
        run = [safe_text(header.run.get(name, "?")) for name in ("device", "torch")]
        process = header.process
        damaged = [f"records damaged: {self._damaged}"] if self._damaged else []
        known = (f"pid {process.pid} on {process.host}", run[0], compiled, f"torch {run[1]}", f"nobs {header.nobs_version}")
        return (rank, *damaged, *known)

    def worst_site(self, layer: int, side: str) -> str:
        """The site that the worst layer's side is about, in the last row."""
        return self._lines.site(self._last, self._lines.names[layer], side) if self._last is not None else side


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Which file it is, and its size; None where it is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size
