"""What layers hand on: every kind of tensor and container, views and second names, is read as what it is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nobs


class NoGradient(torch.autograd.Function):
    """As some operators do for inputs that they do not depend on: no gradient at all, which is not one of zeros."""

    @staticmethod
    def forward(ctx, x, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def test_no_gradient_is_not_zero():
    """A parameter without a gradient keeps none: an optimizer with weight decay or momentum would move it for one of zeros."""
    model = nobs.instrument(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    ring = nobs.RingBuffer(model)
    x = torch.ones(1, 2)
    NoGradient.apply(model[0](x), model[1](x)).sum().backward()
    ring.add(0, 0.0)
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None
    history = ring.history()
    assert history["0", "output", "norm"][0] > 0
    assert history["0", "output.grad", "norm"][0] != history["0", "output.grad", "norm"][0]


@pytest.mark.parametrize("compiled", [False, True])
def test_one_tensor_twice_in_an_output(compiled, fresh_dynamo):
    """As in a list of hidden states that ends with the last: it stays one tensor, and its gradient is whole."""

    class Doubled(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return {"last": y, "all": [x, y]}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Doubled(2, 2)

        def forward(self, x):
            output = self.layer(x)
            assert output["last"] is output["all"][-1]
            return output["last"].sum() + output["all"][-1].sum()

    model = nobs.instrument(Model())
    ring = nobs.RingBuffer(model)
    (torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model)(torch.ones(1, 2)).backward()
    ring.add(0, 0.0)
    assert ring.history()["layer", "output.grad", "absmax"][0] == 2


@pytest.mark.parametrize(("dtype", "large", "small"), [(torch.float16, 300.0, 1e-9), (torch.bfloat16, 1e20, 1e-45)])
def test_half_precision_overflows_in_compiled_code_too(dtype, large, small, fresh_dynamo):
    """Inductor keeps values in float32 between kernels: what the user's tensor cannot hold is infinite, or zero, all the same."""

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([large, small, 1.0], dtype=dtype))

        def forward(self, x):
            return x * self.scale * self.scale

    model = nobs.instrument(Squared())
    x = torch.ones(4, 3, dtype=dtype)
    counts = []
    for call in (model, torch.compile(model, fullgraph=True)):
        ring = nobs.RingBuffer(model)
        with torch.no_grad():
            call(x)
        ring.add(0, 0.0)
        row = next(ring.drain())
        counts.append([row["(model)", "output", name] for name in ("posinf", "zeros", "absmax")])
    assert counts[0] == counts[1] == [4, pytest.approx(1 / 3), 1]


def test_nested_tensors_pass():
    """They have no one shape: left alone, and the recording goes on."""
    model = nobs.instrument(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    recorder = nobs.Recorder(model)
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    assert model(nested).is_nested
    model(torch.ones(1, 3)).sum().backward()
    recorder.step(1.0)
    assert recorder.history()["0", "output", "elements"][0] == 3


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="Dynamo cannot be told before torch 2.9 not to branch on sizes that are data"
)
@pytest.mark.parametrize("routed", [[True, False, True, True], [False] * 4])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_chosen_by_a_mask(routed, fresh_dynamo):
    """A mixture of experts in one graph: how many rows a layer gets is known to the device only, and may be none."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.expert, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x, chosen):
            rows = chosen.nonzero().squeeze(1)
            return self.head(x.index_add(0, rows, self.expert(x[rows])))

    model = nobs.instrument(Routed())
    ring = nobs.RingBuffer(model)
    x, chosen = torch.randn(4, 3), torch.tensor(routed)
    torch.compile(model, fullgraph=True)(x, chosen).sum().backward()
    ring.add(0, 0.0)
    row = next(ring.drain())
    expected = F.linear(x[chosen], model.expert.weight, model.expert.bias)
    assert row["expert", "output", "elements"] == expected.numel()
    assert row["expert", "output", "absmax"] == pytest.approx(expected.abs().max().item() if expected.numel() else 0, rel=1e-5)
    assert row["head", "output", "norm"] > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_an_empty_batch(compiled, fresh_dynamo):
    """The last batch of an epoch has no sample: no elements and no norm, and no error."""
    model = nobs.instrument(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    ring = nobs.RingBuffer(model)
    call = torch.compile(model, backend="aot_eager_decomp_partition") if compiled else model
    for step, samples in enumerate((4, 0)):
        call(torch.ones(samples, 3)).sum().backward()
        ring.add(step, 0.0)
    full, empty = ring.drain()
    assert full["0", "output", "elements"] == 12
    assert empty["0", "output", "elements"] == 0
    assert empty["0", "output", "norm"] != empty["0", "output", "norm"]
    assert ring.row.broken is None


class Viewing(nn.Module):
    """A layer whose output is its input in another shape, while that has another use of 100 times the gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.flatten, self.last = nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.flatten(x)).sum() + 100 * x.sum()


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager", "inductor"])
def test_a_view_of_the_input(backend, fresh_dynamo):
    """The gradient of the view is its own, and that of what it shows the sum of both."""
    model = nobs.instrument(Viewing(), layers=["first", "flatten"])
    ring = nobs.RingBuffer(model)
    (torch.compile(model, fullgraph=True, backend=backend) if backend else model)(torch.randn(3, 2, 4)).backward()
    ring.add(0, 0.0)
    row = next(ring.drain())
    flat = model.last.weight.detach().sum(0).expand(3, 8)
    assert row["flatten", "output.grad", "norm"] == pytest.approx(flat.norm().item(), rel=1e-6)
    assert row["first", "output.grad", "norm"] == pytest.approx((flat + 100).norm().item(), rel=1e-6)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_conjugate_that_is_not_yet_computed(backend, fresh_dynamo):
    """torch conjugates by a flag on the tensor: outputs and gradients with it are read as what they stand for."""

    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x).conj()

    model = nobs.instrument(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), Turned(4, 4, dtype=torch.complex64)))
    ring = nobs.RingBuffer(model)
    x = torch.randn(3, 4, dtype=torch.complex64)
    y = (torch.compile(model, fullgraph=True, backend=backend) if backend else model)(x)
    (y * x).real.sum().backward()
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["1", "output", "norm"] == pytest.approx(y.norm().item(), rel=1e-5)
    assert row["1", "output.grad", "norm"] == pytest.approx(x.norm().item(), rel=1e-5)
    assert ring.row.broken is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype):
    """Under autocast the outputs are half, the statistics of them exact to float32, and the dtype is known."""
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    outputs = []
    model[0].register_forward_hook(lambda module, args, output: outputs.append(output.detach().double()))
    nobs.instrument(model)
    ring = nobs.RingBuffer(model)
    with torch.autocast("cpu", dtype=dtype):
        model(torch.randn(8, 16))
    ring.add(0, 0.0)
    history = ring.history()
    assert history["0", "output", "norm"][0] == pytest.approx(outputs[0].norm().item(), rel=1e-6)
    assert history["0", "output", "absmax"][0] == outputs[0].abs().max().item()
    assert history.layers[0].sites["output"].dtype == str(dtype).removeprefix("torch.")


class Odd(tuple):
    __slots__ = ()

    def __new__(cls, a, b):
        return super().__new__(cls, (a, b))


OLD = pytest.mark.skipif(torch.__version__ < "2.9", reason="Dynamo of torch 2.7 does not trace a __new__, without nobs either")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=OLD)])
def test_a_container_that_cannot_be_made_again(compiled, fresh_dynamo):
    """A tuple type with a constructor of its own is read like any other: nothing is put into it."""

    class Layer(nn.Linear):
        def forward(self, x):
            return Odd(super().forward(x), 1)

    model = nobs.instrument(nn.Sequential(Layer(2, 2)))
    recorder = nobs.Recorder(model)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    output = call(torch.ones(1, 2))
    assert type(output) is Odd
    output[0].sum().backward()
    recorder.step(1.0)
    assert recorder.history()["0", "output.grad", "norm"][0] == pytest.approx(2**0.5)


class Two(nn.Linear):
    """Gives a tensor and a part of it, which is then written to through the tensor."""

    def forward(self, x):
        y = super().forward(x)
        return y, y[..., :2]


class Keeps(nn.Linear):
    """Keeps what it gives away, which is then written to."""

    def forward(self, x):
        self.feature = super().forward(x)
        return self.feature


class Writes(nn.Linear):
    """Writes to its input and gives that away."""

    def forward(self, x):
        return x.mul_(self.bias)


def two(model, x):
    a, b = model(x)
    a.mul_(2)
    return a.sum() + b.pow(2).sum()


def keeps(model, x):
    return model(x).relu_().pow(2).sum() + model.feature.sum()


def writes(model, x):
    h = x * model.weight.sum()
    y = model(h)
    y.mul_(3)
    return (y + h).sum()


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize(("kind", "loss"), [(Two, two), (Keeps, keeps), (Writes, writes)])
def test_outputs_with_a_second_name(kind, loss, shape, backend, fresh_dynamo):
    """A write through one name must reach the gradient of the other, as without nobs."""
    torch.manual_seed(0)
    plain = kind(4, 4)
    model = nobs.instrument(copy.deepcopy(plain))
    ring = nobs.RingBuffer(model)
    x = torch.randn(shape)
    observed = torch.compile(loss, backend=backend) if backend else loss
    observed(model, x).backward()
    loss(plain, x).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6 if backend else 0, atol=1e-7 if backend else 0)
    ring.add(0, 0.0)
    assert ring.row.broken is None
    for site in ("output", "output.grad"):
        assert ring.history()["(model)", site, "norm"][0] > 0


def test_a_container_stays_the_users_own():
    """A cache that is handed from layer to layer grows as without nobs, and tensors keep what was written on them."""

    class Caching(nn.Linear):
        def forward(self, x, cache):
            y = super().forward(x)
            y.mark = 1
            cache.append(y)
            return y, cache

    model = nobs.instrument(nn.ModuleList([Caching(3, 3), Caching(3, 3)]))
    ring = nobs.RingBuffer(model)
    cache, x = [], torch.ones(2, 3)
    for layer in model:
        x, given = layer(x, cache)
        assert given is cache
        assert x is cache[-1]
        assert x.mark == 1
    x.sum().backward()
    ring.add(0, 0.0)
    assert len(cache) == 2
    assert ring.history()["0", "output.grad", "norm"][0] > 0


class Reversal(torch.autograd.Function):
    """Gradient reversal, as adversarial training has it: the output is a view, and its backward gives another gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -10 * grad


@pytest.mark.parametrize("compiled", [False, True])
def test_an_output_that_a_function_of_the_users_gives(compiled):
    """The gradient of the output is the one that comes into that function, and not the one that it makes."""

    class Reversed(nn.Linear):
        def forward(self, x):
            return Reversal.apply(super().forward(x))

    model = nobs.instrument(nn.Sequential(Reversed(4, 4), nn.Linear(4, 1)))
    ring = nobs.RingBuffer(model)
    step = torch.compile(model, backend="aot_eager") if compiled else model
    step(torch.randn(8, 4)).sum().backward()
    ring.add(0, 1.0)
    expected = float((model[1].weight.detach().double().square().sum() * 8).sqrt())
    assert ring.history()["0", "output.grad", "norm"][0] == pytest.approx(expected, rel=1e-5)
