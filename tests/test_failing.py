"""When a run fails, stops, crashes or is killed, and when nobs itself breaks: what is left, and where."""

import json
import logging
import math
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from nets import loss_of
from runs import dumps, run

import nobs
from nobs import _publish, diagnosis


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


WHILE_FAILING = """
    import os, signal, sys
    import nobs
    from nobs import _publish
    from nets import Images
    from runs import run
    write = _publish.write
    def slowly(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher does that stops all ranks behind the first
        return write(*args, **kwargs)
    _publish.write = slowly
    model = nobs.instrument(Images())
    with nobs.Recorder(model, directory=sys.argv[1]) as recorder:
        run(recorder, model, 9, loss_at={4: float("nan")})
"""


def test_sigterm_while_a_dump_is_written(tmp_path):
    """It is waited for the dump, of which there is one, and then the process ends as it would have."""
    script = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WHILE_FAILING), str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False, env=environ)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "loss is NaN at step 4" in done.stderr
    (path,) = dumps(tmp_path)
    assert nobs.load(path).reason == "trigger"


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
    monkeypatch.setattr(_publish.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    failing(model, tmp_path / "crashes")
    (path,) = dumps(tmp_path / "tmp")
    assert nobs.load(path).failure.step == 3
    err = capsys.readouterr().err
    assert "could not write a dump to" in err
    assert path.name in err


def test_no_directory_at_all_still_prints(model, tmp_path, capsys, monkeypatch):
    """Nowhere to write: the report is on the terminal, and the run ends as it should."""
    (tmp_path / "a").write_text("")
    monkeypatch.setattr(_publish.tempfile, "gettempdir", lambda: str(tmp_path / "a"))
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
    monkeypatch.setattr(diagnosis, "diagnose", lambda *args, **kwargs: 1 / 0)
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


def test_an_optimizer_that_breaks_the_reading(model, tmp_path):
    """A learning rate that is no number: recording stops, the user's backward does not."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nobs.Recorder(model, optimizer=optimizer, directory=tmp_path)
    optimizer.param_groups[0]["lr"] = "fast"
    loss_of(model, model.batch()).backward()
    with pytest.warns(nobs.NobsWarning, match="stopped recording"):
        recorder.step(1.0)


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


def test_an_interrupted_healthy_run_gets_no_diagnosis(model, tmp_path, capsys):
    """Ctrl-C: the dump is written, and nobody is blamed."""
    with pytest.raises(KeyboardInterrupt), nobs.Recorder(model, directory=tmp_path) as recorder:
        run(recorder, model, 5, lr=0.5)
        raise KeyboardInterrupt
    assert recorder.report.findings == ()
    assert "nobs: the run ended" in capsys.readouterr().err
