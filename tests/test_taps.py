"""Every recorded number against the slow twin, in every mode; and nothing of the user's changed by it."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nets import Images, Outputs, Tokens, loss_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from twin import Twin

import nobs


@pytest.mark.parametrize("observed", [False, True])
def test_identical_blocks_share_one_graph(observed, fresh_dynamo):
    """Twelve blocks compiled apart, and the recompilation limit of eight: one graph, with taps as without."""
    model = Tokens(depth=12)
    if observed:
        nobs.instrument(model)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    loss_of(model, model.batch()).backward()
    assert fresh_dynamo["stats"]["unique_graphs"] == 1


def test_a_layer_that_did_not_run():
    """`unused` has parameters but no output in the history, and no order."""
    model = nobs.instrument(Outputs())
    ring = nobs.RingBuffer(model)
    loss_of(model, model.batch()).backward()
    ring.add(0, 1.0)
    layers = {layer.name: layer for layer in ring.history().layers}
    assert layers["unused"].order is None
    assert set(layers["unused"].sites) == {"weight", "bias"}
    assert layers["(model)"].order == max(layer.order for layer in layers.values() if layer.order is not None)


@pytest.mark.parametrize("compiled", [False, True])
def test_in_place_activation_behind_a_tap(compiled, fresh_dynamo):
    """relu_ writes into the tapped tensor; autograd, eager and compiled, must not mind, and the tap must see it before."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True))
    nobs.instrument(model)
    ring = nobs.RingBuffer(model)
    step_model = torch.compile(model, fullgraph=True) if compiled else model
    x = torch.randn(8, 4)
    step_model(x).sum().backward()
    ring.add(0, 0.0)
    before_relu = F.linear(x, model[0].weight, model[0].bias)
    assert ring.history()["0", "output", "absmax"][0] == pytest.approx(before_relu.abs().max().item(), rel=1e-6)
    assert ring.history()["0", "output", "zeros"][0] == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_evaluation_leaves_no_trace(compiled, fresh_dynamo):
    """no_grad in eval mode records nothing; the same without no_grad, or in training, does."""
    model = nobs.instrument(Images())
    step_model = torch.compile(model) if compiled else model
    x, _ = model.batch()
    ring = nobs.RingBuffer(model)
    model.eval()
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            step_model(x)
    ring.add(0, 0.0)
    model.train()
    with torch.no_grad():
        step_model(x)
    ring.add(1, 0.0)
    silent, frozen = ring.drain()
    assert all(value != value for value in silent.kind("output", "norm"))
    assert all(value == value for value in frozen.kind("output", "norm"))


def test_every_k_samples_each_kth_step():
    """every=3: taps on steps 0, 3 and 6, the loss on all; how many graphs that makes is counted in test_matrix."""
    model = nobs.instrument(Tokens(depth=1), every=3)
    ring = nobs.RingBuffer(model)
    for step in range(7):
        loss = loss_of(model, model.batch())
        loss.backward()
        ring.add(step, loss)
    history = ring.history()
    sampled = [step for step in range(7) if history["head", "output", "norm"][step] > 0]
    assert sampled == [0, 3, 6]
    assert [step for step in range(7) if history["head", "weight.grad", "norm"][step] > 0] == sampled
    assert history.given["loss"].all()


def test_gradients_that_are_born_non_finite():
    """A NaN from sqrt'(0) shows in the gradients, with its count, and the norms keep to the finite values."""

    class Root(nn.Linear):
        def forward(self, x):
            return super().forward(x).sqrt()

    model = nobs.instrument(nn.Sequential(nn.Linear(3, 8), Root(8, 8)))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    ring = nobs.RingBuffer(model)
    (model(torch.randn(4, 3)) * 0).sum().backward()
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["1", "output.grad", "nonfinite"] == 0
    assert row["0", "output.grad", "nan"] > 0
    assert row["1", "weight.grad", "nan"] > 0


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failing_tap_does_not_end_the_run(where, monkeypatch):
    """An error of nobs inside the forward or the backward stops the recording; the user's own go on."""
    from nobs import _stats

    model = nobs.instrument(Images())
    recorder = nobs.Recorder(model)

    def broken(*args):
        raise RuntimeError("planted")

    if where == "forward":
        monkeypatch.setattr(_stats, "measure", broken)
    loss = loss_of(model, model.batch())
    monkeypatch.setattr(_stats, "measure", broken)
    loss.backward()
    with pytest.warns(nobs.NobsWarning, match="stopped recording.*planted"):
        recorder.step(loss)
    recorder.step(loss)
    assert model.fc.weight.grad is not None


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


def test_threads():
    """Several threads train one model at once: nothing that any of them folded in is lost, and nothing is torn."""
    model = nobs.instrument(Tokens(depth=2))
    plain = copy.deepcopy(model)
    ring, twin = nobs.RingBuffer(model), Twin(plain)
    for step in range(5):
        batches = [model.batch(8) for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda batch: loss_of(model, batch).backward(), batches))
        ring.add(step, 0.0)
        for batch in batches:
            loss_of(plain, batch).backward()
        row = next(ring.drain())
        expected = {key: line for key, line in twin.lines().items() if key[1].startswith("output")}
        for (layer, site), line in expected.items():
            for name, value in line.items():
                assert row[layer, site, name] == pytest.approx(value, rel=1e-5), (layer, site, name)
        for name, parameter in model.named_parameters():
            layer, _, own = name.rpartition(".")
            norm = parameter.grad.norm().item()  # sums of six gradients in any order
            assert row[layer, f"{own}.grad", "norm"] == pytest.approx(norm, rel=1e-5), name
            parameter.grad.zero_()
        twin.clear()


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


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_frozen_tower(guard):
    """A tower that runs without gradients in training is recorded, and the rest of the model as always."""
    tower, head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2)
    model = nobs.instrument(nn.ModuleDict({"tower": tower, "head": head}))
    ring = nobs.RingBuffer(model)
    for step in range(2):
        with guard():
            seen = tower(torch.ones(1, 3))
        head(seen.clone()).sum().backward()
        ring.add(step, 0.0)
    history = ring.history()
    assert history["tower", "output", "norm"] == pytest.approx([seen.norm().item()] * 2)
    assert (history["head", "weight.grad", "norm"] > 0).all()
    assert (history["tower", "weight", "norm"] > 0).all()


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


def test_slots_follow_the_model():
    """`.to()` and `.half()` leave the slots float32."""
    model = nobs.instrument(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))).to(torch.bfloat16)
    ring = nobs.RingBuffer(model)
    model(torch.randn(2, 3, dtype=torch.bfloat16)).sum().backward()
    ring.add(0, 0.0)
    layer = ring.history().layers[0]
    assert layer.sites["output"].dtype == "bfloat16"
    assert model[0]._nobs_output.dtype == torch.float32


def test_reentrant_checkpoint_in_eager():
    """The old checkpoint runs a backward inside the backward; the last reading has the whole gradient."""
    model = nobs.instrument(Tokens(depth=1))
    ring = nobs.RingBuffer(model)
    x = model.embed(torch.randint(0, 20, (4, 8)))
    checkpoint(model.blocks[0], x, use_reentrant=True).sum().backward()
    ring.add(0, 0.0)
    for name, p in model.blocks[0].named_parameters(prefix="blocks.0"):
        layer, _, own = name.rpartition(".")
        assert ring.history()[layer, f"{own}.grad", "norm"][0] == pytest.approx(p.grad.norm().item(), rel=1e-5)


def test_layers_behind_a_reentrant_checkpoint():
    """The backward inside the backward must not make the outer one forget what it had touched."""
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    model = nobs.instrument(nn.Sequential(a, b, c))
    ring = nobs.RingBuffer(model)
    c(checkpoint(b, a(torch.ones(2, 4)), use_reentrant=True)).sum().backward()
    ring.add(0, 0.0)
    for name, layer in zip("012", (a, b, c), strict=True):
        assert ring.history()[name, "weight.grad", "norm"][0] == pytest.approx(layer.weight.grad.norm().item(), rel=1e-5)


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


def test_another_default_device():
    """A default device of the user's must not reach into nobs."""
    model = nobs.instrument(nn.Linear(2, 2))
    with torch.device("meta"):
        ring = nobs.RingBuffer(model)
        model(torch.ones(1, 2, device="cpu")).sum().backward()
        ring.add(0, 0.0)
    assert ring.row.broken is None
    assert ring.history()["(model)", "weight.grad", "norm"][0] == 2


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


def test_gradients_inside_no_grad():
    """A layer that switches gradients on for itself keeps its graph."""

    class Insistent(nn.Linear):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)

    for shape in ((1, 3), (1, 2, 3)):
        model = nobs.instrument(Insistent(3, 3))
        ring = nobs.RingBuffer(model)
        with torch.no_grad():
            y = model(torch.ones(shape))
        y.sum().backward()
        ring.add(0, 0.0)
        assert ring.history()["(model)", "output.grad", "norm"][0] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: there are no CUDA graphs on a CPU")
def test_cuda_graphs_are_taken(fresh_dynamo):
    """mode="reduce-overhead": no graph is skipped for what the taps write, and replayed graphs write to the row as well."""
    model = nobs.instrument(Tokens(depth=2).cuda())
    step_model = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    ring = nobs.RingBuffer(model)
    for step in range(6):
        loss_of(step_model, [part.cuda() for part in model.batch()]).backward()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        model.zero_grad()
        ring.add(step, 0.0)
    assert fresh_dynamo["inductor"]["cudagraph_skips"] == 0
    row = list(ring.drain())[-1]
    assert row["head", "output", "norm"] > 0
    for name, norm in norms.items():
        layer, _, own = name.rpartition(".")
        assert row[layer, f"{own}.grad", "norm"] == pytest.approx(norm, rel=1e-5), name
