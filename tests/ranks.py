"""What torchrun runs for test_ranks.py: scenes in which ranks fail, one after the other in one launch, or one that kills.

    torchrun --nproc-per-node 2 tests/ranks.py FOLDER SCENE...

Each rank writes what became of it to FOLDER/SCENE-RANK.json, and nobs writes to FOLDER/SCENE.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import nobs
import nobs._launch

FAILS_AT, STEPS = 12, 30


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class Loop:
    """A training of several ranks; what each scene does to it stands in the scenes. `last` is the one that was made last."""

    last = None

    def __init__(self, directory, reduced=True, recorded=True, **settings):
        torch.manual_seed(0)
        self.rank = dist.get_rank()
        model = nobs.instrument(Net())
        self.model = DistributedDataParallel(model) if reduced else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.recorder = nobs.Recorder(self.model, optimizer=self.optimizer, directory=directory, **settings) if recorded else None
        self.done = 0
        Loop.last = self

    def batch(self, step):
        torch.manual_seed(step * 100 + self.rank)
        return torch.randn(4, 8), torch.randint(4, (4,))

    def step(self, step, batch=None, loss_scale=1.0):
        x, y = batch or self.batch(step)
        loss = nn.functional.cross_entropy(self.model(x), y) * loss_scale
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        if self.recorder is not None:
            self.recorder.step(loss, batch=f"batch {step} of rank {self.rank}")


def nan_input(directory):
    """The last rank is given a NaN; through the reduction all have it."""
    loop = Loop(directory)
    with loop.recorder:
        for step in range(STEPS):
            x, y = loop.batch(step)
            if step == FAILS_AT and loop.rank == dist.get_world_size() - 1:
                x[0, 0] = float("nan")
            loop.step(step, (x, y))


def seen_by_one(directory):
    """Only the last rank's own trigger sees anything: nothing of it is reduced. The ranks run at different speeds."""
    loop = Loop(directory, reduced=False)
    with loop.recorder:
        for step in range(1000):
            last = loop.rank == dist.get_world_size() - 1
            time.sleep(0.02 if last else 0.01)
            loop.step(step, loss_scale=float("inf") if last and step == FAILS_AT else 1.0)


def warned(directory):
    """The same where nobody is to stop."""
    loop = Loop(directory, on_failure="warn")
    last = loop.rank == dist.get_world_size() - 1
    with loop.recorder:
        for step in range(STEPS):
            loop.step(step, loss_scale=float("inf") if last and step == FAILS_AT else 1.0)
            if step == FAILS_AT:
                time.sleep(1.5)  # the others hear of it within a second


def hangs(directory):
    """Rank 1 leaves its loop by an exception, and rank 0 waits for it in a collective: it dumps all the same."""
    loop = Loop(directory, reduced=False)
    try:
        with loop.recorder:
            for step in range(STEPS):
                if step == FAILS_AT and loop.rank == 1:
                    raise ZeroDivisionError("a bug of the user's")
                if step == FAILS_AT:
                    dist.all_reduce(torch.ones(1))  # nobody answers, until rank 1 has seen the dump
                loop.step(step)
    finally:
        if loop.rank == 1:
            end = time.monotonic() + 20
            while not list(directory.rglob("step*/rank00000.json")) and time.monotonic() < end:
                time.sleep(0.1)
            seen = len(list(directory.rglob("step*/rank00000.json")))
            directory.with_suffix(".seen").write_text(str(seen))
            dist.all_reduce(torch.ones(1))


def ends_early(directory):
    """Rank 1 has fewer batches, and is gone when rank 0 fails, which waits for nobody."""
    loop = Loop(directory, reduced=False)
    with loop.recorder:
        for step in range(5 if loop.rank else STEPS):
            loop.step(step, loss_scale=float("inf") if step == FAILS_AT else 1.0)
            time.sleep(0.05)


def far_apart(directory):
    """Ranks that share no collectives, further apart than the ring is long: nobody waits for the other's steps."""
    loop = Loop(directory, reduced=False, capacity=10)
    with loop.recorder:
        for step in range(2000):
            time.sleep(0.05 if loop.rank else 0.002)
            loop.step(step, loss_scale=float("inf") if loop.rank and step == FAILS_AT else 1.0)


class NoCollective(TorchDispatchMode):
    """Refuses what goes to the process group."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace not in ("c10d", "_c10d_functional"), func
        return func(*args, **(kwargs or {}))


def healthy(directory):
    """Nothing fails, nobody says or writes anything but a black box, and no step of the recorder calls a collective."""
    loop = Loop(directory)
    plain = loop.recorder.step

    def step_alone(*args, **kwargs):
        with NoCollective():
            plain(*args, **kwargs)

    loop.recorder.step = step_alone
    with loop.recorder:
        for step in range(STEPS):
            loop.step(step)


def never_starts(directory):
    """The last rank is there, and has no recorder."""
    loop = Loop(directory, reduced=False, recorded=dist.get_rank() < dist.get_world_size() - 1)
    with loop.recorder or contextlib.nullcontext():
        for step in range(STEPS):
            loop.step(step, loss_scale=float("inf") if step == FAILS_AT and loop.rank == 0 else 1.0)


def raises(directory):
    """An exception ends rank 1's process, and the launcher then the others."""
    loop = Loop(directory)
    with loop.recorder:
        for step in range(STEPS):
            if step == FAILS_AT and loop.rank == 1:
                raise ZeroDivisionError("a bug of the user's")
            loop.step(step)


def killed(directory):
    """SIGKILL takes rank 1 in the middle of a step."""
    loop = Loop(directory)
    with loop.recorder:
        for step in range(STEPS):
            if step == FAILS_AT and loop.rank == 1:
                loop.model(loop.batch(step)[0])
                os.kill(os.getpid(), signal.SIGKILL)
            loop.step(step)


def named(directory):
    """No run id of the launcher, and clocks that differ."""
    loop = Loop(directory, reduced=False, recorded=False)
    clock = mock.patch.object(nobs._launch.time, "gmtime", return_value=time.gmtime(3600 * loop.rank))
    with mock.patch.dict(os.environ, {"TORCHELASTIC_RUN_ID": "none"}), clock:
        loop.recorder = nobs.Recorder(loop.model, directory=directory)
    with loop.recorder:
        loop.step(0)


SCENES = (nan_input, seen_by_one, warned, hangs, ends_early, far_apart, healthy, named, never_starts, raises, killed)
LETHAL = (raises, killed)


def play(scene, folder):
    """One scene; what became of this rank."""
    said, begun, outcome = io.StringIO(), time.monotonic(), {}
    try:
        with contextlib.redirect_stderr(said):
            scene(folder / scene.__name__)
    except Exception as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
        if scene in LETHAL:
            raise
    finally:
        recorder = Loop.last.recorder
        report = None if recorder is None or recorder.report is None else recorder.report.summary()
        outcome |= {"steps": Loop.last.done, "seconds": time.monotonic() - begun, "stderr": said.getvalue(), "report": report}
        (folder / f"{scene.__name__}-{dist.get_rank()}.json").write_text(json.dumps(outcome))


def main(folder, names):
    dist.init_process_group("gloo")
    for scene in SCENES:
        if scene.__name__ in names:
            play(scene, folder)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
