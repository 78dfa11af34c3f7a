"""Trainings that die. A server imports torch once and forks itself for each; what they leave is compared bit for bit.

A program is a text that runs in the fork, with the names of this module and these:

    here        its own folder: `out`, `err`, and a file `steps` with 8 bytes for each step whose `recorder.step` has returned
    Training    a training of `STEPS` steps at most whose numbers are the same in every process

Run as a script this is the server: a program a line on stdin, answered by its process number, and then by how it ended.
"""

import atexit
import ctypes  # noqa: F401  # for programs
import functools
import gc
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from disks import disk, fill, little_memory, own_mounts, read_only  # noqa: F401  # for programs
from nets import Images, loss_of
from torch import nn

import nobs
from nobs._blackbox import BlackBox, Header, OpenBox, this_process
from nobs._columns import OUTPUT
from nobs._history import Row
from nobs._table import Tap, TapTable

CAPACITY = 16
STEPS = {"small": 250, "tall": 24}


class Tall(nn.Module):
    """So many layers that a record is some 20 kB long."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(100))

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.05 * layer(x)
        return x

    @staticmethod
    def batch():
        return torch.randn(4, 4), torch.randint(0, 4, (4,))


class Training:
    """The same rows in every process: what one leaves can be compared with what another had in memory."""

    def __init__(self, here, model="small", **options):
        torch.manual_seed(0)
        self.model = nobs.instrument({"small": Images, "tall": Tall}[model]())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        options = {"directory": here / "run", "capacity": CAPACITY, **options}
        self.recorder = nobs.Recorder(self.model, optimizer=self.optimizer, **options)
        self.steps = 0
        self._returned = os.open(here / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def train(self, steps, loss=None):
        """Some steps; with a loss in place of the real one."""
        for _ in range(steps):
            real = loss_of(self.model, self.model.batch())
            real.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            named = torch.arange(4) + self.steps
            self.recorder.step(real if loss is None else loss, batch=named, progress=self.steps / 7)
            os.write(self._returned, struct.pack("<q", self.steps))
            self.steps += 1

    def train_on(self, model="small"):
        """All steps that anybody knows the numbers of, and then nothing until the end comes."""
        with self.recorder:
            self.train(STEPS[model])
            while True:
                signal.pause()

    @property
    def box(self):
        """Where the black box is."""
        return self.recorder._box.path


@functools.cache
def wide(taps):
    """A model of so many outputs, and the numbers of its step 0."""
    table = TapTable(tuple(Tap(f"layer{i}", "Linear", OUTPUT, OUTPUT) for i in range(taps)))
    return table, np.arange(taps * 8, dtype=np.float32).reshape(taps, 8)


def wide_row(step, taps):
    """A row that is made quickly, and differs from that of any other step everywhere."""
    table, values = wide(taps)
    return Row(step, float(step), {"loss": step / 3}, table, values + np.float32(step), f"batch {step}")


def write_rows(here, taps, steps, durable=False):
    """Nothing but writing: a black box of wide rows, and how many were written."""
    header = Header("0", "", 0, 1, {}, CAPACITY, wide(taps)[0], (), this_process())
    box = BlackBox([here / "run"], lambda: header, durable)
    written = os.open(here / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in range(steps):
        box.write(wide_row(step, taps))
        os.write(written, struct.pack("<q", step))


class Broken(torch.utils.data.Dataset):
    """Numbers, and at one place an exception instead."""

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == self.broken:
            raise OSError("planted")
        return i


# -- in the test: the server --------------------------------------------------------------------------------------------


class Server:
    """Starts programs, one at a time."""

    def __init__(self):
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        command = [sys.executable, "-W", "ignore", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=surroundings)
        self._running = None
        atexit.register(self.close)

    def close(self):
        """End the server."""
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def start(self, here, program, longest_s=120):
        """Start a program; its process number. It is killed when it takes longer."""
        if self._running is not None:  # of a test that failed
            os.kill(self._running, signal.SIGKILL)
            self.wait()
        here.mkdir(exist_ok=True)
        order = {"here": str(here), "program": program, "longest_s": longest_s}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        self._running = int(self._process.stdout.readline())
        return self._running

    def wait(self):
        """How the program ended: its exit code, or the number of the signal, negative."""
        self._running = None
        return int(self._process.stdout.readline())

    def run(self, here, program, longest_s=120):
        """Start a program and wait: how it ended, and what it wrote to stderr."""
        self.start(here, program, longest_s)
        return self.wait(), (here / "err").read_text()


server = functools.cache(Server)


@functools.cache
def expected(model="small"):
    """The rows of a training, as they were in the memory of one that nobody killed."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        program = f"""
training = Training(here, {model!r}, capacity=STEPS[{model!r}], blackbox=False)
training.train(STEPS[{model!r}])
(here / "history").write_bytes(pickle.dumps(training.recorder.history()))
"""
        code, err = server().run(here, program)
        assert code == 0, err
        return pickle.loads((here / "history").read_bytes())


def returned(here):
    """How many steps the training had made."""
    return (here / "steps").stat().st_size // 8 if (here / "steps").exists() else 0


def boxes(here):
    """The black boxes that it left, wherever."""
    return sorted(here.rglob("*.blackbox"))


def until(holds, longest_s=60):
    """Wait for something to hold."""
    end_s = time.monotonic() + longest_s
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.0005)


def steps_in(box, model="small"):
    """The steps of all records, and how many places are damaged, after each record was compared with what it should be.

    A step that an exception ended has no loss, and nobody knows its numbers.
    """
    history = expected(model)
    with OpenBox(box) as opened:
        records, damaged = opened.records()
    if records and "loss" not in records[-1].row.scalars:
        records.pop()
    for record in records:
        row, step = record.row, record.row.step
        assert row.values.tobytes() == history.values[step].tobytes()
        given = {name: history.scalars[name][step] for name in history.scalars if history.given[name][step]}
        assert bits(row.scalars) == bits(given)
        assert row.batch == history.batches[step]
        assert record.left_out == 0
    times_s = [record.row.time_s for record in records]
    assert times_s == sorted(times_s)
    return [record.row.step for record in records], damaged


def bits(scalars):
    """Scalars so that a NaN equals itself, and zero not its negative."""
    return {name: struct.pack("<d", value) for name, value in scalars.items()}


# -- the server ---------------------------------------------------------------------------------------------------------


def _next_program():
    """Fork for each line; in the fork, what to run; None at the end."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            return json.loads(line)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return None


def _prepare(here, longest_s):
    """A folder and an end of its own."""
    signal.alarm(longest_s)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(here)
    for descriptor, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        os.dup2(os.open(name, flags | (os.O_CREAT if descriptor else 0)), descriptor)
    (here / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(here / "tmp")


if __name__ == "__main__":
    import nobs.render.figure
    import nobs.render.terminal  # once, and not in each fork

    torch.set_num_threads(1)
    nobs.Recorder, nobs.instrument  # noqa: B018  # which loads them
    gc.freeze()
    if (order := _next_program()) is not None:  # what follows runs to the interpreter's own end
        here = Path(order["here"])
        _prepare(here, order["longest_s"])
        exec(compile(textwrap.dedent(order["program"]), "program", "exec"), globals())
