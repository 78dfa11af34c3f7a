"""Hears of other ranks' failures, in a thread of its own, and agrees with them when to stop.

The thread alone talks to the store. The training only sets and reads a few fields, and waits (bounded) once something failed.
A rank that hangs in a collective hears all the same, and dumps what lies in its host memory.

Nobody may stop at once: the others are in their next step already, and would wait in its collectives for ever. So each rank
answers an alarm with the number of steps that it will have closed when it can stop: those that it has, and the running one.
All go on to the largest answer, which is a step or so, and stop there. The host of a rank can be ahead of its device, and so of
other ranks, by as many steps as its ring holds, and no more. Where ranks are further apart they share no collectives, and all
stop at the end of their running step. So they do where a rank does not answer in ANSWER_S, as it is dead and no collective ends
without it; and where the rank that failed has left its loop by an exception.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from ._board import Alarm, Board
from ._log import log

Result = TypeVar("Result")

ANSWER_S = 10.0
"""So long ranks wait for the answers of others, and then for their dumps; twenty intervals, if that is more."""
GRACE_S = 2.0
"""So long a rank that is called may take to close the last step of the dump."""
INTERVAL_S = 0.5
REQUESTS_S = 2000
"""How often a rank asks the store: every INTERVAL_S, or as seldom as makes so many requests a second of all ranks together."""


class Lookout:
    """The ears of one recorder. Without a board, as with one rank, all of it does nothing.

    Args:
        board: what the ranks share.
        rank: this process's.
        world_size: how many there are.
        capacity: ranks that are further apart than so many steps are not in step: they share no collectives.
        dump: a method, called in the thread with another rank's alarm; it writes what this rank has, and is held weakly.
    """

    def __init__(self, board: Board | None, rank: int, world_size: int, capacity: int, dump: Callable[[Alarm], None]) -> None:
        self._board = board
        self.rank = rank
        self._capacity = capacity
        self._dump = weakref.WeakMethod(dump)
        self._interval_s = max(INTERVAL_S, world_size / REQUESTS_S)
        self.patience_s = max(ANSWER_S, 20 * self._interval_s)
        self._lock = threading.Lock()
        self._closed = self._number = 0
        self._alarm: Alarm | None = None
        self._agreed: int | None = None
        self._owes_dump = self._hangs = False
        self._errands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to listen."""
        if self._board is not None and self._thread is None:
            known = weakref.ref(self), self._board, self._errands
            self._thread = threading.Thread(target=_listen, args=known, name="nobs", daemon=True)
            self._thread.start()
            weakref.finalize(self, _end, self._thread, self._errands)  # a recorder without a `with`, and the end of the program

    def stop(self) -> None:
        """Listen no more: the loop is over."""
        if self._thread is not None:
            _end(self._thread, self._errands)
            self._thread = None

    # -- the training's side ---------------------------------------------------------------------------------------

    def due(self, closed: int, last: bool) -> bool:
        """So many steps are closed: whether there is an alarm, and it is time to do as it asks. Healthy, it asks nobody.

        Args:
            last: no further step will come.
        """
        with self._lock:
            self._closed = closed
            alarm = self._alarm
        return alarm is not None and (last or not alarm.stop or closed >= self._stop_at())

    @property
    def heard(self) -> bool:
        """Whether there is an alarm that is not dealt with yet."""
        return self._alarm is not None

    @property
    def gone(self) -> bool:
        """Whether a rank has called and left its loop: what then ends here is most likely a collective without it."""
        return self._alarm is not None and self._alarm.gone

    def call(self, alarm: Alarm, closed: int) -> None:
        """This rank failed, and is about to write its dump: tell the others. Where one was quicker, its alarm counts.

        Where nobody can be told there is no alarm (`heard`), and this rank acts for itself.
        """
        self._errand(lambda board: self._post(board, alarm, closed))

    def _stop_at(self) -> int:
        """How many steps all have closed when they stop: waits until it is agreed; 0, which is at once, where it cannot be."""
        alarm = self._alarm
        if alarm is None or alarm.gone:
            return 0
        if self._agreed is None:
            self._agreed = self._errand(self._agree if alarm.rank == self.rank else self._await_decision) or 0
        return self._agreed

    def gather(self) -> None:
        """This rank's dump is written: wait until all have theirs, half of `patience_s` at most."""
        self._errand(self._gather)

    def let_go(self) -> None:
        """Rank 0 has printed the report, which takes all files that there are."""
        self._errand(lambda board: board.show(self._number))

    def linger(self) -> None:
        """Wait until it has, `patience_s` at most: the launcher stops all ranks when the first of them is gone."""
        self._errand(lambda board: self._until(lambda: board.shown(self._number)))

    def done(self) -> None:
        """This alarm is dealt with: listen for the next."""
        with self._lock:
            self._alarm, self._agreed = None, None
            self._number += 1

    def _errand(self, do: Callable[[Board], Result]) -> Result | None:
        """What the thread is to ask the store; None where the store, or the rank that had it, is gone."""
        board = self._board
        if board is None or self._thread is None or self._hangs:
            return None
        answer: Future[Result] = Future()

        def run() -> None:
            try:
                answer.set_result(do(board))
            except Exception as error:
                answer.set_exception(error)

        self._errands.put(run)
        try:
            return answer.result(self.patience_s + 1)
        except Exception as error:  # of the store, or the thread hangs in a connection to a machine that is gone
            self._hangs = not answer.done()
            log.debug("nobs could not reach the other ranks", exc_info=error)
            return None

    # -- the thread's side -----------------------------------------------------------------------------------------

    def _look(self, board: Board) -> None:
        """Ask once whether another rank failed."""
        number = self._number
        if self._alarm is None and (alarm := board.alarm(number)) is not None:
            self._hear(board, number, alarm)

    def _hear(self, board: Board, number: int, alarm: Alarm) -> None:
        with self._lock:
            if self._alarm is not None or number != self._number:
                return
            self._alarm, answer = alarm, self._closed + 1
        if alarm.stop:
            board.answer(number, answer)
        # The same steps in all dumps: the training may be in that step still. Where it hangs, what there is must do.
        self._until(lambda: self._closed > alarm.last, GRACE_S)
        dump = self._dump()
        if dump is not None:
            dump(alarm)
        board.dumped(number)

    def _post(self, board: Board, alarm: Alarm, closed: int) -> None:
        if self._alarm is None:  # else it was heard before, and answered
            counts = board.post(self._number, alarm)
            board.answer(self._number, closed)
            with self._lock:
                self._alarm, self._owes_dump = counts, True

    def _gather(self, board: Board) -> None:
        number = self._number
        if self._owes_dump:
            self._owes_dump = False
            board.dumped(number)
        self._until(lambda: board.all_have(number, "dumped"), self.patience_s / 2)

    def _agree(self, board: Board) -> int:
        number = self._number
        all_alive = self._until(lambda: board.all_have(number, "answers"))
        answers = board.answers(number)
        in_step = max(answers, default=0) - min(answers, default=0) <= self._capacity
        decision = max(answers, default=0) if all_alive and in_step else 0
        board.decide(number, decision)
        return decision

    def _await_decision(self, board: Board) -> int:
        self._until(lambda: board.decision(self._number) is not None)
        return board.decision(self._number) or 0

    def _until(self, there: Callable[[], bool], most_s: float | None = None) -> bool:
        """Wait in the thread, which has nothing better to do, for what other ranks must say; `patience_s` at most."""
        end = time.monotonic() + (self.patience_s if most_s is None else most_s)
        while not there():
            if time.monotonic() > end:
                return False
            time.sleep(self._interval_s / 10)
        return True


def _listen(lookout: weakref.ref[Lookout], board: Board, errands: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """The thread: holds its lookout only while it asks, so that a recorder that nobody holds any more is free to go."""
    reached = _reached(board.join)
    while (own := lookout()) is not None:
        interval_s = own._interval_s
        del own
        try:
            errand = errands.get(timeout=interval_s)
        except queue.Empty:
            reached = reached and _reached(lambda: _look(lookout, board))
            continue
        if errand is None:
            break
        errand()
    if reached:
        _reached(board.leave)


def _end(thread: threading.Thread, errands: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """Send the thread home, and wait for it: one that comes back from torch's C++ when Python has ended aborts the process."""
    errands.put(None)
    if thread is not threading.current_thread():
        thread.join(2.0)  # no longer: it may hang in a connection to a machine that is gone


def _look(lookout: weakref.ref[Lookout], board: Board) -> None:
    own = lookout()
    if own is not None:
        own._look(board)


def _reached(ask: Callable[[], None]) -> bool:
    """Whether the store could be asked: it may have gone with the rank that had it, and there is nobody to hear from."""
    try:
        ask()
    except Exception as error:
        log.debug("nobs hears no more of the other ranks", exc_info=error)
        return False
    return True
