"""What the record of a run survives: deaths of the process, full disks, folders that vanish. `tox -e endure` tries it all."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from deaths import CAPACITY, boxes, returned, server, steps_in, until, wide_row
from disks import NO_MOUNTS

import nobs
from nobs import cli
from nobs._blackbox import OpenBox, read

ROUND = CAPACITY + 5
"""Steps after which the ring has gone round."""


def ran(here, program, code=0, longest_s=120):
    """Run a program to its end, which must be the expected one; what it wrote to stderr."""
    ended, err = server().run(here, program, longest_s)
    if ended == NO_MOUNTS:
        pytest.skip(f"nobody may mount a disk here: {err}")
    assert ended == code, err
    return err


def only(paths):
    """The one that there is."""
    (path,) = paths
    return path


def ring_of(steps):
    """The steps in the places of a ring after so many: one more than the capacity, or all."""
    return list(range(max(0, steps - CAPACITY - 1), steps))


def history_of(steps):
    """The steps of the history after so many."""
    return list(range(max(0, steps - CAPACITY), steps))


def dumps(here):
    return sorted(here.rglob("rank*.json"))


# -- ended at any moment ------------------------------------------------------------------------------------------------


def what_is_left(here, read_steps):
    """Of a training that was ended somewhere: steps returned, records right, places torn. None is missing, none is wrong."""
    count = returned(here)
    if not boxes(here):
        assert count == 0
        return Counter(before_the_box=1)
    box = only(boxes(here))
    if not box.read_bytes()[:8].strip(b"\0"):  # these bytes are written last
        assert count == 0
        with pytest.raises(nobs.NobsError, match="nobody has finished"):
            nobs.load(box)
        return Counter(half_a_box=1)
    steps, damaged = read_steps(box)
    assert damaged <= 1
    assert set(history_of(count)) <= set(steps), (count, steps)
    assert not steps or steps == list(range(steps[0], steps[-1] + 1))
    return Counter(steps_returned=count, records_compared=len(steps), torn=damaged)


def end_somewhere(here, model, rng, number):
    """End a training after a random time: from its first step on, or one time in four while it still makes its black box."""
    from_the_start = rng.random() < 0.25
    process = server().start(here, f"Training(here, {model!r}).train_on({model!r})")
    until((here / "steps").exists if from_the_start else lambda: returned(here) > 0)
    time.sleep(rng.uniform(0, 0.06 if from_the_start else {"small": 0.3, "tall": 1.5}[model]))
    os.kill(process, number)
    return server().wait()


@pytest.mark.parametrize(("model", "endure", "sample"), [("small", 220, 8), ("tall", 40, 2)])
def test_sigkill_at_any_instant(tmp_path, often, counted, model, endure, sample):
    """GIVEN a training that is killed at random instants, THEN each step that had returned is there, and each number right."""
    rng, total = random.Random(model), Counter()
    for n in range(often(endure, sample)):
        here = tmp_path / str(n)
        assert end_somewhere(here, model, rng, signal.SIGKILL) == -signal.SIGKILL
        left = what_is_left(here, lambda box: steps_in(box, model))
        total += left + Counter(kills=1)
        if left["records_compared"]:
            report = nobs.load(here / "run")
            assert (report.reason, report.failure, report.findings) == ("killed", None, ())
    assert total["records_compared"] > 0
    counted(f"SIGKILL, {model} model", **total)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_at_any_instant(tmp_path, often, counted, number):
    """The same for signals that Python handles, between any two bytecodes of a step."""
    rng, total = random.Random(int(number)), Counter()
    for n in range(often(40, 4)):
        here = tmp_path / str(n)
        assert end_somewhere(here, "small", rng, number) == -number
        left = what_is_left(here, steps_in)
        total += left + Counter(signals=1)
        if left["records_compared"]:
            report = nobs.load(only(boxes(here)))
            assert report.reason == {signal.SIGINT: "exception", signal.SIGTERM: "sigterm"}[number]
            assert nobs.load(only(dumps(here))).reason == report.reason
    assert total["records_compared"] > 0
    counted(f"{signal.Signals(number).name} at any instant", **total)


AT_A_LINE = """
from nobs import _publish
os.environ["RANK"] = "1"  # which prints nothing
_publish._draw = lambda report, path: None
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
lines = 0
def trace(frame, event, arg):
    global lines
    file = frame.f_code.co_filename
    if "/nobs/_blackbox/" not in file and not file.endswith(("/recorder.py", "/_ring.py")):
        return None
    lines += event == "line"
    if event == "line" and lines == {line}:
        sys.settrace(None)
        {what}
    return trace
training = Training(here)
with training.recorder:
    training.train({steps})
    sys.settrace(trace)
    training.train(1)
    sys.settrace(None)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("what", "code"), [("raise KeyboardInterrupt", -signal.SIGINT), ("os.kill(os.getpid(), signal.SIGTERM)", 7)]
)
def test_an_interrupt_at_each_line_of_a_step(tmp_path, often, counted, what, code):
    """GIVEN Ctrl-C in any line of a step, or a SIGTERM handler that ends the program, THEN no step is lost and none is torn."""
    total = Counter()
    for line in range(1, 1000, often(2, 32)):
        here = tmp_path / str(line)
        ended, err = server().run(here, AT_A_LINE.format(line=line, what=what, steps=ROUND))
        if ended == 0:  # the step has no more lines
            break
        assert ended == code, err
        steps, damaged = steps_in(only(boxes(here)))
        recording = read(only(boxes(here)))
        assert recording.status.state == "exception"
        dump = nobs.load(recording.status.dump).history
        assert recording.history.steps.tolist() == dump.steps.tolist() == history_of(ROUND + 1)
        assert damaged == 0
        total += Counter(lines=1, records_compared=len(steps))
    assert total["lines"] > 3
    assert line > 100
    counted(f"{'Ctrl-C' if code < 0 else 'SIGTERM and exit'} at each line of a step", **total)


TAPS = 4000
"""So many make a record of 130 kB, which takes a while to write."""


def wide_steps(box):
    """The steps of the records of a box of wide rows, each compared."""
    with OpenBox(box) as opened:
        records, damaged = opened.records()
    for record in records:
        row, made = record.row, wide_row(record.row.step, TAPS)
        assert record.number == row.step + 1
        assert row.values.tobytes() == made.values.tobytes()
        assert (row.time_s, row.scalars, row.batch) == (made.time_s, made.scalars, made.batch)
    return [record.row.step for record in records], damaged


@pytest.mark.parametrize("storage", ["mapped", "called"])
def test_sigkill_while_nothing_but_records_are_written(tmp_path, often, counted, storage):
    """GIVEN a process that does nothing but write records, THEN the one that was torn costs none of the last `capacity`."""
    program = f"write_rows(here, {TAPS}, 10**6)"
    if storage == "called":
        program = f"from nobs._blackbox import _storage; _storage.IN_PLACE = frozenset(); {program}"
    rng, total = random.Random(storage), Counter()
    for n in range(often(200, 6)):
        here = tmp_path / str(n)
        process = server().start(here, program)
        until((here / "run").exists if n % 3 == 0 else (here / "steps").exists)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(process, signal.SIGKILL)
        assert server().wait() == -signal.SIGKILL
        total += what_is_left(here, wide_steps) + Counter(kills=1)
    assert total["records_compared"] > 0
    assert total["torn"] > 0 or not often(True, False)  # a few kills may all miss
    counted(f"SIGKILL, nothing but {storage} records", **total)


def test_reading_while_another_process_writes(tmp_path, often, counted):
    """GIVEN a box that is written to as fast as can be, THEN its readers see records that are right, and all in order."""
    here, total = tmp_path / "here", Counter()
    process = server().start(here, f"write_rows(here, {TAPS}, 10**6)")
    until(lambda: returned(here) > 0)
    box = only(boxes(here))
    for _ in range(often(500, 40)):
        steps, _ = wide_steps(box)
        assert steps == sorted(set(steps))
        total += Counter(readings=1, records_compared=len(steps))
        with OpenBox(box) as opened:
            assert (opened.last_time_s() or 0) <= returned(here)
    with OpenBox(box) as opened:
        last = 0
        for _ in range(often(500, 40)):
            fresh = opened.since(last)
            numbers = [record.number for record in fresh]
            assert numbers == sorted(set(numbers))
            assert not fresh or numbers[0] > last
            for record in fresh:
                assert record.row.values.tobytes() == wide_row(record.row.step, TAPS).values.tobytes()
            last = numbers[-1] if numbers else last
            total += Counter(followed=len(fresh))
    os.kill(process, signal.SIGKILL)
    server().wait()
    assert total["followed"] > 0
    counted("reading while another writes", **total)


# -- deaths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("death", "code", "inside"),
    [
        ("ctypes.string_at(0)", -signal.SIGSEGV, True),
        ("os.abort()", -signal.SIGABRT, True),
        ("os._exit(1)", 1, True),
        ("os._exit(0)", 0, False),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, False),
    ],
)
def test_deaths_without_a_word(tmp_path, death, code, inside):
    """Neither Python nor nobs runs again: every step is in the black box, and the report says how it ended."""
    ran(
        tmp_path,
        f"""
        training = Training(here)
        {"with training.recorder: pass" if not inside else ""}
        {"training.recorder.__enter__()" if inside else ""}
        training.train({ROUND})
        {death}
        """,
        code,
    )
    assert steps_in(only(boxes(tmp_path))) == (ring_of(ROUND), 0)
    report = nobs.load(tmp_path / "run")
    assert (report.reason, report.failure) == ("killed", None)
    assert report.history.steps.tolist() == history_of(ROUND)
    assert report.failed


EXCEPTIONS = {
    "an allocation of petabytes": ("torch.empty(1 << 55)", "RuntimeError"),
    "no memory left": ("little_memory(64 << 20); torch.empty(1 << 28).fill_(1)", "RuntimeError"),
    "a MemoryError": ("bytearray(1 << 55)", "MemoryError"),
    "no CUDA memory": ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", "OutOfMemoryError"),
}


@pytest.mark.parametrize("what", EXCEPTIONS)
def test_out_of_memory_in_forward(tmp_path, what):
    """A dump and the black box tell the same: the steps, the half step that did not fit, and what was raised."""
    raising, kind = EXCEPTIONS[what]
    program = f"""
        training = Training(here)
        def too_much(module, args):
            {raising}
        with training.recorder:
            training.train({ROUND})
            training.model.conv2.register_forward_pre_hook(too_much)
            training.train(1)
        """
    err = ran(tmp_path, program, code=1)
    assert any(line.removeprefix("torch.").startswith(kind) for line in err.splitlines())
    box, dump = only(boxes(tmp_path)), only(dumps(tmp_path))
    steps, damaged = steps_in(box)
    assert (steps, damaged) == (ring_of(ROUND + 1)[:-1], 0)
    reports = nobs.load(box), nobs.load(dump)
    for report in reports:
        assert report.reason == "exception"
        assert report.exception.startswith(kind)
        assert report.history.steps.tolist() == history_of(ROUND + 1)
        assert report.history["conv1", "output", "norm"][-1] > 0
    assert reports[0].findings == reports[1].findings
    assert read(box).status.dump == str(dump)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_an_exception_in_the_data_loader(tmp_path, often, start):
    """A worker that raises ends the run with a dump; no worker writes anywhere, however it began."""
    if start == "spawn" and not often(True, False):
        pytest.skip("workers that import torch anew: --endure")
    program = f"""
        training = Training(here)
        with training.recorder:
            tempfile.tempdir = None  # sockets want short names
            options = dict(num_workers=2, multiprocessing_context="{start}", generator=torch.Generator())
            for i in torch.utils.data.DataLoader(Broken(30), **options):
                training.train(1)
        """
    err = ran(tmp_path, program, code=1)
    assert "OSError: planted" in err
    assert steps_in(only(boxes(tmp_path))) == (ring_of(30), 0)
    report = nobs.load(only(boxes(tmp_path)))
    assert report.reason == "exception"
    assert "planted" in report.exception
    assert report.history.steps.tolist() == nobs.load(only(dumps(tmp_path))).history.steps.tolist() == history_of(30)


def test_sigterm_with_a_handler_that_goes_on(tmp_path):
    """The dump is written, the run goes on, and its black box with it: at the end it says that it ended."""
    program = """
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        training = Training(here)
        with training.recorder:
            for _ in range(2):
                training.train(20)
                os.kill(os.getpid(), signal.SIGTERM)
                print(training.recorder._box._file.status.state)
            training.train(1)
            print(training.recorder._box._file.status.state)
        """
    ran(tmp_path, program)
    assert (tmp_path / "out").read_text().split() == ["sigterm"] * 2 + ["running"]
    assert steps_in(only(boxes(tmp_path))) == (ring_of(41), 0)
    assert nobs.load(only(boxes(tmp_path))).reason == "ended"
    assert [nobs.load(dump).reason for dump in dumps(tmp_path)] == ["sigterm"] * 2


@pytest.mark.parametrize(
    ("end", "code", "reason", "exception"),
    [
        ("pass", 0, "ended", None),
        ("sys.exit(3)", 3, "ended", None),
        ("1 / 0", 1, "exception", "ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "exception", "KeyboardInterrupt"),
    ],
)
def test_without_a_with_block(tmp_path, end, code, reason, exception):
    """The end of the interpreter is noted, and an exception that it printed."""
    ran(tmp_path, f"training = Training(here)\ntraining.train({ROUND})\n{end}", code)
    assert steps_in(only(boxes(tmp_path))) == (ring_of(ROUND), 0)
    report = nobs.load(tmp_path / "run")
    assert (report.reason, report.exception) == (reason, exception)
    assert dumps(tmp_path) == []


# -- disks --------------------------------------------------------------------------------------------------------------

FULL = """
    own_mounts()
    disk(here / "run", 1 << 20)
"""
OUT = """
    import shutil
    (here / "left").mkdir()
    for file in [file for file in (here / "run").rglob("*") if file.is_file() and file.name != "filling"]:
        shutil.copy2(file, here / "left" / ("-".join(file.parts[-2:])))
"""
"""What lies on the disk goes with the process: it is copied out."""


def test_a_disk_that_is_full_at_the_beginning(tmp_path):
    """The black box goes to the temporary folder, which stderr says, and nothing half is left on the disk."""
    err = ran(tmp_path, f"{FULL}\n    fill(here / 'run')\n    training = Training(here)\n    training.train({ROUND})\n{OUT}")
    assert list((tmp_path / "left").iterdir()) == []
    box = only(boxes(tmp_path / "tmp"))
    assert steps_in(box) == (ring_of(ROUND), 0)
    assert "could not make a black box" in err
    assert f"nobs writes its black box to {box}" in err
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(("reserves", "code"), [(True, 0), (False, -signal.SIGBUS)])
def test_a_disk_that_fills_up_while_training(tmp_path, reserves, code):
    """To the last byte: no step is lost. Where the space was not taken before, the same ends the process."""
    program = f"""{FULL}
    if not {reserves}:
        os.posix_fallocate = lambda descriptor, offset, size: os.truncate(descriptor, size)
    training = Training(here, capacity=CAPACITY)
    training.train(3)
    fill(here / "run")
    training.train({ROUND})
    {OUT}"""
    err = ran(tmp_path, program, code)
    if reserves:
        assert err == ""
        assert steps_in(only(boxes(tmp_path / "left"))) == (ring_of(ROUND + 3), 0)


def test_a_disk_that_is_full_when_the_run_fails(tmp_path, capsys):
    """The dump lands in the temporary folder; from the black box `nobs recover` makes the same report."""
    program = f"""{FULL}
    training = Training(here)
    try:
        with training.recorder:
            training.train({ROUND})
            fill(here / "run")
            training.train(1, loss=float("nan"))
    except nobs.TrainingFailure:
        pass
    {OUT}"""
    err = ran(tmp_path, program)
    assert "could not write a dump" in err
    box, dump = only(boxes(tmp_path / "left")), only(dumps(tmp_path / "tmp"))
    assert list((tmp_path / "left").iterdir()) == [box]  # and no half dump
    assert read(box).status.dump == str(dump)
    assert dump.with_suffix(".png").exists()
    assert cli.main(["recover", str(box), "--json"]) == 0
    recovered = json.loads(capsys.readouterr().out)
    dumped = json.loads(dump.read_text())
    assert dumped["failure"]["step"] == ROUND
    differ = {key for key in dumped if dumped[key] != recovered[key]}
    assert differ <= {"created"}


def test_a_folder_that_is_read_only(tmp_path):
    """As a full disk: the temporary folder takes the black box, and the dump."""
    program = """
    own_mounts()
    disk(here / "run", 1 << 20)
    read_only(here / "run")
    training = Training(here)
    with training.recorder:
        training.train(3)
        training.recorder.dump()
    """
    err = ran(tmp_path, program)
    assert "Read-only file system" in err
    assert steps_in(only(boxes(tmp_path / "tmp"))) == ([0, 1, 2], 0)
    assert len(dumps(tmp_path / "tmp")) == 1


def test_no_folder_at_all(tmp_path):
    """Nowhere to write: the run goes on, and stderr says it once."""
    program = """
    (here / "run").write_text("in the way")
    tempfile.tempdir = str(here / "run")
    training = Training(here)
    with training.recorder:
        training.train(30)
    """
    err = ran(tmp_path, program)
    assert returned(tmp_path) == 30
    assert boxes(tmp_path) == []
    assert err.count("goes on without a black box") == 1
    assert len(err.splitlines()) == 3


def test_a_limit_on_file_sizes(tmp_path):
    """`ulimit -f`: no black box, no signal, and the run unaffected."""
    program = """
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    training = Training(here)
    training.train(30)
    """
    err = ran(tmp_path, program)
    assert returned(tmp_path) == 30
    assert boxes(tmp_path) == []
    assert "File too large" in err


# -- folders and files that change under the run ------------------------------------------------------------------------


def test_a_folder_that_is_removed(tmp_path):
    """Again and again: the black box is made anew each time with all its records."""
    program = f"""
    import shutil
    training = Training(here)
    with training.recorder:
        for _ in range(3):
            training.train({ROUND})
            shutil.rmtree(here / "run")
        training.train(2)
    """
    err = ran(tmp_path, program)
    assert steps_in(only(boxes(tmp_path))) == (ring_of(3 * ROUND + 2), 0)
    assert nobs.load(tmp_path / "run").reason == "ended"
    assert "found its black box deleted" in err
    assert len(err.splitlines()) == 2  # each is said once


def test_a_folder_that_is_removed_and_cannot_be_made_again(tmp_path):
    """All records go to the temporary folder."""
    program = f"""
    import shutil
    training = Training(here)
    training.train({ROUND})
    shutil.rmtree(here / "run")
    (here / "run").write_text("in the way")
    training.train(2)
    """
    ran(tmp_path, program)
    assert steps_in(only(boxes(tmp_path / "tmp"))) == (ring_of(ROUND + 2), 0)


def test_a_folder_that_is_renamed(tmp_path):
    """The black box goes along, and goes on."""
    program = f"""
    training = Training(here)
    training.train({ROUND})
    (here / "run").rename(here / "elsewhere")
    training.train({ROUND})
    """
    assert ran(tmp_path, program) == ""
    assert steps_in(only(boxes(tmp_path / "elsewhere"))) == (ring_of(2 * ROUND), 0)


@pytest.mark.parametrize("size", [0, 1, 4096, 40000, -1])
def test_a_file_that_somebody_cuts(tmp_path, size):
    """A store behind its end would kill the process: the run goes on in a new file, and what was cut is still readable."""
    program = f"""
    training = Training(here)
    training.train({ROUND})
    os.truncate(training.box, {size} if {size} >= 0 else training.box.stat().st_size - 1)
    training.train(5)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    err = ran(tmp_path, program, -signal.SIGKILL)
    assert "found its black box cut" in err
    fresh, cut = boxes(tmp_path)
    assert steps_in(fresh) == (list(range(ROUND, ROUND + 5)), 0)
    assert nobs.load(tmp_path / "run").history.steps.tolist() == list(range(ROUND, ROUND + 5))
    if size < 4096 and size != -1:  # not all of the header
        with pytest.raises(nobs.NobsError):
            nobs.load(cut)
    else:
        steps, damaged = steps_in(cut)
        assert damaged > 0
        assert set(steps) < set(ring_of(ROUND))


# -- others ---------------------------------------------------------------------------------------------------------------


def test_a_plot_that_fails(tmp_path):
    """The dump is there, and the black box knows where."""
    program = f"""
    sys.modules["nobs.render.figure"] = None
    training = Training(here, on_failure="stop")
    with training.recorder:
        training.train({ROUND})
        training.train(1, loss=float("nan"))
    """
    assert "could not draw" in ran(tmp_path, program)
    status = read(only(boxes(tmp_path))).status
    assert (status.state, status.failures[0].step, status.dump) == ("failed", ROUND, str(only(dumps(tmp_path))))


def test_two_recorders_in_one_process(tmp_path):
    """Each has a file of its own, also where their runs have one name."""
    program = """
    os.environ["TORCHELASTIC_RUN_ID"] = "one"
    one, other = Training(here), Training(here)
    for steps in (3, 20, 7):
        torch.manual_seed(steps)
        one.train(steps)
        torch.manual_seed(steps)
        other.train(steps)
    (here / "one").write_bytes(pickle.dumps(one.recorder.history()))
    print(one.box, other.box)
    """
    ran(tmp_path, program)
    one, other = map(read, boxes(tmp_path))
    assert (tmp_path / "out").read_text().split() == [str(tmp_path / "run/one" / name) for name in NAMES]
    assert one.history.values.tobytes() == other.history.values.tobytes()
    assert one.history.steps.tolist() == history_of(30)


NAMES = ("rank00000.blackbox", "rank00000-2.blackbox")


def test_two_processes_and_a_restart(tmp_path):
    """GIVEN a launcher whose name for the run stays, THEN no attempt writes over another's black box."""
    program = """
    os.environ["TORCHELASTIC_RUN_ID"] = "one"
    attempt = os.fork()
    training = Training(here)
    training.train(21 if attempt else 18)
    if attempt:
        os.waitpid(attempt, 0)
    os._exit(0)
    """
    ran(tmp_path, program)
    ran(tmp_path, program)
    assert len(boxes(tmp_path)) == 4
    assert sorted(steps_in(box)[0][-1] for box in boxes(tmp_path)) == [17, 17, 20, 20]
    assert all(steps_in(box)[1] == 0 for box in boxes(tmp_path))


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "1 / 0", "ctypes.string_at(0)"])
def test_a_fork_that_calls_step(tmp_path, end):
    """The records are the parent's alone, and how the child ends is not how the run does."""
    program = f"""
    training = Training(here)
    with training.recorder:
        training.train({ROUND})
        child = os.fork()
        if child == 0:
            training.train(4)
            {end}
        os.waitpid(child, 0)
        assert training.recorder._box._file.status.state == "running"
        training.train(3)
    """
    ran(tmp_path, program)
    box = only(boxes(tmp_path))
    assert steps_in(box) == (ring_of(ROUND + 3), 0)
    assert nobs.load(box).reason == "ended"
    assert dumps(tmp_path) == []


def test_durable(tmp_path):
    """Every byte that is written is then waited for, and the file is the same."""
    program = f"""
    from nobs._blackbox import _writer
    dirty = []
    def watched(kind):
        class Watched(kind):
            def put(self, offset, content):
                super().put(offset, content)
                dirty.append((offset, offset + len(content)))
            def sync(self, offset, size):
                super().sync(offset, size)
                dirty[:] = [(begin, end) for begin, end in dirty if begin < offset or end > offset + size]
        return Watched
    storage_for = _writer.storage_for
    def watched_storage(*args):
        storage = storage_for(*args)
        storage.__class__ = watched(type(storage))
        return storage
    _writer.storage_for = watched_storage
    training = Training(here, durable=True)
    for _ in range({ROUND}):
        training.train(1)
        assert training.box and not dirty, dirty
    training.recorder._box.tell(state="ended")
    assert not dirty, dirty
    """
    ran(tmp_path, program)
    assert steps_in(only(boxes(tmp_path))) == (ring_of(ROUND), 0)


def test_a_long_run_costs_no_more_than_a_short_one(tmp_path, often, counted):
    """Memory, file size and descriptors are at the end what they were after the first thousand steps."""
    steps = often(100_000, 1000)
    program = f"""
    torch.manual_seed(0)
    model = nobs.instrument(nn.Linear(2, 2))
    recorder = nobs.Recorder(model, directory=here / "run", capacity=100)
    def now():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), recorder._box.path.stat().st_size, len(os.listdir("/proc/self/fd"))
    x, sizes = torch.ones(1, 2), []
    for step in range({steps}):
        loss = model(x).square().sum()
        loss.backward()
        model.zero_grad()
        recorder.step(loss, batch=step)
        if step + 1 in ({steps} // 2 if {steps} < 10_000 else 5000, {steps}):
            sizes.append(now())
    (here / "sizes").write_text(json.dumps(sizes))
    """
    ran(tmp_path, program, longest_s=1200)
    (rss, size, descriptors), (rss_end, size_end, descriptors_end) = json.loads((tmp_path / "sizes").read_text())
    assert (size, descriptors) == (size_end, descriptors_end)
    assert rss_end - rss < 4 << 20
    assert read(only(boxes(tmp_path))).history.steps.tolist() == list(range(steps - 100, steps))
    counted("a long run", steps=steps, kB_more_memory=(rss_end - rss) >> 10, bytes_more_file=size_end - size)


def test_black_boxes_open_without_torch(tmp_path):
    """By another process, which has no torch: load, show and recover."""
    ran(tmp_path, f"training = Training(here)\ntraining.train({ROUND})\nos._exit(1)", 1)
    program = """if True:
        import sys
        sys.modules["torch"] = None
        import nobs
        from nobs import cli
        report = nobs.load(sys.argv[1])
        print(report.reason, len(report.history), cli.main(["recover", sys.argv[1], "--json"]) or "fine", file=sys.stderr)
    """
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == f"killed {CAPACITY} fine\n"
    assert json.loads(done.stdout)["steps"] == history_of(ROUND)
