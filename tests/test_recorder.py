"""The Recorder around real training: failing, going on, stopping, crashing, being killed, resuming, breaking."""

import io
import json
import logging
import math
import os
import signal
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from nets import Images, loss_of
from torch import nn

import nobs
from nobs import _dump
from nobs.errors import BadLoss, BadSetting


def run(recorder, model, steps, lr=0.01, optimizer=None, loss_at=None):
    """Train, with the loss of some steps replaced."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        loss = loss_of(model, model.batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.step((loss_at or {}).get(step, loss))


@pytest.fixture
def model():
    return nobs.instrument(Images())


def dumps(path):
    return sorted(path.rglob("rank*.json"))


def test_a_healthy_run_leaves_nothing(model, tmp_path, capsys):
    """No file, no print, and a history of the last steps."""
    with nobs.Recorder(model, capacity=5, directory=tmp_path) as recorder:
        run(recorder, model, 8)
        assert recorder.history().steps.tolist() == [3, 4, 5, 6, 7]
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_failure_is_dumped_printed_and_raised(model, tmp_path, capsys):
    """JSON and PNG under <directory>/<run>/step<N>/, the report on stderr, TrainingFailure with it."""
    with (
        pytest.raises(nobs.TrainingFailure, match="loss is NaN at step 4") as caught,
        nobs.Recorder(model, directory=tmp_path) as recorder,
    ):
        run(recorder, model, 9, loss_at={4: math.nan})
    report = caught.value.report
    assert (report.failure.trigger, report.failure.step, report.failure.detected_at) == ("NonFinite", 4, 4)
    (path,) = dumps(tmp_path)
    assert path.parent.name == "step00000004"
    assert path.name == "rank00000.json"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert nobs.load(path).failure == report.failure
    out, err = capsys.readouterr()
    assert out == ""
    assert "loss is NaN at step 4" in err
    assert "rank00000.json" in err.replace("\n", "").replace(" ", "")
    assert isinstance(caught.value, nobs.NobsError)
    assert model._modules["fc"]._nobs_row.before_update is None


def test_warn_goes_on(model, tmp_path, capsys):
    """One report and one warning, then silence for `capacity` steps although every step fails."""
    with nobs.Recorder(model, capacity=4, directory=tmp_path, on_failure="warn") as recorder:
        with pytest.warns(nobs.NobsWarning, match="loss is NaN at step 1"):
            run(recorder, model, 3, loss_at={1: math.nan, 2: math.nan})
        assert len(dumps(tmp_path)) == 1
        run(recorder, model, 3)
        with pytest.warns(nobs.NobsWarning, match="loss is Inf at step 7"):
            run(recorder, model, 2, loss_at={1: math.inf})
    assert len(dumps(tmp_path)) == 2


def test_stop_leaves_the_block_quietly(model, tmp_path, capsys):
    """The loop ends at the failure, the code behind the block runs, the report is there."""
    with nobs.Recorder(model, directory=tmp_path, on_failure="stop") as recorder:
        run(recorder, model, 9, loss_at={3: math.nan})
        raise AssertionError("the loop went on")
    assert recorder.report.failure.step == 3


def test_an_escaping_exception_is_dumped_with_the_half_step(model, tmp_path, capsys):
    """An error in the user's step: its forward, which ran, is the last row; the exception goes on its way."""
    with pytest.raises(ZeroDivisionError), nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 3)
        loss_of(model, model.batch())
        1 / 0  # noqa: B018
    report = nobs.load(dumps(tmp_path)[0])
    assert report.reason == "exception"
    assert report.exception == "ZeroDivisionError: division by zero"
    assert report.history.steps.tolist() == [0, 1, 2, 3]
    assert report.history.given["loss"].tolist() == [True, True, True, False]
    assert report.history["fc", "output", "norm"][3] > 0
    assert math.isnan(report.history["fc", "weight.grad", "norm"][3])
    assert report.findings == ()


@pytest.mark.parametrize("leave", [SystemExit(0), SystemExit(None), GeneratorExit()])
def test_a_clean_exit_is_no_crash(model, tmp_path, leave):
    """sys.exit() inside the block dumps nothing."""
    with pytest.raises(type(leave)), nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 1)
        raise leave
    assert dumps(tmp_path) == []


SIGTERM = """
    import os, signal, sys, torch, nobs
    from torch import nn
    def mine(number, frame):
        print("the user's own handler", flush=True)
        sys.exit(7)
    if sys.argv[2] == "handler":
        signal.signal(signal.SIGTERM, mine)
    if sys.argv[2] == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    model = nobs.instrument(nn.Linear(2, 2))
    with nobs.Recorder(model, directory=sys.argv[1]) as recorder:
        for step in range(5):
            model(torch.ones(1, 2)).sum().backward()
            recorder.step(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
    print("went on", flush=True)
"""


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [("default", -signal.SIGTERM, ""), ("handler", 7, "the user's own handler"), ("ignore", 0, "went on")],
)
def test_sigterm(tmp_path, how, code, says):
    """Dumped, then what would have happened without nobs: death, the user's handler, or nothing."""
    script = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SIGTERM), str(tmp_path), how]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stdout
    reports = [nobs.load(path) for path in dumps(tmp_path)]
    assert reports[0].reason == "sigterm"
    assert reports[0].history.steps.tolist() == [0, 1, 2, 3, 4]


def test_the_handler_is_given_back(model, tmp_path):
    """After the block SIGTERM is handled as before it."""
    before = signal.getsignal(signal.SIGTERM)
    with nobs.Recorder(model, directory=tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_broken_ring_never_ends_the_run(model, tmp_path, monkeypatch, caplog):
    """An error inside nobs: one log entry with its trace, one warning, and the training goes on."""
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 2)

        def broken(*args, **kwargs):
            raise OSError("planted")

        monkeypatch.setattr(recorder._ring, "close_step", broken)
        with pytest.warns(nobs.NobsWarning, match="OSError: planted") as warned, caplog.at_level(logging.ERROR, "nobs"):
            run(recorder, model, 5)
        recorder.flush()
    assert len(warned) == 1
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info


def test_a_broken_trigger_never_ends_the_run(model, tmp_path):
    """A user's trigger that raises stops the recording, not the training."""

    class Broken:
        def update(self, state, row):
            raise KeyError("planted")

    with (
        nobs.Recorder(model, directory=tmp_path, triggers=[Broken()]) as recorder,
        pytest.warns(nobs.NobsWarning, match="KeyError"),
    ):
        run(recorder, model, 3)


def failing(model, directory, **options):
    with nobs.Recorder(model, directory=directory, on_failure="stop", **options) as recorder:
        run(recorder, model, 5, loss_at={3: math.nan})
    return recorder.report


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="root writes everywhere")
def test_an_unwritable_directory_leaves_the_report_elsewhere(model, tmp_path, capsys, monkeypatch):
    """A directory that is a file: the dump lands in the temporary folder, and stderr says where."""
    (tmp_path / "crashes").write_text("in the way")
    monkeypatch.setattr(_dump.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    failing(model, tmp_path / "crashes")
    (path,) = dumps(tmp_path / "tmp")
    assert nobs.load(path).failure.step == 3
    err = capsys.readouterr().err
    assert "could not write a dump to" in err
    assert path.name in err


def test_no_directory_at_all_still_prints(model, tmp_path, capsys, monkeypatch):
    """Nowhere to write: the report is on the terminal, and the run ends as it should."""
    (tmp_path / "a").write_text("")
    monkeypatch.setattr(_dump.tempfile, "gettempdir", lambda: str(tmp_path / "a"))
    failing(model, tmp_path / "a")
    assert "loss is NaN at step 3" in capsys.readouterr().err


def test_a_failing_plot_costs_only_the_plot(model, tmp_path, capsys, monkeypatch):
    """matplotlib broken: JSON and terminal report are there."""
    monkeypatch.setitem(sys.modules, "nobs.render.figure", None)
    failing(model, tmp_path)
    assert len(dumps(tmp_path)) == 1
    err = capsys.readouterr().err
    assert "could not draw" in err
    assert "training failed" in err


def test_a_failing_print_costs_only_the_print(model, tmp_path, capsys, monkeypatch):
    """rich broken: one plain line with the summary and the path."""
    monkeypatch.setitem(sys.modules, "nobs.render.terminal", None)
    failing(model, tmp_path)
    assert "nobs: loss is NaN at step 3" in capsys.readouterr().err


def test_a_failing_diagnosis_costs_only_the_diagnosis(model, tmp_path, capsys, monkeypatch):
    """The history is dumped all the same."""
    monkeypatch.setattr(_dump, "diagnose", lambda *args: 1 / 0)
    assert failing(model, tmp_path).findings == ()
    assert len(dumps(tmp_path)) == 1


def test_two_dumps_of_one_step(model, tmp_path):
    """The second does not write over the first."""
    with nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 2)
        assert recorder.dump().parent.name == "step00000001"
        assert recorder.dump("again").parent.name == "step00000001-2"


def test_other_ranks_are_silent(model, tmp_path, capsys, monkeypatch):
    """Every rank writes its own file; only rank 0 prints; the launcher's run id names the folder."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "../run:7")
    failing(model, tmp_path)
    (path,) = dumps(tmp_path)
    assert path.relative_to(tmp_path).as_posix() == "run-7/step00000003/rank00003.json"
    assert capsys.readouterr().err == ""
    assert (nobs.load(path).rank, nobs.load(path).world_size) == (3, 8)


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


def test_wrong_calls(model):
    """A loss that is no number raises each time; an unknown on_failure at once."""
    with nobs.Recorder(model) as recorder:
        with pytest.raises(BadLoss, match=r"shape \[3\][\s\S]*loss.mean\(\)"):
            recorder.step(torch.ones(3))
        with pytest.raises(BadLoss, match=r"recording extra[\s\S]*a str"):
            recorder.step(1.0, extra="x")
    with pytest.raises(BadSetting, match=r"'ignore'[\s\S]*raise, warn, stop"):
        nobs.Recorder(model, on_failure="ignore")


def test_strict_json(model, tmp_path, capsys):
    """A dump full of NaN parses where NaN tokens are refused."""
    failing(model, tmp_path)
    (path,) = dumps(tmp_path)

    def refuse(word):
        raise AssertionError(word)

    data = json.loads(path.read_text(), parse_constant=refuse)
    assert data["scalars"]["loss"][3] == "NaN"
    assert data["format"] == "nobs.report"
    assert not stat.S_IMODE(path.stat().st_mode) & stat.S_IXUSR


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
        sys.setprofile(count)
        recorder.step(1.0)
        sys.setprofile(None)
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


def test_an_optimizer_that_breaks_the_reading(model, tmp_path):
    """A learning rate that is no number: recording stops, the user's backward does not."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nobs.Recorder(model, optimizer=optimizer, directory=tmp_path)
    optimizer.param_groups[0]["lr"] = "fast"
    loss_of(model, model.batch()).backward()
    with pytest.warns(nobs.NobsWarning, match="stopped recording"):
        recorder.step(1.0)


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
        assert recorder.history().batches == ("[0]", "[1]", "tensor([0.])", "tensor([1.])")


def test_forked_workers_never_write(tmp_path, capfd):
    """A worker that inherits the SIGTERM handler and is terminated leaves no dump and prints nothing."""
    script = """
        import multiprocessing, sys, time, torch, nobs
        from torch import nn
        model = nobs.instrument(nn.Linear(2, 2))
        with nobs.Recorder(model, directory=sys.argv[1]) as recorder:
            recorder.step(1.0)
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            worker.start()
            time.sleep(0.5)
            worker.terminate()
            worker.join(20)
            print(worker.exitcode)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str(-signal.SIGTERM)
    assert done.stderr == ""
    assert dumps(tmp_path) == []


def test_a_report_survives_everything(model, tmp_path, monkeypatch):
    """No history, no metadata, no stderr: TrainingFailure is raised all the same."""
    monkeypatch.setattr(sys, "stderr", None)
    recorder = nobs.Recorder(model, directory=tmp_path)
    monkeypatch.setattr(recorder._ring, "report", lambda *args: 1 / 0)
    with pytest.raises(nobs.TrainingFailure, match="loss is NaN"):
        recorder.step(math.nan)


def test_a_recorder_is_no_cycle(tmp_path):
    """Dropped without a `with` block, it frees model and optimizer at once, without the collector."""
    import gc
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


def test_after_a_rollback_failures_count_again(model, tmp_path):
    """GIVEN a user who goes back to a checkpoint after a failure, THEN the next failure raises too."""
    failed = []
    with nobs.Recorder(model, directory=tmp_path, capacity=50) as recorder:
        run(recorder, model, 3)
        checkpoint = recorder.state_dict()
        for loss in (1.0, math.nan, 1.0, math.nan):
            try:
                run(recorder, model, 1, loss_at={0: loss})
            except nobs.TrainingFailure as failure:
                failed.append(failure.report.failure.step)
                recorder.load_state_dict(checkpoint)
    assert failed == [4, 4]


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


def test_an_interrupted_healthy_run_gets_no_diagnosis(model, tmp_path, capsys):
    """Ctrl-C: the dump is written, and nobody is blamed."""
    with pytest.raises(KeyboardInterrupt), nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 5, lr=0.5)
        raise KeyboardInterrupt
    assert recorder.report.findings == ()
    assert "nobs: the run ended" in capsys.readouterr().err
