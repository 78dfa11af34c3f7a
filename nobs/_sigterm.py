"""A watch on SIGTERM: something is done first, and then what would have been done without it."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class SigtermWatch:
    """Calls `first` on SIGTERM in the process and main thread that started it; forked workers inherit it and skip `first`."""

    def __init__(self, first: Callable[[], object]) -> None:
        """`first` is a method, held weakly: a signal handler must not keep a model alive."""
        self._first = weakref.WeakMethod(first)
        self._process = -1
        self._previous: Any = None
        self._holding = 0
        self._noted: tuple[int, FrameType | None] | None = None

    def start(self) -> None:
        """Put the handler in; a second time, and outside the main thread, where Python has no signals, nothing happens."""
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) != self._handle:
            self._previous = signal.signal(signal.SIGTERM, self._handle)

    def stop(self) -> None:
        """Give the handler back that was there, unless somebody has put in another since."""
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A dump is being made: a launcher that stops all ranks behind the first must not cut it short, nor ask for another.

        What a signal would have done is done behind the block, without `first`.
        """
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
            if self._noted is not None and not self._holding:
                noted, self._noted = self._noted, None
                self._as_without(*noted)

    @property
    def in_child(self) -> bool:
        """Whether this is a forked worker of the process that started the watch."""
        return os.getpid() != self._process

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holding and not self.in_child:
            self._noted = number, frame
            return
        first = self._first()
        if first is not None and not self.in_child:
            first()
        self._as_without(number, frame)

    def _as_without(self, number: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
