"""The Recorder around real training: what it records, in which order, and what it refuses."""

import gc
import io
import math
import signal
import sys

import numpy as np
import pytest
import torch
from nets import Images, loss_of
from runs import run
from torch import nn

import nobs
from nobs.errors import BadLoss, BadSetting


def test_a_healthy_run_leaves_nothing(model, tmp_path, capsys):
    """No print, no file but the black box, and a history of the last steps."""
    with nobs.Recorder(model, capacity=5, directory=tmp_path, blackbox=False) as recorder:
        run(recorder, model, 8)
        assert recorder.history().steps.tolist() == [3, 4, 5, 6, 7]
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_learning_rate_and_scalars(model, tmp_path):
    """The rate that the step used, although the scheduler runs before `step`; batches and scalars by name."""
    one = torch.optim.SGD([{"params": model.fc.parameters()}, {"params": model.conv1.parameters(), "lr": 5.0}], lr=1.0)
    two = torch.optim.Adam(model.conv2.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(one, 0.1)
    with nobs.Recorder(model, optimizer=[one, two], directory=tmp_path, triggers=[]) as recorder:
        for step in range(3):
            loss = loss_of(model, model.batch())
            loss.backward()
            one.step()
            one.zero_grad()
            schedule.step()
            recorder.step(loss, batch=[step], accuracy=torch.tensor(0.5))
        history = recorder.history()
    assert history.scalars["lr"].tolist() == pytest.approx([1, 0.1, 0.01])
    assert history.scalars["lr.1"].tolist() == pytest.approx([5, 0.5, 0.05])
    assert history.scalars["lr.2"].tolist() == [0.5] * 3
    assert history.scalars["accuracy"].tolist() == [0.5] * 3
    assert history.batches == ("[0]", "[1]", "[2]")


def test_grad_scaler(tmp_path):
    """Gradients are unscaled, the scale is recorded as it was, and the step that the scaler skips is no alarm."""
    model = nobs.instrument(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=10**6)
    plain = []
    with nobs.Recorder(model, optimizer=optimizer, scaler=scaler, directory=tmp_path) as recorder:
        for step in range(4):
            loss = model(torch.ones(2, 4)).square().mean()
            scaler.scale(loss * (math.inf if step == 2 else 1)).backward()
            plain.append(model.weight.grad.norm().item() / scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            recorder.step(loss)
        history = recorder.history()
    assert history.scalars["loss_scale"].tolist() == [2**20, 2**20, 2**20, 2**19]
    norms = history["(model)", "weight.grad", "norm"]
    assert norms[[0, 1, 3]] == pytest.approx([plain[i] for i in (0, 1, 3)], rel=1e-5)
    assert history["(model)", "weight.grad", "nonfinite"][2] == 4


def test_paused(model, tmp_path):
    """Inside `paused` nothing is recorded; behind it everything is again."""
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        with recorder.paused():
            loss_of(model, model.batch()).backward()
        recorder.step(1.0)
        run(recorder, model, 1)
        ran = recorder.history()["fc", "output", "norm"]
    assert [norm > 0 for norm in ran] == [False, True]


def test_resuming(model, tmp_path):
    """The state goes through torch.save with weights_only, the step goes on, and the triggers know what they knew."""
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 30, loss_at=dict.fromkeys(range(30), 1.0))
        buffer = io.BytesIO()
        torch.save(recorder.state_dict(), buffer)
    buffer.seek(0)
    with (
        pytest.raises(nobs.TrainingFailure, match="at step 30, 9 times its moving average of 1"),
        nobs.Recorder(model, directory=tmp_path) as resumed,
    ):
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
        run(resumed, model, 1, loss_at={0: 9.0})
    with (
        pytest.raises(BadSetting, match=r"a state of the triggers[\s\S]*one of \['LossSpike'\]"),
        nobs.Recorder(model, directory=tmp_path, triggers=[nobs.triggers.LossSpike()]) as other,
    ):
        other.load_state_dict(recorder.state_dict())
    with pytest.raises(BadSetting, match=r"a state with the keys \['param_groups'\][\s\S]*recorder.state_dict"):
        recorder.load_state_dict({"param_groups": []})
    for garbage in ([1, 2], [("NonFinite",)], ["ab"]):
        with pytest.raises(BadSetting, match="a state of the triggers"):
            recorder.load_state_dict({"step": 3, "triggers": garbage})


def test_resuming_between_two_samples(tmp_path):
    """With `every=5` a run that goes on at step 7 samples step 10 next, as it would have without the break."""
    model = nobs.instrument(Images(), every=5)
    with nobs.Recorder(model, directory=tmp_path, triggers=[]) as recorder:
        run(recorder, model, 7)
    with nobs.Recorder(model, directory=tmp_path, triggers=[]) as resumed:
        resumed.load_state_dict(recorder.state_dict())
        run(resumed, model, 10)
        history = resumed.history()
    assert history.steps[history["fc", "output", "norm"] > 0].tolist() == [10, 15]


def test_a_part_of_the_model_that_moves_alone(tmp_path):
    """After instrumenting: the recording ends with the reason, the run goes on, and a new recorder refuses by name."""
    model = nobs.instrument(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    recorder = nobs.Recorder(model, directory=tmp_path)
    model[1].to("meta")
    recorder.step(0.0)
    with pytest.warns(nobs.NobsWarning, match=r"the training goes on[\s\S]*layers on cpu \(0\) and meta \(1\)"):
        recorder.step(0.0)
    with pytest.raises(BadSetting, match=r"layers on cpu \(0\) and meta \(1\)[\s\S]*layers=\[...\]"):
        nobs.Recorder(model)


def test_wrong_calls(model):
    """A loss that is no number raises each time; an unknown on_failure at once."""
    with nobs.Recorder(model) as recorder:
        with pytest.raises(BadLoss, match=r"shape \[3\][\s\S]*loss.mean\(\)"):
            recorder.step(torch.ones(3))
        with pytest.raises(BadLoss, match=r"recording extra[\s\S]*a str"):
            recorder.step(1.0, extra="x")
    with pytest.raises(BadSetting, match=r"'ignore'[\s\S]*raise, warn, stop"):
        nobs.Recorder(model, on_failure="ignore")


def test_step_costs_no_python_per_layer(tmp_path):
    """300 layers: closing a step and judging it makes a fixed number of Python calls, not one a layer."""
    counts = []
    for layers in (30, 300):
        net = nobs.instrument(nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)]))
        recorder = nobs.Recorder(net, directory=tmp_path)
        calls = 0

        def count(frame, event, arg):
            nonlocal calls
            calls += event == "call"

        recorder.step(1.0)
        net(torch.ones(1, 2)).sum().backward()
        gc.disable()  # what the collector calls, when it happens to run, is not the step's
        try:
            sys.setprofile(count)
            recorder.step(1.0)
            sys.setprofile(None)
        finally:
            gc.enable()
        counts.append(calls)
    assert counts[0] == counts[1]


def test_the_same_recorder_twice(tmp_path):
    """A second `with` block, an epoch later: learning rates and handler are as in the first."""
    model = nobs.instrument(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    recorder = nobs.Recorder(model, optimizer=optimizer, directory=tmp_path, triggers=[])
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(2):
        with recorder:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            schedule.step()
            recorder.step(1.0)
    assert recorder.history().scalars["lr"].tolist() == pytest.approx([1.0, 0.1])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_learning_rate_on_steps_without_taps(tmp_path, as_tensor):
    """every=2: the rate is the one that the step used, also where it is a tensor that the scheduler writes to."""
    model = nobs.instrument(nn.Linear(2, 1), every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(1.0) if as_tensor else 1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    with nobs.Recorder(model, optimizer=optimizer, directory=tmp_path, triggers=[]) as recorder:
        for _ in range(4):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            schedule.step()
            recorder.step(1.0)
        assert recorder.history().scalars["lr"].tolist() == pytest.approx([1, 0.1, 0.01, 0.001])


def test_skipping_a_batch(model, tmp_path):
    """`skip` in place of `step`: the forward of a dropped batch does not count for the next step."""
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        x, y = model.batch()
        loss_of(model, (x * math.nan, y)).backward()
        recorder.skip()
        model.zero_grad()
        model.bn.reset_running_stats()
        run(recorder, model, 3)
        assert len(recorder.history()) == 3
        assert (recorder.history()["fc", "weight", "norm"] > 0).all()


def test_scalars_of_any_name(model, tmp_path):
    """`step`, `values`, `self` are names like others."""
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        recorder.step(1.0, step=5, values=2.0, loss_scale=3.0)
        assert {name: v[0] for name, v in recorder.history().scalars.items()} == {
            "step": 5,
            "values": 2,
            "loss_scale": 3,
            "loss": 1,
        }


def test_a_batch_is_named_as_it_was(model, tmp_path):
    """A list or tensor of indices that the loop reuses: each row keeps what it held then."""
    indices, tensor = [0], torch.zeros(1)
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        for step in range(2):
            indices[0] = step
            recorder.step(1.0, batch=indices)
        for step in range(2):
            tensor.fill_(step)
            recorder.step(1.0, batch=tensor)
        assert recorder.history().batches == ("[0]", "[1]", "[0.0]", "[1.0]")


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ("a.tar", "a.tar"),
        (torch.arange(6).reshape(2, 3).T, "[0, 3, 1, 4, 2, 5]"),
        ([torch.zeros(2, 3), 7], "[<torch.float32 [2, 3]>, 7]"),
        ({"x": torch.zeros(2), "file": "b.tar"}, "{'file': 'b.tar', 'x': <torch.float32 [2]>}"),
        (torch.zeros(3, 0), "[]"),
        (torch.eye(2).to_sparse(), "<torch.float32 [2, 2]>"),
        (range(3), "range(0, 3)"),
    ],
)
def test_a_batch_may_be_anything(model, tmp_path, batch, says):
    """A short text, without waiting for a tensor in it."""
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        recorder.step(1.0, batch=batch)
        assert recorder.history().batches == (says,)


def test_the_name_of_a_batch_costs_no_more_than_its_beginning(model, tmp_path):
    """Millions of indices, and a whole batch of images."""
    import time

    from nobs._given import batch_name

    for batch in (list(range(3_000_000)), torch.zeros(3_000_000), torch.zeros(2000, 1500).T, torch.zeros(64, 3, 100, 100)):
        begin = time.perf_counter()
        assert len(batch_name(batch)) <= 200
        assert time.perf_counter() - begin < 0.02


def test_a_recorder_is_no_cycle(tmp_path):
    """Dropped without a `with` block, it frees model and optimizer at once, without the collector."""
    import weakref

    model = nobs.instrument(nn.Linear(2, 2))
    recorder = nobs.Recorder(model, optimizer=torch.optim.SGD(model.parameters()), directory=tmp_path)
    model(torch.ones(1, 2)).sum().backward()
    recorder.step(1.0)
    watched = weakref.ref(model)
    gc.disable()
    try:
        del model, recorder
        assert watched() is None
    finally:
        gc.enable()


def test_pauses_nest(model, tmp_path):
    """Leaving an inner pause does not end the outer one."""
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        with recorder.paused():
            with recorder.paused():
                pass
            assert not model.fc._nobs_row.recording
        assert model.fc._nobs_row.recording


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"triggers": nobs.triggers.LossSpike()}, "a list of triggers"),
        ({"triggers": [nobs.triggers.LossSpike]}, "an instance of it"),
        ({"optimizer": "sgd"}, "an optimizer with param_groups"),
        ({"directory": None}, "a path"),
        ({"capacity": True}, "capacity=True"),
        ({"capacity": 2**70}, r"capacity=\d+, which is [\s\S]*fits into memory"),
        ({"scaler": "x"}, r"a str[\s\S]*GradScaler"),
    ],
)
def test_wrong_settings(model, options, says):
    """Each refused at once, in words."""
    with pytest.raises(BadSetting, match=says):
        nobs.Recorder(model, **options)


def test_a_ring_that_cannot_be_made_takes_nothing_away(model, tmp_path):
    """The recorder that was there goes on."""
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 1)
        with pytest.raises(BadSetting, match="fits into memory"):
            nobs.RingBuffer(model, capacity=2**50)
        run(recorder, model, 1)
        assert len(recorder.history()) == 2


def test_a_paused_backward_leaves_rate_and_scale_alone(model, tmp_path):
    """A validation with gradients between the update and `step`: the step keeps the rate and scale that it used."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    norms = []
    with nobs.Recorder(model, optimizer=optimizer, scaler=scaler, directory=tmp_path, triggers=[]) as recorder:
        for _ in range(2):
            loss = loss_of(model, model.batch())
            scaler.scale(loss).backward()
            norms.append(float(model.fc.weight.grad.norm()) / scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] /= 2
            with recorder.paused():
                loss_of(model, model.batch()).backward()
            optimizer.zero_grad()
            recorder.step(loss)
        history = recorder.history()
    assert history.scalars["lr"].tolist() == [1.0, 0.5]
    assert history["fc", "weight.grad", "norm"] == pytest.approx(norms, rel=1e-5)


def test_an_optimizer_in_the_backward_from_before(tmp_path):
    """Hooks that step and clear each gradient, put in before nobs: the gradient is read first all the same."""
    model = Images()
    seen = []

    def update(parameter):
        if parameter is model.fc.weight:
            seen.append((float(parameter.norm()), float(parameter.grad.norm())))
        parameter.data -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    with nobs.Recorder(nobs.instrument(model), directory=tmp_path, triggers=[]) as recorder:
        for _ in range(3):
            loss = loss_of(model, model.batch())
            loss.backward()
            recorder.step(loss)
        history = recorder.history()
    read = np.stack([history["fc", site, "norm"] for site in ("weight", "weight.grad")], axis=1)
    assert read == pytest.approx(np.array(seen), rel=1e-5)


def test_states_of_any_documented_kind_survive_a_checkpoint(model, tmp_path):
    """Tuples stay tuples, NumPy scalars become numbers, and the file loads with weights_only."""

    class Mine:
        def update(self, state, row):
            seen = state[0] if state else ()
            return ((*seen, row.step), np.float32(2.5), np.ones(2)), None

    buffer = io.BytesIO()
    for part in range(2):
        with nobs.Recorder(model, directory=tmp_path, triggers=[Mine()]) as recorder:
            if part:
                recorder.load_state_dict(torch.load(buffer, weights_only=True))
            run(recorder, model, 2)
            buffer.seek(0)
            torch.save(recorder.state_dict(), buffer)
            buffer.seek(0)
    assert recorder.state_dict()["step"] == 4
    assert recorder._engine.states[0][0] == (0, 1, 2, 3)
