"""Whoever looks on: tracers get no taps, dispatch modes see no operation of nobs, and strange tensors end no recording."""

import functools

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import nobs


class Doubled(nn.Linear):
    """A user's own layer: tracers look into it."""

    def forward(self, x):
        return super().forward(x) * 2


def make():
    return nn.Sequential(Doubled(4, 4), nn.Tanh(), nn.Linear(4, 4))


def still_records(model, ring):
    """One step as always: the numbers are there, and those of nothing else."""
    model(torch.ones(2, 4)).sum().backward()
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["2", "output", "norm"] == pytest.approx(model(torch.ones(2, 4)).norm().item(), rel=1e-6)
    assert row["2", "output.grad", "norm"] == pytest.approx(8**0.5)
    return row


class Listing(TorchDispatchMode):
    """Every operation that runs, by name, as a counter of FLOPs sees them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


def test_a_mode_sees_the_users_operations_only():
    """Forward and backward under a dispatch mode: the same list as without nobs, and the recording as without the mode."""
    lists = []
    model = make()
    for observed in (False, True):
        ring = nobs.RingBuffer(nobs.instrument(model)) if observed else None
        model.zero_grad()
        with Listing() as mode:
            model(torch.ones(2, 4)).sum().backward()
        lists.append(mode.seen)
    assert lists[0] == lists[1]
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["0", "output.grad", "norm"] > 0
    assert row["0", "weight.grad", "norm"] == pytest.approx(model[0].weight.grad.norm().item(), rel=1e-6)


def test_selective_checkpointing_that_saves_all_but_one():
    """The policy is asked about no operation of nobs, whose rows change and cannot be saved."""

    def policy(context, operation, *args, **kwargs):
        recomputed = operation == torch.ops.aten.tanh.default
        return CheckpointPolicy.PREFER_RECOMPUTE if recomputed else CheckpointPolicy.MUST_SAVE

    model = nobs.instrument(make())
    ring = nobs.RingBuffer(model)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    x = torch.ones(2, 4)
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).sum().backward()
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["0", "output", "norm"] == pytest.approx(model[0](x).norm().item(), rel=1e-6)
    assert row["0", "weight.grad", "norm"] == pytest.approx(model[0].weight.grad.norm().item(), rel=1e-6)


def faked(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.ones(2, 4)).shape == (2, 4)


def traced(model):
    assert len(make_fx(model)(torch.ones(2, 4)).graph.nodes) == len(make_fx(make())(torch.ones(2, 4)).graph.nodes)


def symbolic(model):
    torch.fx.symbolic_trace(model)


def dual(model):
    with forward_ad.dual_level():
        model(forward_ad.make_dual(torch.ones(2, 4), torch.ones(2, 4)))


def jacobian_in_one(model):
    assert torch.autograd.functional.jacobian(model, torch.ones(4), vectorize=True).shape == (4, 4)


def batched_by_hand(model):
    x = torch.ones(4, requires_grad=True)
    y = model(x)
    torch.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(torch.eye(4))


@pytest.mark.parametrize("look", [faked, traced, symbolic, dual])
def test_tracers(look):
    """They work as without nobs and leave nothing behind, and the step that runs afterwards is recorded."""
    model = nobs.instrument(make())
    ring = nobs.RingBuffer(model)
    look(model)
    assert ring.row.clock == 0
    still_records(model, ring)


@pytest.mark.parametrize("look", [jacobian_in_one, batched_by_hand])
def test_batches_of_gradients(look):
    """They had a forward, as any; of a whole batch of gradients none is the layer's."""
    model = nobs.instrument(make())
    ring = nobs.RingBuffer(model)
    look(model)
    ring.add(0, 0.0)
    norm = next(ring.drain())["2", "output.grad", "norm"]
    assert norm != norm
    still_records(model, ring)


class Strict(torch.Tensor):
    """A tensor type that refuses all that its author has not thought of."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise TypeError(f"{func} is not allowed")


class Odd(nn.Linear):
    """Its output is of the type that it is told."""

    def __init__(self, wrap):
        super().__init__(4, 4)
        self.wrap = wrap

    def forward(self, x):
        super().forward(x)
        return self.wrap(torch.ones(2, 3))


@pytest.mark.parametrize("wrap", [lambda x: x.as_subclass(Strict), lambda x: TwoTensor(x, x)])
def test_tensors_of_other_types(wrap):
    """What has no memory of its own is left out, and what has is read, whatever its type says."""
    model = nobs.instrument(nn.ModuleDict({"odd": Odd(wrap), "2": nn.Linear(4, 4)}))
    ring = nobs.RingBuffer(model)
    model["odd"](torch.ones(2, 4))
    model["2"](torch.ones(2, 4)).sum().backward()
    ring.add(0, 0.0)
    assert ring.row.broken is None
    row = next(ring.drain())
    elements = row["odd", "output", "elements"]
    assert elements != elements or elements == 6
    assert row["2", "output", "norm"] > 0
