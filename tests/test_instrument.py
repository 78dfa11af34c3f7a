"""Putting taps in and taking them out: which layers, what stays as it was, and what a wrong call is told."""

import copy
import inspect
import pickle

import pytest
import torch
from nets import Images, Outputs, Tokens, loss_of
from torch import nn

import nobs
from nobs._row import rows_of
from nobs.errors import AlreadyInstrumented, BadSetting, NothingToRecord, NotInstrumented, UnknownLayer


def layers_of(model):
    return {tap.layer for tap in nobs.RingBuffer(model).row.table.taps}


def test_the_same_object_and_the_same_types():
    """instrument returns the model; isinstance, repr, state_dict and the forward's signature are as without."""
    plain, model = Tokens(), Tokens()
    plain.load_state_dict(model.state_dict())
    assert nobs.instrument(model) is model
    assert isinstance(model.head, nn.Linear)
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(model.named_buffers()) == []
    assert inspect.signature(model.head.forward) == inspect.signature(plain.head.forward)
    assert not any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in model.modules())


def test_default_layers():
    """Every layer that owns parameters, and norms without any; not ReLU."""
    model = nn.Sequential(
        nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2, affine=False), nn.Bilinear(2, 2, 2), nn.GRUCell(2, 2), nn.PReLU()
    )
    assert layers_of(nobs.instrument(model)) == {"0", "2", "3", "4", "5"}
    assert layers_of(nobs.instrument(Outputs())) == {"(model)", "split", "shared", "unused", "attention", "attention.out_proj"}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (nn.LayerNorm, {"blocks.0.norm", "blocks.1.norm"}),
        ("blocks.*.up", {"blocks.0.up", "blocks.1.up"}),
        ("head", {"head"}),
        (lambda name, module: name.startswith("blocks.1.") and isinstance(module, nn.Linear), {"blocks.1.down", "blocks.1.up"}),
        ([nn.Embedding, "head"], {"embed", "head"}),
    ],
)
def test_layers_by_type_glob_and_predicate(layers, expected):
    """`layers=` takes what users of the field already write."""
    assert layers_of(nobs.instrument(Tokens(depth=2), layers=layers)) == expected


def test_tied_parameters_are_recorded_once():
    """A weight that two layers share stands under its first name."""
    model = Tokens(depth=1)
    model.head.weight = model.embed.weight
    row = nobs.RingBuffer(nobs.instrument(model)).row
    weights = [(tap.layer, tap.site) for tap in row.table.taps if tap.site == "weight" and tap.layer in ("head", "embed")]
    assert weights == [("head", "weight")]


def test_uninstrument_gives_the_model_back():
    """Class, attributes and hooks are as before; a second uninstrument says so; a new instrument works."""
    model = Images()
    before = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    nobs.uninstrument(nobs.instrument(model))
    assert {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()} == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with pytest.raises(NotInstrumented, match=r"without taps[\s\S]*nobs.instrument"):
        nobs.uninstrument(model)
    nobs.instrument(model)


def test_a_frozen_layer_that_is_thawed():
    """requires_grad switched on later: its gradient is read from its first backward on."""
    model = Images()
    model.conv1.weight.requires_grad_(False)
    nobs.instrument(model)
    ring = nobs.RingBuffer(model)
    for step in range(3):
        loss_of(model, model.batch()).backward()
        ring.add(step, 0.0)
        model.conv1.weight.requires_grad_(True)
    norms = ring.history()["conv1", "weight.grad", "norm"]
    assert [value == value for value in norms] == [False, True, True]
    assert (ring.history()["conv1", "weight", "norm"] > 0).all()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: nobs.instrument(nobs.instrument(Images())), AlreadyInstrumented, r"'conv1' has its tap[\s\S]*uninstrument"),
        (
            lambda: nobs.instrument(nn.Sequential(nn.ReLU())),
            NothingToRecord,
            r"2 modules, none of which owns parameters[\s\S]*layers=",
        ),
        (lambda: nobs.instrument(Images(), layers="conv3"), UnknownLayer, r"'conv3', which fits no layer[\s\S]*'conv2', 'conv1'"),
        (lambda: nobs.instrument(Images(), layers=nn.LSTM), UnknownLayer, r"LSTM, of which there is no layer[\s\S]*Conv2d"),
        (lambda: nobs.instrument(Images(), layers=lambda n, m: False), NothingToRecord, r"of which layers=.* chooses none"),
        (lambda: nobs.instrument(Images(), layers=[]), NothingToRecord, r"layers=\[\] chooses none"),
        (lambda: nobs.instrument(Images(), layers=5), BadSetting, "got:      5"),
        (lambda: nobs.instrument(Images(), layers=[None]), BadSetting, "got:      None"),
        (lambda: nobs.instrument(Images(), layers=[int]), BadSetting, "class 'int'"),
        (lambda: nobs.instrument(Images(), layers=[nn.Linear(1, 1)]), BadSetting, r"a Linear[\s\S]*a layer type, a glob"),
        (lambda: nobs.uninstrument(5), NotInstrumented, "a int without taps"),
        (lambda: nobs.RingBuffer(None), NotInstrumented, "a NoneType without taps"),
        (lambda: nobs.instrument(Images(), every=0), BadSetting, r"every=0[\s\S]*at least 1"),
        (lambda: nobs.instrument(Images(), every=1.5), BadSetting, "every=1.5"),
        (lambda: nobs.instrument("model"), BadSetting, r"a str[\s\S]*torch.nn.Module"),
        (
            lambda: nobs.instrument(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))),
            BadSetting,
            r"cpu \(0\) and meta \(1\)",
        ),
        (lambda: nobs.Recorder(Images()), NotInstrumented, r"Images without taps[\s\S]*model = nobs.instrument\(model\)"),
        (lambda: nobs.RingBuffer(nobs.instrument(Images()), capacity=0), BadSetting, "capacity=0"),
    ],
)
def test_wrong_calls(call, error, says):
    """Each says what was done, got, expected and what to type."""
    with pytest.raises(error, match=says) as caught:
        call()
    assert isinstance(caught.value, nobs.NobsError)
    for part in ("got:", "expected:", "type:"):
        assert part in str(caught.value)


@pytest.mark.parametrize("through_the_wrapper", [True, False])
def test_after_the_first_compiled_call_it_warns(through_the_wrapper, fresh_dynamo):
    """Late taps work, and the user is told the price; before the first call there is nothing to warn of."""
    model = Tokens(depth=1)
    compiled = torch.compile(model, backend="eager")
    loss_of(compiled, model.batch())
    nobs.instrument(Tokens(depth=1))  # another model of the class, which nobody has compiled
    with pytest.warns(nobs.NobsWarning, match="compiles again"):
        nobs.instrument(compiled if through_the_wrapper else model)
    ring = nobs.RingBuffer(compiled)
    loss_of(compiled, model.batch()).backward()
    ring.add(0, 0.0)
    assert ring.history()["head", "output", "norm"][0] > 0


def test_names_without_the_wrappers(fresh_dynamo):
    """torch.compile's `_orig_mod` is not part of a layer's name."""
    model = nobs.instrument(torch.compile(Tokens(depth=1)))
    assert "blocks.0.up" in layers_of(model)


def test_disabled(monkeypatch):
    """NOBS_DISABLE=1: nothing is put in, and everything can still be called."""
    monkeypatch.setenv("NOBS_DISABLE", "1")
    model = Images()
    assert nobs.uninstrument(nobs.instrument(model)) is model
    assert type(model.fc) is nn.Linear
    ring = nobs.RingBuffer(model)
    ring.add(0, float("nan"))
    assert list(ring.drain()) == []
    with nobs.Recorder(model) as recorder:
        recorder.step(torch.tensor(float("nan")))
        recorder.flush()
        recorder.load_state_dict(recorder.state_dict())
        with recorder.paused():
            pass
        assert len(recorder.history()) == 0
        assert len(recorder.history()["fc", "weight.grad", "norm"]) == 0
        assert recorder.dump() is None
        assert recorder.report is None
    assert recorder.state_dict() == {}

    class Mine(nobs.Recorder):
        def __init__(self, model, extra):
            super().__init__(model)
            self.extra = extra

    assert Mine(model, 3).extra == 3


def test_a_layer_that_makes_another_of_its_own_type():
    """`type(self)(...)` in a user's layer gives a layer without slots: it computes, and records nothing."""

    class Twin(nn.Linear):
        def twin(self):
            return type(self)(self.in_features, self.out_features)

    model = nobs.instrument(nn.Sequential(Twin(3, 3)))
    other = model[0].twin()
    assert other(torch.ones(1, 3)).shape == (1, 3)
    other.double()
    assert copy.deepcopy(other).weight.dtype == torch.float64


@pytest.mark.parametrize("change", ["parametrize", "no bias", "prune"])
def test_surgery_after_instrument(change):
    """A parametrization, a removed bias, pruning: the model still moves, trains and is recorded."""
    from torch.nn.utils import parametrizations, prune

    model = nobs.instrument(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    if change == "parametrize":
        parametrizations.weight_norm(model[0])
    elif change == "no bias":
        model[0].bias = None
    else:
        prune.l1_unstructured(model[0], "weight", 0.5)
    model.to(torch.float64)
    ring = nobs.RingBuffer(model)
    model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    ring.add(0, 0.0)
    history = ring.history()
    assert history["0", "output", "norm"][0] > 0
    assert history["1", "weight.grad", "norm"][0] > 0
    assert not any("_nobs_row" in vars(module) for module in nobs.uninstrument(model).modules())


def test_a_class_that_something_else_has_changed():
    """As fully_shard does: nobs cannot take its own class out from under it, and says so."""
    model = nobs.instrument(nn.Sequential(nn.Linear(3, 3)))
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    with pytest.raises(BadSetting, match=r"a Sharded whose class was changed again[\s\S]*undo first"):
        nobs.uninstrument(model)


def test_parameters_that_are_replaced():
    """load_state_dict(assign=True) puts new parameters in: they are recorded from then on."""
    model = nobs.instrument(Images())
    ring = nobs.RingBuffer(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    for step in range(60):
        loss_of(model, model.batch()).backward()
        ring.add(step, 0.0)
    assert ring.history()["fc", "weight.grad", "norm"][-1] > 0
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    ring = nobs.RingBuffer(model)  # a recorder made behind the load sees them at once
    loss_of(model, model.batch()).backward()
    ring.add(0, 0.0)
    assert ring.history()["fc", "weight.grad", "norm"][0] > 0


def test_a_forward_of_the_object_itself():
    """A layer whose forward was replaced on the object is recorded by its parameters, and the user is told."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].forward = lambda x: x * 2
    with pytest.warns(nobs.NobsWarning, match="output of 0: its forward was replaced"):
        nobs.instrument(model)
    ring = nobs.RingBuffer(model)
    model(torch.ones(1, 2)).sum().backward()
    ring.add(0, 0.0)
    assert ring.history()["1", "output", "norm"][0] > 0


def test_a_parameter_list_alone():
    """A module whose only recorded part has no forward can be recorded, and given back."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList([torch.ones(2)])

        def forward(self, x):
            return x * self.parts[0]

    model = nobs.instrument(Listed())
    ring = nobs.RingBuffer(model)
    model(torch.ones(2)).sum().backward()
    ring.add(0, 0.0)
    assert ring.history()["parts", "0.grad", "norm"][0] == pytest.approx(2**0.5)
    assert type(nobs.uninstrument(model).parts) is nn.ParameterList


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.LazyLinear(2)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu_().flatten(1))


@pytest.mark.parametrize("compiled", [False, True])
def test_lazy_layers(compiled, fresh_dynamo):
    """They get their parameters in the first call, and their class with them: recorded from that call on, by their last name."""
    torch.manual_seed(0)
    plain = Lazy()
    torch.manual_seed(0)
    model = nobs.instrument(Lazy())
    ring = nobs.RingBuffer(model)
    x = torch.randn(3, 2, 8)
    for each in (model, plain):
        torch.manual_seed(1)
        (torch.compile(each, backend="aot_eager") if compiled else each)(x).square().sum().backward()
    ring.add(0, 0.0)
    history = ring.history()
    assert {layer.name: layer.type for layer in history.layers} == {"conv": "Conv1d", "norm": "BatchNorm1d", "fc": "Linear"}
    assert [layer.order for layer in history.layers] == [0, 1, 2]
    for name, parameter in plain.named_parameters():
        layer, own = name.split(".")
        assert history[layer, own, "norm"][0] == pytest.approx(parameter.norm().item(), rel=1e-5)
        assert history[layer, f"{own}.grad", "norm"][0] == pytest.approx(parameter.grad.norm().item(), rel=1e-5, abs=1e-7)
    nobs.uninstrument(model)
    assert [type(part) for part in model.children()] == [nn.Conv1d, nn.BatchNorm1d, nn.Linear]
    assert {name: sorted(vars(part)) for name, part in model.named_children()} == {
        name: sorted(vars(part)) for name, part in plain.named_children()
    }


def test_lazy_layers_that_never_ran():
    """Given back lazy, and able to run."""
    model = nobs.uninstrument(nobs.instrument(Lazy()))
    assert [type(part) for part in model.children()] == [nn.LazyConv1d, nn.LazyBatchNorm1d, nn.LazyLinear]
    model(torch.randn(3, 2, 8))
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_a_model_from_the_meta_device(how):
    """Instrumented before it has memory, by either way in which it gets some."""
    with torch.device("meta"):
        model = nobs.instrument(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3, elementwise_affine=False), nn.Linear(3, 2)))
    values = {name: torch.ones(value.shape) for name, value in model.state_dict().items()}
    if how == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(values, assign=how == "assign")
    ring = nobs.RingBuffer(model)
    model(torch.ones(1, 3)).sum().backward()
    ring.add(0, 0.0)
    history = ring.history()
    assert ring.row.broken is None
    assert history["0", "output", "absmax"][0] == 4
    assert history["1", "output", "elements"][0] == 3
    assert history["2", "weight.grad", "norm"][0] == pytest.approx(model[2].weight.grad.norm().item())


def test_a_type_that_cannot_be_subclassed():
    """An __init_subclass__ with a required argument: refused in words, and nothing was changed."""

    class Strict(nn.Linear):
        def __init_subclass__(cls, *, needed):
            pass

    model = nn.Sequential(nn.Linear(1, 1), Strict(1, 1))
    with pytest.raises(BadSetting, match=r"making a subclass of Strict for '1'"):
        nobs.instrument(model)
    assert type(model[0]) is nn.Linear


def test_layers_with_protocols_of_their_own():
    """An `_apply` without `recurse`, a `__setattr__` and a `__delattr__` that refuse, a `__new__` with arguments."""

    class Own(nn.Linear):
        def __new__(cls, *sizes):
            return super().__new__(cls)

        def __getnewargs__(self):
            return (self.in_features, self.out_features)

        def _apply(self, fn):
            return super()._apply(fn)

        def __setattr__(self, name, value):
            if "closed" in vars(self) and name != "training":
                raise AttributeError(name)
            super().__setattr__(name, value)

        def __delattr__(self, name):
            raise AttributeError(name)

    layer = Own(2, 2)
    layer.closed = True
    before = sorted(vars(layer))
    model = nobs.instrument(nn.Sequential(layer))
    model.to(torch.float32)
    ring = nobs.RingBuffer(model)
    model(torch.ones(1, 2)).sum().backward()
    ring.add(0, 0.0)
    assert ring.history()["0", "output", "norm"][0] > 0
    nobs.uninstrument(model)
    assert type(layer) is Own
    assert sorted(vars(layer)) == before


class WithArguments(nn.Linear):
    def __new__(cls, *sizes):
        return super().__new__(cls)

    def __getnewargs__(self):
        return (self.in_features, self.out_features)


class WithTuple(nn.Linear):
    def __getstate__(self):
        return vars(self), None

    def __setstate__(self, state):
        vars(self).update(state[0])


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(2), lambda: WithArguments(3, 2), lambda: WithTuple(3, 2)])
def test_pickles_of_odd_layers(make):
    """Lazy, with arguments to `__new__`, with a tuple for a state: plain again, and able to run."""
    model = nobs.instrument(nn.Sequential(make()))
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert not rows_of(twin)
        assert not any(key.startswith("_nobs_") for key in vars(twin[0]))
        twin(torch.ones(1, 3))
        assert "_nobs_plain" not in vars(type(twin[0]))


class Static(nn.Linear):
    """Its forward is no method."""

    @staticmethod
    def forward(x):
        return x + 1


class Made(nn.Linear):
    """Its forward is made anew at each call."""

    @property
    def forward(self):
        return lambda x: nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("kind", [Static, Made])
def test_a_forward_that_is_no_method(kind):
    """It runs as without nobs; there is nowhere to put a tap, and the parameters are recorded."""
    with pytest.warns(nobs.NobsWarning, match="output of 0: its forward is no plain method"):
        model = nobs.instrument(nn.Sequential(kind(3, 3), nn.Linear(3, 2)))
    ring = nobs.RingBuffer(model)
    model(torch.ones(1, 3)).sum().backward()
    ring.add(0, 0.0)
    sites = {layer.name: set(layer.sites) for layer in ring.history().layers}
    assert {"weight", "bias"} <= sites["0"] <= {"weight", "bias", "weight.grad", "bias.grad"}
    assert sites["1"] >= {"output", "output.grad", "weight.grad"}


def test_inside_inference_mode():
    """A model that is loaded and instrumented there is trained and recorded outside."""
    model = nn.Linear(3, 1)
    with torch.inference_mode():
        nobs.instrument(model)
    ring = nobs.RingBuffer(model)
    model(torch.ones(2, 3)).sum().backward()
    ring.add(0, 0.0)
    assert next(ring.drain())["(model)", "weight.grad", "norm"] == pytest.approx(2 * 3**0.5, rel=1e-6)
