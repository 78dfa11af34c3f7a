"""Faults planted in real training: the layer, the site, the step and the cause that the diagnosis names."""

import math
import re

import numpy as np
import pytest
import torch
from nets import Images, Tokens, loss_of
from torch import nn

import nobs
from nobs._columns import KINDS
from nobs._history import History
from nobs._schema import CAUSES, Failure
from nobs._table import Tap, TapTable
from nobs.diagnosis import diagnose

SITES = ("output", "output.grad", "weight", "weight.grad")

AT = 20


def failing_run(model, fault, tmp_path, steps=30, lr=0.05, optimizer=torch.optim.SGD, **options):
    """Train with `fault(step, model, optimizer, batch) -> batch` before each step; the report of the failure."""
    nobs.instrument(model)
    optimizer = optimizer(model.parameters(), lr=lr)
    with nobs.Recorder(model, optimizer=optimizer, directory=tmp_path, on_failure="stop", **options) as recorder:
        for step in range(steps):
            batch = fault(step, model, optimizer, model.batch(8))
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss, batch=f"batch {step}")
    assert recorder.report is not None, "nothing failed"
    return recorder.report


def nan_in_forward(step, model, optimizer, batch):
    model.blocks[1].up.poison = step == AT
    return batch


class PoisonedForward(nn.Linear):
    poison = False

    def forward(self, x):
        y = super().forward(x)
        return y + math.nan if self.poison else y


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[0] = math.nan
        return grad


class PoisonedBackward(nn.Linear):
    poison = False

    def forward(self, x):
        return super().forward(BadBackward.apply(x) if self.poison else x)


def tokens(layer):
    model = Tokens()
    model.blocks[1].up = layer(16, 32)
    return model


class Bare(Images):
    """Without the norm, which would swallow a batch of the wrong scale."""

    def __init__(self):
        super().__init__()
        self.bn = nn.Identity()


def nan_in_weight(step, model, optimizer, batch):
    if step == AT:
        model.blocks[2].up.weight.data[0, 0] = math.nan
    return batch


def nan_in_input(step, model, optimizer, batch):
    if step == AT:
        batch[0][0, 0, 0, 0] = math.nan
    return batch


def scaled_batch(step, model, optimizer, batch):
    return (batch[0] * 1e4, batch[1]) if step == AT else batch


def scaled_weight(step, model, optimizer, batch):
    if step == AT:
        model.fc.weight.data *= 1e3
    return batch


def fast(step, model, optimizer, batch):
    optimizer.param_groups[0]["lr"] *= 1000 if step == AT else 1
    return batch


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1e6


class LoudBackward(PoisonedBackward):
    def forward(self, x):
        y = nn.Linear.forward(self, x)
        return Scaled.apply(y) if self.poison else y


class LoudForward(PoisonedForward):
    def forward(self, x):
        y = nn.Linear.forward(self, x)
        return y * 1e5 if self.poison else y


FAULTS = {
    "a gradient x 1e6": (lambda: tokens(LoudBackward), nan_in_forward, "gradient_explosion", "blocks.1.up", AT),
    "an output x 1e5": (lambda: tokens(LoudForward), nan_in_forward, "gradient_explosion", "blocks.1.up", AT),
    "NaN in a forward": (lambda: tokens(PoisonedForward), nan_in_forward, "nonfinite_forward", "blocks.1.up", AT),
    "NaN in a backward": (lambda: tokens(PoisonedBackward), nan_in_forward, "nonfinite_backward", "blocks.1.up", AT),
    "NaN in a weight": (Tokens, nan_in_weight, "nonfinite_weight", "blocks.2.up", AT),
    "NaN in a batch": (Images, nan_in_input, "nonfinite_input", "conv1", AT),
    "a batch x 1e4": (Bare, scaled_batch, "bad_batch", "conv1", AT),
    "a weight x 1e3": (Images, scaled_weight, "weight_corruption", "fc", AT),
    "learning rate x 1000": (Images, fast, "learning_rate", None, AT + 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name, tmp_path, capsys):
    """The first finding is the cause, at the right layer and step."""
    make, fault, cause, layer, step = FAULTS[name]
    report = failing_run(make(), fault, tmp_path)
    first = report.findings[0]
    assert first.cause == cause, report.findings
    assert first.step == step
    assert layer is None or first.layer == layer
    assert first.evidence
    assert first.advice
    assert first.layer in capsys.readouterr().err


def test_execution_order_not_name_order(tmp_path, capsys):
    """A NaN that is born in the first block dirties `head` too, which is registered before it and runs behind it."""

    def fault(step, model, optimizer, batch):
        if step == 5:
            model.blocks[0].up.register_forward_pre_hook(lambda module, given: (given[0] * math.nan,))
        return batch

    report = failing_run(Tokens(), fault, tmp_path)
    assert (report.findings[0].layer, report.findings[0].site) == ("blocks.0.up", "output")
    assert not any(name in report.findings[0].evidence for name in ("head", "blocks.1", "blocks.2"))
    table = capsys.readouterr().err.split("layers in execution order")[1]
    shown = re.findall(r"embed|blocks\.0\.\w+|head", table)
    assert list(dict.fromkeys(shown)) == ["embed", "blocks.0.norm", "blocks.0.up", "blocks.0.down", "head"]


def test_float16_overflow(tmp_path, capsys):
    """An activation that leaves float16's range is called that, with the headroom in numbers."""
    model = nobs.instrument(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half())
    nn.init.constant_(model[1].weight, 100.0)
    with nobs.Recorder(model, directory=tmp_path, on_failure="stop") as recorder:
        for step in range(20):
            x = torch.full((2, 4), 20.0 * 1.5**step, dtype=torch.float16)
            nn.init.constant_(model[0].weight, 0.25)
            model[0].bias.data.zero_()
            loss = model(x).float().mean()
            loss.backward()
            recorder.step(1.0)
    first = recorder.report.findings[0]
    assert (first.cause, first.layer) == ("overflow", "1")
    assert "float16 ends at 6.55e+04" in first.evidence


def test_a_loss_that_is_nan_by_itself(tmp_path, capsys):
    """Every output is finite and the loss is not: born behind the last layer."""
    model = nobs.instrument(Images())
    with nobs.Recorder(model, directory=tmp_path, on_failure="stop") as recorder:
        for step in range(5):
            loss = loss_of(model, model.batch())
            recorder.step(loss if step < 4 else (loss - loss - 1).log())
    first = recorder.report.findings[0]
    assert (first.cause, first.layer, first.site, first.step) == ("nonfinite_forward", None, "loss", 4)
    assert "first wrong: the loss itself, at step 4" in capsys.readouterr().err
    assert "while every output is finite" in first.evidence


def test_a_loss_spike_that_no_layer_shows(tmp_path, capsys):
    """Only the number of the loss jumps: `loss_spike`, and no layer is blamed."""
    model = nobs.instrument(Images())
    with nobs.Recorder(model, directory=tmp_path, on_failure="stop") as recorder:
        for step in range(30):
            loss_of(model, model.batch(32)).backward()
            model.zero_grad()
            recorder.step(1.0 if step < 25 else 50.0)
    assert [(f.cause, f.layer) for f in recorder.report.findings] == [("loss_spike", None)]


def test_every_layer_masked_is_no_finding(tmp_path):
    """-Inf in an output, as masks have it, is not taken for the origin of a failure."""

    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.eye(4, dtype=torch.bool), -math.inf)

    model = nobs.instrument(nn.Sequential(Masked(4, 4)))
    ring = nobs.RingBuffer(model)
    for step in range(5):
        model(torch.randn(4, 4)).softmax(-1).sum().backward()
        ring.add(step, 1.0)
    assert diagnose(ring.history()) == ()


def test_nothing_recorded():
    """An empty history has no findings; causes come from the closed list."""
    ring = nobs.RingBuffer(nobs.instrument(Images()))
    assert diagnose(ring.history()) == ()
    assert len(CAUSES) == len(set(CAUSES)) == 15


def test_confidence_orders_the_findings(tmp_path, capsys):
    """The surest first, each between 0 and 1, and nothing behind the failing step is looked at."""
    report = failing_run(Bare(), scaled_batch, tmp_path)
    confidences = [finding.confidence for finding in report.findings]
    assert confidences == sorted(confidences, reverse=True)
    assert all(0 < c <= 1 for c in confidences)
    history = report.history
    longer = History(
        np.r_[history.steps, 99],
        history.table,
        np.r_[history.values, np.full_like(history.values[:1], np.nan)],
        history.scalars,
        history.given,
        history.batches,
    )
    assert diagnose(longer, report.failure) == report.findings


def test_a_loss_that_is_made_nan_is_not_blamed_on_the_backward(tmp_path, capsys):
    """loss * NaN dirties every gradient; the outputs were finite, the loss was not."""
    model = nobs.instrument(Images())
    with nobs.Recorder(model, directory=tmp_path, on_failure="stop") as recorder:
        for step in range(5):
            loss = loss_of(model, model.batch()) * (math.nan if step == 4 else 1)
            loss.backward()
            recorder.step(loss)
            model.zero_grad()
    assert recorder.report.findings[0].cause == "nonfinite_forward"
    assert "while every output is finite" in recorder.report.findings[0].evidence


def test_a_step_number_that_comes_twice(tmp_path, capsys):
    """After going back to a checkpoint the failing step is the later one of that number."""
    model = nobs.instrument(Images())
    with nobs.Recorder(model, directory=tmp_path, on_failure="stop") as recorder:
        for step in range(12):
            if step == 4:
                saved = recorder.state_dict()
            if step == 8:
                recorder.load_state_dict(saved)
            if step == 10:
                model.fc.weight.data[0, 0] = math.nan
            loss = loss_of(model, model.batch())
            loss.backward()
            recorder.step(loss)
            model.zero_grad()
    first = recorder.report.findings[0]
    assert (first.cause, first.layer, first.step) == ("nonfinite_weight", "fc", 6)
    assert "it was finite at step 5" in first.evidence


class Rooted(nn.Module):
    """A parameter of the root and one of each block, used before the layers inside them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gamma = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x + self.up(x * self.gamma).relu()

    def __init__(self, bad):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(8))
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.head = nn.Linear(8, 3)
        self.get_submodule(bad).__class__ = PoisonedBackward

    def forward(self, x):
        return self.head(self.blocks(x + self.position))

    def batch(self, n=8):
        return torch.randn(n, 8), torch.randint(3, (n,))


@pytest.mark.parametrize("bad", ["head", "blocks.1.up", "blocks.0.up"])
def test_a_parameter_of_a_parent_takes_no_blame(bad, tmp_path):
    """GIVEN a NaN made in the backward of a layer, THEN that layer is named, and not the root whose parameter is used first."""

    def poison(step, model, optimizer, batch):
        model.get_submodule(bad).poison = step == AT
        return batch

    first = failing_run(Rooted(bad), poison, tmp_path).findings[0]
    assert (first.cause, first.layer, first.step) == ("nonfinite_backward", bad, AT)


@pytest.mark.parametrize("every", [1, 7])
def test_a_rate_that_grows_is_found_between_samples(every, tmp_path):
    """With `every=` most steps have no norms: the diagnosis reads those that have, and says what it read."""

    x = torch.randn(2000, 16)
    labels = (x @ torch.randn(16, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(nobs.instrument(model, every=every).parameters(), lr=0.05)
    with nobs.Recorder(model, optimizer=optimizer, directory=tmp_path, on_failure="stop") as recorder:
        for _ in range(200):
            optimizer.param_groups[0]["lr"] *= 1.05
            some = torch.randint(2000, (32,))
            loss = nn.functional.cross_entropy(model(x[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss)
    assert recorder.report.findings[0].cause == "learning_rate"


def test_nothing_is_said_of_norms_that_nobody_saw(tmp_path):
    """A spike at the first recorded steps: there is no usual range, and nobody claims one."""
    model = nobs.instrument(Bare(), every=50)
    with nobs.Recorder(model, directory=tmp_path, on_failure="stop") as recorder:
        for step in range(60):
            model(model.batch()[0])
            recorder.step(1.0 if step < 40 else 100.0)
    first = recorder.report.findings[0]
    assert first.cause == "unknown"
    assert "1 recorded steps, too few to know a usual range" in first.evidence


def test_a_drift_is_not_a_cause(tmp_path):
    """A layer whose norms tripled in health stands beside a weight that jumped by 1e9: the jump is the cause."""
    model = Bare()

    def drift_then_jump(step, model, optimizer, batch):
        model.conv1.weight.data *= 1.04
        if step == 2 * AT:
            model.fc.weight.data *= 1e9
        return batch

    first = failing_run(model, drift_then_jump, tmp_path, steps=60, lr=1e-3).findings[0]
    assert (first.cause, first.layer, first.site, first.step) == ("weight_corruption", "fc", "weight", 2 * AT)


def test_a_jump_that_ends_in_nan_at_once(tmp_path):
    """A corrupted weight overflows what comes behind it in the same step; the weight is the cause."""

    def corrupt(step, model, optimizer, batch):
        if step == AT:
            model.blocks[0].up.weight.data[0, 0] = 3e38
        return batch

    first = failing_run(Tokens(), corrupt, tmp_path).findings[0]
    assert (first.cause, first.layer, first.site) == ("weight_corruption", "blocks.0.up", "weight")


def test_a_rate_that_jumps_between_samples_is_no_corruption(tmp_path):
    """With `every=4` the weights of the next sample have moved by updates at the new rate, which is what is blamed."""
    model = nobs.instrument(nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1)), every=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    with nobs.Recorder(model, optimizer=optimizer, directory=tmp_path, on_failure="stop") as recorder:
        for step in range(400):
            if step == 103:
                optimizer.param_groups[0]["lr"] = 1.0
            x = torch.randn(32, 10)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss)
    assert recorder.report.findings[0].cause == "learning_rate"


def test_a_gradient_that_became_zero_is_back_in_its_band():
    """A layer that was loud for one step and then silent is not what explodes forty steps later."""
    table = TapTable(
        tuple(
            Tap(layer, "Linear", site, kind)
            for layer in "abc"
            for site, kind in zip(("output", "output.grad", "weight", "weight.grad"), KINDS, strict=True)
        )
    )
    values = np.tile(np.float32([1, 1, 0, 0, 0, 0, 10, 1]), (100, len(table), 1))
    values[..., 7] += np.arange(len(table)) // 4 + 1 / 16
    values[60, [1, 3], :2] = 20
    values[61:, [1, 3], :2] = 0
    values[95:, [5, 7, 9, 11], :2] = 1e4
    failure = Failure("GradientNorm", 99, "a gradient", "c", "weight.grad")
    first = diagnose(History(np.arange(100), table, values), failure)[0]
    assert (first.cause, first.layer, first.step) == ("gradient_explosion", "c", 95)


@pytest.mark.parametrize(("ranks", "own"), [(1, False), (4, False), (4, True)])
def test_what_a_reduction_may_have_brought(ranks, own):
    """A gradient of a parameter that is NaN while those of all outputs are not: with several ranks it is of any of them."""
    table = TapTable(tuple(Tap(layer, "Linear", *pair) for layer in ("a", "b") for pair in zip(SITES, KINDS, strict=True)))
    values = np.zeros((6, len(table), 8), dtype=np.float32)
    values[..., :2], values[..., 6], values[..., 7] = 1, 64, 1 + np.arange(len(table)) // 4
    values[-1, table.line("b", "weight.grad"), 2] = 64
    values[-1, table.line("a", "output.grad"), 2] = 64 * own
    loss = {"loss": np.ones(6)}
    failure = Failure("NonFinite", 5, "64 of 64 values NaN in b (weight.grad) at step 5", "b", "weight.grad")
    history = History(np.arange(6), table, values, loss, {"loss": np.full(6, True)})
    first = diagnose(history, failure, ranks=ranks)[0]
    assert (first.cause, first.layer) == ("nonfinite_backward", "b")
    brought = ranks > 1 and not own
    assert ("from any of 4 ranks" in first.evidence) == brought
    assert (first.confidence < 0.3) == brought
    assert ("nobs merge" in first.advice) == brought


def test_a_list_of_parameters_takes_no_blame(tmp_path):
    """A layer without an output of its own has its gradient at some unknown time: the loss made the NaN, not it."""

    class Model(nn.Module):
        poison = False

        def __init__(self):
            super().__init__()
            self.extra = nn.ParameterList([nn.Parameter(torch.zeros(8))])
            self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = self.head(self.up(x + self.extra[0]).relu())
            if self.poison:
                y.register_hook(lambda grad: grad * math.nan)
            return y

        def batch(self, n=8):
            return torch.randn(n, 8), torch.randint(3, (n,))

    def poison(step, model, optimizer, batch):
        model.poison = step == AT
        return batch

    assert failing_run(Model(), poison, tmp_path).findings[0].layer == "head"
