"""What the README says that nobs does not do, or does otherwise under torch.compile: so it is, and no worse."""

import pytest
import torch
from torch import nn

import nobs
from nobs import _kernels

KERNELLESS = "aot_eager_decomp_partition"


def recorded(model, backward, backend=KERNELLESS, **options):
    """The row of one step of a compiled model."""
    nobs.instrument(model)
    ring = nobs.RingBuffer(model)
    backward(torch.compile(model, backend=backend, **options))
    ring.add(0, 0.0)
    assert ring.row.broken is None
    return next(ring.drain())


class Half(nn.Module):
    """Two layers, of which the loss uses one; its output is handed out in part."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x), self.unused(x)


@pytest.mark.parametrize(("backend", "expected"), [(KERNELLESS, "0"), ("eager", "none")])
def test_an_output_that_the_loss_does_not_use(backend, expected, fresh_dynamo):
    """Its gradient is zero under AOTAutograd, and none where autograd runs by itself."""
    row = recorded(Half(), lambda call: call(torch.ones(2, 4))[0].sum().backward(), backend)
    norm = row["unused", "output.grad", "norm"]
    assert norm == 0 if expected == "0" else norm != norm


def test_norms_beyond_the_squares_of_float32(fresh_dynamo, monkeypatch):
    """In a graph without kernels a norm is infinite from about 1e19 on, where `absmax` is not; with kernels neither is."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((4,), 1e20))

        def forward(self, x):
            return x * self.scale

    def largest():
        return recorded(Scaled(), lambda call: call(torch.ones(2, 4)).sum().backward())

    assert largest()["(model)", "output", "norm"] == pytest.approx(1e20 * 8**0.5, rel=1e-6)
    monkeypatch.setattr(_kernels, "one_operator", lambda x: False)
    torch._dynamo.reset()
    row = largest()
    assert row["(model)", "output", "norm"] == float("inf")
    assert row["(model)", "output", "absmax"] == pytest.approx(1e20)


class Part(nn.Linear):
    """Its output is a part of a larger tensor."""

    def forward(self, x):
        return super().forward(x)[:, :2]


def test_a_part_that_is_written_to():
    """Autograd gives it a new history; its gradient reads as one that never came, and the user's own are right."""
    gradients = []
    for observed in (False, True):
        torch.manual_seed(0)
        model = Part(4, 4)
        ring = nobs.RingBuffer(nobs.instrument(model)) if observed else None
        model(torch.ones(2, 4)).mul_(3).sum().backward()
        gradients.append(model.weight.grad)
    assert torch.equal(*gradients)
    ring.add(0, 0.0)
    norm = next(ring.drain())["(model)", "output.grad", "norm"]
    assert norm != norm


class Breaking(nn.Linear):
    """A layer whose own forward breaks the graph."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


def graphs_of(make, fresh_dynamo):
    """(graphs, breaks) without nobs and with."""
    counts = []
    for observed in (False, True):
        torch._dynamo.reset()
        fresh_dynamo.clear()
        model = make()
        if observed:
            nobs.instrument(model)
        out = torch.compile(model, backend=KERNELLESS)(torch.ones(2, 3, 4))
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        counts.append((fresh_dynamo["stats"]["unique_graphs"], sum(fresh_dynamo["graph_break"].values())))
    return counts


def test_a_layer_that_breaks_the_graph(fresh_dynamo):
    """Its tap is one graph more, and one break."""
    plain, observed = graphs_of(lambda: nn.Sequential(nn.Linear(4, 4), Breaking(4, 4)), fresh_dynamo)
    assert observed[0] <= plain[0] + 1
    assert observed[1] <= plain[1] + 1


def test_create_graph_through_a_compiled_model(fresh_dynamo):
    """torch stops it where taps write in the backward; a graph that was compiled in a pause has none."""
    model = nobs.instrument(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)))
    recorder = nobs.Recorder(model)
    call = torch.compile(model, backend=KERNELLESS)
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"input mutations .* for create_graph=True"):
        torch.autograd.grad(call(x).sum(), x, create_graph=True)
    with recorder.paused():
        (slope,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    assert slope.requires_grad


def test_layers_inside_of_a_branch_of_the_graph(fresh_dynamo):
    """`torch.cond` and its like forbid their branches to write: what runs there is not seen, and trained all the same."""

    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))

    model = Chooses()
    row = recorded(model, lambda call: call(torch.ones(2, 4)).sum().backward())
    assert row["a", "output", "norm"] != row["a", "output", "norm"]
    assert row["a", "weight.grad", "norm"] == pytest.approx(model.a.weight.grad.norm().item(), rel=1e-6)


def test_gradients_that_come_by_another_way():
    """`autograd.grad` accumulates nothing, and nobody calls back: the lines of parameters stay empty."""
    model = nobs.instrument(nn.Linear(3, 1))
    ring = nobs.RingBuffer(model)
    (model.weight.grad,) = torch.autograd.grad(model(torch.ones(2, 3)).sum(), [model.weight])
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["(model)", "output.grad", "norm"] > 0
    assert row["(model)", "weight.grad", "norm"] != row["(model)", "weight.grad", "norm"]


def test_a_layer_that_writes_to_its_own_weight():
    """Without an optimizer to tell, each write is taken for an update: the worst micro-batch, and not their sum."""
    model = nobs.instrument(nn.Embedding(5, 3, max_norm=0.1))
    ring = nobs.RingBuffer(model)
    largest = 0.0
    for scale in (1.0, -3.0, 1.0):
        (model(torch.tensor([0, 1, 4])).sum() * scale).backward()
        largest = max(largest, model.weight.grad.norm().item())
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["(model)", "weight.grad", "norm"] == pytest.approx(largest, rel=1e-6)
    assert row["(model)", "weight.grad", "norm"] > 1.5 * model.weight.grad.norm().item()
