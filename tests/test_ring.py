"""The ring as a state machine, with rows that arrive late; alone, in a hand-written loop; and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from nets import Images, loss_of
from torch import nn

import nobs
from nobs._link import HostLink, link_for
from nobs._row import SCALARS
from nobs.errors import BadLoss, BadSetting


class LateLink(HostLink):
    """Rows arrive when the test says so, in order; waiting makes them arrive."""

    def __init__(self, capacity, values):
        super().__init__(capacity, values)
        self.on_the_way = []
        self.waited = 0

    def send(self, values, place):
        assert place not in [p for p, _ in self.on_the_way], "a row was overwritten before it had arrived"
        self.on_the_way.append((place, values.clone()))
        self.host[place] = math.nan  # what a reader sees who does not ask

    def deliver(self, count):
        for _ in range(min(count, len(self.on_the_way))):
            place, values = self.on_the_way.pop(0)
            self.host[place].copy_(values)

    def arrived(self, place):
        return place not in [p for p, _ in self.on_the_way]

    def wait(self, place):
        while not self.arrived(place):
            self.waited += 1
            self.deliver(1)


class RingMachine(RuleBasedStateMachine):
    """Any order of steps, arrivals and drains, at any capacity and `every`: every row comes out once, in order, and whole."""

    @initialize(capacity=st.integers(1, 5), every=st.integers(1, 3))
    def begin(self, capacity, every):
        self.model = nobs.instrument(nn.Linear(1, 1, bias=False), every=every)
        self.ring = nobs.RingBuffer(self.model, capacity=capacity)
        self.ring._link = self.link = LateLink(capacity, self.ring.row.values)
        self.every, self.added, self.drained = every, 0, []

    @rule(delta=st.integers(1, 9))
    def add(self, delta):
        with torch.no_grad():
            self.model(torch.full((1, 1), float(self.added + 1)))
        self.ring.add(10 * self.added, float(delta), extra=torch.tensor(self.added))
        self.added += 1

    @rule(count=st.integers(1, 3))
    def arrive(self, count):
        self.link.deliver(count)

    @rule()
    def drain(self):
        waited = self.link.waited
        self.drained += list(self.ring.drain())
        assert self.link.waited == waited, "drain waited"

    @precondition(lambda self: self.added)
    @rule()
    def history(self):
        history = self.ring.history()
        kept = list(range(self.added))[-self.ring.capacity :]
        assert history.steps.tolist() == [10 * i for i in kept]
        weight = self.model.weight.abs().item()
        for i, absmax in zip(kept, history["(model)", "output", "absmax"], strict=True):
            sampled = i % self.every == 0
            assert absmax == pytest.approx(weight * (i + 1), rel=1e-6) if sampled else math.isnan(absmax)
        assert history.scalars["extra"].tolist() == kept

    @invariant()
    def none_skipped(self):
        if not hasattr(self, "drained"):
            return
        steps = [row.step for row in self.drained]
        lost = max(0, self.added - len(steps) - 2 * self.ring.capacity)
        assert steps == sorted(set(steps))
        assert lost == 0 or len(steps) < self.added

    def teardown(self):
        if hasattr(self, "ring") and self.added <= 2 * self.ring.capacity:
            self.ring.wait()
            self.drained += list(self.ring.drain())
            assert [row.step for row in self.drained] == [10 * i for i in range(self.added)]


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_none_skipped_when_drained_after_each_step():
    """The Recorder's use: whatever the lag, 1000 steps come out once each, in order; the waits are counted."""
    model = nobs.instrument(nn.Linear(1, 1))
    ring = nobs.RingBuffer(model, capacity=4)
    ring._link = link = LateLink(4, ring.row.values)
    seen = []
    for step in range(1000):
        ring.add(step, 0.0)
        link.deliver(5 if step % 6 == 5 else 0)
        seen += [row.step for row in ring.drain()]
    ring.wait()
    seen += [row.step for row in ring.drain()]
    assert seen == list(range(1000))
    assert 0 < ring.waits <= link.waited
    assert len(ring.history()) == 4


def test_add_does_not_wait_while_the_ring_has_room():
    """Nothing arrives at all: `capacity` steps are taken without a wait, and then one wait a step."""
    ring = nobs.RingBuffer(nobs.instrument(nn.Linear(1, 1)), capacity=5)
    ring._link = link = LateLink(5, ring.row.values)
    for step in range(5):
        ring.add(step, 0.0)
    assert (ring.waits, link.waited) == (0, 0)
    ring.add(5, 0.0)
    assert (ring.waits, link.waited) == (1, 1)


def test_a_device_scalar_is_not_read(monkeypatch):
    """A loss that is not on the CPU goes into the row; nobody asks it for its value."""
    ring = nobs.RingBuffer(nobs.instrument(nn.Linear(1, 1)), capacity=2)
    loss = torch.tensor(2.5)

    class Elsewhere:
        type = "elsewhere"

    class DeviceTensor(torch.Tensor):
        @property
        def device(self):
            return Elsewhere

        def __float__(self):
            raise AssertionError("a host sync")

        item = __float__

    ring.add(0, loss.as_subclass(DeviceTensor), aux=1.0)
    row = next(ring.drain())
    assert row.scalars == {"aux": 1.0, "loss": 2.5}


def test_at_most_sixteen_device_scalars():
    """The row has 16 places; the message names them and says how to go around it."""
    row = nobs.RingBuffer(nobs.instrument(nn.Linear(1, 1))).row
    for i in range(SCALARS):
        row.write_scalar(f"s{i}", torch.tensor(1.0))
    with pytest.raises(BadSetting, match=r"17th scalar[\s\S]*at most 16: s0, s1[\s\S]*more=float\(more\)"):
        row.write_scalar("more", torch.tensor(1.0))


@pytest.mark.parametrize(
    "loss",
    [
        torch.ones(3),
        "0.5",
        None.__class__,
        float,
        [1.0],
        torch.tensor(1j),
        torch.ones(0),
        torch.ones((), device="meta"),
        torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged),
        np.ones(2),
        np.array("x"),
        np.array("2020-01-01", dtype="datetime64"),
        10**400,
    ],
)
def test_a_loss_that_is_no_number(loss):
    """A wrong loss raises at once and says what it got."""
    ring = nobs.RingBuffer(nobs.instrument(nn.Linear(1, 1)))
    with pytest.raises(BadLoss, match=r"recording loss[\s\S]*loss.mean\(\)"):
        ring.add(0, loss)
    for step, number in enumerate((torch.tensor([[1.5]], requires_grad=True), np.array([[1.5]]), np.float32(1.5), 1.5)):
        ring.add(step, number)
    assert ring.history().scalars["loss"].tolist() == [1.5] * 4


def test_what_ran_before_the_ring_is_not_its_first_step():
    """A trial forward between instrument and the ring leaves no trace."""
    model = nobs.instrument(nn.Linear(1, 1), every=2)
    model(torch.full((1, 1), 1e6))
    ring = nobs.RingBuffer(model)
    for step in range(3):
        model(torch.ones(1, 1))
        ring.add(step, 0.0)
    history = ring.history()
    assert [norm > 0 for norm in history["(model)", "output", "norm"]] == [True, False, True]
    assert history["(model)", "output", "absmax"][0] < 10


def test_a_newer_ring_takes_over():
    """Two rings would steal each other's steps: the older one says that it was replaced."""
    model = nobs.instrument(nn.Linear(1, 1))
    old, new = nobs.RingBuffer(model), nobs.RingBuffer(model)
    new.add(0, 0.0)
    with pytest.raises(BadSetting, match="a newer one of the same model has replaced"):
        old.add(0, 0.0)


def test_gradients_are_reported_unscaled():
    """A loss scale in the row divides the gradients' norm and absmax when the row is read, and nothing else."""
    model = nobs.instrument(Images())
    ring = nobs.RingBuffer(model)
    batch = model.batch()
    model.eval()
    for step, scale in enumerate((1.0, 1024.0)):
        (loss_of(model, batch) * scale).backward()
        ring.row.write_scalar("loss_scale", torch.tensor(scale))
        ring.add(step, 0.0)
        model.zero_grad()
    history = ring.history()
    assert history.scalars["loss_scale"].tolist() == [1, 1024]
    for tap in history.table.taps:
        for statistic in ("norm", "absmax", "rms", "zeros", "elements"):
            one, two = history[tap.layer, tap.site, statistic]
            assert one == pytest.approx(two, rel=1e-5, abs=1e-9), (tap, statistic)


def test_the_hand_written_loop(tmp_path):
    """Taps, ring and triggers without the Recorder: a dozen lines, and a dump that `nobs.load` opens."""
    model = nobs.instrument(Images())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    ring = nobs.RingBuffer(model, capacity=50)
    engine = nobs.TriggerEngine(grad_threshold=100.0, spike_factor=3.0)
    failure = None
    for step in range(50):
        loss = loss_of(model, model.batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ring.add(step, loss)
        for row in ring.drain():
            failure = failure or engine.check(row)
        if failure:
            path = ring.save_json(tmp_path / "crash.json", trigger_reason=failure.message)
            break
    assert failure is not None
    assert json.loads(path.read_text())["reason"] == failure.message
    assert nobs.load(path).history.steps[-1] == failure.step


def test_the_ring_follows_the_model():
    """A model that moves to another device begins a new memory there."""
    with torch.device("meta"):
        model = nobs.instrument(nn.Linear(2, 2))
    ring = nobs.RingBuffer(model, capacity=3)
    model.to_empty(device="cpu")
    model(torch.ones(1, 2))
    ring.add(0, 1.0)
    assert ring.history()["(model)", "output", "elements"].tolist() == [2]


def test_a_ring_says_once_that_recording_has_stopped(model):
    """nobs failed inside a tap: a hand-written loop hears of it, once, and goes on."""
    ring = nobs.RingBuffer(model)
    ring.row.give_up(RuntimeError("planted"))
    with pytest.warns(nobs.NobsWarning, match="stopped recording.*planted"):
        ring.add(0, 0.0)
    ring.add(1, 0.0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: events and pinned memory are not seen on a CPU")
def test_pinned_rows_arrive_without_a_sync():
    """On CUDA `add` and `drain` run under the error mode for synchronising calls, and the rows are right."""
    model = nobs.instrument(Images().cuda())
    ring = nobs.RingBuffer(model, capacity=4)
    assert type(link_for(ring.row.values, 1)).__name__ == "PinnedLink"
    rows = []
    for step in range(10):
        x, y = (part.cuda() for part in model.batch())
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ring.add(step, loss)
            rows += list(ring.drain())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ring.wait()
    rows += list(ring.drain())
    assert [row.step for row in rows] == list(range(10))
    assert all(row["fc", "output", "norm"] > 0 for row in rows)
