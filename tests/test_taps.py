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
    """no_grad in eval mode records nothing; eval mode with gradients does, and so does training without."""
    model = nobs.instrument(Images())
    step_model = torch.compile(model) if compiled else model
    x, _ = model.batch()
    ring = nobs.RingBuffer(model)
    model.eval()
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            step_model(x)
    ring.add(0, 0.0)
    step_model(x)
    ring.add(1, 0.0)
    model.train()
    with torch.no_grad():
        step_model(x)
    ring.add(2, 0.0)
    silent, *recorded = ring.drain()
    assert all(value != value for value in silent.kind("output", "norm"))
    for row in recorded:
        assert all(value == value for value in row.kind("output", "norm"))


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
    from nobs import _kernels

    model = nobs.instrument(Images())
    recorder = nobs.Recorder(model)

    def broken(*args):
        raise RuntimeError("planted")

    if where == "forward":
        monkeypatch.setattr(_kernels, "fold", broken)
    loss = loss_of(model, model.batch())
    monkeypatch.setattr(_kernels, "fold", broken)
    loss.backward()
    with pytest.warns(nobs.NobsWarning, match="stopped recording.*planted"):
        recorder.step(loss)
    recorder.step(loss)
    assert model.fc.weight.grad is not None


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


def test_threads_and_one_compiled_model(fresh_dynamo):
    """Of two folds at the same instant one may be lost (the README says so): never more than there was, and trained as ever."""
    model = Tokens(depth=1)
    plain = copy.deepcopy(model)
    ring = nobs.RingBuffer(nobs.instrument(model))
    call = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    batches = [model.batch(8) for _ in range(6)]
    loss_of(call, batches[0]).backward()  # compiled by one
    model.zero_grad()
    ring.row.blank()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda batch: loss_of(call, batch).backward(), batches))
    largest = 0.0
    for batch in batches:
        loss_of(plain, batch).backward()
        largest = max(largest, plain(batch[0]).norm().item())
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert 0 < row["head", "output", "norm"] <= largest * (1 + 1e-5)
    for (name, ours), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


class Towered(nn.Module):
    """A frozen tower, run without gradients, under a head that learns."""

    def __init__(self, guard):
        super().__init__()
        self.tower, self.head, self.guard = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2), guard

    def forward(self, x):
        with self.guard():
            seen = self.tower(x)
        return self.head(seen.clone())


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_tower(guard, compiled, fresh_dynamo):
    """A tower that runs without gradients in training is recorded, and the rest of the model as always."""
    if compiled and guard is torch.inference_mode:
        pytest.skip("torch compiles no training around inference_mode, with nobs or without")
    model = nobs.instrument(Towered(guard))
    ring = nobs.RingBuffer(model)
    call = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else model
    seen = F.linear(torch.ones(1, 3), model.tower.weight, model.tower.bias)
    for step in range(2):
        call(torch.ones(1, 3)).sum().backward()
        ring.add(step, 0.0)
    history = ring.history()
    assert history["tower", "output", "norm"] == pytest.approx([seen.norm().item()] * 2)
    assert (history["head", "weight.grad", "norm"] > 0).all()
    assert (history["tower", "weight", "norm"] > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_changes_its_dtype(dtype, compiled, fresh_dynamo):
    """`.bfloat16()`, `.half()`, `.double()`, after steps that were recorded: the next ones are as right, in float32 lines."""
    model = nobs.instrument(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    ring = nobs.RingBuffer(model)
    call = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition") if compiled else model
    for step, kind in enumerate((torch.float32, dtype)):
        model.to(kind)
        model.zero_grad()
        x = torch.randn(4, 3, dtype=kind)
        call(x).sum().backward()
        ring.add(step, 0.0)
        row = next(ring.drain())
        expected = F.linear(x, model[0].weight, model[0].bias).double().norm().item()
        assert row["0", "output", "norm"] == pytest.approx(expected, rel=1e-6)
        assert row["1", "weight.grad", "norm"] == pytest.approx(model[1].weight.grad.double().norm().item(), rel=1e-6)
    assert ring.history().layers[0].sites["output"].dtype == str(dtype).removeprefix("torch.")
    assert model[0]._nobs_output.dtype == torch.float32


def test_a_probe_in_a_pause():
    """A backward inside `paused()`, of a forward from before it: its gradients are no readings."""
    model = nobs.instrument(nn.Linear(4, 4))
    recorder = nobs.Recorder(model, triggers=[])
    y = model(torch.ones(1, 4))
    y.sum().backward(retain_graph=True)
    with recorder.paused():
        (y.sum() * 1000).backward()
    recorder.step(0.0)
    assert recorder.history()["(model)", "output.grad", "norm"] == [2]


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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_checkpoint_inside_of_compiled_code(backend, fresh_dynamo):
    """The recomputation writes to the tap's line once more, and the version counters of torch do not take that for damage."""
    model = nobs.instrument(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    rows = []
    for compiled in (False, True):

        def call(x):
            return checkpoint(model, x, use_reentrant=False)

        ring = nobs.RingBuffer(model)
        (torch.compile(call, backend=backend) if compiled else call)(torch.ones(3, 4)).sum().backward()
        model.zero_grad()
        ring.add(0, 0.0)
        rows += [torch.from_numpy(row.values) for row in ring.drain()]
    torch.testing.assert_close(rows[1][:, :7], rows[0][:, :7], rtol=1e-5, atol=0, equal_nan=True)


def test_layers_behind_a_reentrant_checkpoint():
    """The backward inside the backward must not make the outer one forget what it had touched."""
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    model = nobs.instrument(nn.Sequential(a, b, c))
    ring = nobs.RingBuffer(model)
    c(checkpoint(b, a(torch.ones(2, 4)), use_reentrant=True)).sum().backward()
    ring.add(0, 0.0)
    for name, layer in zip("012", (a, b, c), strict=True):
        assert ring.history()[name, "weight.grad", "norm"][0] == pytest.approx(layer.weight.grad.norm().item(), rel=1e-5)


def test_another_default_device():
    """A default device of the user's must not reach into nobs."""
    model = nobs.instrument(nn.Linear(2, 2))
    with torch.device("meta"):
        ring = nobs.RingBuffer(model)
        model(torch.ones(1, 2, device="cpu")).sum().backward()
        ring.add(0, 0.0)
    assert ring.row.broken is None
    assert ring.history()["(model)", "weight.grad", "norm"][0] == 2


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
