"""How ranks hear of each other's failures and agree when to stop: many lookouts in one process, over one store in memory."""

import gc
import threading
import time
import weakref

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import run

import nobs
from nobs import _board, _lookout
from nobs._board import Alarm, Board
from nobs._lookout import Lookout

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(_lookout, "INTERVAL_S", 0.01)
    monkeypatch.setattr(_lookout, "ANSWER_S", 0.5)
    monkeypatch.setattr(_lookout, "GRACE_S", 0.05)


class Rank:
    """A rank: its lookout, and the alarms that it was told to dump for."""

    def __init__(self, store, rank, ranks, capacity=100):
        self.dumped = []
        self.lookout = Lookout(Board(store, "nobs/0"), rank, ranks, capacity, self.dump)
        self.lookout.start()

    def dump(self, alarm):
        self.dumped.append(alarm)


def ranks_over(store, ranks, **settings):
    made = [Rank(store, rank, ranks, **settings) for rank in range(ranks)]
    board = Board(store, "nobs/0")
    wait_for(lambda: board._count("present") >= ranks)
    return made


def wait_for(there, most_s=5.0):
    end = time.monotonic() + most_s
    while not there():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def alarm_of(rank, step=3, **changed):
    return Alarm(**{"rank": rank, "step": step, "last": step, "message": "loss is NaN", "stop": True, "gone": False} | changed)


def train_to_the_end(rank, closed, most=1000):
    """Close step after step, as a training does, until it is time to stop; how many were closed then."""
    while not rank.lookout.due(closed, last=False):
        closed += 1
        assert closed < most
        time.sleep(0.001)
    return closed


@settings(max_examples=15)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=5), st.data())
def test_all_stop_behind_the_same_step(closed, data):
    """Wherever each of them is when one fails, and whoever calls too: behind the largest number that anybody had to close."""
    ranks = ranks_over(dist.HashStore(), len(closed))
    calling = data.draw(st.sets(st.integers(0, len(closed) - 1), min_size=1, max_size=2))
    for rank, at in zip(ranks, closed, strict=True):
        assert not rank.lookout.due(at, last=False)
    stopped = {}

    def train(number, rank, at):
        if number in calling:
            rank.lookout.call(alarm_of(number), at)
        stopped[number] = train_to_the_end(rank, at)

    threads = [threading.Thread(target=train, args=(n, *pair)) for n, pair in enumerate(zip(ranks, closed, strict=True))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(stopped) == len(closed)
    assert len(set(stopped.values())) == 1, stopped
    assert max(closed) <= stopped[0]
    for number, rank in enumerate(ranks):
        assert len(rank.dumped) <= 1
        assert rank.dumped or number in calling
        rank.lookout.stop()


def test_a_healthy_step_asks_nobody():
    """The store is asked in the lookout's own thread alone."""

    class Asked(dist.HashStore):
        def __init__(self):
            super().__init__()
            self.by = set()

        def check(self, keys):
            self.by.add(threading.current_thread().name)
            return super().check(keys)

    store = Asked()
    (rank,) = ranks_over(store, 1)
    for step in range(200):
        assert not rank.lookout.due(step, last=False)
        time.sleep(0.001)
    assert store.by == {"nobs"}
    rank.lookout.stop()


def test_a_dead_rank_holds_nobody():
    """It never answers: the others stop at once, after a while."""
    store = dist.HashStore()
    ranks = ranks_over(store, 2)
    Board(store, "nobs/0").join()  # a third one, of which nothing more is heard
    begun = time.monotonic()
    ranks[0].lookout.due(7, last=False)
    ranks[1].lookout.call(alarm_of(1), 9)
    assert ranks[1].lookout.due(9, last=False)
    assert train_to_the_end(ranks[0], 8) == 8
    assert time.monotonic() - begun < 4


def test_ranks_that_are_further_apart_than_the_ring_stop_at_once():
    """They share no collectives, in which one could be left."""
    ranks = ranks_over(dist.HashStore(), 2, capacity=10)
    ranks[0].lookout.due(500, last=False)
    ranks[1].lookout.call(alarm_of(1), 4)
    assert ranks[1].lookout.due(4, last=False)
    assert train_to_the_end(ranks[0], 501) == 501


def test_a_rank_that_has_left_its_loop_is_not_waited_for():
    """Nobody can close another step with it."""
    ranks = ranks_over(dist.HashStore(), 2)
    ranks[0].lookout.due(5, last=False)
    ranks[1].lookout.call(alarm_of(1, gone=True), 5)
    wait_for(lambda: ranks[0].dumped)
    assert ranks[0].lookout.gone
    assert ranks[0].lookout.due(6, last=False)


def test_a_rank_that_has_ended_is_not_asked():
    """Its loop was shorter."""
    ranks = ranks_over(dist.HashStore(), 2)
    ranks[1].lookout.stop()
    begun = time.monotonic()
    ranks[0].lookout.call(alarm_of(0), 3)
    assert ranks[0].lookout.due(3, last=False)
    ranks[0].lookout.gather()
    assert time.monotonic() - begun < 0.4


def test_warnings_stop_nobody_and_the_next_alarm_is_heard_too():
    """One after the other, each once."""
    ranks = ranks_over(dist.HashStore(), 2)
    for step in (3, 8):
        ranks[1].lookout.call(alarm_of(1, step, stop=False), step + 1)
        wait_for(lambda: ranks[0].lookout.heard)
        for rank in ranks:
            assert rank.lookout.due(step + 1, last=False)
            rank.lookout.gather()
            rank.lookout.done()
            assert not rank.lookout.due(step + 1, last=False)
    assert [alarm.step for alarm in ranks[0].dumped] == [3, 8]
    assert ranks[1].dumped == []


def test_rank_0_lets_the_others_go():
    """They stay while it prints, and not longer."""
    ranks = ranks_over(dist.HashStore(), 2)
    ranks[0].lookout.call(alarm_of(0), 3)
    wait_for(lambda: ranks[1].dumped)
    went = []
    other = threading.Thread(target=lambda: went.append(ranks[1].lookout.linger()))
    other.start()
    time.sleep(0.1)
    assert not went
    ranks[0].lookout.let_go()
    other.join(5)
    assert went == [None]


class Broken(dist.HashStore):
    """A store whose rank is gone, or whose machine is: it raises, or never answers."""

    def __init__(self, hangs):
        super().__init__()
        self.hangs, self.gone, self.free = hangs, False, threading.Event()

    def _go(self):
        if self.gone and self.hangs:
            self.free.wait(20)
        if self.gone:
            raise dist.DistNetworkError("Connection reset by peer")

    def check(self, keys):
        self._go()
        return super().check(keys)

    def compare_set(self, *args):
        self._go()
        return super().compare_set(*args)

    def add(self, *args):
        self._go()
        return super().add(*args)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_store_that_is_gone_ends_nothing(hangs):
    """Nothing is raised, and the wait is short."""
    store = Broken(hangs)
    (rank,) = ranks_over(store, 1)
    store.gone = True
    time.sleep(0.1)
    begun = time.monotonic()
    rank.lookout.call(alarm_of(0), 3)
    rank.lookout.gather()
    assert not rank.lookout.heard, "there is nobody to agree with: the recorder acts for itself"
    rank.lookout.stop()
    assert time.monotonic() - begun < 5
    store.free.set()


def test_a_lookout_that_nobody_holds_ends_its_thread():
    """Neither thread nor queue keep a recorder, and so a model, alive."""
    (rank,) = ranks_over(dist.HashStore(), 1)
    thread, seen = rank.lookout._thread, weakref.ref(rank.lookout)
    del rank
    gc.collect()
    wait_for(lambda: seen() is None)
    thread.join(2)
    assert not thread.is_alive()


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"rank": "0"}', b'{"rank": 1.5, "step": 0, "last": 0}', b"\xff"])
def test_what_is_no_alarm(raw):
    """A store is shared with others."""
    with pytest.raises((ValueError, TypeError, KeyError)):
        _board.decode(raw)


def test_the_first_alarm_counts():
    """Both ranks are told of the same."""
    store = dist.HashStore()
    boards = [Board(store, "nobs/0") for _ in range(2)]
    assert boards[0].post(0, alarm_of(0)) == boards[1].post(0, alarm_of(1)) == boards[1].alarm(0) == alarm_of(0)
    assert boards[0].alarm(1) is None
    assert _board.decode(_board.encode(alarm_of(0, message="✕ [red]"))) == alarm_of(0, message="✕ [red]")


def test_a_lookout_that_is_gone_is_not_waited_for():
    """Its rank counts as one that has ended."""
    store = dist.HashStore()
    ranks = ranks_over(store, 2)
    del ranks[1]
    gc.collect()
    board = Board(store, "nobs/0")
    wait_for(lambda: board._count("left") == 1)
    ranks[0].lookout.call(alarm_of(0), 3)
    begun = time.monotonic()
    assert ranks[0].lookout.due(3, last=False)
    assert time.monotonic() - begun < 0.4


def test_a_group_whose_store_can_nothing(model, tmp_path):
    """A fake one, as planners of large runs use it: rank and world size are its, and each acts for itself."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    try:
        with nobs.Recorder(model, directory=tmp_path) as recorder:
            run(recorder, model, 2)
            report = nobs.load(recorder.dump())
    finally:
        dist.destroy_process_group()
    assert (report.rank, report.world_size, len(report.history)) == (3, 8, 2)
