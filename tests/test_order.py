"""Layers come in the order in which they run, whatever the order of registration, of branches and of steps."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import nobs
from nobs._order import execution_order


def names_that_ran(history):
    return [layer.name for layer in history.layers if layer.order is not None]


class Branching(nn.Module):
    """Registered backwards. A branch of three layers on odd steps, one of one layer on even ones."""

    def __init__(self):
        super().__init__()
        self.end, self.short, self.long, self.start = nn.Linear(4, 4), nn.Linear(4, 4), Chain(3), nn.Linear(4, 4)
        self.late = nn.Linear(4, 4)

    def forward(self, x, odd):
        x = self.start(x)
        x = self.end(self.long(x) if odd else self.short(x))
        return x if odd else self.late(x)


class Chain(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(n))

    def forward(self, x):
        for part in reversed(self.parts):
            x = part(x)
        return x


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpoint"])
def test_branches_that_run_on_some_steps(how, fresh_dynamo):
    """`late` is the fourth layer of even steps and `end` the fifth of odd ones: it still comes behind it."""
    model = nobs.instrument(Branching())
    call = {
        "eager": model,
        "compiled": torch.compile(model, backend="aot_eager"),
        "checkpoint": lambda *given: checkpoint(model, *given, use_reentrant=False),
    }[how]
    ring = nobs.RingBuffer(model)
    for step in range(4):
        call(torch.ones(2, 4), step % 2 == 1).sum().backward()
        ring.add(step, 0.0)
    ran = names_that_ran(ring.history())
    for before, after in itertools.pairwise(["start", "long.parts.2", "long.parts.1", "long.parts.0", "end", "late"]):
        assert ran.index(before) < ran.index(after), ran
    assert ran.index("start") < ran.index("short") < ran.index("end")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition", "inductor"])
def test_registered_in_another_order(backend, recompute, fresh_dynamo):
    """Head first, embedding last; recomputed layers stand where they first ran."""
    model = nobs.instrument(Tokens(recompute=recompute, depth=2))
    ring = nobs.RingBuffer(model)
    call = torch.compile(model, fullgraph=True, backend=backend) if backend else model
    call(model.batch()[0]).sum().backward()
    ring.add(0, 0.0)
    ran = names_that_ran(ring.history())
    assert ran == ["embed", *(f"blocks.{i}.{part}" for i in range(2) for part in ("norm", "up", "down")), "head"]


@given(st.permutations(range(6)), st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=6))
def test_any_steps_of_one_order(order, steps):
    """Whatever subsets of the layers ran in each step: what ran together keeps its order, and all that ran is there."""
    clocks = np.full((len(steps), 6), np.inf, dtype=np.float32)
    for row, ran in zip(clocks, steps, strict=True):
        for clock, layer in enumerate(layer for layer in order if layer in ran):
            row[layer] = clock + 1
    merged = execution_order(clocks)
    assert sorted(merged) == sorted(set().union(*steps))
    longest = max(steps, key=len)
    assert [layer for layer in merged if layer in longest] == [layer for layer in order if layer in longest]
