"""What the ranks of a run tell each other: a few keys in the store of their process group. No collective, and no waiting.

    run                  the run's name: the first rank to ask for it gives it
    present, left        how many recorders there are, and how many of them have ended
    N/alarm              the N-th alarm, from 0 on: the first rank to post it
    N/at/<seat>          how many steps a rank will have closed when it can stop; N/answers: how many ranks have said so
    N/stop               how many closed steps all stop at
    N/dumped             how many ranks have written what they had
    N/shown              rank 0 has printed the report, and all may go

Plan for 10,000 ranks: a healthy rank asks for one key every 5 s (2,000 requests a second of all, some 50 bytes each), and the
store holds 3 keys. An alarm adds 10,000 small keys, which the rank that posted it reads once, all together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from . import _checked as checked


@dataclass(frozen=True)
class Alarm:
    """What a rank that failed tells the others.

    Attributes:
        rank: whose failure it is.
        step: at which it failed; the folder of the dumps has its number.
        last: the last step in that rank's dump. Nobody's dump goes further.
        message: what failed.
        stop: whether the ranks are to stop.
        gone: whether that rank has left its loop already: then nobody can finish another step with it.
    """

    rank: int
    step: int
    last: int
    message: str
    stop: bool
    gone: bool


def encode(alarm: Alarm) -> str:
    """The alarm as JSON."""
    return json.dumps(vars(alarm))


def decode(raw: bytes) -> Alarm:
    """The alarm in a JSON text.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    data = json.loads(raw)
    rank, step, last = (checked.whole(data[name]) for name in ("rank", "step", "last"))
    return Alarm(rank, step, last, checked.text(data["message"]), bool(data["stop"]), bool(data["gone"]))


class Board:
    """The keys of one recorder, the same on every rank.

    Args:
        store: a `torch.distributed.Store`.
        prefix: the same on every rank, and of no other recorder.

    Raises:
        RuntimeError: in any method, where the store is gone.
    """

    def __init__(self, store: Any, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self.seat: int | None = None

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (self._prefix, *parts)))

    def _read(self, *parts: object) -> bytes | None:
        """A value, None where there is none yet: asked for first, as the store waits for a key that is not there."""
        key = self._key(*parts)
        return bytes(self._store.get(key)) if self._store.check([key]) else None

    def _count(self, *parts: object, more: int = 0) -> int:
        return int(self._store.add(self._key(*parts), more))

    def _first(self, value: str, *parts: object) -> bytes:
        """What the first rank to say something has said."""
        return bytes(self._store.compare_set(self._key(*parts), "", value))

    def run_name(self, mine: str) -> str:
        """The run's name, on all ranks the one of the rank that asked first."""
        return self._first(mine, "run").decode()

    def join(self) -> None:
        """Take a seat, once."""
        if self.seat is None:
            self.seat = self._count("present", more=1)

    def leave(self) -> None:
        """This rank answers no more: its loop is over."""
        if self.seat is not None:
            self._count("left", more=1)
            self.seat = None

    def post(self, number: int, alarm: Alarm) -> Alarm:
        """Give the alarm of a number; the one that counts, which another rank may have given."""
        return decode(self._first(encode(alarm), number, "alarm"))

    def alarm(self, number: int) -> Alarm | None:
        """The alarm of a number, if there is one."""
        raw = self._read(number, "alarm")
        return None if raw is None else decode(raw)

    def answer(self, number: int, closed: int) -> None:
        """Say how many steps this rank will have closed when it can stop."""
        self._store.set(self._key(number, "at", self.seat), str(closed))
        self._count(number, "answers", more=1)  # behind the value: who counts may read it

    def all_have(self, number: int, what: str) -> bool:
        """Whether all ranks that are there have given their "answers", or "dumped"."""
        return self._count(number, what) + self._count("left") >= self._count("present")

    def answers(self, number: int) -> list[int]:
        """What all have answered."""
        keys = [self._key(number, "at", seat) for seat in range(1, self._count("present") + 1)]
        if self._count(number, "answers") < len(keys):  # of the dead, and of those that ended, there is none
            keys = [key for key in keys if self._store.check([key])]
        return [int(raw) for raw in self._store.multi_get(keys)] if keys else []

    def decide(self, number: int, closed: int) -> None:
        """All stop when they have closed so many steps."""
        self._store.set(self._key(number, "stop"), str(closed))

    def decision(self, number: int) -> int | None:
        """When all stop, if that is decided."""
        raw = self._read(number, "stop")
        return None if raw is None else int(raw)

    def dumped(self, number: int) -> None:
        """This rank has written what it had."""
        self._count(number, "dumped", more=1)

    def show(self, number: int) -> None:
        """Rank 0 has printed the report."""
        self._count(number, "shown", more=1)

    def shown(self, number: int) -> bool:
        """Whether it has."""
        return self._read(number, "shown") is not None
