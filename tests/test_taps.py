"""Every recorded number against the slow twin, in every mode; and nothing of the user's changed by it."""

import copy

import pytest
import torch
from nets import NETS, Images, Outputs, Pair, Tokens, loss_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from twin import Twin, assert_agree

import nobs
from nobs._taps import _map_tensors

MODES = {
    "eager": lambda model: model,
    "whole": lambda model: torch.compile(model, fullgraph=True),
    "blocks": lambda model: [block.compile(fullgraph=True) for block in model.blocks] and model,
}
COMBINATIONS = [
    (mode, name) for mode in MODES for name in NETS if mode == "eager" or "tokens" in name or (mode, name) == ("whole", "images")
]


def train(model, step_model, batches, optimizer, each_step, accumulate=2):
    """Two micro-batches a step; `each_step(step, loss, values)` after backward, with the parameters as they were."""
    for step, pair in enumerate(zip(*[iter(batches)] * accumulate, strict=True)):
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        for micro_batch in pair:
            loss = loss_of(step_model, micro_batch)
            loss.backward()
        optimizer.step()
        each_step(step, loss, values)
        optimizer.zero_grad()


def twins_of(make, mode, fresh_dynamo, steps=3):
    """The rows that nobs recorded in some mode and the lines that the twin saw in eager, step by step, and the graphs."""
    torch.manual_seed(1)
    model = make()
    plain = copy.deepcopy(model)
    batches = [model.batch() for _ in range(2 * steps)]

    nobs.instrument(model)
    ring = nobs.RingBuffer(model)
    rows, lines = [], []

    def record(step, loss, values):
        ring.add(step, loss)
        rows.extend(ring.drain())

    train(model, MODES[mode](model), batches, torch.optim.SGD(model.parameters(), lr=0.1), record)
    graphs = fresh_dynamo["stats"]["unique_graphs"], sum(fresh_dynamo["graph_break"].values())

    twin = Twin(plain)

    def watch(step, loss, values):
        lines.append(twin.lines(values))
        twin.clear()

    train(plain, plain, batches, torch.optim.SGD(plain.parameters(), lr=0.1), watch)
    return rows, lines, graphs, model, plain


@pytest.mark.parametrize(("mode", "name"), COMBINATIONS)
def test_every_number_equals_the_twin(mode, name, fresh_dynamo):
    """GIVEN a model in some mode, WHEN it trains with micro-batches, THEN each statistic of each site is the twin's."""
    rows, lines, (_, breaks), _, _ = twins_of(NETS[name], mode, fresh_dynamo)
    assert breaks == 0
    assert len(rows) == len(lines) == 3
    for row, expected in zip(rows, lines, strict=True):
        # In compile, outputs themselves differ by rounding; near-zero values are compared to the layer's scale.
        assert_agree(row, expected, rtol=1e-5 if mode == "eager" else 5e-5, atol=1e-30 if mode == "eager" else 1e-6)


@pytest.mark.parametrize("name", NETS)
def test_training_is_bit_equal_in_eager(name, fresh_dynamo):
    """nobs must not move the user's numbers: not one bit of one parameter or buffer."""
    _, _, _, model, plain = twins_of(NETS[name], "eager", fresh_dynamo)
    for (key, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("mode", ["whole", "blocks"])
def test_as_many_graphs_as_without(mode, fresh_dynamo):
    """Taps add no graph and no break: identical blocks go on sharing one; and training stays what it is, but for rounding."""
    counts, losses = [], []
    for instrumented in (False, True):
        torch._dynamo.reset()
        fresh_dynamo.clear()
        torch.manual_seed(3)
        model = Tokens(depth=4)
        if instrumented:
            nobs.instrument(model)
        step_model = MODES[mode](model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            loss = loss_of(step_model, model.batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        counts.append((fresh_dynamo["stats"]["unique_graphs"], sum(fresh_dynamo["graph_break"].values())))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-6)


def test_several_forwards_before_their_backwards(fresh_dynamo):
    """Two forwards, then two backwards, compiled per block: the fold is the worst of both, no update lost."""
    model = Tokens()
    plain = copy.deepcopy(model)
    batches = [model.batch(), model.batch()]
    nobs.instrument(model)
    MODES["blocks"](model)
    ring = nobs.RingBuffer(model)
    twin = Twin(plain)
    values = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for each in (model, plain):
        losses = [loss_of(each, batch) for batch in batches]
        for loss in losses:
            loss.backward()
    ring.add(0, losses[0])
    assert_agree(next(ring.drain()), twin.lines(values), rtol=5e-5, atol=1e-6)


def test_checkpoint_around_a_compiled_block(fresh_dynamo):
    """Recomputation outside the compiled region runs the forward again; the numbers stay those of one run."""
    model = Tokens(recompute=True)
    plain = copy.deepcopy(model)
    batch = model.batch()
    nobs.instrument(model)
    MODES["blocks"](model)
    ring, twin = nobs.RingBuffer(model), Twin(plain)
    values = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for each in (model, plain):
        loss = loss_of(each, batch)
        loss.backward()
    ring.add(0, loss)
    assert_agree(next(ring.drain()), twin.lines(values), rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "whole"])
def test_layers_in_execution_order(mode, fresh_dynamo):
    """Registered head first, it still comes last, and the unused layer never ran."""
    model = nobs.instrument(Tokens(depth=2))
    ring = nobs.RingBuffer(model)
    loss_of(MODES[mode](model), model.batch()).backward()
    ring.add(0, 1.0)
    ran = [layer.name for layer in ring.history().layers if layer.order is not None]
    assert ran == ["embed", *(f"blocks.{i}.{part}" for i in range(2) for part in ("norm", "up", "down")), "head"]


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


def test_every_k_adds_one_graph(fresh_dynamo):
    """every=3 samples each third step, and compiles two variants, not three."""
    model = nobs.instrument(Tokens(depth=1), every=3)
    step_model = torch.compile(model, fullgraph=True)
    ring = nobs.RingBuffer(model)
    for step in range(7):
        loss = loss_of(step_model, model.batch())
        loss.backward()
        ring.add(step, loss)
    history = ring.history()
    sampled = [step for step in range(7) if history["head", "output", "norm"][step] > 0]
    assert sampled == [0, 3, 6]
    assert [step for step in range(7) if history["head", "weight.grad", "norm"][step] > 0] == sampled
    assert history.given["loss"].all()
    assert fresh_dynamo["stats"]["unique_graphs"] == 2


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


def test_containers_are_rebuilt_as_they_were():
    """Tuples, named tuples, lists, dicts and dataclasses keep their types; what is no tensor passes untouched."""
    from torch.nn.utils.rnn import PackedSequence, pack_sequence

    tap = lambda x: x + 1 if x.is_floating_point() else x  # noqa: E731
    one = torch.ones(2)
    packed = pack_sequence([torch.zeros(3, 1), torch.zeros(2, 1)])
    output = (one, [one, None], {"a": one, "b": "text"}, Pair(one, "name"), packed)
    mapped = _map_tensors(tap, output)
    assert [type(part) for part in mapped] == [torch.Tensor, list, dict, Pair, PackedSequence]
    assert mapped[1][0].tolist() == mapped[2]["a"].tolist() == mapped[3].logits.tolist() == [2, 2]
    assert mapped[2]["b"] == "text"
    assert mapped[3].name == "name"
    assert mapped[4].data.sum() == 5
    assert torch.equal(mapped[4].batch_sizes, packed.batch_sizes)


def test_a_failing_tap_does_not_end_the_run(monkeypatch):
    """An error of nobs inside the forward stops the recording; the user's forward and backward go on."""
    from nobs import _stats

    model = nobs.instrument(Images())
    recorder = nobs.Recorder(model)

    def broken(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr(_stats, "measure", broken)
    loss = loss_of(model, model.batch())
    loss.backward()
    with pytest.warns(nobs.NobsWarning, match="stopped recording.*planted"):
        recorder.step(loss)
    recorder.step(loss)
    assert model.fc.weight.grad is not None


def test_slots_follow_the_model():
    """`.half()` leaves the slots float32; meta and back makes new ones that work."""
    model = nobs.instrument(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))).to(torch.bfloat16)
    ring = nobs.RingBuffer(model)
    model(torch.randn(2, 3, dtype=torch.bfloat16)).sum().backward()
    ring.add(0, 0.0)
    layer = ring.history().layers[0]
    assert layer.sites["output"].dtype == "bfloat16"
    assert model[0]._nobs_output.dtype == torch.float32

    with torch.device("meta"):
        empty = nobs.instrument(nn.Linear(3, 3))
    empty.to_empty(device="cpu")
    nn.init.ones_(empty.weight)
    nn.init.zeros_(empty.bias)
    ring = nobs.RingBuffer(empty)
    empty(torch.ones(1, 3)).sum().backward()
    ring.add(0, 0.0)
    assert ring.history()["(model)", "output", "absmax"][0] == 3
    assert ring.history()["(model)", "weight.grad", "norm"][0] == 3


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


@pytest.mark.parametrize("to_none", [True, False])
def test_two_updates_in_one_step(to_none):
    """Where gradients are zeroed between two backwards the step shows the worse, and the parameter as the first found it."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    ring = nobs.RingBuffer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms, before = [], model.weight.norm().item()
    for scale in (100.0, 1.0):
        optimizer.zero_grad(set_to_none=to_none)
        (model(torch.ones(2, 3)).sum() * scale).backward()
        norms.append(model.weight.grad.norm().item())
        optimizer.step()
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["(model)", "weight.grad", "norm"] == pytest.approx(max(norms), rel=1e-6)
    assert row["(model)", "weight", "norm"] == pytest.approx(before, rel=1e-6)


def test_an_optimizer_inside_the_backward():
    """A hook that updates and drops each gradient at once: it is read before that."""
    model = nobs.instrument(nn.Linear(3, 1, bias=False))
    before = model.weight.norm().item()

    def update(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    model.weight.register_post_accumulate_grad_hook(update)
    ring = nobs.RingBuffer(model)
    model(torch.ones(2, 3)).sum().backward()
    ring.add(0, 0.0)
    row = next(ring.drain())
    assert row["(model)", "weight.grad", "norm"] == pytest.approx(2 * 3**0.5, rel=1e-6)
    assert row["(model)", "weight", "norm"] == pytest.approx(before, rel=1e-6)


def test_functorch_passes_untapped():
    """vmap, func.grad and forward AD work as without nobs, and the recording goes on behind them."""
    model = nobs.instrument(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    ring = nobs.RingBuffer(model)
    parameters = dict(model.named_parameters())

    def loss(p, x):
        return torch.func.functional_call(model, p, (x,)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.ones(5, 3))
    assert gradients["0.weight"].shape == (5, 3, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(1, 3), torch.ones(1, 3))
        assert torch.autograd.forward_ad.unpack_dual(model(dual)).tangent is not None
    model(torch.ones(1, 3)).sum().backward()
    ring.add(0, 0.0)
    assert ring.row.broken is None
    assert ring.history()["1", "output", "norm"][0] > 0


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
    """torch.set_default_device of the user's must not reach into nobs."""
    model = nobs.instrument(nn.Linear(2, 2))
    torch.set_default_device("meta")
    try:
        ring = nobs.RingBuffer(model)
        model(torch.ones(1, 2, device="cpu")).sum().backward()
        ring.add(0, 0.0)
    finally:
        torch.set_default_device(None)
    assert ring.row.broken is None
    assert ring.history()["(model)", "weight.grad", "norm"][0] == 2


def test_containers_that_cannot_be_rebuilt():
    """A tuple type with a constructor of its own: the user's output passes, and the recording stops, said once."""

    class Odd(tuple):
        def __new__(cls, a, b):
            return super().__new__(cls, (a, b))

    class Layer(nn.Linear):
        def forward(self, x):
            return Odd(super().forward(x), 1)

    model = nobs.instrument(nn.Sequential(Layer(2, 2)))
    recorder = nobs.Recorder(model)
    assert model(torch.ones(1, 2))[1] == 1
    with pytest.warns(nobs.NobsWarning, match="stopped recording"):
        recorder.step(1.0)
