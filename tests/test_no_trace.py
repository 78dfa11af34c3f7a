"""Whatever people do with a model works with its taps in as without; and `uninstrument` leaves none."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from nets import Images, Outputs
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from zoo import ZOO, loss_of

import nobs
from nobs._row import rows_of

SMALL = [name for name, specimen in ZOO.items() if not specimen.large]
PARAMETRIZED = ("weight_norm", "spectral_norm")


def made(name, observed=False):
    """A model of the zoo, ready to run."""
    model = ZOO[name].make().train()
    if observed:
        nobs.instrument(model)
    ZOO[name].ready(model)
    return model


def pair(name):
    """A model with its taps and the same one without."""
    torch.manual_seed(0)
    plain = made(name)
    torch.manual_seed(0)
    return made(name, observed=True), plain


def facts(model):
    """All that tells one model from another, but for the values of its parameters."""
    return {
        name: (
            type(module),
            type(module).__mro__,
            sorted(vars(module)),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", SMALL)
def test_it_looks_the_same(name):
    """state_dict, parameters and buffers by name and value, the types in repr, isinstance."""
    model, plain = pair(name)
    for each in ("state_dict", "named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, each)()) for m in (model, plain))
        assert list(ours) == list(theirs)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert repr(model) == repr(plain)
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(ours, type(theirs).__bases__[0] if parametrize.is_parametrized(theirs) else type(theirs))
    assert model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_it_is_given_back(name):
    """The very classes, attributes and hooks that were there before, also after some training."""
    specimen = ZOO[name]
    model = made(name)
    loss_of(model, specimen.inputs(2)).backward()  # what layers keep on themselves is there now
    before = facts(model)
    nobs.instrument(model)
    ring = nobs.RingBuffer(model)
    loss_of(model, specimen.inputs(2)).backward()
    ring.add(0, 0.0)
    assert nobs.uninstrument(model) is model
    assert facts(model) == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_plain(name, how):
    """A copy computes the same, records nothing here, and can be instrumented itself."""
    model, plain = pair(name)
    if how != "deepcopy" and name in PARAMETRIZED:
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):  # torch's own words
            pickle.dumps(model)
        return
    if name in ("old weight_norm", "pruned"):  # a weight that was computed cannot be copied; before the first call it is there
        for each in (model, plain):
            del each[0].weight
            each[0](torch.ones(1, 8))
            each[0].weight = each[0].weight.detach()
    twin = copied(model, how)
    assert not rows_of(twin)
    if name not in PARAMETRIZED:
        assert facts(twin) == facts(copied(plain, how))
    ring = nobs.RingBuffer(model)
    inputs = ZOO[name].inputs(2)
    torch.manual_seed(1)
    ours = loss_of(twin, inputs)
    torch.manual_seed(1)
    assert ours == loss_of(plain, inputs)
    ring.add(0, 0.0)
    assert not any(layer.sites for layer in ring.history().layers)
    nobs.uninstrument(nobs.instrument(twin))


def copied(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_is_free_to_die(name):
    """Dropped, it is gone at once and without the collector, where it is so without nobs; and with it in any case."""
    alive = []
    for observed in (False, True):
        model = made(name, observed)
        ring = nobs.RingBuffer(model) if observed else None
        loss_of(model, ZOO[name].inputs(2)).backward()
        if ring:
            ring.add(0, 0.0)
        watched = weakref.ref(model)
        gc.disable()
        try:
            del model, ring
            alive.append(watched() is not None)
        finally:
            gc.enable()
        gc.collect()
        assert watched() is None
    assert alive[1] <= alive[0]


def test_outputs_can_be_saved():
    """The hook on an output is not part of it: no warning that it is left out."""
    model = nobs.instrument(nn.Linear(2, 2))
    torch.save(model(torch.ones(1, 2)), io.BytesIO())


def test_averaged_model():
    """The average is of plain layers: evaluating it in training mode records nothing."""
    model = nobs.instrument(Images())
    ring = nobs.RingBuffer(model)
    average = AveragedModel(model)
    average.update_parameters(model)
    average(model.batch()[0])
    ring.add(0, 0.0)
    assert not any(layer.sites for layer in ring.history().layers)
    assert type(average.module.fc) is nn.Linear


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrizations_come_and_go(when):
    """Registered before nobs or on top of it, they can be removed again, and so can the taps, in any order."""
    for taps_go_first in (False, True):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        plain = {name: value.clone() for name, value in model.state_dict().items()}
        if when == "before":
            parametrizations.weight_norm(model[0])
        nobs.instrument(model)
        if when == "after":
            parametrizations.weight_norm(model[0])
        ring = nobs.RingBuffer(model)
        model(torch.ones(1, 3)).sum().backward()
        ring.add(0, 0.0)
        assert ring.history()["0", "output", "norm"][0] > 0
        assert ring.row.broken is None
        remove = lambda model=model: parametrize.remove_parametrizations(model[0], "weight")  # noqa: E731
        take = lambda model=model: nobs.uninstrument(model)  # noqa: E731
        for step in (take, remove) if taps_go_first else (remove, take):
            step()
        assert type(model[0]) is nn.Linear
        assert list(model.state_dict()) == (["0.bias", "0.weight", "1.weight", "1.bias"])
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, plain[name])


def test_pruning_comes_and_goes():
    """Pruned on top of the taps: it trains, is recorded, and can be made permanent."""
    model = nobs.instrument(nn.Sequential(nn.Linear(3, 3)))
    prune.l1_unstructured(model[0], "weight", 0.5)
    ring = nobs.RingBuffer(model)
    model(torch.ones(1, 3)).sum().backward()
    ring.add(0, 0.0)
    assert ring.history()["0", "output", "norm"][0] > 0
    prune.remove(model[0], "weight")
    assert type(nobs.uninstrument(model)[0]) is nn.Linear


def functional(model, x):
    return torch.func.functional_call(model, dict(model.named_parameters()), (x,))


def per_sample_gradients(model, x):
    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,)).square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["0.weight"]


def jacobian(model, x):
    return torch.func.jacrev(model)(x)


def forward_mode(model, x):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


def gradient_penalty(model, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    return model[0].weight.grad


def exported(model, x, strict=False):
    program = torch.export.export(model, (x,), strict=strict)
    assert not program.graph_signature.buffers_to_mutate
    return torch.cat([program.module()(x).flatten(), torch.tensor([float(len(program.graph.nodes))])])


def exported_strictly(model, x):
    return exported(model, x, strict=True)


def traced(model, x):
    return torch.jit.trace(model, x)(x)


def symbolically_traced(model, x):
    return torch.fx.symbolic_trace(model)(x)


def compiled_per_sample(model, x):
    return torch.compile(per_sample_gradients, backend="aot_eager", fullgraph=True)(model, x)


def compiled_backward(model, x):
    """Compiled autograd, an experiment of torch's."""
    with torch._dynamo.config.patch(compiled_autograd=True):
        loss = torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum()
        torch.compile(torch.Tensor.backward, backend="aot_eager")(loss)
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    return gradient


WAYS = (
    functional, per_sample_gradients, jacobian, forward_mode, gradient_penalty, exported, exported_strictly, traced,
    symbolically_traced, compiled_per_sample, compiled_backward,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated", "ignore:.*is deprecated:DeprecationWarning")
def test_other_ways_to_run_a_model(way, fresh_dynamo):
    """functorch, forward AD, double backward, export and tracing give what they give without; recording goes on behind."""
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    model = nobs.instrument(copy.deepcopy(plain))
    x = torch.randn(5, 3)
    ring = nobs.RingBuffer(model)
    assert torch.equal(way(model, x), way(plain, x))
    ring.add(0, 0.0)
    model(x).sum().backward()
    ring.add(1, 0.0)
    assert ring.row.broken is None
    assert ring.history()["3", "output", "norm"][1] > 0


@pytest.mark.parametrize("whole_step", [False, True])
def test_a_graph_that_breaks_around_layers(whole_step, fresh_dynamo):
    """Dynamo leaves torch's own layers alone where the graph around them breaks; ours must not become graphs either."""

    class Breaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                if not whole_step:
                    torch._dynamo.graph_break()
            return x

    counts = []
    for observed in (False, True):
        torch._dynamo.reset()
        fresh_dynamo.clear()
        model = Breaking()
        ring = nobs.RingBuffer(nobs.instrument(model)) if observed else None

        def step(x, model=model):
            loss = model(x).square().sum()
            if whole_step:
                loss.backward()  # breaks the graph: the backward runs under Dynamo's eyes
            return loss

        loss = torch.compile(step, backend="aot_eager")(torch.ones(2, 4))
        if not whole_step:
            loss.backward()
        counts.append((fresh_dynamo["stats"]["unique_graphs"], sum(fresh_dynamo["graph_break"].values())))
    ring.add(0, 0.0)
    assert counts[0] == counts[1]
    assert ring.history()["layers.2", "output.grad", "norm"][0] > 0
    assert ring.history()["layers.0", "weight.grad", "norm"][0] > 0


def test_a_compiled_model_is_given_back(fresh_dynamo):
    """The same compiled object trains on without taps, as if there had never been any, and is recorded again later."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nobs.instrument(model)
    call = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.ones(2, 3)
    for observed in (True, False, True):
        if observed and fresh_dynamo["stats"]["unique_graphs"]:
            nobs.instrument(model)
        ring = nobs.RingBuffer(model) if observed else None
        model.zero_grad()
        call(x).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        if ring is not None:
            ring.add(0, 0.0)
            assert ring.history()["0", "output", "norm"][0] > 0
            nobs.uninstrument(model)
        assert type(model[0]) is nn.Linear
        assert all(parameter._post_accumulate_grad_hooks is None for parameter in model.parameters())
        model.zero_grad()
        model(x).sum().backward()
        assert all(torch.equal(ours, parameter.grad) for ours, parameter in zip(gradients, model.parameters(), strict=True))
    assert fresh_dynamo["stats"]["unique_graphs"] == 2  # with taps, and without


def test_many_types_of_layers_compiled_apart(fresh_dynamo):
    """Dynamo counts recompilations by code: a dozen types, each compiled by itself, must not share one."""
    kinds = [type(f"Own{i}", (nn.Linear,), {"forward": copy_of(nn.Linear.forward)}) for i in range(12)]
    model = nobs.instrument(nn.Sequential(*[kind(3, 3) for kind in kinds]))
    for layer in model:
        torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.ones(1, 3)).sum().backward()


def copy_of(function):
    def forward(self, x):
        return function(self, x)

    return forward


def test_a_deep_copy_of_a_parametrized_layer():
    """torch copies such layers attribute by attribute, class and all: the copy has no row, and can get one of its own."""
    model = nobs.instrument(parametrizations.weight_norm(Outputs().shared))
    twin = copy.deepcopy(model)
    assert not rows_of(twin)
    for each in (model, twin if rows_of(twin) else nobs.instrument(twin)):
        ring = nobs.RingBuffer(each)
        each(torch.ones(1, 6)).sum().backward()
        ring.add(0, 0.0)
        assert ring.history()["(model)", "output", "norm"][0] > 0
